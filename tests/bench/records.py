"""Records and runs for tests."""

from collections.abc import Sequence

from gateway.bench.results import RequestRecord, RunResult


def record(
    index: int = 0,
    *,
    start: float = 100.0,
    ttft: float | None = 0.5,
    itl: Sequence[float] = (0.1, 0.1),
    arrival: float | None = None,
    prompt_tokens: int | None = 7,
    error: str = "",
    name: str = "",
) -> RequestRecord:
    """Return the record of an answer in which every piece is one token."""
    last = start + (ttft or 0.0) + sum(itl)
    return RequestRecord(
        index=index,
        arrival=start if arrival is None else arrival,
        start=start,
        last_token=last,
        end=last,
        ttft=ttft,
        itl=tuple(itl),
        prompt_tokens=prompt_tokens,
        completion_tokens=None if error else len(itl) + 1,
        status=0 if error else 200,
        error=error,
        name=name,
    )


def run(records: Sequence[RequestRecord], *, label: str = "", duration: float | None = None) -> RunResult:
    """Return a run with these records."""
    start = min(item.start for item in records)
    return RunResult(
        label=label,
        target="http://127.0.0.1:1",
        model="m",
        records=tuple(records),
        start=start,
        duration=max(item.end for item in records) - start if duration is None else duration,
        num_prompts=len(records),
    )
