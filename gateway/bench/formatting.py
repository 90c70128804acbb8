"""Tables, figures and remarks of a result as text, shared by all writers for people. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.bench.metrics import run_figures
from gateway.bench.quantiles import percentile_word
from gateway.bench.results import Cell, CellValue, ClientLoad, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.texts import Language, text, text_or_key

NOTHING = "–"
DEFAULT_METRICS: tuple[str, ...] = ("ttft", "tpot", "itl", "e2el")
_DECIMALS = {"s": 2, "ms": 1, "x": 2, "%": 1, "tok/s": 1, "req/s": 2, "n": 1}
FIGURES = (
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "output_throughput_per_user",
    "total_token_throughput",
    "total_input_tokens",
    "total_output_tokens",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
)
PROBE_FIGURES = (
    "probe_completed",
    "probe_failed",
    "probe_median_e2el_ms",
    "probe_p99_e2el_ms",
    "probe_max_e2el_ms",
)


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table ready to print: a title, headings, rows, and which columns hold numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_number: tuple[bool, ...]


def number(value: CellValue, unit: str = "") -> str:
    """Return a value with the decimals that its unit has; None is a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (unit == "n" and float(value).is_integer()):
        return f"{value:.0f}"
    shown = f"{value:.{_DECIMALS.get(unit, 2)}f}"
    return f"{shown}x" if unit == "x" else shown


def heading(column: Column, language: Language, kind: str = "measured") -> str:
    """Return a column's heading with its unit, and with the kind of its values if they are not measured."""
    label = text_or_key(column.key, language)
    unit = column.unit if column.unit in ("s", "ms", "%") else ""
    remarks = ", ".join(part for part in (unit, "" if kind == "measured" else _kind(kind, language)) if part)
    return f"{label} ({remarks})" if remarks else label


def cell_text(cell: Cell, column: Column, language: Language, *, marks_kind: bool = True) -> str:
    """Return a cell's text with its note and, unless the heading has it, its kind."""
    value = cell.value
    shown = (
        text_or_key(value, language) if column.unit == "key" and isinstance(value, str) else number(value, column.unit)
    )
    remarks = []
    if cell.kind != "measured" and marks_kind and value is not None:
        remarks.append(_kind(cell.kind, language))
    if cell.note:
        remarks.append(text_or_key(cell.note, language))
    return f"{shown} ({', '.join(remarks)})" if remarks else shown


def column_kind(table: Table, place: int) -> str:
    """Return the kind that all values of a column have, `measured` if they differ."""
    kinds = {row[place].kind for row in table.rows if row[place].value is not None}
    return kinds.pop() if len(kinds) == 1 else "measured"


def text_table(table: Table, language: Language) -> TextTable:
    """Return a scenario's table as text."""
    kinds = [column_kind(table, place) for place in range(len(table.columns))]
    return TextTable(
        text(table.key, language),
        tuple(heading(column, language, kind) for column, kind in zip(table.columns, kinds, strict=True)),
        tuple(
            tuple(
                cell_text(cell, column, language, marks_kind=cell.kind != kind)
                for cell, column, kind in zip(row, table.columns, kinds, strict=True)
            )
            for row in table.rows
        ),
        tuple(column.unit not in ("", "key") for column in table.columns),
    )


def metrics_table(
    run: RunResult, language: Language, percentiles: Sequence[float], metrics: Sequence[str] = DEFAULT_METRICS
) -> TextTable:
    """Return mean, median, deviation and percentiles in milliseconds, a row for each metric.

    A percentile for which there are too few values says so.
    """
    figures = run_figures(run, percentiles)
    columns = ["mean", "median", "std", *(f"p{percentile_word(percentile)}" for percentile in percentiles)]
    columns = [column for column in columns if column != "p50"]  # the median
    rows = []
    for metric in metrics:
        cells = [text(f"metric_{metric}", language)]
        for column in columns:
            key = f"{column}_{metric}_ms"
            few = figures["too_few"].get(key)
            cells.append(
                f"{text('n_too_small', language)} ({few['has']}/{few['needs']})" if few else number(figures[key], "ms")
            )
        rows.append(tuple(cells))
    headings = (text("metric", language), *(f"{text_or_key(column, language)} (ms)" for column in columns))
    return TextTable(_title("run_metrics", run, language), headings, tuple(rows), (False, *(True for _ in columns)))


def figures_table(run: RunResult, language: Language) -> TextTable:
    """Return the counts and rates of a run."""
    figures = run_figures(run)
    rows = [
        (text(f"figure_{name}", language), number(figures[name], "n" if name == "max_output_tokens_per_s" else ""))
        for name in FIGURES
        if name != "request_goodput" or figures[name] is not None
    ]
    if run.probes is not None:
        rows += [(text(f"figure_{name}", language), _probe_figure(figures, name, language)) for name in PROBE_FIGURES]
    for kind, count in run.errors.items():
        rows.append((f"{text('failures', language)}: {kind}", str(count)))
    headings = (text("metric", language), text("value", language))
    return TextTable(_title("run_figures", run, language), headings, tuple(rows), (False, True))


def _title(key: str, run: RunResult, language: Language) -> str:
    return text(key, language, {"run": text_or_key(run.label, language)})


def _probe_figure(figures: Mapping[str, Any], name: str, language: Language) -> str:
    few = figures["too_few"].get(name)
    if few:
        return f"{text('n_too_small', language)} ({few['has']}/{few['needs']})"
    return number(figures[name], "ms" if name.endswith("_ms") else "")


def verdict_text(verdict: Verdict, language: Language) -> tuple[str, str]:
    """Return the conclusion and its rule."""
    figures = dict(verdict.figures)
    key = verdict.key
    return text(key, language, figures), text(verdict.rule, language, figures)


def client_text(load: ClientLoad, language: Language) -> str:
    """Return how busy the load client was."""
    return text("client_line", language, client_figures(load))


def remarks(result: ScenarioResult, language: Language) -> list[str]:
    """Return notes and warnings about a result."""
    found = [text("interrupted", language)] if result.is_interrupted else []
    worst = ClientLoad.worst(run.client for run in result.runs)
    found += [text(key, language, client_figures(worst)) for key in worst.warnings]
    found += [text_or_key(note, language) for note in result.notes]
    kinds = {cell.kind for table in result.tables for row in table.rows for cell in row if cell.value is not None}
    if kinds - {"measured"}:
        found.append(text("kinds_explained", language))
    return found


def facts(result: ScenarioResult, language: Language) -> list[tuple[str, str]]:
    """Return what was measured, as pairs of name and value."""
    pairs = [
        ("target", result.target if result.target == result.url else f"{result.target} ({result.url})"),
        ("model", result.model),
        ("api", f"{result.api} {result.endpoint}"),
        ("date", result.date),
        ("metadata", metadata_text(result)),
        ("client", client_text(ClientLoad.worst(run.client for run in result.runs), language)),
    ]
    return [(text(key, language), value) for key, value in pairs if value]


def metadata_text(result: ScenarioResult) -> str:
    """Return the user's facts about the measurement in one line."""
    return ", ".join(f"{name}={value}" for name, value in result.metadata.items())


def _kind(kind: str, language: Language) -> str:
    return text("forecast_kind" if kind == "forecast" else kind, language)


def client_figures(load: ClientLoad) -> dict[str, Any]:
    """Return the values that texts about the load client are filled in with."""
    return {
        "cpu": load.cpu_share * 100,
        "lag": load.lag_p99_ms,
        "most": load.lag_max_ms,
        "delay": load.start_delay_p99_ms or 0.0,
    }
