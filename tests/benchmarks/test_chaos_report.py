"""The table of the chaos run: which fault a request belongs to, and what is counted."""

from benchmarks.accounting import Logged
from benchmarks.chaos_report import NO_FAULT, Fault, Row, rows, table
from benchmarks.clients import ClientRecord, Seen

FAULTS = [Fault("kill", 10.0, 20.0), Fault("stop", 30.0, 35.0, is_recovered=False), Fault("kill", 40.0, 55.0)]


def record(
    name: str,
    sent: float,
    seconds: float,
    seen: Seen = "ok",
    backend: str = "vllm",
    status: int = 200,
    code: str | None = None,
) -> ClientRecord:
    return ClientRecord(name, "stream alone", seen, sent, seconds, status, code, backend)


def by_kind(records: list[ClientRecord], exchanges: dict[str, list[Logged]] | None = None) -> dict[str, Row]:
    return {row.kind: row for row in rows(records, FAULTS, exchanges or {})}


def test_request_belongs_to_the_fault_during_which_it_ended_or_else_to_the_first() -> None:
    found = by_kind(
        [
            record("before", 8.0, 1.0),
            record("into", 9.0, 2.0),
            record("within", 12.0, 1.0),
            record("into the next", 19.0, 13.0),
            record("between", 21.0, 5.0),
            record("second", 31.0, 1.0),
            record("again", 54.0, 9.0),
        ]
    )
    assert {kind: row.requests for kind, row in found.items()} == {"kill": 3, "stop": 2, NO_FAULT: 2}
    assert (found["kill"].faults, found["kill"].longest, found["kill"].longest_recovery) == (2, 9.0, 15.0)
    assert (found["stop"].unrecovered, found["kill"].unrecovered) == (1, 0)


def test_row_counts_what_clients_saw_with_the_reason_of_the_log() -> None:
    line = Logged("upstream_error", 502, "upstream_error", "reset", "waiting", "vllm", "vllm", 1.0, 1)
    found = by_kind(
        [
            record("a", 11.0, 1.0),
            record("b", 11.0, 1.0, backend="ollama"),
            record("c", 11.0, 1.0, "error", status=502, code="upstream_error"),
            record("d", 11.0, 1.0, "cut", code="upstream_error"),
            record("e", 11.0, 1.0, "left"),
            record("f", 11.0, 1.0, "lost"),
            record("g", 11.0, 1.0, "hung"),
            record("h", 11.0, 1.0, "wrong"),
        ],
        {"c": [line], "d": [line]},
    )["kill"]
    assert (found.served, found.by_fallback, found.left, found.bad) == (1, 1, 1, 3)
    assert found.errors == {"alone 502 upstream_error (reset)": 1}
    assert found.cuts == {"alone upstream_error (reset)": 1}
    text = table([found])
    assert "errors: alone 502 upstream_error (reset) 1" in text
