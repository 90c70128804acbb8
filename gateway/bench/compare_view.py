"""Statements of a comparison as texts and formatted rows: shared by its HTML, Markdown and terminal forms. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.bench.compare_result import Comparison
from gateway.bench.compare_rows import Row, rows
from gateway.bench.compare_statistics import Interval
from gateway.bench.quality_scores import WEIGHTS, QualityRow, SideQuality, mean_dimension, recommendation
from gateway.bench.quality_scores import rows as quality_rows
from gateway.bench.report_texts import Lang, digits, number, text


@dataclass(frozen=True, slots=True)
class ViewRow:
    """A row with its formatted cells. `better` is `A`, `B` or empty; `is_total` sets it apart."""

    name: str
    a: str
    b: str
    difference: str
    ratio: str
    verdict: str
    better: str = ""
    group: str = ""
    is_total: bool = False


def names(comparison: Comparison) -> list[str]:
    """Return how the sides are called: A and B, with their models where these differ, else with their names."""
    sides = comparison.sides
    differ = len({side.model for side in sides}) == len(sides)
    return [f"{letter} ({side.model if differ else side.name})" for letter, side in zip("AB", sides, strict=False)]


def row_views(comparison: Comparison, lang: Lang) -> list[ViewRow]:
    """Return the metrics in the order of the table, and after them the figures of a scenario's results."""
    return [*(_view(row, comparison, lang) for row in rows(comparison)), *_figure_views(comparison, lang)]


def groups(views: Sequence[ViewRow]) -> dict[str, list[ViewRow]]:
    """Return the rows by their group, in the order of the tables."""
    return {name: [one for one in views if one.group == name] for name in dict.fromkeys(one.group for one in views)}


def _figure_views(comparison: Comparison, lang: Lang) -> list[ViewRow]:
    """Return the figures that scenarios give, such as `users_realtime`; one value each has no interval."""
    found = []
    for key in dict.fromkeys(key for side in comparison.sides for key in side.figures):
        values = [side.figures.get(key) for side in comparison.sides]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        difference = signed(numbers[1] - numbers[0], "", lang) if len(numbers) == 2 else ""
        shown = [text("not_seen", lang) if value is None else number(value, "", lang) for value in values]
        found.append(ViewRow(key, shown[0], shown[1] if len(shown) > 1 else "", difference, "", "", group="figures"))
    return found


def _view(row: Row, comparison: Comparison, lang: Lang) -> ViewRow:
    factor, unit = _scale(row)
    one_side = comparison.b is None
    difference = None if row.difference is None else row.difference * factor
    a, b = values(row, lang)
    return ViewRow(
        text(f"row_{row.metric.key}", lang),
        a,
        "" if one_side else b,
        "" if difference is None else signed(difference, unit, lang),
        interval_text(row, lang),
        "" if one_side else _better_text(row, lang),
        row.better if row.better in ("A", "B") else "",
        row.metric.group,
    )


def values(row: Row, lang: Lang) -> tuple[str, str]:
    """Return both sides' values in the same unit."""
    factor, unit = _scale(row)
    a, b = (None if value is None else value * factor for value in (row.a, row.b))
    return seen(a, unit, lang), seen(b, unit, lang)


def _scale(row: Row) -> tuple[float, str]:
    """Return factor and unit: times of which both sides are below a second are shown in milliseconds."""
    longest = max((value for value in (row.a, row.b) if value is not None), default=1.0)
    return (1000.0, "ms") if row.metric.unit == "s" and longest < 1 else (1.0, row.metric.unit)


def _better_text(row: Row, lang: Lang) -> str:
    if row.better in ("A", "B"):
        return row.better
    if row.a is None or row.b is None:
        return text("none", lang)
    return text(f"better_{row.better}", lang)


def seen(value: float | None, unit: str, lang: Lang) -> str:
    """Return a value, or that it was not seen."""
    return text("not_seen", lang) if value is None else number(value, unit, lang)


def signed(value: float, unit: str, lang: Lang) -> str:
    """Return a difference with its sign; percentages differ by percentage points."""
    unit = "pp" if unit == "%" else unit
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value), unit, lang)}"


def interval_text(row: Row, lang: Lang) -> str:
    """Return the ratio with its interval, or for metrics that may be 0 the interval of the difference."""
    interval = row.interval
    if interval is None:
        return ""
    if not row.metric.is_ratio:
        unit = row.metric.unit
        shown = signed(interval.estimate, unit, lang)
        if interval.low is None or interval.high is None:
            return shown
        return f"{shown} ({signed(interval.low, '', lang)} – {signed(interval.high, '', lang)})"
    shown = number(interval.estimate, "x", lang)
    if interval.low is None or interval.high is None:
        return shown
    excludes_1 = not interval.crosses(1)
    return f"{shown} ({_bound(interval.low, excludes_1)} – {_bound(interval.high, excludes_1)})"


def _bound(value: float, excludes_1: bool) -> str:
    """Return the end of an interval; one that excludes 1 by little has the decimals that show it."""
    shown = digits(value)
    places = 3
    while excludes_1 and float(shown.replace(",", "")) == 1 and places < 8:
        shown, places = f"{value:.{places}f}", places + 1
    return shown


def verdicts(comparison: Comparison, lang: Lang) -> list[str]:
    """Return the conclusions, the most important first."""
    if comparison.b is None:
        found = [text("verdict_one", lang)]
    else:
        found = [_speed_verdict(comparison, lang), *_count_verdict(comparison, lang)]
    if any(side.quality is not None for side in comparison.sides):
        found.append(text(_recommendation(comparison), lang))
    return found


def _speed_verdict(comparison: Comparison, lang: Lang) -> str:
    """Return the difference in tokens per second: in sum, or for each user where that has no interval."""
    found = {row.metric.key: row for row in rows(comparison)}
    for key in ("throughput", "speed"):
        row = found.get(key)
        if row is not None and row.interval is not None and row.interval.low is not None:
            return _speed_words(row, row.interval, comparison, lang)
    return text("verdict_no_interval", lang)


def _speed_words(row: Row, interval: Interval, comparison: Comparison, lang: Lang) -> str:
    metric = text(f"row_{row.metric.key}", lang)
    low, high = interval.low or 0.0, interval.high or 0.0
    if row.better not in ("A", "B"):
        words = [number(value, "x", lang) for value in (interval.estimate, low, high)]
        return text("verdict_same_speed", lang, metric=metric, estimate=words[0], low=words[1], high=words[2])
    factor = interval.estimate
    if row.better == "A":
        factor, low, high = 1 / factor, 1 / high, 1 / low
    winner = names(comparison)["AB".index(row.better)]
    words = [number(value, "x", lang) for value in (factor, low, high)]
    return text("verdict_speed", lang, metric=metric, winner=winner, factor=words[0], low=words[1], high=words[2])


def _count_verdict(comparison: Comparison, lang: Lang) -> Iterator[str]:
    """Return in how many rows each side is better, unless no row can be judged."""
    a, b = names(comparison)
    counts = {better: sum(row.better == better for row in rows(comparison)) for better in ("A", "B", "same")}
    if judged := sum(counts.values()):
        yield text(
            "verdict_counts", lang, a=a, b=b, a_rows=counts["A"], b_rows=counts["B"], same_rows=counts["same"],
            all=judged,
        )  # fmt: skip


def _recommendation(comparison: Comparison) -> str:
    qualities = [side.quality for side in comparison.sides]
    return recommendation(qualities[0], qualities[1] if len(qualities) > 1 else None)


def quality_views(comparison: Comparison, lang: Lang) -> list[ViewRow]:
    """Return the scenarios with their total scores, and the mean row."""
    a, b = qualities(comparison)
    return [_quality_view(row, lang) for row in quality_rows(a, b)]


def _quality_view(row: QualityRow, lang: Lang) -> ViewRow:
    interval = ""
    difference = ""
    if row.difference is not None:
        difference = signed(row.difference.estimate, "", lang)
        low, high = row.difference.low, row.difference.high
        if low is not None and high is not None:
            interval = f"{difference} ({signed(low, '', lang)} – {signed(high, '', lang)})"
    verdict = "" if row.difference is None else text("better_same", lang)
    if row.better:
        verdict = row.better
    shown = [score(value, lang) for value in (row.a, row.b)]
    name = row.scenario or text("scenario_mean", lang)
    return ViewRow(name, shown[0], shown[1], difference, interval, verdict, row.better, "quality", not row.scenario)


def dimensions(comparison: Comparison) -> dict[str, list[float | None]]:
    """Return the mean of each dimension on both sides."""
    sides = qualities(comparison)
    return {name: [None if side is None else mean_dimension(side, name) for side in sides] for name in WEIGHTS}


def qualities(comparison: Comparison) -> tuple[SideQuality | None, SideQuality | None]:
    """Return the quality results of A and of B."""
    b = comparison.b
    return comparison.a.quality, None if b is None else b.quality


def score(value: float | None, lang: Lang) -> str:
    """Return a score with two decimals."""
    return text("not_seen", lang) if value is None else f"{value:.2f}"


def quality_notes(comparison: Comparison, lang: Lang) -> list[str]:
    """Return the method of the quality scores."""
    found = [quality for quality in qualities(comparison) if quality is not None]
    if not found:
        return []
    first = found[0]
    lines = [
        text("quality_method", lang, tasks=len(first.tasks), repeats=first.repeats, temperature=first.temperature),
        text("quality_by_judge", lang, judge=first.judge) if first.judge else text("quality_by_checks", lang),
    ]
    for name, side in zip(names(comparison), qualities(comparison), strict=False):
        if side is not None and (side.failed or side.cut):
            lines.append(text("quality_losses", lang, side=name, failed=side.failed, cut=side.cut, all=side.asked))
    if first.judge and first.judge in {side.model for side in comparison.sides}:
        lines.append(text("quality_judge_is_side", lang))
    if first.guards is not None:
        held = ", ".join(name for name, holds in first.guards.items() if holds) or text("guards_none", lang)
        lines.append(text("quality_guards", lang, guards=held))
    return lines


def method_notes(comparison: Comparison, lang: Lang) -> list[str]:
    """Return how the sides were measured and compared."""
    lines = [text("method_clock", lang)]
    if comparison.b is not None:
        lines.append(
            text("method_paired", lang, n=min(len(side.rounds) for side in comparison.sides))
            if comparison.in_turn
            else text("method_files", lang)
        )
        lines += [text("method_values", lang), text("method_better", lang)]
    return [*lines, text("method_gpu", lang), text("method_content", lang)]


def remarks(comparison: Comparison, lang: Lang) -> list[str]:
    """Return what a reader has to know about this comparison."""
    found = [text(key, lang) for key in comparison.notes if not key.startswith("forced:")]
    for key in comparison.notes:
        if key.startswith("forced:"):
            found.insert(0, text("forced", lang, fields=key.removeprefix("forced:")))
    b = comparison.b
    if b is not None and comparison.a.model != b.model:
        found.append(text("unlike_models", lang, a=comparison.a.model, b=b.model))
    if b is not None and comparison.in_turn and min(len(side.rounds) for side in comparison.sides) < 3:
        found.append(text("few_rounds", lang))
    return found


def cold_remarks(comparison: Comparison, lang: Lang) -> list[str]:
    """Return why load times are missing."""
    if not any(side.cold for side in comparison.sides):
        return [text("cold_not_asked", lang)]
    return [
        text(reason, lang, side=name)
        for name, side in zip(names(comparison), comparison.sides, strict=True)
        for reason in dict.fromkeys(cold.reason for cold in side.cold if cold.reason)
    ]
