"""`vision-batch`: 1, 5, 10 and 20 images at once; what does a file cost, and what fails?"""

from dataclasses import replace

from gateway.bench.images import make_images, read_folder
from gateway.bench.options import BenchOptions
from gateway.bench.prompts import IMAGE_QUESTIONS, user
from gateway.bench.results import Cell, CellValue, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner
from gateway.bench.scenarios.base import (
    Scenario,
    assemble,
    at_once,
    failures_cell,
    forecast_cells,
    forecast_column,
    is_whole,
    ratio,
    table,
    total_cell,
    verdict_of,
    warm_up,
)
from gateway.bench.target import BenchImage, BenchRequest
from gateway.bench.workload import Prompts, describe

LEVELS = (1, 5, 10, 20)
OUTPUT_LEN = 256


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Send each level's files at once, one file a request."""
    levels = options.levels or LEVELS
    files, notes = _files(options, max(levels))
    prompts = await Prompts.of(replace(options, input_len=None), runner, OUTPUT_LEN)
    requests = [_request(prompts, options, file) for file in files]
    await warm_up(options, runner, requests[-1:])
    runs: list[RunResult] = []
    first = 0
    for level in levels:
        if runs and runner.stop.is_set():
            break
        # Other files for each level where there are enough: an engine may have cached the earlier ones.
        batch = [requests[(first + place) % len(requests)] for place in range(level)]
        first += level
        runs.append(await at_once(runner, str(level), batch, options))
    base = _base(runs)
    figures: dict[str, CellValue] = {}
    for run in runs:
        figures[f"total_s_{run.label}"] = run.duration
        figures[f"speedup_{run.label}"] = _speedup(base, run)
        figures[f"failed_{run.label}"] = len(run.ended) - len(run.good)
    return assemble(
        "vision-batch",
        options,
        runs,
        runs[-1].label,
        describe(options, requests, levels=", ".join(map(str, levels))),
        tables=(_table(options, runs, base),),
        verdicts=tuple(_verdict(base, run) for run in runs if int(run.label) > 1 and not run.interrupted),
        figures=figures,
        notes=notes,
    )


def _files(options: BenchOptions, most: int) -> tuple[list[BenchImage], tuple[str, ...]]:
    if options.image_folder is None:
        return make_images(sum(options.levels or LEVELS) + 1, options.image_size, options.seed), ("images_made",)
    files = read_folder(options.image_folder)
    return files, () if len(files) > most else ("images_repeated",)


def _request(prompts: Prompts, options: BenchOptions, file: BenchImage) -> BenchRequest:
    language = options.languages[0]
    text = prompts.options.dataset[0].messages if options.dataset else user(IMAGE_QUESTIONS[language])
    return prompts.completed(BenchRequest(text, prompts.output_len, images=(file,), language=language, name=file.name))


def _base(runs: list[RunResult]) -> float | None:
    """Return the seconds of a file in the smallest level without a failure."""
    whole = [run for run in runs if is_whole(run)]
    return min(whole, key=lambda run: run.num_prompts).duration / _least(whole) if whole else None


def _least(runs: list[RunResult]) -> int:
    return min(run.num_prompts for run in runs)


def _speedup(base: float | None, run: RunResult) -> float | None:
    """Return how much faster a file was than alone; None if any file failed."""
    return ratio(base, ratio(run.duration, run.num_prompts)) if is_whole(run) else None


def _table(options: BenchOptions, runs: list[RunResult], base: float | None) -> Table:
    columns = (
        Column("files", "n"),
        Column("total", "s", lower_is_better=True),
        Column("per_file", "s", lower_is_better=True),
        Column("speedup", "x", lower_is_better=False),
        Column("failures"),
        Column("in_turn_computed", "s"),
        Column("difference_computed", "s", lower_is_better=True),
    )
    rows = []
    for run in runs:
        in_turn = None if base is None else base * run.num_prompts
        rows.append(
            (
                Cell(run.num_prompts),
                total_cell(run),
                Cell(ratio(run.duration, run.num_prompts) if is_whole(run) else None),
                Cell(_speedup(base, run)),
                failures_cell(run),
                Cell(in_turn, "computed"),
                Cell(run.duration - in_turn if is_whole(run) and in_turn is not None else None, "computed"),
                *forecast_cells(options, run.label),
            )
        )
    return table("vision_batch", forecast_column(options, columns), rows)


def _verdict(base: float | None, run: RunResult) -> Verdict:
    speedup = _speedup(base, run)
    count = run.num_prompts
    if run.errors:
        key = "files_failed"
    elif speedup is None:
        key = "unclear"
    elif speedup < 0.9:
        key = "slower_together"
    elif speedup < 1.2:
        key = "no_gain"
    else:
        key = "full_gain" if speedup >= 0.9 * count else "partial_gain"
    return verdict_of(key, "rule_speedup", speedup=speedup, n=count, failed=len(run.ended) - len(run.good))


SCENARIO = Scenario(
    "vision-batch", run, frozenset({"levels", "images", "image_size", "forecast"}), r"(total_s|speedup|failed)_[1-9]\d*"
)
