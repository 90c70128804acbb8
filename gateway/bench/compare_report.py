"""`report.html` of a comparison. Pure."""

from collections.abc import Mapping, Sequence

from gateway import __version__
from gateway.bench import compare_view as view
from gateway.bench.compare_result import Comparison, Side
from gateway.bench.compare_rows import rows
from gateway.bench.quality_scores import BEST
from gateway.bench.quality_scores import rows as quality_rows
from gateway.bench.report import client_line, fact_blocks, warnings, workload_line
from gateway.bench.report_blocks import (
    Block,
    DataTable,
    Notes,
    Page,
    Section,
    SideCard,
    TextCell,
    Tile,
    Tiles,
    Verdict,
)
from gateway.bench.report_page import render
from gateway.bench.report_pictures import Bar, Bars, Forest, Ratio
from gateway.bench.report_runs import NamedRun, distribution, over_time, throughput, timeline
from gateway.bench.report_texts import Lang, date, number, text
from gateway.bench.results import CellValue, RunResult

_TILES = ("throughput", "response", "ttft", "tpot")
_FOREST = ("load_time", "cold_response", "cold_speed", "response", "speed", "ttft", "tpot", "throughput", "requests")


def html(comparison: Comparison, lang: Lang = "en", machine: Mapping[str, CellValue] | None = None) -> str:
    """Return the report of a comparison; `machine` are the facts of `machine_facts`."""
    return render(page(comparison, lang, machine or {}))


def page(comparison: Comparison, lang: Lang, machine: Mapping[str, CellValue]) -> Page:
    """Return the parts of the report."""
    one_side = comparison.b is None
    title = text("compare_title_one" if one_side else "compare_title", lang)
    models = list(dict.fromkeys(side.model for side in comparison.sides))
    sections = (
        Section(text("section_compare", lang), tuple(_comparison(comparison, lang))),
        Section(text("section_quality", lang), tuple(_quality(comparison, lang))),
        Section(text("section_requests", lang), tuple(_pictures(comparison, lang))),
        Section(text("section_method", lang), tuple(_method(comparison, lang, machine))),
    )
    return Page(
        lang=lang,
        eyebrow="gateway compare",
        title=f"{title}: {' – '.join(models)}",
        lead=f"{lead(comparison, lang)} · {date(comparison.date)}",
        sides=tuple(_side_card(side, letter, lang) for side, letter in zip(comparison.sides, "AB", strict=False)),
        verdicts=tuple(Verdict(words) for words in view.verdicts(comparison, lang)),
        warnings=(*warnings(comparison.runs, lang), *view.remarks(comparison, lang)),
        tiles=_tiles(comparison, lang),
        sections=tuple(section for section in sections if section.blocks),
        footer=text("report_made", lang, version=__version__, date=date(comparison.date)),
    )


def lead(comparison: Comparison, lang: Lang) -> str:
    """Return how much was measured."""
    side = comparison.a
    requests = sum(len(run.ended) for run in side.rounds)
    if comparison.b is None:
        return text("compare_lead_one", lang, rounds=len(side.rounds), requests=requests)
    if not comparison.in_turn:
        return text("compare_lead_files", lang)
    return text("compare_lead", lang, rounds=min(len(one.rounds) for one in comparison.sides), requests=requests)


def _side_card(side: Side, letter: str, lang: Lang) -> SideCard:
    servers = ", ".join(f"{name} {version}" for name, version in side.server.items())
    facts = (
        (text("fact_url", lang), side.url),
        (text("fact_endpoint", lang), f"{side.api} {side.endpoint}".strip()),
        (text("fact_server", lang), servers),
        (text("fact_date", lang), date(side.date)),
    )
    shown = tuple((name, value) for name, value in facts if value)
    return SideCard(letter, side.model, shown, "AB".index(letter))


def _tiles(comparison: Comparison, lang: Lang) -> Tiles:
    found = {row.metric.key: row for row in rows(comparison)}
    tiles = []
    for key in _TILES:
        row = found.get(key)
        if row is None or row.a is None:
            continue
        a, b = view.values(row, lang)
        if comparison.b is None:
            tiles.append(Tile(text(f"row_{key}", lang), a))
            continue
        ratio = text("none", lang) if row.ratio is None else f"B = {number(row.ratio, 'x', lang)} A"
        tiles.append(Tile(text(f"row_{key}", lang), ratio, f"A {a}, B {b}"))
    return Tiles(tuple(tiles))


def _comparison(comparison: Comparison, lang: Lang) -> list[Block]:
    views = view.row_views(comparison, lang)
    blocks: list[Block] = []
    if comparison.b is not None and (forest := _forest(comparison, lang)) is not None:
        blocks.append(forest)
    for group, members in view.groups(views).items():
        blocks.append(_table(text(f"group_{group}", lang), members, comparison, lang, text("col_metric", lang)))
    blocks.append(_round_bars(comparison, lang))
    return blocks


def _forest(comparison: Comparison, lang: Lang) -> Forest | None:
    found = {row.metric.key: row for row in rows(comparison)}
    ratios = [
        Ratio(
            text(f"row_{key}", lang),
            row.interval.estimate,
            row.interval.low,
            row.interval.high,
            row.better,
            view.interval_text(row, lang),
        )
        for key in _FOREST
        if (row := found.get(key)) is not None and row.interval is not None
    ]
    if not ratios:
        return None
    return Forest(
        text("forest_title", lang),
        text("forest_hint", lang),
        tuple(ratios),
        text("forest_left", lang),
        text("forest_right", lang),
    )


def _table(
    title: str, views: Sequence[view.ViewRow], comparison: Comparison, lang: Lang, first: str, hint: str = ""
) -> DataTable:
    two = comparison.b is not None
    header = [first, *view.names(comparison)]
    has_ratio = two and any(one.ratio for one in views)
    has_verdict = two and any(one.verdict for one in views)
    if has_ratio:
        header += [text("col_difference", lang), text("col_interval" if _is_quality(views) else "col_ratio", lang)]
    if has_verdict:
        header.append(text("col_better", lang))
    table_rows = []
    for one in views:
        cells = [TextCell(one.name), _value(one.a, one.better == "A", lang)]
        if two:
            cells.append(_value(one.b, one.better == "B", lang))
        if has_ratio:
            cells += [TextCell(one.difference), TextCell(one.ratio)]
        if has_verdict:
            cells.append(TextCell(one.verdict, look="strong" if one.better else "absent"))
        table_rows.append(tuple(cells))
    return DataTable(
        title,
        tuple(header),
        tuple(table_rows),
        frozenset(range(1, 5 if has_ratio else len(view.names(comparison)) + 1)),
        hint,
        total=any(one.is_total for one in views),
    )


def _is_quality(views: Sequence[view.ViewRow]) -> bool:
    return any(one.group == "quality" for one in views)


def _value(shown: str, is_better: bool, lang: Lang) -> TextCell:
    if shown == text("not_seen", lang):
        return TextCell(shown, look="absent")
    return TextCell(shown, look="strong" if is_better else "")


def _round_bars(comparison: Comparison, lang: Lang) -> Bars:
    most = min(len(side.rounds) for side in comparison.sides)
    groups = []
    for place in range(most):
        bars = []
        for tone, (side, letter) in enumerate(zip(comparison.sides, "AB", strict=False)):
            value = _throughput(side.rounds[place])
            bars.append(Bar(letter, value, view.seen(value, "tok/s", lang), tone))
        groups.append((text("round", lang, number=place + 1), tuple(bars)))
    return Bars(text("bars_rounds", lang), text("bars_rounds_hint", lang), tuple(groups), wide=True)


def _throughput(run: RunResult) -> float | None:
    tokens = sum(record.completion_tokens or 0 for record in run.good)
    return tokens / run.duration if run.duration > 0 and run.good else None


def _quality(comparison: Comparison, lang: Lang) -> list[Block]:
    a, b = view.qualities(comparison)
    if a is None and b is None:
        return []
    scenarios = [(row.scenario or text("scenario_mean", lang), (row.a, row.b)) for row in quality_rows(a, b)]
    dimensions = [(text(name, lang), values) for name, values in view.dimensions(comparison).items()]
    first = text("col_scenario", lang)
    return [
        _table(text("quality_table", lang), view.quality_views(comparison, lang), comparison, lang, first),
        _score_bars(text("quality_bars", lang), scenarios, comparison, lang),
        _score_bars(text("quality_dimensions", lang), dimensions, comparison, lang),
        Notes(tuple(view.quality_notes(comparison, lang))),
    ]


def _score_bars(
    title: str, scores: Sequence[tuple[str, Sequence[float | None]]], comparison: Comparison, lang: Lang
) -> Bars:
    groups = []
    for name, values in scores:
        bars = tuple(
            Bar(letter, value, view.score(value, lang), tone)
            for tone, (letter, value) in enumerate(zip("AB", values[: len(comparison.sides)], strict=False))
        )
        groups.append((name, bars))
    return Bars(title, text("chart_bars_better_high", lang), tuple(groups), top=BEST)


def _pictures(comparison: Comparison, lang: Lang) -> list[Block]:
    origin = min(run.start for run in comparison.runs)
    if not comparison.in_turn:
        origins = [min(run.start for run in side.rounds) for side in comparison.sides]
    else:
        origins = [origin] * len(comparison.sides)
    named = [
        NamedRun(name, run, tone, run.start - origins[tone])
        for tone, (side, name) in enumerate(zip(comparison.sides, view.names(comparison), strict=True))
        for run in side.rounds
    ]
    last = [
        NamedRun(name, side.rounds[-1], tone)
        for tone, (side, name) in enumerate(zip(comparison.sides, view.names(comparison), strict=True))
    ]
    longest = max(side.rounds[-1].duration for side in comparison.sides)
    timelines = [found for one in last if (found := timeline(one, lang, longest)) is not None]
    charts = (
        over_time(named, lang),
        distribution(named, lang),
        distribution(named, lang, of="ttft"),
        throughput(named, lang, needs_all=True),
    )
    return [*timelines, *(chart for chart in charts if chart is not None)]


def _method(comparison: Comparison, lang: Lang, machine: Mapping[str, CellValue]) -> list[Block]:
    facts = [
        (text("fact_workload", lang), workload_line(comparison.a.workload)),
        (text("fact_client_load", lang), client_line(comparison.runs, lang)),
    ]
    lines = (*view.method_notes(comparison, lang), *view.cold_remarks(comparison, lang))
    return [Notes(lines), *fact_blocks(facts, machine, lang)]
