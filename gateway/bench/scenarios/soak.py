"""`soak`: one load for a long time, reported in windows; does the server get slower?"""

from collections.abc import Sequence
from dataclasses import replace

from gateway.bench.metrics import run_figures
from gateway.bench.options import BenchOptions
from gateway.bench.quantiles import quantile
from gateway.bench.results import Cell, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.scenarios.base import Scenario, assemble, failures_cell, ratio, table, verdict_of, warm_up
from gateway.bench.workload import Prompts, describe

OUTPUT_LEN = 128
MAX_CONCURRENCY = 4
SLOWER = 1.2


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Keep the load up for `duration` seconds."""
    prompts = await Prompts.of(options, runner, OUTPUT_LEN)
    await warm_up(options, runner, prompts.take(1))
    limit = options.max_concurrency or (None if options.request_rate else MAX_CONCURRENCY)
    whole = await runner.run(
        RunPlan(
            "whole",
            prompts.endless(),
            max_concurrency=limit,
            request_rate=options.request_rate,
            burstiness=options.burstiness,
            goodput=options.goodput,
            seed=options.seed,
            seconds=options.duration,
            probe=prompts.probe(),
            probe_rate=options.probe_rate or 1.0,
        )
    )
    parts = windows(whole, options.window)
    drift = drift_of(parts)
    workload = describe(options, prompts.take(1), duration=options.duration, window=options.window)
    return assemble(
        "soak",
        options,
        [whole],
        "whole",
        workload,
        tables=(_table(parts),),
        verdicts=(_verdict(drift, len(parts)),),
        figures={"drift": drift},
        notes=prompts.notes,
    )


def windows(run: RunResult, seconds: float) -> list[RunResult]:
    """Cut a run into windows by the end of each request.

    A rest shorter than half a window belongs to the last one: its rates would mean little.
    """
    count = max(1, round(run.duration / seconds))
    parts = []
    for number in range(count):
        begin = run.start + number * seconds
        length = run.start + run.duration - begin if number == count - 1 else seconds
        records = tuple(
            record for record in run.ended if min(int((record.end - run.start) / seconds), count - 1) == number
        )
        parts.append(
            replace(
                run,
                label=str(number + 1),
                records=records,
                start=begin,
                duration=length,
                num_prompts=len(records),
                probes=None,
            )
        )
    return parts


def drift_of(parts: Sequence[RunResult]) -> float | None:
    """Return the median latency of the last third of the windows, divided by that of the first third.

    None with fewer than three windows, or without answers in one of the thirds.
    """
    third = len(parts) // 3
    if not third:
        return None

    def median(chosen: Sequence[RunResult]) -> float | None:
        return quantile([record.latency for part in chosen for record in part.good], 50)

    return ratio(median(parts[-third:]), median(parts[:third]))


def _table(parts: Sequence[RunResult]) -> Table:
    columns = (
        Column("window", "n"),
        Column("until", "s"),
        Column("answers", "n"),
        Column("failures"),
        Column("ttft_median", "ms", lower_is_better=True),
        Column("e2el_median", "ms", lower_is_better=True),
        Column("e2el_p95", "ms", lower_is_better=True),
        Column("output_throughput", "tok/s", lower_is_better=False),
    )
    rows = []
    for part in parts:
        figures = run_figures(part, (95.0,))
        rows.append(
            (
                Cell(int(part.label)),
                Cell(part.start + part.duration - parts[0].start),
                Cell(len(part.good)),
                failures_cell(part),
                Cell(figures["median_ttft_ms"]),
                Cell(figures["median_e2el_ms"]),
                Cell(figures["p95_e2el_ms"], note="n_too_small" if figures["p95_e2el_ms"] is None else ""),
                Cell(figures["output_throughput"]),
            )
        )
    return table("soak", columns, rows)


def _verdict(drift: float | None, count: int) -> Verdict:
    key = "unclear" if drift is None else "slowing" if drift > SLOWER else "steady"
    return verdict_of(key, "rule_drift", drift=drift, limit=SLOWER, n=count)


SCENARIO = Scenario(
    "soak",
    run,
    frozenset({"duration", "window", "max_concurrency", "request_rate", "burstiness", "probe_request_rate"}),
    "drift",
)
