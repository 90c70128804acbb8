"""Charts and timelines of runs. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.bench.report_blocks import Chart, Series, Tone
from gateway.bench.report_pictures import Span, Timeline
from gateway.bench.report_texts import Lang, text
from gateway.bench.results import RequestRecord, RunResult

MOST_POINTS = 2000
"""Points of one series; more make the file large and the picture no clearer."""
LOG_RATIO = 30.0
"""Ratio of the largest to the smallest latency from which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class NamedRun:
    """A run with the name and the colour of its series. Several may share a name: they become one series."""

    name: str
    run: RunResult
    tone: Tone
    offset: float = 0.0
    """Seconds from the beginning of the measurement to that of the run."""


def over_time(runs: Sequence[NamedRun], lang: Lang) -> Chart | None:
    """Return the latency of each request by the second in which it was sent; None without answers."""
    series, shown, every = [], 0, 0
    for name, tone, members in _by_name(runs):
        points = sorted(
            (member.offset + record.start - member.run.start, record.latency)
            for member in members
            for record in member.run.good
        )
        kept = thinned(points)
        every, shown = every + len(points), shown + len(kept)
        if kept:
            series.append(Series(name, [x for x, _ in kept], [y for _, y in kept], tone))
    if not series:
        return None
    hint = text("chart_over_time_hint", lang)
    if shown < every:
        hint += " " + text("chart_thinned", lang, shown=shown, all=every)
    return Chart(
        text("chart_over_time", lang),
        hint,
        "points",
        text("axis_sent", lang),
        text("axis_seconds", lang),
        tuple(series),
    )


def distribution(runs: Sequence[NamedRun], lang: Lang, *, of: str = "latency") -> Chart | None:
    """Return the cumulative share of answers by `latency` or `ttft`; None with fewer than 4 in every series."""
    series = []
    for name, tone, members in _by_name(runs):
        values = sorted(
            value for member in members for record in member.run.good if (value := _value(record, of)) is not None
        )
        if len(values) >= 4:
            steps = thinned([(value, 100 * (place + 1) / len(values)) for place, value in enumerate(values)])
            series.append(Series(name, [values[0], *(x for x, _ in steps)], [0.0, *(y for _, y in steps)], tone))
    if not series:
        return None
    positive = [x for one in series for x in one.x if x > 0]
    log = bool(positive) and max(positive) / min(positive) > LOG_RATIO
    if log:
        series = [Series(one.name, [max(x, min(positive)) for x in one.x], one.y, one.tone) for one in series]
    title, axis = (
        ("chart_distribution", "axis_seconds") if of == "latency" else ("chart_ttft_distribution", "axis_ttft")
    )
    return Chart(
        text(title, lang), text("chart_distribution_hint", lang), "steps", text(axis, lang), text("axis_share", lang),
        tuple(_distinct(one) for one in series), top=100.0, log=log,
    )  # fmt: skip


def throughput(runs: Sequence[NamedRun], lang: Lang, *, needs_all: bool = False) -> Chart | None:
    """Return the pieces that arrived in each second; None if no run lasts 3 seconds or was streamed.

    With `needs_all` also if one of the series would be missing.
    """
    series = []
    for name, tone, members in _by_name(runs):
        x: list[float] = []
        y: list[float] = []
        for member in members:
            counts = pieces_by_second(member.run)
            x += [member.offset + second for second in range(len(counts))]
            y += counts
        if len(x) >= 3 and any(y):
            series.append(Series(name, x, y, tone))
        elif needs_all:
            return None
    if not series:
        return None
    return Chart(
        text("chart_throughput", lang), text("chart_throughput_hint", lang), "lines", text("axis_elapsed", lang),
        text("axis_pieces", lang), tuple(_distinct(one) for one in series),
    )  # fmt: skip


def pieces_by_second(run: RunResult) -> list[float]:
    """Return how many pieces of answers arrived in each whole second of the run."""
    counts = [0.0] * int(run.duration)
    for record in run.good:
        if record.ttft is None:
            continue
        moment = record.start + record.ttft - run.start
        for gap in (0.0, *record.itl):
            moment += gap
            if 0 <= moment < len(counts):
                counts[int(moment)] += 1
    return counts


def timeline(named: NamedRun, lang: Lang, seconds: float = 0.0) -> Timeline | None:
    """Return the requests of a run as bars; None for fewer than two.

    The axis ends at `seconds`, or at the end of the last request if that is later.
    """
    run = named.run
    records = run.ended
    if len(records) < 2:
        return None
    spans = tuple(
        Span(
            record.name or str(record.index + 1),
            max(0.0, record.arrival - run.start),
            record.start - run.start,
            None if record.ttft is None else record.start + record.ttft - run.start,
            record.end - run.start,
            not record.is_ok,
        )
        for record in sorted(records, key=lambda record: (record.start, record.end))
    )
    title = text("chart_timeline", lang, run=named.name)
    return Timeline(
        title, text("chart_timeline_hint", lang), spans, max(seconds, *(span.end for span in spans)), named.tone
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MOST_POINTS points: of each stretch the first, and the highest, which matter most."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2
    kept = []
    for number in range(stretches):
        stretch = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        kept += sorted({stretch[0], max(stretch, key=lambda point: point[1])})
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def _value(record: RequestRecord, of: str) -> float | None:
    return record.latency if of == "latency" else record.ttft


def _by_name(runs: Sequence[NamedRun]) -> list[tuple[str, Tone, list[NamedRun]]]:
    names = dict.fromkeys(named.name for named in runs)
    groups = [(name, [named for named in runs if named.name == name]) for name in names]
    return [(name, members[0].tone, members) for name, members in groups]


def _distinct(series: Series) -> Series:
    """Return the series with strictly increasing x: of equal ones the last, which a chart's axis can hold."""
    last = dict(zip(series.x, series.y, strict=True))
    xs = sorted(last)
    return Series(series.name, xs, [last[x] for x in xs], series.tone, series.kind)
