"""Parts of an HTML report: text, tables and pictures, each with its HTML. Pure; every text is escaped here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Protocol

from gateway.bench.report_texts import Lang, text
from gateway.bench.results import CellKind

Tone = int
"""Index of a colour: 0 is side A, 1 side B, others follow."""


class Charts(Protocol):
    """Collects the data of charts that the page's script draws."""

    lang: Lang

    def add(self, chart: Mapping[str, Any]) -> str:
        """Keep the chart's data and return the id of its element."""
        ...


class Block(Protocol):
    """A part of a section."""

    def html(self, charts: Charts) -> str:
        """Return its HTML."""
        ...


@dataclass(frozen=True, slots=True)
class Tile:
    """A single figure; `detail` says what it is about."""

    what: str
    value: str
    detail: str = ""

    def html(self, charts: Charts) -> str:
        detail = f'<div class="detail">{escape(self.detail)}</div>' if self.detail else ""
        return (
            f'<div class="tile"><div class="what">{escape(self.what)}</div>'
            f'<div class="value">{escape(self.value)}</div>{detail}</div>'
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """A row of single figures."""

    tiles: tuple[Tile, ...]

    def html(self, charts: Charts) -> str:
        return f'<div class="tiles">{"".join(tile.html(charts) for tile in self.tiles)}</div>'


@dataclass(frozen=True, slots=True)
class TextCell:
    """A formatted cell of a table.

    Attributes:
        kind: a value that was not measured gets a mark that says so.
        look: `strong`, `good`, `bad`, `absent` or empty.
    """

    text: str
    kind: CellKind = "measured"
    look: str = ""
    note: str = ""

    def html(self, tag: str, numeric: bool, lang: Lang) -> str:
        words = " ".join(word for word in (("num" if numeric else ""), self.look, self._kind_word) if word)
        mark = f' <span class="kind {self.kind}">{escape(text(self.kind, lang))}</span>' if self._kind_word else ""
        note = f' <span class="hint">{escape(self.note)}</span>' if self.note else ""
        attributes = (' scope="row"' if tag == "th" else "") + (f' class="{words}"' if words else "")
        return f"<{tag}{attributes}>{escape(self.text)}{mark}{note}</{tag}>"

    @property
    def _kind_word(self) -> str:
        return "" if self.kind == "measured" else self.kind


@dataclass(frozen=True, slots=True)
class DataTable:
    """A table. The first cell of a row is its heading; `numeric` columns are aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[TextCell, ...], ...]
    numeric: frozenset[int] = frozenset()
    hint: str = ""
    total: bool = False
    """True if the last row is set apart."""
    folded: bool = False

    def html(self, charts: Charts) -> str:
        head = "".join(
            f'<th scope="col"{" class=num" if place in self.numeric else ""}>{escape(name)}</th>'
            for place, name in enumerate(self.header)
        )
        body = "".join(self._row(number, row, charts.lang) for number, row in enumerate(self.rows))
        caption = "" if self.folded or not self.title else f"<caption>{escape(self.title)}</caption>"
        region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.title)}">'
        table = f"{region}<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        hint = f'<p class="hint">{escape(self.hint)}</p>' if self.hint else ""
        if self.folded:
            table = f"<details><summary>{escape(self.title)}</summary>{table}{hint}</details>"
            hint = ""
        return f'<div class="card wide">{table}{hint}</div>'

    def _row(self, number: int, row: Sequence[TextCell], lang: Lang) -> str:
        cells = "".join(
            cell.html("td" if place else "th", place in self.numeric, lang) for place, cell in enumerate(row)
        )
        is_total = self.total and number == len(self.rows) - 1
        return f"<tr{' class=total' if is_total else ''}>{cells}</tr>"


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with their values, such as the machine."""

    title: str
    facts: tuple[tuple[str, str], ...]

    def html(self, charts: Charts) -> str:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.facts)
        return f'<div class="card wide"><h3>{escape(self.title)}</h3><dl class="facts">{rows}</dl></div>'


@dataclass(frozen=True, slots=True)
class Notes:
    """A list of sentences."""

    lines: tuple[str, ...]

    def html(self, charts: Charts) -> str:
        items = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        return f'<div class="card wide"><ul class="notes">{items}</ul></div>'


@dataclass(frozen=True, slots=True)
class Terminal:
    """The summary as the terminal shows it."""

    title: str
    lines: str

    def html(self, charts: Charts) -> str:
        return f'<div class="card wide"><h3>{escape(self.title)}</h3><pre tabindex="0">{escape(self.lines)}</pre></div>'


@dataclass(frozen=True, slots=True)
class Series:
    """Points or a line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: Tone
    kind: CellKind = "measured"


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with two axes that the page's script draws.

    Attributes:
        form: `points`, `lines` or `steps`.
        top: end of the vertical axis; None: the data decide.
        log: a logarithmic horizontal axis.
    """

    title: str
    hint: str
    form: str
    x: str
    y: str
    series: tuple[Series, ...]
    top: float | None = None
    log: bool = False
    wide: bool = False

    def html(self, charts: Charts) -> str:
        name = charts.add(
            {
                "form": self.form,
                "x": self.x,
                "y": self.y,
                "top": self.top,
                "log": self.log,
                "series": [
                    {
                        "name": one.name,
                        "tone": one.tone,
                        "kind": one.kind,
                        "x": _increasing(one.x),
                        "y": [_rounded(value) for value in one.y],
                    }
                    for one in self.series
                ],
            }
        )
        return (
            f'<figure class="card{" wide" if self.wide else ""}"><h3>{escape(self.title)}</h3>'
            f'<p class="hint">{escape(self.hint)}</p><div class="plot" id="{name}" role="img" '
            f'aria-label="{escape(self.title)}"></div></figure>'
        )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _increasing(values: Sequence[float]) -> list[float]:
    """Return the values, moved apart imperceptibly where they are equal: one place holds one point of a series."""
    step = max((abs(value) for value in values), default=0.0) * 1e-7 or 1e-9
    found: list[float] = []
    for value in values:
        found.append(float(f"{max(value, found[-1] + step) if found else value:.10g}"))
    return found


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""

    def html(self, charts: Charts) -> str:
        intro = f'<p class="intro">{escape(self.intro)}</p>' if self.intro else ""
        blocks = "".join(block.html(charts) for block in self.blocks)
        return f'<section><h2>{escape(self.title)}</h2>{intro}<div class="cards">{blocks}</div></section>'


@dataclass(frozen=True, slots=True)
class SideCard:
    """One side of the measurement in the head of the page."""

    name: str
    title: str
    facts: tuple[tuple[str, str], ...]
    tone: Tone = 0

    def html(self, charts: Charts) -> str:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in self.facts)
        name = f"<b>{escape(self.name)}</b> " if self.name else ""
        title = f'<div class="name">{name}{escape(self.title)}</div>'
        return f'<div class="side tone-{self.tone}">{title}<dl>{rows}</dl></div>'


@dataclass(frozen=True, slots=True)
class Verdict:
    """A conclusion and the rule that led to it."""

    words: str
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    lang: Lang
    eyebrow: str
    title: str
    lead: str
    sides: tuple[SideCard, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    warnings: tuple[str, ...] = ()
    tiles: Tiles = field(default_factory=lambda: Tiles(()))
    sections: tuple[Section, ...] = ()
    footer: str = ""
