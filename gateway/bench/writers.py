"""Files of a result: JSON, Markdown, CSV and HTML. `WRITERS` lists all that `--out` writes."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.bench.formatting import (
    DEFAULT_METRICS,
    TextTable,
    facts,
    figures_table,
    metrics_table,
    remarks,
    text_table,
    verdict_text,
)
from gateway.bench.machine import machine_facts
from gateway.bench.metrics import DEFAULT_PERCENTILES
from gateway.bench.report import html
from gateway.bench.result_json import to_json
from gateway.bench.results import ScenarioResult
from gateway.bench.texts import Language, text


@dataclass(frozen=True, slots=True)
class Style:
    """Form in which a result is shown: language, percentiles, and metrics with percentiles."""

    language: Language = "en"
    percentiles: Sequence[float] = DEFAULT_PERCENTILES
    metrics: Sequence[str] = DEFAULT_METRICS


@dataclass(frozen=True, slots=True)
class Writer:
    """A file in the `--out` folder and what writes its text."""

    filename: str
    render: Callable[[ScenarioResult, Style], str]


def json_text(result: ScenarioResult, style: Style) -> str:
    """Return the result as JSON; see `gateway.bench.result_json`."""
    return json.dumps(to_json(result, style.percentiles), ensure_ascii=False, indent=1) + "\n"


def markdown_text(result: ScenarioResult, style: Style) -> str:
    """Return the result as Markdown."""
    language = style.language
    lines = [f"# {text('title', language)}: {text(f'scenario_{result.scenario}', language)}", ""]
    lines += [f"- {name}: {_escaped(value)}" for name, value in facts(result, language)]
    for verdict in result.verdicts:
        conclusion, _ = verdict_text(verdict, language)
        lines += ["", f"**{conclusion}**"]
    for table in (*(text_table(table, language) for table in result.tables), *headline_tables(result, style)):
        lines += ["", f"## {table.title}", "", *_markdown_table(table)]
    if rules := dict.fromkeys(verdict_text(verdict, language)[1] for verdict in result.verdicts):
        lines += ["", f"## {text('rule', language)}", "", *rules]
    if notes := remarks(result, language):
        lines += ["", f"## {text('notes', language)}", "", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])


def headline_tables(result: ScenarioResult, style: Style) -> list[TextTable]:
    """Return the tables of the headline run's figures and metrics."""
    run = result.headline_run
    return [figures_table(run, style.language), metrics_table(run, style.language, style.percentiles, style.metrics)]


CSV_COLUMNS = (
    "scenario", "target", "run", "index", "name", "model", "language", "images", "start", "ttft", "mean_itl", "latency",
    "queue_time", "gateway_queue_ms", "prompt_tokens", "completion_tokens", "tokens_per_second", "status", "finish",
    "error",
)  # fmt: skip


def csv_text(result: ScenarioResult, style: Style) -> str:
    """Return a line for each request of each run; times are seconds, `start` from the run's start."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(CSV_COLUMNS)
    for run in result.runs:
        for record in run.records:
            mean_itl = sum(record.itl) / len(record.itl) if record.itl else None
            row = (
                result.scenario, run.target, run.label, record.index, record.name, record.model or run.model,
                record.language, record.images, record.start - run.start, record.ttft, mean_itl, record.latency,
                record.queue_time, record.queue_ms, record.prompt_tokens, record.completion_tokens,
                record.tokens_per_second, record.status, record.finish, record.error,
            )  # fmt: skip
            rows.writerow([_guarded(value) if isinstance(value, str) else value for value in row])
    return out.getvalue()


def html_text(result: ScenarioResult, style: Style) -> str:
    """Return the report with pictures as one HTML file."""
    return html(result, style.language, machine_facts())


WRITERS: list[Writer] = [
    Writer("benchmark_results.json", json_text),
    Writer("benchmark_summary.md", markdown_text),
    Writer("results.csv", csv_text),
    Writer("report.html", html_text),
]


def write_all(result: ScenarioResult, folder: Path, style: Style) -> list[Path]:
    """Write every file into `folder`, which is made if needed, and return their paths.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for writer in WRITERS:
        path = folder / writer.filename
        path.write_text(writer.render(result, style), "utf-8")
        paths.append(path)
    return paths


def _markdown_table(table: TextTable) -> list[str]:
    marks = ["---:" if is_number else "---" for is_number in table.is_number]
    rows = [table.headings, marks, *table.rows]
    return [f"| {' | '.join(map(_escaped, row))} |" for row in rows]


def _escaped(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _guarded(value: str) -> str:
    """Return a text that a spreadsheet does not run as a formula."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
