"""`performance_report_YYYYMMDD_HHMMSS.md` of a comparison. Pure."""

from collections.abc import Mapping, Sequence

from gateway.bench import compare_view as view
from gateway.bench.compare_report import lead
from gateway.bench.compare_result import Comparison
from gateway.bench.report import client_line, workload_line
from gateway.bench.report_texts import Lang, date, text
from gateway.bench.results import CellValue


def filename(comparison: Comparison) -> str:
    """Return the report's name, with the time of the measurement."""
    return f"performance_report_{comparison.date.replace('-', '_')}.md"


def markdown(comparison: Comparison, lang: Lang = "en", machine: Mapping[str, CellValue] | None = None) -> str:
    """Return the report; the better side's value is bold."""
    one_side = comparison.b is None
    lines = [
        f"# {text('compare_title_one' if one_side else 'compare_title', lang)}",
        "",
        f"{lead(comparison, lang)} · {date(comparison.date)}",
        "",
        *_sides(comparison, lang),
        "",
        *(f"**{_escaped(words)}**  " for words in view.verdicts(comparison, lang)),
    ]
    views = view.row_views(comparison, lang)
    for group, members in view.groups(views).items():
        lines += ["", f"## {text(f'group_{group}', lang)}", ""]
        lines += _table(members, comparison, lang, "col_metric", "col_ratio")
    if any(quality is not None for quality in view.qualities(comparison)):
        lines += ["", f"## {text('section_quality', lang)}", "", text("quality_table", lang), ""]
        lines += _table(view.quality_views(comparison, lang), comparison, lang, "col_scenario", "col_interval")
        lines += ["", text("quality_dimensions", lang), "", *_dimensions(comparison, lang), ""]
        lines += [f"- {_escaped(line)}" for line in view.quality_notes(comparison, lang)]
    lines += ["", f"## {text('section_method', lang)}", ""]
    notes = (
        *view.remarks(comparison, lang),
        *view.method_notes(comparison, lang),
        *view.cold_remarks(comparison, lang),
    )
    lines += [f"- {_escaped(line)}" for line in notes]
    lines += ["", *_facts(comparison, lang, machine or {})]
    return "\n".join([*lines, ""])


def _sides(comparison: Comparison, lang: Lang) -> list[str]:
    header = ["", text("fact_model", lang), text("fact_url", lang), text("fact_api", lang), text("fact_server", lang)]
    rows = [
        [
            letter,
            f"`{side.model}`",
            side.url or text("none", lang),
            f"{side.api} {side.endpoint}".strip(),
            ", ".join(f"{name} {version}" for name, version in side.server.items()) or text("not_seen", lang),
        ]
        for letter, side in zip("AB", comparison.sides, strict=False)
    ]
    return _lines(header, rows, numbers=())


def _table(views: Sequence[view.ViewRow], comparison: Comparison, lang: Lang, first: str, interval: str) -> list[str]:
    one_side = comparison.b is None
    header = [text(first, lang), *view.names(comparison)]
    if not one_side:
        header += [text("col_difference", lang), text(interval, lang), text("col_better", lang)]
    rows = []
    for one in views:
        name = f"**{one.name}**" if one.is_total else one.name
        values = [_strong(one.a, one.better == "A"), *([] if one_side else [_strong(one.b, one.better == "B")])]
        rest = [] if one_side else [one.difference, one.ratio, _strong(one.verdict, bool(one.better))]
        rows.append([name, *values, *rest])
    return _lines(header, rows, numbers=range(1, len(header) - (0 if one_side else 1)))


def _dimensions(comparison: Comparison, lang: Lang) -> list[str]:
    sides = len(comparison.sides)
    rows = [
        [text(name, lang), *(view.score(value, lang) for value in values[:sides])]
        for name, values in view.dimensions(comparison).items()
    ]
    return _lines([text("col_score", lang), *view.names(comparison)], rows, numbers=range(1, sides + 1))


def _facts(comparison: Comparison, lang: Lang, machine: Mapping[str, CellValue]) -> list[str]:
    rows = [
        [text("fact_workload", lang), workload_line(comparison.a.workload)],
        [text("fact_client_load", lang), client_line(comparison.runs, lang)],
        *([text(f"fact_{key}", lang), str(value)] for key, value in machine.items()),
    ]
    return _lines([text("facts_measurement", lang), ""], rows, numbers=())


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    marks = ["---:" if place in numbers else "---" for place in range(len(header))]
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (header, marks, *rows)]


def _strong(value: str, is_strong: bool) -> str:
    return f"**{value}**" if is_strong else value


def _escaped(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
