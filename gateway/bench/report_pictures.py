"""Pictures of a report that need no script: bars, intervals, and the timeline of requests. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from gateway.bench.report_blocks import Charts, Tone
from gateway.bench.report_texts import number, text
from gateway.bench.results import CellKind

MOST_REQUESTS = 64
"""Requests that a timeline shows: more would be thinner than a line."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; `value` is None where there is nothing to show, and `shown` says why."""

    name: str
    value: float | None
    shown: str
    tone: Tone
    kind: CellKind = "measured"


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars with a common scale from 0 to `top`; None: the longest bar."""

    title: str
    hint: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    wide: bool = False
    top: float | None = None

    def html(self, charts: Charts) -> str:
        bars = [bar for _, group in self.groups for bar in group]
        top = self.top or max((bar.value for bar in bars if bar.value is not None), default=0.0) or 1.0
        rows = []
        for name, group in self.groups:
            if len(group) > 1 or not group[0].name:
                rows.append(f'<div class="group">{escape(name)}</div>' if len(group) > 1 else "")
            rows += [self._row(bar, bar.name if len(group) > 1 else bar.name or name, top) for bar in group]
        return (
            f'<figure class="card{" wide" if self.wide else ""}"><h3>{escape(self.title)}</h3>'
            f'<p class="hint">{escape(self.hint)}</p>{_kinds(bars, charts)}'
            f'<div class="bars">{"".join(rows)}</div></figure>'
        )

    @staticmethod
    def _row(bar: Bar, name: str, top: float) -> str:
        if bar.value is None:
            inner, look = "", " absent"
        else:
            width = max(0.0, 100 * bar.value / top)
            inner, look = f'<div class="bar {bar.kind}" style="width:{width:.2f}%"></div>', ""
        return (
            f'<div class="label">{escape(name)}</div><div class="track tone-{bar.tone}">{inner}</div>'
            f'<div class="value{look}">{escape(bar.shown)}</div>'
        )


def _kinds(bars: Sequence[Bar], charts: Charts) -> str:
    """Return a legend of measured, computed and forecast bars where they differ."""
    kinds = list(dict.fromkeys(bar.kind for bar in bars))
    if kinds in ([], ["measured"]):
        return ""
    tones = {bar.kind: bar.tone for bar in bars}
    items = "".join(
        f'<li class="tone-{tones[kind]}"><i class="{kind}"></i>{escape(text(kind, charts.lang))}</li>' for kind in kinds
    )
    return f'<ul class="legend">{items}</ul>'


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio B ÷ A with its interval; `better` is `A`, `B` or empty."""

    name: str
    estimate: float
    low: float | None
    high: float | None
    better: str
    shown: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Ratios with their intervals around 1, on a logarithmic scale."""

    title: str
    hint: str
    ratios: tuple[Ratio, ...]
    left: str
    right: str

    def html(self, charts: Charts) -> str:
        ends = [value for one in self.ratios for value in (one.estimate, one.low, one.high) if value is not None]
        reach = min(max([abs(math.log(value)) for value in ends if value > 0] + [math.log(1.25)]), math.log(50)) * 1.08

        def place(value: float) -> float:
            return max(0.0, min(100.0, 50 + 50 * math.log(value) / reach))

        rows = "".join(self._row(one, place) for one in self.ratios)
        low, high = (number(math.exp(side * reach), "x", charts.lang) for side in (-1, 1))
        axis = (
            f'<div class="pad"></div><div class="ends"><span style="left:0">{escape(self.left)} <i>{low}</i></span>'
            f'<span style="left:50%">1</span><span style="left:100%"><i>{high}</i> {escape(self.right)}</span></div>'
            '<div class="pad"></div>'
        )
        return (
            f'<figure class="card wide"><h3>{escape(self.title)}</h3><p class="hint">{escape(self.hint)}</p>'
            f'<div class="forest">{rows}{axis}</div></figure>'
        )

    @staticmethod
    def _row(one: Ratio, place: Callable[[float], float]) -> str:
        tone = {"A": "tone-0", "B": "tone-1"}.get(one.better, "neutral")
        span = ""
        if one.low is not None and one.high is not None:
            left, right = place(one.low), place(one.high)
            span = f'<div class="range" style="left:{left:.2f}%;width:{max(0.4, right - left):.2f}%"></div>'
        return (
            f'<div class="label">{escape(one.name)}</div><div class="track {tone}">'
            f'<div class="same" style="left:50%"></div>{span}'
            f'<div class="point" style="left:{place(one.estimate):.2f}%"></div></div>'
            f'<div class="value">{escape(one.shown)}</div>'
        )


@dataclass(frozen=True, slots=True)
class Span:
    """One request of a timeline, in seconds from the start of its run.

    `first` is the arrival of the first token, None where it was not seen.
    """

    name: str
    due: float
    start: float
    first: float | None
    end: float
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each request waited, was worked on and answered: requests that are served together lie side by side."""

    title: str
    hint: str
    spans: tuple[Span, ...]
    seconds: float
    tone: Tone = 0

    def html(self, charts: Charts) -> str:
        lang = charts.lang
        shown = self.spans[:MOST_REQUESTS]
        rows = "".join(self._row(span, charts) for span in shown)
        states = [(key, text(f"timeline_{key}", lang)) for key in self._states()]
        legend = "".join(
            f'<li class="tone-{self.tone}"><i class="{key}"></i>{escape(words)}</li>' for key, words in states
        )
        is_cut = len(self.spans) > len(shown)
        more = text("timeline_more", lang, shown=len(shown), all=len(self.spans)) if is_cut else ""
        end = number(self.seconds, "s", lang)
        return (
            f'<figure class="card"><h3>{escape(self.title)}</h3><p class="hint">{escape(self.hint)} {escape(more)}</p>'
            f'<ul class="legend">{legend}</ul><div class="timeline tone-{self.tone}">{rows}'
            f'<div></div><div class="ends"><span>0</span><span>{escape(end)}</span></div><div></div></div></figure>'
        )

    def _states(self) -> list[str]:
        found = {
            "waited": any(span.start - span.due > 0.002 * self.seconds for span in self.spans),
            "first": any(span.first is not None for span in self.spans),
            "rest": True,
            "failed": any(span.failed for span in self.spans),
        }
        return [key for key, is_there in found.items() if is_there]

    def _row(self, span: Span, charts: Charts) -> str:
        whole = self.seconds or 1.0
        first = span.start if span.first is None else min(span.first, span.end)
        parts = [("waited", span.due, span.start), ("first", span.start, first), ("rest", first, span.end)]
        if span.failed:
            parts = [parts[0], ("failed", span.start, span.end)]
        places = [(name, 100 * start / whole, 100 * (end - start) / whole) for name, start, end in parts if end > start]
        pieces = "".join(
            f'<span class="{name}" style="left:{left:.2f}%;width:{width:.2f}%"></span>' for name, left, width in places
        )
        value = number(span.end - span.start, "s", charts.lang)
        return (
            f'<div class="label">{escape(span.name)}</div><div class="track">{pieces}</div>'
            f'<div class="value">{escape(value)}</div>'
        )
