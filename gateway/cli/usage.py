"""`gateway usage`: what a running gateway reports, as a table, CSV or JSON."""

import csv
from datetime import date
from typing import Any, TextIO
from urllib.parse import urlencode

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.usage.totals import DIMENSIONS


def path_of(by: str, since: str | None, until: str | None) -> str:
    """Return the path of the call."""
    given = {"by": by, "since": since, "until": until}
    return f"/ops/usage?{urlencode({name: value for name, value in given.items() if value is not None})}"


def wrong_words(by: str, since: str | None, until: str | None) -> list[str]:
    """Return a line for each option that no gateway accepts."""
    lines = []
    if unknown := [word for word in map(str.strip, by.split(",")) if word and word not in DIMENSIONS]:
        lines.append(f"--by: got {unknown[0]!r}; expected a list of {', '.join(DIMENSIONS)}, separated by commas")
    for name, text in (("--since", since), ("--until", until)):
        if text is not None and not _is_day(text):
            lines.append(f"{name}: got {text!r}; expected a date such as 2026-11-29")
    return lines


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows as a table."""
    if not rows:
        console.print("no usage")
        return
    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[Text(_printable(value)) if isinstance(value, str) else f"{value:,}" for value in row.values()])
    console.print(table)


def _printable(value: str) -> str:
    """Return a text without control characters, such as U+009B, which a terminal obeys: persons name themselves."""
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in value)


def write_csv(rows: list[dict[str, Any]], out: TextIO) -> None:
    """Write the rows as CSV (RFC 4180), with a line of names; nothing without rows."""
    if rows:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)


def _safe(value: object) -> object:
    """Return a value that spreadsheets do not take for a formula: persons name themselves (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
