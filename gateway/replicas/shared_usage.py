"""Usage of all replicas: each keeps the sums of its file in Redis as well, by day.

A replica replaces what it has there for a day by the sums of its whole day. So nothing is counted twice
if a call has to be repeated, and a Redis that has lost its data is filled again. The sums of a replica
that is down stay, since they belong to its file, which has a name of its own.
"""

import asyncio
import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

import orjson

from gateway.replicas.link import LinkDown, RedisLink
from gateway.replicas.tasks import end

SEND_SECONDS = 2.0
"""Time between two looks at what has changed."""
CHECK_SECONDS = 60.0
"""Time after which it is checked that Redis still has all days."""
DAYS = 30
"""Days in one call."""
MAX_BYTES = 64 * 1024 * 1024
"""Maximum size of one replica's sums of a day."""
SECONDS_PER_DAY = 86_400
ROWS_PER_SECOND = 5000
"""Rows that are sent in the mean: a day with 50,000 rows every 10 seconds, which takes a twentieth of a core."""
ROWS_AT_ONCE = 1000
"""Rows that are encoded at once. Until that is done, no other thread runs."""

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class UsageFile(Protocol):
    """The usage of this replica. Its methods raise `sqlite3.Error` if the file cannot be read."""

    async def identity(self) -> str | None:
        """Return the name of the file; None as long as nothing is recorded."""

    async def days(self) -> list[str]:
        """Return the days of which there is usage."""

    async def rows_of_day(self, day: str) -> list[Row]:
        """Return the usage of a day with all fields."""

    def take_changed_days(self) -> set[str]:
        """Return the days whose usage has changed since the last call."""


class SharedUsage:
    """Sends the usage of `file` to Redis, and reads that of the others, from `start` to `close`.

    `days` are those that are kept.
    """

    def __init__(self, link: RedisLink, file: UsageFile, days: int) -> None:
        self._link = link
        self._file = file
        self._days = days
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._check_at = 0.0
        self._has_joined = False
        link.watch(on_up=self._join)

    def __repr__(self) -> str:
        return f"<SharedUsage {sorted(self._changed)} to send>"

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Send what has not been sent, if Redis answers."""
        if self._task is None:
            return
        await end(self._task)
        await self._send()

    async def rows(self, since: str | None, until: str | None) -> list[Row] | None:
        """Return the others' usage of these days with all fields; None if Redis does not answer."""
        found: list[Row] = []
        try:
            own = await self._file.identity()
            all_days = [day.decode() for day in await self._link.call("usage_days", ["usage:days"])]
            days = sorted(day for day in all_days if (since or "") <= day <= (until or "9999"))
            for begin in range(0, len(days), DAYS):
                keys = [f"usage:{day}" for day in days[begin : begin + DAYS]]
                for sums in await self._link.call("read_usage", keys, [own or ""]):
                    found += await asyncio.to_thread(_unpacked, sums)
        except (LinkDown, sqlite3.Error):
            return None
        return found

    def _join(self) -> None:
        self._check_at, self._has_joined = 0.0, False
        self._wake.set()

    async def _run(self) -> None:
        sent = 0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_pause_after(sent)):
                    await self._wake.wait()
            self._wake.clear()
            sent = await self._send()

    async def _send(self) -> int:
        """Send the days that have changed, and now and then those that Redis lacks; return how many rows they had."""
        sent = 0
        self._changed |= self._file.take_changed_days()
        if not self._link.is_up:
            return 0
        try:
            own = await self._file.identity()
            if own is None:
                return 0
            now = asyncio.get_running_loop().time()
            if now >= self._check_at:
                days = await self._file.days()
                self._changed |= await self._lacking(own, days)
                if not self._has_joined:  # the last seconds before a restart or a loss of Redis were not sent
                    self._changed |= {*days[-2:]}
                    self._has_joined = True
                self._check_at = now + CHECK_SECONDS
            for day in sorted(self._changed):
                rows = await self._file.rows_of_day(day)
                sums = await asyncio.to_thread(_packed, rows)
                life = self._days * SECONDS_PER_DAY
                await self._link.call("write_usage", [f"usage:{day}", "usage:days"], [own, day, sums, life])
                self._changed.discard(day)
                sent += len(rows)
        except LinkDown:
            pass
        except Exception:
            _log.exception("the usage could not be shared with the other replicas")
        return sent

    async def _lacking(self, own: str, days: list[str]) -> set[str]:
        if not days:
            return set()
        has = await self._link.call("has_usage", [f"usage:{day}" for day in days], [own])
        return {day for day, is_there in zip(days, has, strict=True) if not is_there}


def _pause_after(rows: int) -> float:
    """Return the seconds until the next look at what has changed, after so many rows were sent."""
    return max(SEND_SECONDS, rows / ROWS_PER_SECOND)


def _packed(rows: Sequence[Row]) -> bytes:
    slices = (orjson.dumps(rows[start : start + ROWS_AT_ONCE])[1:-1] for start in range(0, len(rows), ROWS_AT_ONCE))
    return zlib.compress(b"[" + b",".join(slices) + b"]")


def _unpacked(content: bytes) -> list[Row]:
    """Return rows that a replica has written; none if it was something else that did."""
    try:
        text = zlib.decompressobj().decompress(content, MAX_BYTES).decode()
        return [row for row in _decoded(text) if isinstance(row, dict)]
    except (zlib.error, ValueError, RecursionError):
        _log.error("the usage of another replica cannot be read, and is left out")
        return []


def _decoded(text: str) -> Iterator[Any]:
    """Yield the items of a list as `_packed` writes it. A parser of the whole would let no other thread run.

    Raises:
        ValueError: It is something else.
    """
    if text == "[]":
        return
    decode, place, begin = json.JSONDecoder().raw_decode, 0, "["
    while text[place : place + 1] == begin:
        item, place = decode(text, place + 1)
        yield item
        begin = ","
    if text[place:] != "]":
        raise ValueError
