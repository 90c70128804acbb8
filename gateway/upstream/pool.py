"""Connection pool of one server: HTTP/1.1 with keep-alive, one exchange at a time per connection.

Guarantees, with their reasons in docs/adr/0002:

- A connection that saw anything unexpected (a byte too many, a broken head, a truncated body) is
  closed and never used again, so that no byte of one answer can reach the next (RFC 9112 section
  6.3).
- A pooled connection that closes before the first byte of the answer was stale: the request is sent
  once more, on a fresh connection.
- Leaving `with await pool.request(...)` in any way, cancellation included, leaves no connection,
  timer or buffer behind.
- Nothing grows without bound: the head, informational answers, the body and unread pieces each have
  their limit.

The only deadline here is the one for connecting. For any other, the caller cancels the task.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.telemetry.trace_context import current_trace
from gateway.upstream.answer_head import AnswerHead
from gateway.upstream.connection import READ_BYTES, Connection, ConnectionLimits
from gateway.upstream.connector import Connector
from gateway.upstream.resolver import without_scope
from gateway.upstream.silence import Silence
from gateway.upstream.transport_error import TransportError


@dataclass(frozen=True, slots=True)
class Origin:
    """Address of a server: host and port to connect to, and the prefix of every path.

    With `address`, the server is at this IP address. `host` is then only the name in the Host header
    and in its certificate.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    prefix: str = ""
    address: str | None = None

    @property
    def authority(self) -> str:
        """Value of the Host header (RFC 9110 section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Pool:
    """Connections to one server. Admission limits their number, by limiting requests in flight.

    `idle_seconds` has to be shorter than the server's own keep-alive. Otherwise requests meet
    connections that the server is closing.
    """

    def __init__(
        self, origin: Origin, *, connect_timeout: float, idle_seconds: float, limits: ConnectionLimits | None = None
    ) -> None:
        self.origin = origin
        self.connect_timeout = connect_timeout
        self._idle_seconds = idle_seconds
        self._limits = limits or ConnectionLimits()
        self._idle: list[Connection] = []
        self._open: dict[Connection, Silence] = {}
        self._has_heard = False  # a connection that has closed since got something from the server
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.answer_head: AnswerHead | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._connector = Connector(
            origin.host, origin.port, origin.tls, self._new_connection, self._retire, origin.address
        )

    def __repr__(self) -> str:
        return f"<Pool {len(self._open)} open, {len(self._idle)} idle>"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    @property
    def is_waiting(self) -> bool:
        """True if a request waits for the server."""
        return any(connection.is_busy and not connection.is_probe for connection in self._open)

    def head(self, method: str, path: str, headers: Sequence[tuple[str, str]]) -> bytes:
        """Return the constant part of a request's head, without Content-Length and the blank line.

        Raises:
            ValueError: a header has a character that cannot be sent.
        """
        fixed = [("Host", self.origin.authority), ("Accept-Encoding", "identity"), ("User-Agent", "gateway"), *headers]
        for name, value in fixed:
            if not (name.isascii() and value.isascii() and (name + value).isprintable()):
                raise ValueError(f"header {name!r} has a character that cannot be sent")
        return (
            f"{method} {self.origin.prefix}{path} HTTP/1.1\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in fixed)
        ).encode("ascii")

    async def request(
        self,
        head: bytes,
        body: bytes | list[bytes] = b"",
        on_stale: Callable[[], None] = lambda: None,
        connect_timeout: float | None = None,
    ) -> Connection:
        """Send one request and wait for the head of its answer.

            with await pool.request(...) as response:

        `head` comes from `head()`. A long `body` may be a list of its parts. `on_stale` is called
        if a pooled connection was stale and the request is sent once more. `connect_timeout` is in
        seconds; None means the pool's own.

        Raises:
            TransportError: there was no connection, or no complete head of an answer.
        """
        head = b"%bContent-Length: %d\r\n\r\n" % (head, len(body) if isinstance(body, bytes) else sum(map(len, body)))
        kept = self.acquire()
        if kept is not None:
            try:
                await kept.send(head, body)
            except TransportError as error:
                if error.answered or error.fault not in ("closed", "reset"):
                    raise
                on_stale()
            else:
                return kept
        trace, began = current_trace.get(), time.monotonic()
        fresh = await self.connect(connect_timeout)
        if trace is not None:
            trace.connected(began, time.monotonic())
        address = fresh.address
        try:
            await fresh.send(head, body)
        except TransportError as error:
            if not error.answered:
                self._connector.try_last(address)
            raise
        return fresh

    async def connect(self, connect_timeout: float | None = None) -> Connection:
        """Open a new connection, within `connect_timeout` seconds (None: the pool's own) in all.

        Raises:
            TransportError: there is no connection. Its cause tells why.
        """
        seconds = self.connect_timeout if connect_timeout is None else connect_timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._connector.connect(seconds)
        except TimeoutError as error:
            if self._connector.is_resolving:
                raise TransportError("connect_timeout") from socket.gaierror(socket.EAI_AGAIN, "no answer in time")
            raise TransportError("connect_timeout") from error
        except OSError as error:
            raise TransportError("connect") from error

    def _new_connection(self) -> Connection:
        return Connection(self, asyncio.get_running_loop(), self._limits)

    def _retire(self, addresses: frozenset[str]) -> None:
        """Stop using connections to addresses that the server's name no longer has.

        Those in use are closed when their answer ends.
        """
        current = {without_scope(address) for address in addresses}
        for connection in list(self._open):
            if without_scope(connection.address) not in current:
                connection.mark_unusable()
                if connection in self._idle:
                    connection.abort()

    def has_sign_of_life(self, now: float) -> bool:
        """Return whether anything came from the server on the requests' connections since the last call."""
        signs = [
            silence.take_sign_of_life(now) for connection, silence in self._open.items() if not connection.is_probe
        ]
        is_alive = self._has_heard or any(signs)
        self._has_heard = False
        return is_alive

    def give_up_silent(self, moment: float, *, has_begun: bool = False) -> int:
        """End the exchanges that got no byte since `moment`, and return their number.

        With `has_begun`, only those whose answer had begun before.
        """
        silent = [
            connection
            for connection, silence in self._open.items()
            if not connection.is_probe and silence.has_lasted_since(moment, has_begun=has_begun)
        ]
        for connection in silent:
            connection.give_up()
        return len(silent)

    def retire(self) -> None:
        """Close the idle connections now, and those in use when their answer ends."""
        self._retire(frozenset())

    def close_idle(self) -> None:
        """Close the idle connections, because the server may have lost them."""
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()

    def acquire(self) -> Connection | None:
        """Return the most recently used idle connection that is still good, or None."""
        oldest = time.monotonic() - self._idle_seconds
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable() and connection.idle_since > oldest and connection.is_silent():
                return connection
            connection.abort()
        return None

    def release(self, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if self._expiry_timer is None:
            self._expiry_timer = asyncio.get_running_loop().call_later(self._idle_seconds, self._close_expired)

    def _close_expired(self) -> None:
        oldest = time.monotonic() - self._idle_seconds
        for connection in self._idle:
            if connection.idle_since <= oldest:
                connection.abort()
        self._idle = [connection for connection in self._idle if connection.idle_since > oldest]
        delay = self._idle[0].idle_since - oldest if self._idle else 0.0
        self._expiry_timer = asyncio.get_running_loop().call_later(delay, self._close_expired) if self._idle else None

    def opened(self, connection: Connection) -> None:
        self._open[connection] = Silence(connection)

    def closed(self, connection: Connection) -> None:
        if connection.has_arrived and not connection.is_probe:
            self._has_heard = True
        self._open.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close all connections, including those in use."""
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        for connection in list(self._open):
            connection.abort()
        self._idle.clear()
