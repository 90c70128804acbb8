"""The SQLite file of usage: one row for each key, person, tier, backend and day.

It is in WAL mode, so that a reader does not stop the writer, and a process that is killed loses no
transaction that has ended (https://www.sqlite.org/wal.html).
"""

import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from gateway.usage.totals import COUNTS, DIMENSIONS, Counts, Group

BUSY_SECONDS = 5.0
LEAP_DAYS = 31
"""Maximum number of days by which the days to keep move at once."""

_CREATE = f"""
CREATE TABLE IF NOT EXISTS usage (
    {", ".join(f"{name} TEXT NOT NULL" for name in DIMENSIONS)},
    {", ".join(f"{name} {'REAL' if name == 'seconds' else 'INTEGER'} NOT NULL" for name in COUNTS)},
    PRIMARY KEY ({", ".join(DIMENSIONS)})
) WITHOUT ROWID
"""
_CREATE_IDENTITY = "CREATE TABLE IF NOT EXISTS identity (id TEXT NOT NULL)"
_SET_IDENTITY = "INSERT INTO identity SELECT lower(hex(randomblob(8))) WHERE NOT EXISTS (SELECT 1 FROM identity)"
_ADD = f"""
INSERT INTO usage VALUES ({", ".join("?" * (len(DIMENSIONS) + len(COUNTS)))})
ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)}
"""  # noqa: S608 - names from this module


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the file, and create it if it does not exist, for its owner alone: it names persons.

    Raises:
        sqlite3.Error: It cannot be opened, or is not a database.
    """
    with suppress(OSError):  # SQLite says why; its files beside this one get the same mode
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        for statement in (_CREATE, _CREATE_IDENTITY, _SET_IDENTITY):
            connection.execute(statement)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def add_rows(connection: sqlite3.Connection, rows: Mapping[Group, Counts], delete_before: str | None = None) -> None:
    """Add `rows` in one transaction, and delete the days before `delete_before`.

    Raises:
        sqlite3.Error: Nothing has been written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(_ADD, [(*group, *counts) for group, counts in rows.items()])
        if delete_before is not None:
            connection.execute("DELETE FROM usage WHERE day < ?", (delete_before,))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def first_day_to_keep(connection: sqlite3.Connection, today: str, days: int) -> str:
    """Return the first of the last `days` days.

    They end today, but at most `LEAP_DAYS` after the last earlier day with usage: a clock that runs
    years ahead after a start without a battery or a time server must not delete everything.

    Raises:
        sqlite3.Error: The file cannot be read.
    """
    end = date.fromisoformat(today)
    (last,) = connection.execute("SELECT max(day) FROM usage WHERE day < ?", (today,)).fetchone()
    if last is not None:
        end = min(end, date.fromisoformat(last) + timedelta(LEAP_DAYS))
    return (end - timedelta(min(days, end.toordinal() - 1))).isoformat()


def read_rows(path: Path, by: Sequence[str], since: str | None, until: str | None) -> list[dict[str, Any]]:
    """Return sums of usage by the fields `by`, from the day `since` to the day `until`, both included.

    Days are texts such as `2026-11-29`. A file that does not exist has no rows.

    Raises:
        sqlite3.Error: The file cannot be read.
    """
    assert set(by) <= set(DIMENSIONS)
    sums = ", ".join(f"sum({name})" for name in COUNTS)
    names = "".join(f"{name}, " for name in by)
    groups = f"GROUP BY {', '.join(by)} ORDER BY {', '.join(by)}" if by else ""
    query = f"SELECT {names}{sums} FROM usage WHERE day >= ? AND day <= ? {groups}"  # noqa: S608 - checked names
    found = _selected(path, "usage", query, since or "", until or "9999")
    rows = [dict(zip((*by, *COUNTS), values, strict=True)) for values in found if values[-1] is not None]
    for row in rows:
        row["seconds"] = round(row["seconds"], 6)
    return rows


def identity_of(path: Path) -> str | None:
    """Return the name that the file was given when it was created; None if it does not exist yet.

    Raises:
        sqlite3.Error: The file cannot be read.
    """
    found = _selected(path, "identity", "SELECT id FROM identity LIMIT 1")
    return found[0][0] if found else None


def days_of(path: Path) -> list[str]:
    """Return the days of which the file has usage.

    Raises:
        sqlite3.Error: The file cannot be read.
    """
    return [day for (day,) in _selected(path, "usage", "SELECT DISTINCT day FROM usage ORDER BY day")]


def _selected(path: Path, table: str, query: str, *values: str) -> list[tuple[Any, ...]]:
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []  # the writer has just created the file
        return connection.execute(query, values).fetchall()
