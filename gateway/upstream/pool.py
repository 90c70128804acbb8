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
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.upstream.connection import READ_BYTES, Connection, ConnectionLimits, TransportError


@dataclass(frozen=True, slots=True)
class Origin:
    """Address of a server: host and port to connect to, and the prefix of every path."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    prefix: str = ""

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
        self._open: set[Connection] = set()
        self.buffer = memoryview(bytearray(READ_BYTES))
        self._expiry_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Pool {len(self._open)} open, {len(self._idle)} idle>"

    @property
    def open_connections(self) -> int:
        return len(self._open)

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
        fresh = await self.connect(connect_timeout)
        await fresh.send(head, body)
        return fresh

    async def connect(self, connect_timeout: float | None = None) -> Connection:
        """Open a new connection."""
        loop = asyncio.get_running_loop()
        origin = self.origin
        connection = Connection(self, loop, self._limits)
        try:
            async with asyncio.timeout(self.connect_timeout if connect_timeout is None else connect_timeout):
                await loop.create_connection(lambda: connection, origin.host, origin.port, ssl=origin.tls)
        except BaseException as error:
            connection.abort()
            connection.connection_lost(None)  # uvloop omits it if it is cancelled just as the connection is made
            if isinstance(error, TimeoutError):
                raise TransportError("connect_timeout") from error
            if isinstance(error, OSError):
                raise TransportError("connect") from error
            raise
        return connection

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
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
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
