"""Results of a made-up server, for tests of the advice."""

from collections.abc import Sequence
from dataclasses import replace

from gateway.bench.results import RunResult, ScenarioResult
from tests.bench.records import record, run


def level(at_once: int, *, slots: int = 4, rounds: int = 10, failed: int = 0) -> RunResult:
    """Return a level of a server that runs `slots` answers at once, in 1 s each, and queues the others."""
    records = []
    for number in range(at_once * rounds):
        turn, place = divmod(number, at_once)
        wait = float(place // slots)
        begin = turn * max(1.0, -(-at_once // slots))
        records.append(record(number, start=100.0 + begin, ttft=wait + 0.2, itl=[0.1] * 8))
    for number in range(failed):
        records[-1 - number] = record(number, error="http_503")
    return replace(run(records, label=str(at_once)), max_concurrency=at_once)


def result(
    levels: Sequence[int] = (1, 2, 4, 8), *, api: str = "openai", slots: int = 4, **figures: int
) -> ScenarioResult:
    runs = tuple(level(at_once, slots=slots) for at_once in levels)
    return ScenarioResult(
        scenario="users",
        date="20260101-000000",
        target="t",
        url="http://127.0.0.1:1",
        api=api,
        endpoint="/v1/chat/completions",
        model="m",
        workload={},
        runs=runs,
        headline="1",
        figures=figures,
    )
