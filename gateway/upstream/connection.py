"""HTTP/1.1 connection to a server: an asyncio protocol on httptools, for one answer at a time.

A connection that saw anything unexpected (a byte too many, a broken head, a truncated body) is
closed and never used again. Nothing grows without bound: the head, informational answers, the body
and unread pieces each have their limit. `pool.py` keeps the connections.
"""

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, cast

import httptools

from gateway.upstream.answer_head import AnswerHead, answer_head
from gateway.upstream.chunks import SIZE_LINES, ends_between_chunks
from gateway.upstream.socket_options import set_keep_alive
from gateway.upstream.transport_error import TransportError, fault_of_end

READ_BYTES = 32 * 1024
"""Maximum number of bytes per read from a socket.

The bytes of one read grow to a few times that when they are parsed and rendered for the client, and
libuv reads up to 32 times before it turns to other sockets. So this limits both a client's unsent
bytes and the time during which nothing else is served.
"""

DRAIN_SECONDS = 1.0
"""Time to wait for the end of the body once the caller has all that it needs.

A connection that takes longer is closed.
"""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one connection, in bytes unless another unit is named."""

    head: int = 64 * 1024
    """Bytes of the head, and of the chunk extensions and trailers between or after parts of the body."""
    headers: int = 200
    informational: int = 100
    """Number of 1xx answers after which nothing more is read, until the caller's deadline."""
    unread: int = 256 * 1024
    """Bytes of a body that may wait for a caller that does not read; then the socket is paused."""


class ConnectionOwner(Protocol):
    """Owner of connections: learns of their start and end, and gets the reusable ones back."""

    buffer: memoryview
    """Buffer for the reads of all connections. A read is parsed before the next one begins."""
    answer_head: AnswerHead | None
    """Head of the last plain answer."""

    def opened(self, connection: "Connection") -> None: ...
    def closed(self, connection: "Connection") -> None: ...
    def release(self, connection: "Connection") -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One connection, and the answer that is being read from it.

    `status`, `headers` and `fields` (the headers as a dict with lower-case names) are those of the
    answer, once `Pool.request` has returned the connection.
    """

    __slots__ = (
        "_bodiless_bytes",
        "_buffer",
        "_busy",
        "_draining",
        "_ended",
        "_failure",
        "_has_body",
        "_head_bytes",
        "_head_done",
        "_informational",
        "_is_between_chunks",
        "_is_full",
        "_is_held",
        "_limits",
        "_loop",
        "_max_body",
        "_on_piece",
        "_owner",
        "_parser",
        "_pieces",
        "_readable",
        "_stopped",
        "_timer",
        "_transport",
        "_until_close",
        "_usable",
        "_waiter",
        "answered",
        "fields",
        "has_arrived",
        "has_begun",
        "headers",
        "idle_since",
        "is_paused",
        "is_probe",
        "on_chunks",
        "status",
    )

    def __init__(self, owner: ConnectionOwner, loop: asyncio.AbstractEventLoop, limits: ConnectionLimits) -> None:
        self._owner = owner
        self._buffer = owner.buffer
        self._loop = loop
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._draining = False
        self._is_held = False  # paused by the caller
        self._is_full = False  # paused because too much is unread
        self._readable = select.poll()
        self._usable = True
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self.is_probe = False
        """True for a probe's connection, which says nothing about those of the requests."""
        self.has_arrived = False
        """True if bytes have arrived since this was set to False (`silence.py`)."""
        self.is_paused = False
        """True if the socket is not read, because the caller has paused it or too much is unread."""
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.fields: dict[bytes, bytes] = {}
        self.answered = False
        self._head_done = False
        self._head_bytes = 0
        self.has_begun = False
        """True if a part of the body has arrived."""
        self._has_body = False  # the last read brought a part of the body
        self._bodiless_bytes = 0  # since then
        self._informational = 0
        self._ended = False
        self._until_close = False
        self._stopped = False
        self._failure: BaseException | None = None
        self._pieces: list[bytes] = []
        self._max_body: int | None = None
        self._on_piece: Callable[[bytes], None] | None = None
        self.on_chunks: Callable[[bytes], bool] | None = None
        """Called with the bytes of a read that begins between two chunks, while a body is streamed.

        It returns whether it has taken them, which it may only if they are nothing but whole chunks.
        The others go to `on_piece`.
        """
        self._is_between_chunks = False

    def __repr__(self) -> str:
        state = (
            "closed" if self._transport is None else "draining" if self._draining else "busy" if self._busy else "idle"
        )
        return f"<Connection {state}, status {self.status}, {self._unread()} bytes unread>"

    # Called by the pool and by the user of the connection

    async def send(self, head: bytes, body: bytes | list[bytes]) -> None:
        """Send one request and wait for the head of its answer.

        The parts of a list are sent one after the other, without a copy of the whole. A failure or
        a cancellation closes the connection.
        """
        self._reset()
        self._busy = True
        if self._transport is None:
            raise TransportError("closed")
        if isinstance(body, list):
            self._transport.writelines((head, *body))
        else:
            self._transport.write(head + body if len(body) < 65536 else head)
            if len(body) >= 65536:
                self._transport.write(body)
        try:
            while not self._head_done:
                if self._failure is not None:  # inlined `_wait`
                    self._raise_failure()
                self._waiter = self._loop.create_future()
                await self._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def whole(self, limit: int) -> bytes | None:
        """Return the body if all of it arrived with the head, without waiting.

        Return None if it has to be read, or is longer than `limit` bytes.
        """
        if self._ended and len(self._pieces) == 1 and len(self._pieces[0]) <= limit and self._failure is None:
            return self._pieces.pop()
        return None

    async def read(self, limit: int) -> bytes:
        """Return the whole body.

        Raises:
            TransportError: the body is truncated, malformed or longer than `limit` bytes.
        """
        whole = self.whole(limit)
        if whole is not None:
            return whole
        self._max_body = limit
        self._set_full(False)
        self._check_unread()
        while not self._ended:
            await self._wait()
        self._raise_failure()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return body

    async def stream(self, on_piece: Callable[[bytes], None]) -> None:
        """Call `on_piece` with each piece of the body as it arrives, until its end or until `stop`.

        `on_piece` runs inside the socket's read callback, so it must not block. Its exceptions are
        raised here.
        """
        self._on_piece = on_piece
        self._set_full(False)
        if self._pieces:
            self._deliver()
        while not (self._ended or self._stopped):
            await self._wait()
        self._raise_failure()

    def stop(self) -> None:
        """End `stream`: the caller has all that it needs. Only the end of the body may follow."""
        self._stopped = True
        self._is_between_chunks = False
        self._wake()

    def mark_unusable(self) -> None:
        """Never reuse this connection, because the caller saw something unexpected.

        The present answer may be read on.
        """
        self._usable = False

    def pause(self) -> None:
        """Stop reading from the socket, because the caller cannot take more."""
        self._is_held = True
        self._update_reading()

    def resume(self) -> None:
        """Continue to read after `pause`."""
        self._is_held = False
        self._update_reading()

    def release(self) -> None:
        """Return the connection to the pool if the answer ended cleanly, otherwise close it."""
        self._on_piece = self.on_chunks = None
        self._is_between_chunks = False
        self._pieces.clear()
        self._is_held = self._is_full = False
        if self._ended:
            self._finish()
        elif self._stopped and self.is_usable():
            self._draining = True
            self._update_reading()
            self._timer = self._loop.call_later(DRAIN_SECONDS, self.abort)
        else:
            self.abort()

    @property
    def is_busy(self) -> bool:
        """True from sending a request until the end of its answer."""
        return self._busy

    @property
    def address(self) -> str:
        """IP address of the server, or an empty string if the connection is closed."""
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        return "" if peer is None else str(peer[0])

    @property
    def unsent_bytes(self) -> int:
        """Bytes of the request that the socket has not taken yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def is_open(self) -> bool:
        """True until the connection is closed, or about to be."""
        return self._transport is not None and not self._transport.is_closing()

    def give_up(self) -> None:
        """End the exchange, because the server does not respond any more."""
        self._fail(TransportError("unresponsive", self.answered))

    def abort(self) -> None:
        """Close the connection at once, without reading what is left."""
        self._usable = False
        self._cancel_timer()
        if self._transport is not None:
            self._transport.abort()

    def is_usable(self) -> bool:
        return self._usable and self._transport is not None and not self._transport.is_closing()

    def is_silent(self) -> bool:
        """Return whether the socket has nothing to read.

        A busy loop may not have noticed yet that the server closed the connection or sent a byte
        that was not requested.
        """
        return not self._readable.poll(0)

    def _finish(self) -> None:
        if self._timer is not None:
            self._cancel_timer()
        self._busy = self._draining = False
        if self.is_paused:
            self._update_reading()
        if self.is_usable() and self._transport is not None and self._transport.get_write_buffer_size() == 0:
            self._owner.release(self)
        else:
            self.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self) -> None:
        """Wait until anything happens.

        A failure is raised only here, so that what arrived before it is not lost, however the bytes
        were split.
        """
        self._raise_failure()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            try:
                raise self._failure
            finally:  # the raised one gets a traceback, which holds this object and the request
                self._failure = TransportError("closed", answered=True)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _set_full(self, full: bool) -> None:
        self._is_full = full
        self._update_reading()

    def _update_reading(self) -> None:
        """Read from the socket unless there is a reason to pause."""
        paused = self._is_held or self._is_full
        if paused == self.is_paused or self._transport is None:
            return
        self.is_paused = paused
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
        if self._max_body is not None:
            if self._unread() > self._max_body:
                self._pieces.clear()
                self._fail(TransportError("too_large", answered=True))
        elif self._unread() > self._limits.unread:
            self._set_full(True)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._usable:  # aborted while it was being made
            cast("asyncio.Transport", transport).abort()
            return
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass
        sock = transport.get_extra_info("socket")
        set_keep_alive(sock)
        self._readable.register(sock.fileno(), select.POLLIN)
        self._owner.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._usable = False
        self._cancel_timer()
        self._parser = None  # the parser refers to this object: break the cycle
        self._owner.closed(self)
        if not self._busy or self._ended or self._stopped:
            return
        if self._until_close and exc is None:
            self._ended = True
        elif self._failure is None:
            self._failure = TransportError(fault_of_end(exc, has_head=self._head_done), self.answered)
        self._wake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.has_arrived = True
        if self._is_between_chunks and self._take_chunks(self._buffer[:nbytes].tobytes()):
            return
        if not self._busy:  # an unrequested byte: the next user of the connection would take it for the answer
            self.abort()
            return
        if self._parser is None or self._failure is not None:
            return
        if not self.answered and (head := self._owner.answer_head) is not None and self._take_whole(head, nbytes):
            return
        is_broken = False
        try:
            self._parser.feed_data(self._buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            is_broken = True
            self._usable = False
        if not self.answered or not self._head_done:
            if self._ended and not self.answered:
                self._keep_head(nbytes)
            self.answered = True
            if not (self._head_done or self._is_full):
                self._head_bytes += nbytes
                is_broken = is_broken or self._head_bytes > self._limits.head
        else:
            is_broken = self._lacks_body(nbytes) or is_broken
        if self._pieces:
            last = self._pieces[-1]
            self._deliver()
            if self._on_piece is not None and last.endswith(b"\n"):
                is_between = ends_between_chunks(last, self._buffer, nbytes)
                self._is_between_chunks = is_between and not (self._ended or self._stopped or self._failure is not None)
        if is_broken or self._draining:
            self._after_end(is_broken)

    def _take_chunks(self, data: bytes) -> bool:
        """Take a read that consists of whole chunks; return whether it does.

        The parser does not see it: it would be in the same state after it.
        """
        try:
            if self.on_chunks is not None and self.on_chunks(data):
                return True
            line = SIZE_LINES.get(len(data), b"none")
            start = len(line)
            if data[:start] == line and data[-2:] == b"\r\n":
                self._on_piece(data[start:-2])  # type: ignore[misc]  # set while _is_between_chunks is True
                return True
        except Exception as failure:
            self._fail(failure)
            return True
        self._is_between_chunks = False
        return False

    def _take_whole(self, head: AnswerHead, nbytes: int) -> bool:
        """Take an answer that is whole, behind a head which was parsed before; return whether it is one.

        The parser does not see it: it would be in the same state after it.
        """
        body = head.body(self._buffer[:nbytes].tobytes())
        if body is None:
            return False
        self.status, self.headers, self.fields = 200, head.headers, head.fields
        self.answered = self._head_done = self.has_begun = self._ended = True
        self._pieces.append(body)
        self._wake()
        return True

    def _keep_head(self, nbytes: int) -> None:
        """Keep the head of an answer that arrived in one read, if others may have the same."""
        if self._usable and not self._until_close:
            self._owner.answer_head = answer_head(self._buffer[:nbytes].tobytes(), self.headers, self.fields)

    def _lacks_body(self, nbytes: int) -> bool:
        """Count a read without any part of the body. Return whether too many followed each other.

        Such bytes are a chunk extension or a trailer. The parser would collect a trailer for as
        long as the backend sends it.
        """
        if self._has_body:
            self._has_body, self._bodiless_bytes = False, 0
            return False
        self._bodiless_bytes += nbytes
        return self._bodiless_bytes > self._limits.head and not self._ended

    def _after_end(self, is_broken: bool) -> None:
        if is_broken and not (self._ended or self._stopped):
            self._fail(TransportError("protocol", answered=True))
        if self._draining and (self._ended or is_broken):
            self._finish()

    def _deliver(self) -> None:
        """Pass on the pieces of one read in one call: ten thousand tiny chunks become one piece."""
        pieces = self._pieces
        if self._on_piece is None:
            if not self._ended or self._max_body is not None:
                self._check_unread()
            return
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        try:
            self._on_piece(piece)
        except Exception as failure:
            self._fail(failure)

    # httptools callbacks. They do not raise, because an exception would come back as a parser error.

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
            self._fail(TransportError("protocol", answered=True))
            return
        self.fields = fields = dict(self.headers)
        self._until_close = not (b"content-length" in fields or b"transfer-encoding" in fields or status in (204, 304))
        if self._until_close or not self._parser.should_keep_alive():
            self._usable = False
        self._wake()

    def on_body(self, piece: bytes) -> None:
        self._has_body = self.has_begun = True
        if not (self._ended or self._stopped or self._failure is not None):
            self._pieces.append(piece)
        elif self._stopped and not self._ended:  # more than the end of the body followed
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
