"""Server-sent events of `/ops/events`: the status as it changes, for any number of consoles.

Theory of operation. While somebody listens, a timer asks for the status at most four times a second
and computes the JSON Patch from the one before, once for all listeners. A listener gets the whole
status first, then the patches. Nothing is queued for it: a listener that reads slowly misses
patches, and gets the whole status again when it can take it. While nobody listens, nothing runs.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from gateway.api.json_patch import json_patch
from gateway.errors import InvalidRequest, QueueFull, ShuttingDown
from gateway.relay.requests import ClientConnection
from gateway.telemetry.live import KEPT

INTERVAL = 0.25
"""Shortest time between two events in seconds."""
COST_RATIO = 20
"""Least ratio of the time between two events to the time that one takes: at most 5 % of the loop."""
HEARTBEAT = 15.0
"""Longest time without a byte, in seconds. Proxies close connections that seem idle."""
MAX_LISTENERS = 256

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
    (b"x-content-type-options", b"nosniff"),
]

Snapshot = Callable[[], Mapping[str, Any]]
Series = Callable[[str | None, int], Mapping[str, Any]]


class Events:
    """Source of the events.

    `snapshot` returns the status. `series` returns the course of the figures of a tier, or of all
    tiers with None, limited to a number of samples; `sample_number` counts the samples.
    """

    def __init__(self, snapshot: Snapshot, series: Series, sample_number: Callable[[], int]) -> None:
        self._snapshot = snapshot
        self._series = series
        self._sample_number = sample_number
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._listeners: set[asyncio.Event] = set()
        self._state: Mapping[str, Any] = {}
        self._version = 0
        self._patch = b""
        self._whole: bytes | None = None
        self._last_sample = -1
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Events at version {self._version}, {len(self._listeners)} listeners>"

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def check(self) -> None:
        """Raise if nobody can listen now.

        Raises:
            ShuttingDown: The gateway stops.
            QueueFull: There are `MAX_LISTENERS` listeners already.
        """
        if self._is_closed:
            raise ShuttingDown
        if len(self._listeners) >= MAX_LISTENERS:
            raise QueueFull("Too many programs listen to /ops/events. Use GET /ops/status.", retry_after=60)

    def close(self) -> None:
        """End all responses, and refuse new ones: the gateway stops."""
        self._is_closed = True
        self._stop_timer()
        for wake in self._listeners:
            wake.set()

    async def listen(self, client: ClientConnection, tier: str | None, send: Send) -> None:
        """Send events until the client leaves or `close` is called. `tier` selects the series."""
        wake = asyncio.Event()
        client.on_leave = wake.set
        if not self._listeners:
            self._refresh()
        self._listeners.add(wake)
        if self._timer is None:
            self._start_timer(INTERVAL)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send_events(client, tier, wake, send)
        finally:
            self._listeners.discard(wake)
            if not self._listeners:
                self._stop_timer()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, client: ClientConnection, tier: str | None, wake: asyncio.Event, send: Send) -> None:
        version = sample = -1
        while not (client.gone or self._is_closed):
            wake.clear()
            events = []
            if self._version != version:
                events.append(self._patch if self._version == version + 1 and version >= 0 else self._whole_event())
                version = self._version
            number = self._sample_number()
            if number != sample:
                is_next = number == sample + 1 and sample >= 0
                try:
                    series = self._series(tier, 1 if is_next else KEPT)
                except InvalidRequest:
                    return  # new settings do not have the tier; the client learns it when it asks again
                events.append(_event(b"sample" if is_next else b"series", series))
                sample = number
            # `send` waits while the client does not read. What changes meanwhile is not kept for it.
            await send({"type": "http.response.body", "body": b"".join(events) or b":\n\n", "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await wake.wait()

    def _whole_event(self) -> bytes:
        if self._whole is None:
            self._whole = _event(b"status", self._state)
        return self._whole

    # The timer

    def _start_timer(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        began, version = time.perf_counter(), self._version
        try:
            self._refresh()
        finally:
            self._start_timer(max(INTERVAL, COST_RATIO * (time.perf_counter() - began)))
        sample = self._sample_number()
        if self._version != version or sample != self._last_sample:
            self._last_sample = sample
            for wake in self._listeners:
                wake.set()

    def _refresh(self) -> None:
        state = self._snapshot()
        patch = json_patch(self._state, state)
        if patch:
            self._state = state
            self._version += 1
            self._patch = _event(b"patch", patch)
            self._whole = None


class EventResponse(Response):
    """Response with the events, for a route that has checked the caller."""

    def __init__(self, events: Events, tier: str | None) -> None:
        super().__init__()
        self._events = events
        self._tier = tier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client leaves or the gateway stops."""
        await self._events.listen(scope["extensions"]["gateway.client"], self._tier, send)


def _event(name: bytes, value: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, msgspec.json.encode(value))
