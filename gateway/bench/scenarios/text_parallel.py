"""`text-parallel`: the same prompts one after the other and at once."""

from gateway.bench.options import BenchOptions
from gateway.bench.results import Cell, Column, RunResult, ScenarioResult
from gateway.bench.runner import Runner
from gateway.bench.scenarios.base import (
    REQUEST_COLUMNS,
    Scenario,
    assemble,
    at_once,
    failures_cell,
    in_turn,
    is_whole,
    ratio,
    request_rows,
    table,
    total_cell,
    verdict_of,
    warm_up,
)
from gateway.bench.workload import Prompts, describe

PROMPTS = 3
OUTPUT_LEN = 256
IN_TURN, TOGETHER = "in_turn", "together"
FIGURES = r"in_turn_s|together_s|speedup"


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Send the prompts in turn, then at once."""
    prompts = await Prompts.of(options, runner, OUTPUT_LEN)
    requests = prompts.take(options.num_prompts or PROMPTS)
    await warm_up(options, runner, requests[:1])
    runs = [await in_turn(runner, IN_TURN, requests, options)]
    if not runner.stop.is_set():
        runs.append(await at_once(runner, TOGETHER, requests, options))
    return compared("text-parallel", options, runs, "text_parallel", prompts.notes, describe(options, requests))


def compared(
    scenario: str,
    options: BenchOptions,
    runs: list[RunResult],
    title: str,
    notes: tuple[str, ...],
    workload: dict[str, float | int | str | None],
) -> ScenarioResult:
    """Return the result of a run in turn and one at once."""
    alone, last = runs[0], runs[-1]
    speedup = ratio(alone.duration, last.duration) if len(runs) == 2 and all(map(is_whole, runs)) else None
    columns = (
        Column("mode", "key"),
        Column("total", "s", lower_is_better=True),
        Column("mean_per_request", "s", lower_is_better=True),
        Column("speedup", "x", lower_is_better=False),
        Column("failures"),
    )
    rows = [
        (
            Cell(run.label),
            total_cell(run),
            Cell(ratio(run.duration, len(run.good)) if is_whole(run) else None),
            Cell(speedup if run is not alone else 1.0 if is_whole(run) else None),
            failures_cell(run),
        )
        for run in runs
    ]
    return assemble(
        scenario,
        options,
        runs,
        last.label,
        workload,
        tables=(
            table(title, columns, rows),
            *(table(f"requests_{run.label}", REQUEST_COLUMNS, request_rows(run)) for run in runs),
        ),
        verdicts=()
        if speedup is None
        else (verdict_of(_classify(speedup, len(last.good)), "rule_speedup", speedup=speedup, n=len(last.good)),),
        figures={
            "in_turn_s": alone.duration,
            "together_s": last.duration if len(runs) == 2 else None,
            "speedup": speedup,
        },
        notes=notes,
    )


def _classify(speedup: float, requests: int) -> str:
    if speedup < 0.9:
        return "slower_together"
    if speedup < 1.2:
        return "no_gain"
    return "full_gain" if speedup >= 0.9 * requests else "partial_gain"


SCENARIO = Scenario("text-parallel", run, frozenset({"num_prompts"}), FIGURES)
