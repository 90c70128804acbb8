"""Accounts of the long runs: every request is in the log once, as its client saw it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accounting import GatewayLog, Logged, account, read_metrics
from benchmarks.clients import ClientRecord, Seen

OK = Logged("ok", 200, None, None, "streaming", "vllm", "vllm", 1.0, 1)
CANCELLED = OK._replace(outcome="cancelled", status=499)
TIMEOUT = OK._replace(outcome="timeout", status=504, code="upstream_timeout")


def record(seen: Seen, status: int = 200, code: str | None = None, note: str = "", name: str = "a") -> ClientRecord:
    return ClientRecord(name, "stream", seen, 0.0, 1.0, status, code, "vllm", note)


@pytest.mark.parametrize(
    ("saw", "line"),
    [
        (record("ok"), OK),
        (record("error", 504, "upstream_timeout"), TIMEOUT),
        (record("cut", 200, "upstream_timeout"), TIMEOUT),
        (record("left"), CANCELLED),
        (record("left"), OK),
    ],
)
def test_request_is_accounted_for_by_a_line_that_says_what_the_client_saw(saw: ClientRecord, line: Logged) -> None:
    found = account([saw], {"a": [line]}, {line.outcome: 1})
    assert found.problems == []
    assert found.outcomes == {line.outcome: 1}


@pytest.mark.parametrize(
    ("saw", "lines"),
    [
        (record("ok"), []),
        (record("ok"), [OK, OK]),
        (record("ok"), [CANCELLED]),
        (record("ok"), [OK._replace(backend="ollama")]),
        (record("error", 502, "upstream_error"), [TIMEOUT]),
        (record("error", 504, "upstream_error"), [TIMEOUT]),
        (record("cut", 200, "upstream_error"), [TIMEOUT]),
        (record("cut", 200, "upstream_timeout"), [OK]),
        (record("left", note="waiting"), []),
        (record("lost"), [OK]),
        (record("wrong"), [OK]),
        (record("hung"), [TIMEOUT]),
    ],
)
def test_request_without_such_a_line_is_a_problem(saw: ClientRecord, lines: list[Logged]) -> None:
    counted = Counter(line.outcome for line in lines)
    found = account([saw], {"a": lines} if lines else {}, counted)
    assert len(found.problems) == 1


def test_client_that_left_while_uploading_may_never_have_been_read() -> None:
    found = account([record("left", note="uploading")], {}, {})
    assert (found.problems, found.unread) == ([], 1)


def test_line_that_no_client_asked_for_is_a_problem() -> None:
    assert account([], {"b": [OK]}, {"ok": 1}).problems == ["b: in the log, but no client sent it"]


@pytest.mark.parametrize("counted", [{}, {"ok": 2}, {"ok": 1, "timeout": 1}])
def test_metrics_count_what_the_log_has(counted: dict[str, int]) -> None:
    assert len(account([record("ok")], {"a": [OK]}, counted).problems) == 1


def exchange_line(**fields: Any) -> str:
    line = {"time": "…", "level": "info", "event": "exchange", "request_id": "a", **OK._asdict(), **fields}
    return json.dumps(line) + "\n"


def test_log_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    text = exchange_line()
    path.write_text(text + text[:20])
    log = GatewayLog(path)
    log.read()
    assert log.exchanges == {"a": [OK]}
    path.write_text(text + exchange_line(request_id="b", outcome="cancelled", status=499))
    log.read()
    assert log.exchanges == {"a": [OK], "b": [CANCELLED]}


def test_errors_and_exceptions_in_the_log_are_crashes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [
        {"level": "error", "event": "a relay failed"},
        {"level": "warning", "event": "odd", "exception": "KeyError", "at": ["f:1"]},
        {"level": "warning", "event": "backend vllm: not reachable"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "Traceback\n")
    log = GatewayLog(path)
    log.read()
    assert log.crashes == {"a relay failed": 1, "odd [KeyError at f:1]": 1, "not JSON: b'Traceback\\n'": 1}


def test_metrics_are_summed_over_tiers_backends_and_lanes() -> None:
    text = """# TYPE gateway_requests counter
gateway_requests_total{tier="a",outcome="ok"} 2.0
gateway_requests_total{tier="b",outcome="ok"} 3.0
gateway_requests_total{tier="b",outcome="timeout"} 1.0
# TYPE gateway_requests_running gauge
gateway_requests_running{backend="vllm",lane="text"} 1.0
gateway_requests_running{backend="vllm",lane="vision"} 2.0
# TYPE gateway_requests_waiting gauge
gateway_requests_waiting{backend="vllm",lane="text"} 4.0
"""
    sample = read_metrics(text)
    assert sample.outcomes == {"ok": 5, "timeout": 1}
    assert (sample.running, sample.waiting) == (3, 4)
