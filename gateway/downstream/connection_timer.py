"""Timer of a connection: for its deadline, and for the check that its client takes the response."""

import asyncio
from typing import Protocol

from gateway.downstream.write_timeout import NEVER, WriteTimeout


class TimedConnection(Protocol):
    """The connection that a timer belongs to, as the timer uses it."""

    transport: asyncio.Transport

    def on_deadline(self, now: float) -> None:
        """Act on the deadline: it has been reached, and is not set any longer."""


class ConnectionTimer:
    """One timer of the event loop for `deadline` and for the checks of `write_timeout`.

    It is set only if it would otherwise fire too late, and moves on to the next of these times when
    it fires, so that a keep-alive request sets no timer. `deadline` is a time of the event loop's
    clock; its owner may put it off, or set it to `NEVER`.
    """

    __slots__ = ("_connection", "_handle", "_handle_at", "_loop", "_write_timeout", "deadline")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, write_timeout: WriteTimeout, connection: TimedConnection
    ) -> None:
        self._loop = loop
        self._write_timeout = write_timeout
        self._connection: TimedConnection | None = connection
        self._handle: asyncio.TimerHandle | None = None
        self._handle_at = NEVER
        self.deadline = NEVER

    def arm(self, seconds: float) -> None:
        """Set the deadline to `seconds` from now."""
        self.deadline = deadline = self._loop.time() + seconds
        if self._handle is None or self._handle_at > deadline:
            self._set(deadline)

    def watch_unsent(self) -> None:
        """Check from now on that the client takes the bytes which wait for it, if any do."""
        assert self._connection is not None
        unsent = self._connection.transport.get_write_buffer_size()
        self._write_timeout.watch(unsent, self._loop.time())
        if self._write_timeout.deadline != NEVER:
            self._set(self._write_timeout.deadline)

    def stop(self) -> None:
        """Do not fire any more. Let go of the connection, since it holds a reference to this object."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._connection = None

    def _set(self, when: float) -> None:
        if self._handle is not None:
            if self._handle_at <= when:
                return
            self._handle.cancel()
        self._handle_at = when
        self._handle = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        self._handle = None
        connection, write_timeout = self._connection, self._write_timeout
        assert connection is not None
        transport = connection.transport
        now = self._loop.time()
        if now >= write_timeout.deadline and write_timeout.has_expired(transport.get_write_buffer_size(), now):
            transport.abort()
        if now >= self.deadline:
            self.deadline = NEVER
            connection.on_deadline(now)
        nearest = min(self.deadline, write_timeout.deadline)
        # With no deadline and nothing unsent, as in a connection that is closing, no check is needed.
        if nearest != NEVER and (self.deadline != NEVER or transport.get_write_buffer_size()):
            self._set(nearest)
