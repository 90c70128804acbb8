"""`gateway compare`: two targets measured in turn, or two result files, to one comparison and its files."""

import asyncio
import datetime as dt
import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gateway.bench.bodies import OLLAMA_LACKS
from gateway.bench.compare_markdown import filename, markdown
from gateway.bench.compare_measure import ComparePlan
from gateway.bench.compare_measure import compare as measure_sides
from gateway.bench.compare_report import html
from gateway.bench.compare_result import FORMAT, Comparison, Side, side_of_file
from gateway.bench.compare_rows import Row, figures, rows
from gateway.bench.compare_start import StartedServer
from gateway.bench.compare_workload import Unlike, differences
from gateway.bench.gpu import find_gpus
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.machine import machine_facts
from gateway.bench.measure import interruption, with_model
from gateway.bench.quality_scores import QualityRow, recommendation
from gateway.bench.quality_scores import rows as quality_rows
from gateway.bench.report_texts import Lang
from gateway.bench.results import CellValue, RunResult
from gateway.bench.runner import Silent
from gateway.bench.target import Target
from gateway.bench.terminal import ProgressBar
from gateway.bench.writers import Style

RESULTS = "compare_results.json"
REPORT = "report.html"


class UnreadableResult(Exception):
    """A file is not a result; the text names it and says why."""


class UnlikeWorkloads(Exception):
    """The two results have different workloads."""

    def __init__(self, fields: Sequence[Unlike]) -> None:
        super().__init__("the workloads differ")
        self.fields = fields


@dataclass(frozen=True, slots=True)
class Written:
    """A comparison and the facts of the machine, as they go into the files."""

    comparison: Comparison
    machine: dict[str, CellValue]

    def json_text(self) -> str:
        """Return everything as JSON; a one-sided result can be compared with another later."""
        return json.dumps(to_json(self.comparison, self.machine), ensure_ascii=False, indent=1) + "\n"

    def write(self, folder: Path, lang: Lang) -> list[Path]:
        """Write the report in Markdown, HTML and JSON into `folder`, which is made if needed.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            filename(self.comparison): markdown(self.comparison, lang, self.machine),
            REPORT: html(self.comparison, lang, self.machine),
            RESULTS: self.json_text(),
        }
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
        return [folder / name for name in contents]


def of_files(paths: Sequence[Path], *, force: bool = False) -> Written:
    """Compare the results in one or two files.

    Raises:
        UnreadableResult: a file is not a result of one side.
        UnlikeWorkloads: the workloads differ, and `force` is not given.
    """
    sides = [_read(path) for path in paths]
    notes: tuple[str, ...] = ()
    if len(sides) == 2 and (unlike := differences(sides[0].workload, sides[1].workload)):
        if not force:
            raise UnlikeWorkloads(unlike)
        notes = (f"forced:{', '.join(one.field for one in unlike)}",)
    now = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    # The machine of a result file is not known to be this one.
    return Written(Comparison(now, tuple(sides), in_turn=False, notes=notes), {})


def _read(path: Path) -> Side:
    if path.is_dir():
        path = next(
            (path / name for name in (RESULTS, "benchmark_results.json") if (path / name).exists()), path / RESULTS
        )
    try:
        side = side_of_file(json.loads(path.read_text(encoding="utf-8")))
    except OSError as problem:
        raise UnreadableResult(f"{path}: {problem.strerror}") from problem
    except (ValueError, UnicodeDecodeError) as problem:
        raise UnreadableResult(f"{path}: {problem}") from problem
    if not any(run.good for run in side.rounds):
        raise UnreadableResult(f"{path}: no request was answered")
    return side


async def of_targets(
    plan: ComparePlan,
    targets: Sequence[Target],
    judge: Target | None,
    console: Console | None,
    lang: Lang,
    commands: Mapping[str, str],
) -> Written:
    """Measure one or two targets; SIGINT ends it with the rounds that are complete.

    `commands` start the servers of the sides with these labels; they end with the measurement.

    Raises:
        gateway.bench.measure.NoModel: no model was named, and a server lists none.
        gateway.bench.compare_measure.NotMeasured: a side does not answer, or no round was complete.
        gateway.bench.compare_start.NotStarted: a server did not become ready.
    """
    gpus = find_gpus()
    stop = asyncio.Event()
    servers = {label: StartedServer(command) for label, command in commands.items()}
    async with AsyncExitStack() as stack:
        for target in targets:
            if target.label in servers:
                stack.push_async_callback(servers[target.label].stop)
                await _start(servers[target.label], target)
        named = [await with_model(target) for target in targets]
        plan = replace(plan, load=replace(plan.load, target=named[0]))
        clients = [HttpLoadClient(target) for target in named]
        judge_client = None if judge is None else HttpLoadClient(judge)
        for client in (*clients, *([] if judge_client is None else [judge_client])):
            stack.push_async_callback(client.close)
        progress = Silent() if console is None else await stack.enter_async_context(ProgressBar(console, Style(lang)))
        gc.collect()
        gc.freeze()  # as for `gateway bench`: shorter collections while answers are being timed
        try:
            with interruption(stop):
                found = await measure_sides(
                    plan,
                    clients,
                    judge_client=judge_client,
                    gpus=gpus,
                    progress=progress,
                    stop=stop,
                    servers=servers,
                )
        finally:
            gc.unfreeze()
    if any(target.api == "ollama" for target in named) and set(OLLAMA_LACKS) & set(plan.load.parameters):
        found = replace(found, notes=(*found.notes, "ollama_ignores_eos"))
    machine = machine_facts()
    if gpus is not None:
        machine["gpu"] = ", ".join(gpus.names())
    return Written(found, machine)


async def _start(server: StartedServer, target: Target) -> None:
    client = HttpLoadClient(target)
    try:
        await server.start(client)
    finally:
        await client.close()


def to_json(comparison: Comparison, machine: dict[str, CellValue]) -> dict[str, Any]:
    """Return the comparison with its sides, rows and figures."""
    b = comparison.b
    qualities = (comparison.a.quality, None if b is None else b.quality)
    return {
        "format": FORMAT,
        "date": comparison.date,
        "in_turn": comparison.in_turn,
        "notes": list(comparison.notes),
        "machine": machine,
        "figures": all_figures(comparison),
        "rows": [_row(row) for row in rows(comparison)],
        "quality_rows": [_quality_row(row) for row in quality_rows(*qualities)],
        "recommendation": recommendation(*qualities) if any(qualities) else None,
        "sides": [side.to_json() for side in comparison.sides],
    }


def all_figures(comparison: Comparison) -> dict[str, float | None]:
    """Return the figures for `--fail-if`, with `a_quality`, `b_quality` and `difference_quality` if there are any."""
    found = figures(comparison)
    b = comparison.b
    a_quality, b_quality = comparison.a.quality, None if b is None else b.quality
    if a_quality is not None or b_quality is not None:
        mean = quality_rows(a_quality, b_quality)[-1]
        found |= {"a_quality": mean.a, "b_quality": mean.b}
        if b is not None:
            found["difference_quality"] = None if mean.a is None or mean.b is None else mean.b - mean.a
    return found


def figure_names(sides: int, *, has_quality: bool) -> list[str]:
    """Return the names of the figures that a measurement of so many sides will have."""
    nothing = RunResult("", "", "", (), 0.0, 0.0, 0)
    side = Side("", "", "", "", "", {}, (nothing,))
    names = list(figures(Comparison("", (side,) * sides, in_turn=True)))
    if has_quality:
        names += ["a_quality", "b_quality", *(["difference_quality"] if sides == 2 else [])]
    return sorted(names)


def _row(row: Row) -> dict[str, Any]:
    return {
        "key": row.metric.key,
        "unit": row.metric.unit,
        "lower_is_better": row.metric.lower_is_better,
        "a": row.a,
        "b": row.b,
        "difference": row.difference,
        "ratio": row.ratio,
        "interval": _interval(row.interval),
        "interval_of": "ratio" if row.metric.is_ratio else "difference",
        "better": row.better,
    }


def _quality_row(row: QualityRow) -> dict[str, Any]:
    return {
        "scenario": row.scenario or "mean",
        "a": row.a,
        "b": row.b,
        "interval": _interval(row.difference),
        "interval_of": "difference",
        "better": row.better or "same",
    }


def _interval(interval: Any) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "confidence": 0.95,
        "method": interval.method,
        "n": interval.n,
    }
