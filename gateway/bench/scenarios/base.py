"""Parts that all scenarios share: their description, warm-up, and the assembly of a result."""

import datetime as dt
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.bench.options import BenchOptions
from gateway.bench.results import Cell, CellValue, Column, RequestRecord, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.target import BenchRequest

RunScenario = Callable[[BenchOptions, Runner], Awaitable[ScenarioResult]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario.

    Attributes:
        options: the options that have a meaning for it, besides those of all scenarios.
        figures: a regular expression that matches the names of its own figures.
    """

    name: str
    run: RunScenario
    options: frozenset[str]
    figures: str = ""


class Unanswered(Exception):
    """The warm-up failed: there is nothing to measure. `error` is the kind of failure."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


async def warm_up(options: BenchOptions, runner: Runner, requests: Sequence[BenchRequest]) -> None:
    """Send the requests `num_warmups` times unmeasured, so that models are loaded and kernels compiled.

    Raises:
        Unanswered: the last answer was a failure.
    """
    for request in requests:
        records = await runner.warm_up(request, options.num_warmups)
        if records and records[-1].error and not runner.stop.is_set():
            raise Unanswered(records[-1].error)


async def at_once(runner: Runner, label: str, requests: Sequence[BenchRequest], options: BenchOptions) -> RunResult:
    """Send all requests at the same time."""
    return await runner.run(RunPlan(label, requests, max_concurrency=len(requests), goodput=options.goodput))


async def in_turn(runner: Runner, label: str, requests: Sequence[BenchRequest], options: BenchOptions) -> RunResult:
    """Send the requests one after the other."""
    return await runner.run(RunPlan(label, requests, max_concurrency=1, goodput=options.goodput))


def assemble(
    scenario: str,
    options: BenchOptions,
    runs: Sequence[RunResult],
    headline: str,
    workload: Mapping[str, CellValue],
    **parts: object,
) -> ScenarioResult:
    """Return the result of a scenario that took place just now."""
    target = options.target
    result = ScenarioResult(
        scenario=scenario,
        date=dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
        target=target.name,
        url=target.url,
        api=target.api,
        endpoint=target.path,
        model=", ".join(options.models) or target.model,
        workload={"scenario": scenario, **workload},
        runs=tuple(runs),
        headline=headline,
        metadata=options.metadata,
    )
    return replace(result, **parts)  # type: ignore[arg-type]  # the names and types of ScenarioResult's fields


def ratio(above: float | None, below: float | None) -> float | None:
    """Return the quotient; None where there is none."""
    return None if above is None or not below else above / below


def time_of(record: RequestRecord) -> float:
    """Return the seconds from sending to the end of the response, as `time curl` shows them."""
    return record.end - record.start


REQUEST_COLUMNS = (
    Column("request"),
    Column("time", "s", lower_is_better=True),
    Column("ttft", "s", lower_is_better=True),
    Column("gateway_queue", "s", lower_is_better=True),
    Column("tokens", "n"),
    Column("speed", "tok/s", lower_is_better=False),
    Column("outcome", "key"),
)


def request_rows(run: RunResult) -> tuple[tuple[Cell, ...], ...]:
    """Return a row for each request of a run, in the order of their ends."""
    return tuple(
        (
            Cell(record.name or str(record.index + 1)),
            Cell(time_of(record)),
            Cell(record.ttft),
            Cell(None if record.queue_ms is None else record.queue_ms / 1000),
            Cell(record.completion_tokens),
            Cell(record.tokens_per_second if record.is_ok else None),
            Cell(record.error or "ok"),
        )
        for record in sorted(run.ended, key=lambda record: record.end)
    )


def is_whole(run: RunResult) -> bool:
    """Return whether every request of the run was answered."""
    return not run.errors and not run.interrupted


def total_cell(run: RunResult) -> Cell:
    """Return the time of all requests together, marked where some were not answered."""
    return Cell(run.duration, note="" if is_whole(run) else "until_last_failure")


def failures_cell(run: RunResult) -> Cell:
    """Return the number of failures with their kinds, such as `3 (timeout)`; 0 if there were none."""
    failed = len(run.ended) - len(run.good)
    return Cell(f"{failed} ({', '.join(run.errors)})" if failed else "0")


def forecast_column(options: BenchOptions, columns: Sequence[Column]) -> tuple[Column, ...]:
    """Return the columns, with one more where the options have forecasts."""
    return (*columns, Column("forecast")) if options.forecasts else tuple(columns)


def forecast_cells(options: BenchOptions, row: str) -> tuple[Cell, ...]:
    """Return the cell for `forecast_column` in the row with this key."""
    return (Cell(options.forecasts.get(row), "forecast"),) if options.forecasts else ()


def verdict_of(key: str, rule: str, **figures: CellValue) -> Verdict:
    """Return a verdict; see `Verdict`."""
    return Verdict(key, rule, figures)


def table(key: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Table:
    """Return a table."""
    return Table(key, tuple(columns), tuple(map(tuple, rows)))
