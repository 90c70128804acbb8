"""`users`: how many people at once are served in real time, within an acceptable wait, and at most?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.bench.metrics import run_figures
from gateway.bench.options import BenchOptions
from gateway.bench.quantiles import quantile
from gateway.bench.results import Cell, CellValue, Column, RequestRecord, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.scenarios.base import (
    Scenario,
    assemble,
    failures_cell,
    forecast_cells,
    forecast_column,
    table,
    verdict_of,
    warm_up,
)
from gateway.bench.workload import Prompts, describe

OUTPUT_LEN = 100
TIMEOUT = 120.0
SHARE = 0.95
"""Share of a level's requests that have to be fast enough: all of them, if fewer than 20."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One of the three questions.

    Attributes:
        key: its row in the table and its key in `forecasts`.
        share: share of a level's requests that have to satisfy it.
    """

    key: str
    holds: Callable[[RequestRecord], bool]
    share: float = SHARE

    def is_met(self, run: RunResult) -> bool:
        """Return whether enough requests of a level satisfy it."""
        needed = math.ceil(self.share * len(run.ended) - 1e-9)
        return bool(run.ended) and sum(map(self.holds, run.ended)) >= needed


def criteria(options: BenchOptions) -> tuple[Criterion, ...]:
    """Return the questions with the thresholds of the options, the strictest first."""

    def is_realtime(record: RequestRecord) -> bool:
        first = record.latency if record.ttft is None else record.ttft
        is_fast = record.tpot is None or record.tpot <= 1 / options.realtime_speed
        return record.is_ok and first <= options.realtime_ttft and is_fast

    return (
        Criterion("realtime", is_realtime),
        Criterion("within_wait", lambda record: record.is_ok and record.end - record.start <= options.wait),
        Criterion("at_most", lambda record: record.is_ok, 1.0),
    )


class _Search:
    """Measures levels until each criterion has the largest level that meets it."""

    def __init__(self, options: BenchOptions, runner: Runner, prompts: Prompts) -> None:
        self._options = options
        self._runner = runner
        self._prompts = prompts
        self._next = 1
        self.runs: dict[int, RunResult] = {}
        self.interrupted: RunResult | None = None

    async def measure(self, users: int) -> RunResult | None:
        """Measure a level once; None if the scenario was stopped."""
        if users not in self.runs and not self._runner.stop.is_set():
            count = users * self._options.rounds
            requests = self._prompts.take(count, self._next)
            self._next += count
            plan = RunPlan(str(users), requests, max_concurrency=users, goodput=self._options.goodput)
            run = await self._runner.run(plan)
            if run.interrupted:
                self.interrupted = run
            else:
                self.runs[users] = run
        return self.runs.get(users)

    async def all(self) -> None:
        """Double the users until none of the criteria is met, then narrow each one down."""
        wanted = criteria(self._options)
        if self._options.levels:
            for users in sorted(set(self._options.levels)):
                await self.measure(users)
            return
        users = 1
        while (run := await self.measure(users)) is not None:
            if users == self._options.max_users or not any(criterion.is_met(run) for criterion in wanted):
                break
            users = min(users * 2, self._options.max_users)
        for criterion in wanted:
            await self._narrow(criterion)

    async def _narrow(self, criterion: Criterion) -> None:
        """Halve the gap between the largest level that meets a criterion and the next that does not."""
        while True:
            low = self.largest(criterion)
            high = min((users for users in self.runs if users > low), default=low)
            if high - low <= 1 or await self.measure((low + high) // 2) is None:
                return

    def largest(self, criterion: Criterion) -> int:
        """Return the largest level below which every measured level meets the criterion; 0: none does."""
        largest = 0
        for users in sorted(self.runs):
            if not criterion.is_met(self.runs[users]):
                break
            largest = users
        return largest

    def is_exact(self, criterion: Criterion) -> bool:
        """Return whether one user more than the largest level was measured, and was too many."""
        return self.largest(criterion) + 1 in self.runs


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Search the three numbers."""
    timed = options if options.timeout is not None else _with_timeout(options)
    prompts = await Prompts.of(timed, runner, OUTPUT_LEN)
    await warm_up(timed, runner, prompts.take(1))
    search = _Search(timed, runner, prompts)
    await search.all()
    runs = [search.runs[users] for users in sorted(search.runs)]
    whole = tuple(runs)
    if search.interrupted is not None or not runs:
        runs.append(search.interrupted or await runner.run(RunPlan("1", [])))
    wanted = criteria(timed)
    found = {criterion.key: search.largest(criterion) for criterion in wanted}
    figures: dict[str, CellValue] = {f"users_{key}": users if whole else None for key, users in found.items()}
    rows = [
        (
            Cell(criterion.key),
            Cell(figures[f"users_{criterion.key}"], note=_note(search, criterion)),
            *forecast_cells(timed, criterion.key),
        )
        for criterion in wanted
    ]
    columns = forecast_column(timed, (Column("criterion", "key"), Column("users_at_once", "n", lower_is_better=False)))
    return assemble(
        "users",
        timed,
        runs,
        str(found["realtime"] or min(search.runs, default=1)),
        describe(timed, prompts.take(1), rounds=timed.rounds, max_users=timed.max_users),
        tables=(table("users", columns, rows), _levels(runs, wanted)),
        verdicts=(_verdict(search, timed, prompts.output_len),) if whole else (),
        figures=figures,
        notes=prompts.notes,
    )


def _note(search: _Search, criterion: Criterion) -> str:
    """Return why the number of a criterion may be larger than the one found; empty if it is exact."""
    if not search.runs or search.is_exact(criterion):
        return ""
    return "limit_of_search" if search.largest(criterion) == max(search.runs) else "gap_above"


def _verdict(search: _Search, options: BenchOptions, tokens: int) -> Verdict:
    found: dict[str, CellValue] = {}
    for criterion in criteria(options):
        users = search.largest(criterion)
        found[f"users_{criterion.key}"] = users if search.is_exact(criterion) else f"≥ {users}"
    return verdict_of(
        "users_found",
        "rule_users",
        **found,
        ttft=options.realtime_ttft,
        speed=options.realtime_speed,
        wait=options.wait,
        timeout=options.timeout,
        share=SHARE * 100,
        rounds=options.rounds,
        tokens=tokens,
    )


def _with_timeout(options: BenchOptions) -> BenchOptions:
    return replace(options, timeout=TIMEOUT)


def _levels(runs: list[RunResult], wanted: tuple[Criterion, ...]) -> Table:
    columns = (
        Column("users_at_once", "n"),
        Column("ttft_median", "s", lower_is_better=True),
        Column("ttft_slowest", "s", lower_is_better=True),
        Column("time_slowest", "s", lower_is_better=True),
        Column("speed_per_user", "tok/s", lower_is_better=False),
        Column("output_throughput", "tok/s", lower_is_better=False),
        Column("failures"),
        Column("meets", "key"),
    )
    rows = []
    for run in runs:
        figures = run_figures(run)
        ttfts = [record.ttft for record in run.good if record.ttft is not None]
        met = next((criterion.key for criterion in wanted if criterion.is_met(run)), "meets_none")
        if run.interrupted:
            met = "incomplete"
        rows.append(
            (
                Cell(int(run.label)),
                Cell(quantile(ttfts, 50)),
                Cell(max(ttfts, default=None)),
                Cell(max((record.end - record.start for record in run.good), default=None)),
                Cell(figures["output_throughput_per_user"]),
                Cell(figures["output_throughput"]),
                failures_cell(run),
                Cell(met),
            )
        )
    return table("users_levels", columns, rows)


SCENARIO = Scenario(
    "users",
    run,
    frozenset({"levels", "rounds", "realtime_ttft", "realtime_speed", "wait", "max_users", "forecast"}),
    r"users_(realtime|within_wait|at_most)",
)
