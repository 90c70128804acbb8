"""`report.html` of one scenario's result. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway import __version__
from gateway.bench.formatting import client_figures, client_text, metadata_text
from gateway.bench.metrics import run_figures
from gateway.bench.report_blocks import (
    Block,
    DataTable,
    Facts,
    Notes,
    Page,
    Section,
    Terminal,
    TextCell,
    Tile,
    Tiles,
    Verdict,
)
from gateway.bench.report_page import render
from gateway.bench.report_runs import NamedRun, distribution, over_time, throughput, timeline
from gateway.bench.report_tables import data_table, table_bars
from gateway.bench.report_terminal import summary
from gateway.bench.report_texts import Lang, date, digits, number, text
from gateway.bench.results import CellValue, ClientLoad, RunResult, ScenarioResult
from gateway.bench.results import Verdict as Conclusion

METRIC_NAMES = ("ttft", "tpot", "itl", "e2el")
_STATISTICS = ("mean", "median", "p90", "p95", "p99")
MOST_TIMELINES = 4
MOST_SERIES = 6
"""Series that colours can tell apart."""
_SHORT_DIGEST = 12


def html(result: ScenarioResult, lang: Lang = "en", machine: Mapping[str, CellValue] | None = None) -> str:
    """Return the report of `result`; `machine` are the facts of `machine_facts`."""
    return render(page(result, lang, machine or {}))


def page(result: ScenarioResult, lang: Lang, machine: Mapping[str, CellValue]) -> Page:
    """Return the parts of the report."""
    title = text(f"scenario_{result.scenario}", lang)
    return Page(
        lang=lang,
        eyebrow=f"gateway bench {result.scenario}",
        title=f"{title}: {result.model}",
        lead=f"{result.target} · {date(result.date)}",
        sides=(),
        verdicts=_verdicts(result.verdicts, lang),
        warnings=tuple(warnings(result.runs, lang)),
        tiles=tiles(result.headline_run, lang),
        sections=tuple(section for section in _sections(result, lang, machine) if section.blocks),
        footer=text("report_made", lang, version=__version__, date=date(result.date)),
    )


def _verdicts(verdicts: Sequence[Conclusion], lang: Lang) -> tuple[Verdict, ...]:
    """Return the conclusions; several in a row with the same rule show it once, after the last."""
    words = [text(one.key, lang, **one.figures) for one in verdicts]
    rules = [text(one.rule, lang, **one.figures) if one.rule else "" for one in verdicts]
    return tuple(
        Verdict(said, "" if rule in rules[place + 1 : place + 2] else rule)
        for place, (said, rule) in enumerate(zip(words, rules, strict=True))
    )


def _sections(result: ScenarioResult, lang: Lang, machine: Mapping[str, CellValue]) -> list[Section]:
    tables = tuple(data_table(table, lang) for table in result.tables)
    return [
        Section(text("section_results", lang), tables),
        Section(text("section_pictures", lang), tuple(_pictures(result, lang))),
        Section(
            text("section_metrics", lang),
            (
                metrics_table(result.headline_run, lang),
                Terminal(text("summary_terminal", lang), summary(result.headline_run)),
            ),
            text("section_metrics_intro", lang),
        ),
        Section(text("section_method", lang), tuple(_method(result, lang, machine))),
    ]


def _pictures(result: ScenarioResult, lang: Lang) -> list[Block]:
    runs = named_runs(result.runs, lang)
    bars = [chart for table in result.tables for chart in table_bars(table, lang)]
    is_split = len({named.name for named in runs}) == len(runs)
    several = [named for named in runs if len(named.run.ended) > 1] if is_split else []
    charts = (
        over_time(runs, lang),
        distribution(runs, lang),
        distribution(runs, lang, of="ttft"),
        throughput(runs, lang),
    )
    timelines = [found for named in several[-MOST_TIMELINES:] if (found := timeline(named, lang)) is not None]
    return [*bars, *timelines, *(chart for chart in charts if chart is not None)]


def named_runs(runs: Sequence[RunResult], lang: Lang) -> list[NamedRun]:
    """Return the runs with their labels as names; more than MOST_SERIES, such as a soak's windows, are one series."""
    origin = min((run.start for run in runs), default=0.0)
    labels = list(dict.fromkeys(run.label for run in runs))
    if len(labels) > MOST_SERIES:
        return [NamedRun(text("run", lang), run, 0, run.start - origin) for run in runs]
    return [
        NamedRun(
            text(run.label, lang) if run.label else text("run", lang),
            run,
            labels.index(run.label),
            run.start - origin,
        )
        for run in runs
    ]


def tiles(run: RunResult, lang: Lang) -> Tiles:
    """Return the most important figures of a run."""
    figures = run_figures(run)
    ended, failed = len(run.ended), figures["failed"]
    user = number(figures["output_throughput_per_user"], "tok/s", lang)
    rate = number(figures["request_throughput"], "", lang)
    return Tiles(
        (
            Tile(
                text("tile_requests", lang),
                digits(figures["completed"]),
                text("tile_requests_detail", lang, all=ended, failed=failed),
            ),
            Tile(
                text("tile_duration", lang),
                number(run.duration, "s", lang),
                text("tile_duration_detail", lang, run=text(run.label, lang), rate=rate),
            ),
            Tile(
                text("tile_throughput", lang),
                number(figures["output_throughput"], "", lang),
                text("tile_throughput_detail", lang, user=user),
            ),
            _latency_tile("ttft", figures, [record.ttft for record in run.good], lang),
            _latency_tile("e2el", figures, [record.latency for record in run.good], lang),
        )
    )


def _latency_tile(name: str, figures: Mapping[str, Any], values: Sequence[float | None], lang: Lang) -> Tile:
    seen = [value for value in values if value is not None]
    title = text({"ttft": "tile_ttft", "e2el": "tile_latency"}[name], lang)
    middle = figures[f"median_{name}_ms"]
    if middle is None:
        return Tile(title, text("none", lang), text("not_seen", lang))
    p95 = figures[f"p95_{name}_ms"]
    if p95 is None:
        detail = text("tile_most", lang, n=len(seen), most=duration(max(seen) * 1000, lang))
    else:
        detail = text("tile_percentiles", lang, p95=duration(p95, lang))
    return Tile(title, duration(middle, lang), detail)


def duration(milliseconds: float | None, lang: Lang) -> str:
    """Return a time in milliseconds below one second, else in seconds."""
    if milliseconds is None:
        return text("none", lang)
    return number(milliseconds, "ms", lang) if milliseconds < 1000 else number(milliseconds / 1000, "s", lang)


def metrics_table(run: RunResult, lang: Lang) -> DataTable:
    """Return mean, median and percentiles of each metric."""
    figures = run_figures(run)
    rows = []
    for name in METRIC_NAMES:
        cells = [TextCell(text(f"metric_{name}", lang))]
        for statistic in _STATISTICS:
            key = f"{statistic}_{name}_ms"
            few = figures["too_few"].get(key)
            if figures[key] is None and few and few["has"]:
                cells.append(TextCell(text("needs", lang, needs=few["needs"]), look="absent"))
            else:
                cells.append(TextCell(duration(figures[key], lang)))
        rows.append(tuple(cells))
    header = (text("column_metric", lang), text("column_mean", lang), text("column_median", lang), "p90", "p95", "p99")
    return DataTable(text("metrics", lang), header, tuple(rows), frozenset(range(1, 6)))


def warnings(runs: Sequence[RunResult], lang: Lang) -> list[str]:
    """Return what makes the result doubtful: a busy client, and an early end."""
    found = [text("interrupted", lang)] if any(run.interrupted for run in runs) else []
    worst = ClientLoad.worst(run.client for run in runs)
    return found + [text(key, lang, **client_figures(worst)) for key in worst.warnings]


def client_line(runs: Sequence[RunResult], lang: Lang) -> str:
    """Return how busy the load client was, at worst over the runs."""
    return client_text(ClientLoad.worst(run.client for run in runs), lang)


def workload_line(workload: Mapping[str, CellValue]) -> str:
    """Return the workload in one line; the digest is cut, since people compare its beginning."""
    shown = {
        key: value[:_SHORT_DIGEST] if key.endswith("sha256") and isinstance(value, str) else value
        for key, value in workload.items()
        if value is not None
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _method(result: ScenarioResult, lang: Lang, machine: Mapping[str, CellValue]) -> list[Block]:
    notes = [text(key, lang) for key in ("method_clock", "method_tokens", "method_kinds")]
    facts = [
        (text("fact_url", lang), result.url),
        (text("fact_endpoint", lang), f"{result.api} {result.endpoint}"),
        (text("fact_model", lang), result.model),
        (text("fact_workload", lang), workload_line(result.workload)),
        (text("metadata", lang), metadata_text(result)),
        (text("fact_client_load", lang), client_line(result.runs, lang)),
        *((text("fact_server", lang), f"{key} {value}") for key, value in result.server.items()),
    ]
    lines = (*notes, *(text(key, lang) for key in result.notes), text("method_content", lang))
    return [Notes(lines), *fact_blocks([(name, value) for name, value in facts if value], machine, lang)]


def fact_blocks(facts: Sequence[tuple[str, str]], machine: Mapping[str, CellValue], lang: Lang) -> list[Block]:
    """Return the facts of the measurement and those of the machine that sent the requests."""
    blocks: list[Block] = [Facts(text("facts_measurement", lang), tuple(facts))]
    if machine:
        rows = tuple((text(f"fact_{key}", lang), str(value)) for key, value in machine.items())
        blocks.append(Facts(text("facts_machine", lang), rows))
    return blocks
