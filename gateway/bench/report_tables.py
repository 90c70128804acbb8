"""Tables of a scenario as HTML tables and as bars. Pure."""

import re
from collections.abc import Sequence

from gateway.bench.report_blocks import DataTable, TextCell
from gateway.bench.report_pictures import Bar, Bars
from gateway.bench.report_texts import Lang, number, text
from gateway.bench.results import Cell, Column, Table

FOLDED_ROWS = 12
"""Rows from which a table is folded at first."""
MOST_GROUPS = 16
INCOMPLETE = "until_last_failure"
"""Note of a total time in which not everything was answered."""
_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:s|초)?\s*")
_PICTURES = (("speedup",), ("total", "in_turn_computed", "forecast"), ("per_file",), ("mean_per_request",))
"""Columns that make one picture each; those that a table does not have are left out."""


def data_table(table: Table, lang: Lang) -> DataTable:
    """Return the table with texts and formatted numbers."""
    rows = tuple(
        tuple(_cell(cell, column, lang) for cell, column in zip(row, table.columns, strict=True)) for row in table.rows
    )
    return DataTable(
        text(table.key, lang),
        tuple(text(column.key, lang) for column in table.columns),
        rows,
        frozenset(place for place, column in enumerate(table.columns) if column.unit not in ("", "key")),
        folded=len(rows) > FOLDED_ROWS,
    )


def _cell(cell: Cell, column: Column, lang: Lang) -> TextCell:
    note = text(cell.note, lang) if cell.note else ""
    if cell.value is None:
        return TextCell(text("none", lang), cell.kind if note else "measured", "absent", note)
    is_key = column.unit == "key" and isinstance(cell.value, str)
    shown = (
        text(str(cell.value), lang) if is_key else number(cell.value, "" if column.unit == "n" else column.unit, lang)
    )
    return TextCell(shown, cell.kind, note=note)


def table_bars(table: Table, lang: Lang) -> list[Bars]:
    """Return a picture for each group of columns that can be compared by length, if there are several rows."""
    if not 2 <= len(table.rows) <= MOST_GROUPS:
        return []
    keys = [column.key for column in table.columns]
    found = [
        _bars(table, [keys.index(key) for key in wanted if key in keys], lang)
        for wanted in _PICTURES
        if wanted[0] in keys
    ]
    return [bars for bars in found if any(bar.value is not None for _, group in bars.groups for bar in group)]


def _bars(table: Table, places: Sequence[int], lang: Lang) -> Bars:
    main = table.columns[places[0]]
    first = table.columns[0]
    groups = []
    for row in table.rows:
        head = row[0].value
        label = text(str(head), lang) if first.unit == "key" else f"{number(head, '', lang)}"
        bars = tuple(
            Bar(
                text(table.columns[place].key, lang) if len(places) > 1 else "",
                _length(row[place]),
                _shown(row[place], table.columns[place], lang),
                0,
                row[place].kind if row[place].kind != "computed" or len(places) > 1 else "measured",
            )
            for place in places
        )
        groups.append((f"{text(first.key, lang)} {label}" if first.unit == "n" else label, bars))
    better = {True: "chart_bars_better_low", False: "chart_bars_better_high", None: "chart_bars_hint"}
    title = f"{text(main.key, lang)}: {text(table.key, lang)}"
    return Bars(title, text(better[main.lower_is_better], lang), tuple(groups))


def _shown(cell: Cell, column: Column, lang: Lang) -> str:
    shown = number(cell.value, column.unit, lang)
    return f"{shown}, {text(cell.note, lang)}" if cell.note == INCOMPLETE and cell.value is not None else shown


def _length(cell: Cell) -> float | None:
    """Return the value as a number.

    A forecast is text, such as `35` or `35s`, and a range has no length. Neither has the time of a batch
    that failed: beside the others it would look fast.
    """
    value = cell.value
    if cell.note == INCOMPLETE:
        return None
    if isinstance(value, str):
        found = _SECONDS.fullmatch(value) if cell.kind == "forecast" else None
        return float(found[1]) if found else None
    return None if value is None else float(value)
