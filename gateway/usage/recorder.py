"""Recorder of usage: sums exchanges in memory, and has one thread write the sums once a second.

A disk that is full or broken costs a line in the log, never a request: what could not be written is
added to the next attempt.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from gateway.telemetry.exchange import Attribution, Exchange
from gateway.usage.file import add_rows, days_of, first_day_to_keep, identity_of, open_for_writing, read_rows
from gateway.usage.totals import DIMENSIONS, Counts, Group, Row, Totals, is_row, summed

WRITE_SECONDS = 0.7
"""Time between two writes. With the time that exchanges wait to be recorded, it is below a second."""
MAX_ROWS = 50_000
"""Maximum number of rows that wait to be written."""
CLOSE_SECONDS = 5.0
REPEAT_SECONDS = 300.0
"""Time after which a failure that goes on is logged again."""
SECONDS_PER_DAY = 86_400

_log = logging.getLogger(__name__)

Finished = Sequence[tuple[Exchange, Attribution | None]]


class OtherUsage(Protocol):
    """Usage that other replicas have recorded."""

    async def rows(self, since: str | None, until: str | None) -> list[Row] | None:
        """Return the others' usage of these days with all fields; None if it is not known."""


class UsageRecorder:
    """Usage in the file at `path`, of the last `days` days.

    `wall` is in Unix time. Build it in the event loop that calls `observe`.
    """

    def __init__(self, path: Path, days: int, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self._wall = wall
        self._totals = Totals()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._writer = _Writer(path, days)
        self._today = 0, ""
        self.others: OtherUsage | None = None
        """Usage of other replicas; None if there are none."""
        self._changed_days: set[str] = set()
        self.settle: Callable[[], None] = lambda: None
        """Called before a reader sees the sums, to add exchanges that have ended and not been recorded."""
        self.flush_others: Callable[[], Awaitable[object]] | None = None
        """Has other replicas write their sums to the same file, before a reader sees them."""

    def __repr__(self) -> str:
        return f"<UsageRecorder {self.path} {self._totals}>"

    def observe(self, finished: Finished) -> None:
        """Add exchanges that have ended."""
        day = self._day()
        for exchange, attribution in finished:
            self._totals.add(exchange, attribution, day)
        self._changed_days.add(day)
        if self._timer is None and self._totals.rows:
            self._timer = self._loop.call_later(WRITE_SECONDS, self._write)

    async def rows(self, by: Sequence[str], since: str | None, until: str | None) -> list[Row]:
        """Return sums of this replica's usage, those of the last second included.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        await self.flush()
        if self.flush_others is not None:
            await self.flush_others()
        return await asyncio.to_thread(read_rows, self.path, by, since, until)

    async def flush(self) -> None:
        """Write the sums of all exchanges that have ended."""
        self.settle()
        await asyncio.wrap_future(self._write())

    async def rows_of_all(self, by: Sequence[str], since: str | None, until: str | None) -> tuple[list[Row], bool]:
        """Return sums of the usage of all replicas, and whether that of all is in them.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        own = await self.rows(by, since, until)
        if self.others is None:
            return own, True
        others = await self.others.rows(since, until)
        if others is None:
            return own, False
        return await asyncio.to_thread(lambda: summed((*own, *filter(is_row, others)), by)), True

    # For other replicas

    async def identity(self) -> str | None:
        """Return the name of the file; None as long as nothing is recorded.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        await asyncio.wrap_future(self._write())
        return await asyncio.to_thread(identity_of, self.path)

    async def days(self) -> list[str]:
        """Return the days of which there is usage.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        return await asyncio.to_thread(days_of, self.path)

    async def rows_of_day(self, day: str) -> list[Row]:
        """Return the usage of a day with all fields.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        return await self.rows(DIMENSIONS, day, day)

    def take_changed_days(self) -> set[str]:
        """Return the days whose usage has changed since the last call."""
        found, self._changed_days = self._changed_days, set()
        return found

    async def close(self) -> None:
        """Write what is left, and stop the thread."""
        self._write()
        await asyncio.to_thread(self._writer.close)

    def _write(self) -> "Future[None]":
        """Hand the rows over to the thread; the result is done when they are written, or have failed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._writer.write(self._totals.take(), self._wall())

    def _day(self) -> str:
        now = self._wall()
        number = int(now) // SECONDS_PER_DAY
        if number != self._today[0]:
            self._today = number, day_of(now)
        return self._today[1]


def day_of(now: float) -> str:
    """Return the date in UTC of `now` in Unix time, such as `2026-11-29`."""
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and the number of a file, None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Writer:
    """The thread that writes. Only the threads of other replicas write to the same file."""

    def __init__(self, path: Path, days: int) -> None:
        self._path = path
        self._days = days
        self._pending: queue.SimpleQueue[tuple[dict[Group, Counts], float, Future[None]] | None] = queue.SimpleQueue()
        self._unwritten = Totals()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        """Device and number of the file that is open."""
        self._deleted_on = ""
        self._failure: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def write(self, rows: dict[Group, Counts], now: float) -> "Future[None]":
        done: Future[None] = Future()
        self._pending.put((rows, now, done))
        return done

    def close(self) -> None:
        self._pending.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (work := self._pending.get()) is not None:
            rows, now, done = work
            lost = self._unwritten.merge(rows.items(), MAX_ROWS)
            if lost:
                _log.error("usage: %d rows are lost, since the file %s cannot be written", lost, self._path)
            if self._unwritten.rows:
                self._try(now)
            done.set_result(None)
        if self._connection is not None:
            self._connection.close()

    def _try(self, now: float) -> None:
        try:
            if self._connection is None or _identity(self._path) != self._identity:
                self._reopen()
            today, oldest = day_of(now), None
            assert self._connection is not None
            if today != self._deleted_on:
                oldest = first_day_to_keep(self._connection, today, self._days)
            add_rows(self._connection, self._unwritten.rows, oldest)
        except (sqlite3.Error, OSError) as error:
            self._report(str(error), now)
            return
        self._unwritten.take()
        self._deleted_on = today
        if self._failure is not None:
            self._failure = None
            _log.info("usage: the file %s is written again; nothing is missing in it", self._path)

    def _reopen(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._connection = open_for_writing(self._path)
        self._identity = _identity(self._path)

    def _report(self, reason: str, now: float) -> None:
        if self._failure is not None and self._failure[0] == reason and now - self._failure[1] < REPEAT_SECONDS:
            return
        self._failure = reason, now
        _log.error(
            "usage: the file %s cannot be written (%s); what is missing in it is kept in memory", self._path, reason
        )
