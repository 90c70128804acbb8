"""`concurrency`: N requests at once; is the server batching, or serving one after the other?"""

from gateway.bench.options import BenchOptions
from gateway.bench.overlap import BATCHED_SHARE, SERIAL_LIMIT, classify, generating_at_once
from gateway.bench.prompts import user
from gateway.bench.results import Cell, CellValue, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner
from gateway.bench.scenarios.base import (
    REQUEST_COLUMNS,
    Scenario,
    assemble,
    at_once,
    failures_cell,
    is_whole,
    ratio,
    request_rows,
    table,
    time_of,
    total_cell,
    verdict_of,
    warm_up,
)
from gateway.bench.target import BenchRequest
from gateway.bench.workload import Prompts, describe

LEVELS = (5, 16)
OUTPUT_LEN = 32
PROMPT = "Request {}: vLLM 병렬 처리 테스트."


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Send one request alone, then each level's requests at once."""
    prompts = await Prompts.of(options, runner, OUTPUT_LEN)
    levels = (options.num_prompts,) if options.num_prompts else options.levels or LEVELS
    requests = _requests(options, prompts, max(levels) + 1)
    await warm_up(options, runner, requests[:1])
    runs = [await at_once(runner, "1", requests[:1], options)]
    for level in levels:
        if runner.stop.is_set():
            break
        runs += [await at_once(runner, str(level), requests[1 : level + 1], options)]
    alone = _seconds(runs[0])
    last = runs[-1]
    figures: dict[str, CellValue] = {
        "alone_s": alone,
        "total_s": last.duration,
        "generating_at_once": generating_at_once(last.good),
        "speedup": _speedup(alone, last),
    }
    return assemble(
        "concurrency",
        options,
        runs,
        last.label,
        describe(options, requests, levels=", ".join(map(str, levels))),
        tables=(_totals(runs, alone), *(_each(run) for run in runs[1:])),
        verdicts=tuple(_verdict(run) for run in runs[1:] if not run.interrupted),
        figures=figures,
        notes=prompts.notes,
    )


def _requests(options: BenchOptions, prompts: Prompts, count: int) -> list[BenchRequest]:
    if options.dataset or options.input_len is not None:
        return prompts.take(count)
    return [
        prompts.completed(BenchRequest(user(PROMPT.format(number)), prompts.output_len, language="ko"))
        for number in range(count)
    ]


def _seconds(run: RunResult) -> float | None:
    return time_of(run.good[0]) if run.good else None


def _speedup(alone: float | None, run: RunResult) -> float | None:
    """Return how much faster the requests were together than one after the other; None if not all were answered."""
    return ratio(None if alone is None else alone * len(run.good), run.duration) if is_whole(run) else None


def _totals(runs: list[RunResult], alone: float | None) -> Table:
    columns = (
        Column("at_once", "n"),
        Column("total", "s", lower_is_better=True),
        Column("fastest", "s", lower_is_better=True),
        Column("slowest", "s", lower_is_better=True),
        Column("in_turn_computed", "s"),
        Column("speedup", "x", lower_is_better=False),
        Column("generating_at_once", "n", lower_is_better=False),
        Column("failures"),
    )
    rows = []
    for run in runs:
        times = [time_of(record) for record in run.good]
        in_turn = None if alone is None else alone * run.num_prompts
        rows.append(
            (
                Cell(int(run.label)),
                total_cell(run),
                Cell(min(times, default=None)),
                Cell(max(times, default=None)),
                Cell(in_turn, "computed"),
                Cell(_speedup(alone, run)),
                Cell(generating_at_once(run.good)),
                failures_cell(run),
            )
        )
    return table("concurrency_totals", columns, rows)


def _each(run: RunResult) -> Table:
    return table("concurrency_requests", REQUEST_COLUMNS, request_rows(run))


def _verdict(run: RunResult) -> Verdict:
    average = generating_at_once(run.good)
    return verdict_of(
        classify(average, len(run.good)),
        "rule_overlap",
        n=len(run.good),
        average=average,
        batched=BATCHED_SHARE * 100,
        serial=SERIAL_LIMIT,
    )


SCENARIO = Scenario(
    "concurrency", run, frozenset({"num_prompts", "levels"}), r"alone_s|total_s|generating_at_once|speedup"
)
