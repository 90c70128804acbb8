"""One HTTP/1.1 connection to a server: an asyncio protocol on httptools that reads one answer at a time.

A connection that saw anything unexpected (a byte too many, a broken head, a body cut short) is closed and never used again. Nothing grows
without bound: head, informational answers, body and unread pieces each have their limit. gateway/wire.py keeps the pool.
"""

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self, cast

import httptools

WireFault = Literal["connect", "connect_timeout", "closed", "reset", "protocol", "truncated", "too_large"]

READ_BYTES = 32 * 1024
"""Read from a socket at once. What is parsed, and rendered anew for the client, in one go comes to a few times that, and libuv reads up
to 32 times before it turns to others: this bounds both a client's unsent bytes and the time in which nobody else is served."""

_SIZE_LINES = {len(line) + size + 2: line for size in range(1, 2048) for line in (b"%x\r\n" % size,)}
"""The first line of an HTTP chunk by the bytes of the whole chunk: for those that a token makes."""

DRAIN_SECONDS = 1.0
"""How long a connection may take to end its body after the caller has seen all that it wanted, and still be kept."""


class WireError(Exception):
    """The exchange failed. `answered`: at least one byte of the answer had come."""

    def __init__(self, fault: WireFault, answered: bool = False) -> None:
        super().__init__(fault)
        self.fault = fault
        self.answered = answered


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one connection, in bytes where no unit is named."""

    head: int = 64 * 1024
    """Of the head. Also of the chunk extensions and trailers between two parts of the body, or after the last."""
    headers: int = 200
    informational: int = 100
    """1xx answers read before the connection is left alone until the caller's deadline."""
    unread: int = 256 * 1024
    """Body bytes that may wait for a caller that does not read; then the socket is paused."""


class ConnectionOwner(Protocol):
    """Who owns connections: told of their beginning and end, and handed those that can be used again."""

    buffer: memoryview
    """All connections read into it in turn: what a read brings is parsed before the next begins."""

    def opened(self, connection: "Connection") -> None: ...
    def closed(self, connection: "Connection") -> None: ...
    def release(self, connection: "Connection") -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One connection, and the answer that is being read from it.

    `status`, `headers` and `fields` (the headers as a dict, names in lower case) are those of the answer, once `Pool.exchange` has handed
    the connection out.
    """

    __slots__ = (
        "_arrivals",
        "_bodiless",
        "_busy",
        "_draining",
        "_ended",
        "_failure",
        "_full",
        "_has_body",
        "_head_bytes",
        "_head_done",
        "_held",
        "_informational",
        "_is_between_chunks",
        "_keeper",
        "_limit",
        "_limits",
        "_loop",
        "_on_piece",
        "_parser",
        "_paused",
        "_pieces",
        "_stopped",
        "_timer",
        "_to_eof",
        "_transport",
        "_usable",
        "_waiter",
        "answered",
        "fields",
        "headers",
        "idle_since",
        "status",
    )  # fmt: skip

    def __init__(self, keeper: ConnectionOwner, loop: asyncio.AbstractEventLoop, bounds: ConnectionLimits) -> None:
        self._keeper = keeper
        self._loop = loop
        self._limits = bounds
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._draining = False
        self._held = False  # by the caller
        self._full = False  # more is unread than may be
        self._paused = False  # the socket, for either reason
        self._arrivals = select.poll()
        self._usable = True
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.fields: dict[bytes, bytes] = {}
        self.answered = False
        self._head_done = False
        self._head_bytes = 0
        self._has_body = False  # the last read brought a part of the body
        self._bodiless = 0  # bytes since then
        self._informational = 0
        self._ended = False
        self._to_eof = False
        self._stopped = False
        self._failure: BaseException | None = None
        self._pieces: list[bytes] = []
        self._limit: int | None = None
        self._on_piece: Callable[[bytes], None] | None = None
        self._is_between_chunks = False

    def __repr__(self) -> str:
        state = (
            "closed" if self._transport is None else "draining" if self._draining else "busy" if self._busy else "idle"
        )
        return f"<Connection {state}, status {self.status}, {self._unread()} bytes unread>"

    # What the pool and the caller do

    async def send(self, head: bytes, body: bytes) -> None:
        """Send one request and wait for the head of its answer. A failure, or a cancellation, closes the connection."""
        self._reset()
        self._busy = True
        if self._transport is None:
            raise WireError("closed")
        self._transport.write(head + body if len(body) < 65536 else head)
        if len(body) >= 65536:
            self._transport.write(body)
        try:
            while not self._head_done:
                await self._wait()
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def whole(self, limit: int) -> bytes | None:
        """The body, if all of it came together with the head: as `read`, without waiting. None: it has to be read."""
        if self._ended and len(self._pieces) == 1 and len(self._pieces[0]) <= limit and self._failure is None:
            return self._pieces.pop()
        return None

    async def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            WireError: it was cut short, broken or longer than `limit` bytes.
        """
        whole = self.whole(limit)
        if whole is not None:
            return whole
        self._limit = limit
        self._set_full(False)
        self._check_unread()
        while not self._ended:
            await self._wait()
        self._raise_failure()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return body

    async def stream(self, on_piece: Callable[[bytes], None]) -> None:
        """Call `on_piece` with each piece of the body as it comes; return at the body's end, or after `stop`.

        `on_piece` runs inside the socket's read callback: it must not block; what it raises is raised here.
        """
        self._on_piece = on_piece
        self._set_full(False)
        if self._pieces:
            self._deliver()
        while not (self._ended or self._stopped):
            await self._wait()
        self._raise_failure()

    def stop(self) -> None:
        """The caller has all that it wants: end `pump`. The rest of the body may only be its end."""
        self._stopped = True
        self._is_between_chunks = False
        self._wake()

    def mark_unusable(self) -> None:
        """The caller has seen what should not be there: this answer may be read on, but none after it."""
        self._usable = False

    def pause(self) -> None:
        """Stop reading from the socket: the caller cannot take more."""
        self._held = True
        self._regulate()

    def resume(self) -> None:
        """Read on after `pause`."""
        self._held = False
        self._regulate()

    def release(self) -> None:
        """The caller is done: back into the pool if the answer ended cleanly, else closed."""
        self._on_piece = None
        self._is_between_chunks = False
        self._pieces.clear()
        self._held = self._full = False
        if self._ended:
            self._settle()
        elif self._stopped and self.is_usable():
            self._draining = True
            self._regulate()
            self._timer = self._loop.call_later(DRAIN_SECONDS, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once and forget what was read."""
        self._usable = False
        self._cancel_timer()
        if self._transport is not None:
            self._transport.abort()

    def is_usable(self) -> bool:
        return self._usable and self._transport is not None and not self._transport.is_closing()

    def is_silent(self) -> bool:
        """Nothing waits in the socket that the loop, busy with others, has not read yet: no close, and no byte that nobody asked for."""
        return not self._arrivals.poll(0)

    def _settle(self) -> None:
        self._cancel_timer()
        self._busy = self._draining = False
        self._regulate()
        if self.is_usable() and self._transport is not None and self._transport.get_write_buffer_size() == 0:
            self._keeper.release(self)
        else:
            self.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self) -> None:
        """Until anything happens. A failure is raised only here: what came before it is not lost, however the bytes were cut."""
        self._raise_failure()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _set_full(self, full: bool) -> None:
        self._full = full
        self._regulate()

    def _regulate(self) -> None:
        """Read from the socket unless somebody wants a pause."""
        paused = self._held or self._full
        if paused == self._paused or self._transport is None:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
        self._is_between_chunks = False
        self.abort()
        self._wake()

    def _unread(self) -> int:
        return sum(map(len, self._pieces))

    def _check_unread(self) -> None:
        if self._limit is not None:
            if self._unread() > self._limit:
                self._pieces.clear()
                self._fail(WireError("too_large", answered=True))
        elif self._unread() > self._limits.unread:
            self._set_full(True)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._usable:  # given up while it was being made
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self._arrivals.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._keeper.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._usable = False
        self._cancel_timer()
        self._parser = None  # it holds this object: break the cycle
        self._keeper.closed(self)
        if not self._busy or self._ended or self._stopped:
            return
        if self._to_eof and exc is None:
            self._ended = True
        elif self._failure is None:
            fault: WireFault = "truncated" if self._head_done else "reset" if exc is not None else "closed"
            self._failure = WireError(fault, self.answered)
        self._wake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._keeper.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_between_chunks:
            data = self._keeper.buffer[:nbytes].tobytes()
            line = _SIZE_LINES.get(nbytes, b"none")
            start = len(line)
            if (
                data[:start] == line and data[-2:] == b"\r\n"
            ):  # one whole chunk: behind it the parser would stand where it stands
                try:
                    self._on_piece(data[start:-2])  # type: ignore[misc]  # there is one as long as this is true
                except Exception as failure:
                    self._fail(failure)
                return
            self._is_between_chunks = False
        if not self._busy:  # nobody asked for this byte: whoever took the connection next would take it for the answer
            self.abort()
            return
        if self._parser is None or self._failure is not None:
            return
        is_broken = False
        try:
            self._parser.feed_data(self._keeper.buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            is_broken = True
            self._usable = False
        if not self.answered or not self._head_done:
            self.answered = True
            if not (self._head_done or self._full):
                self._head_bytes += nbytes
                is_broken = is_broken or self._head_bytes > self._limits.head
        else:
            is_broken = self._lacks_body(nbytes) or is_broken
        if self._pieces:
            last = self._pieces[-1]
            self._deliver()
            if self._on_piece is not None and last.endswith(b"\n"):
                self._look_for_boundary(last, nbytes)
        if is_broken or self._draining:
            self._after_end(is_broken)

    def _lacks_body(self, nbytes: int) -> bool:
        """Count a read without a part of the body, and return whether there was too much between two parts.

        It is a chunk extension or a trailer. The parser would collect a trailer for as long as it is sent.
        """
        if self._has_body:
            self._has_body, self._bodiless = False, 0
            return False
        self._bodiless += nbytes
        return self._bodiless > self._limits.head and not self._ended

    def _look_for_boundary(self, last: bytes, nbytes: int) -> None:
        """Where the body's `last` piece ends with its line, and the read with CRLF behind it, a chunk has ended and none has begun: a size line
        holds no line feed but its own. From there on whole chunks need no parser."""
        is_outside = not last.endswith(b"\r\n") and self._keeper.buffer[nbytes - 3 : nbytes].tobytes() == b"\n\r\n"
        self._is_between_chunks = is_outside and not (self._ended or self._stopped or self._failure is not None)

    def _after_end(self, is_broken: bool) -> None:
        if is_broken and not (self._ended or self._stopped):
            self._fail(WireError("protocol", answered=True))
        if self._draining and (self._ended or is_broken):
            self._settle()

    def _deliver(self) -> None:
        """Hand on what one read brought, in one call: ten thousand tiny chunks are one piece."""
        pieces = self._pieces
        if self._on_piece is None:
            self._check_unread()
            return
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        try:
            self._on_piece(piece)
        except Exception as failure:
            self._fail(failure)

    # httptools callbacks; what they raise would come back as a parser's error, so they do not raise

    def on_message_begin(self) -> None:
        if self._ended:  # a second answer to one request
            self._usable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._ended or self._parser is None or self._failure is not None:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._informational += 1
            if self._informational > self._limits.informational:
                self._set_full(True)
            return
        self.status = status
        self._head_done = True
        if len(self.headers) > self._limits.headers:
            self._fail(WireError("protocol", answered=True))
            return
        self.fields = fields = dict(self.headers)
        self._to_eof = not (b"content-length" in fields or b"transfer-encoding" in fields or status in (204, 304))
        if self._to_eof or not self._parser.should_keep_alive():
            self._usable = False
        self._wake()

    def on_body(self, piece: bytes) -> None:
        self._has_body = True
        if not (self._ended or self._stopped or self._failure is not None):
            self._pieces.append(piece)
        elif self._stopped and not self._ended:  # more than the end came after the end
            self._usable = False
            if self._draining:
                self.abort()

    def on_message_complete(self) -> None:
        if self._ended:
            return
        if not self._head_done:  # an informational answer
            self.headers = []
            self._head_bytes = 0
            return
        self._ended = True
        self._wake()
