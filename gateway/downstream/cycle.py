"""Request/response cycle: one ASGI exchange, plus synchronous calls for the hot path.

No parsing and no deadlines.
"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

from gateway.downstream.responses import STATUS_LINES, asgi_head, error_answer
from gateway.errors import SERVER_ERROR

AsgiMessage = MutableMapping[str, Any]
Handler = Callable[["RequestResponseCycle"], Awaitable[None]]
"""Answers one request, without an ASGI scope."""
Hook = Callable[[], None]

HANDLER = "handler"
"""Name of the application's note with the `Handler` for the further requests with a head."""

_PIECE_BYTES = 48
"""Memory that a piece of the request body takes beside its bytes."""
# How the response body is delimited: `_UNDECIDED` until its first piece is known, `_ENDED` after
# its last.
_UNDECIDED, _CHUNKED, _CONTENT_LENGTH, _UNTIL_CLOSE, _NO_BODY, _ENDED = range(6)

_log = logging.getLogger(__name__)


class CycleOwner(Protocol):
    """The connection that a cycle belongs to, as the cycle uses it."""

    def resume_body(self) -> None:
        """Read more of the request body: the application waits for it."""

    def add_unsent(self, size: int) -> None:
        """Count `size` bytes that were written while the write buffer was over its limit."""

    def answered(self) -> None:
        """Go on to the next request: the last byte of the response is in the transport."""

    def close_after_flush(self) -> None:
        """Send what was written, then close: the response will not be completed."""


class RequestResponseCycle:
    """One request and its response; `scope["extensions"]["gateway.client"]` is this object.

    Interface for the application:
        fields: the request headers by lower-case name. A repeated name has its last value;
            `len(scope["headers"])` is larger then.
        notes: a dict for the application. It is empty, or as the application left it for an
            earlier request on this connection whose head differs at most in its content length.
            A `Handler` that it leaves as `HANDLER` answers such requests in its place, once their
            body is complete. Their `fields` have no content length.
        gone: True once the client has disconnected, or the server has refused the rest of its
            request. Writes do nothing from then on.
        on_leave: called once, synchronously, when `gone` becomes true before the response is
            complete.
        paused: True while more than 64 KiB of the response wait for the client. `send` waits by
            itself; callers of `write` must check.
        on_pause, on_resume: called when `paused` changes.
        write: sends one piece of the body without yielding to the event loop.
        chunk_line, write_chunk: the same for a caller that sends many pieces of few different sizes.
    """

    __slots__ = (
        "_body_taken", "_chunks", "_event", "_head", "_http11", "_mode", "_owner", "_remaining", "_send_continue",
        "_task", "_transport", "body_bytes", "complete", "fields", "gone", "keep_alive", "more_body", "notes",
        "on_leave", "on_pause", "on_resume", "paused", "started", "unread",
    )  # fmt: skip

    def __init__(
        self,
        owner: CycleOwner,
        transport: asyncio.Transport,
        fields: dict[bytes, bytes],
        notes: dict[str, Any],
        is_head: bool,
        http11: bool,
        keep_alive: bool,
        paused: bool,
        body: bytes | None = None,
    ) -> None:
        """Begin an exchange.

        `body` is the complete request body; with None it follows by `add_body` and `end_body`.
        """
        self._owner = owner
        self._transport = transport
        self._http11 = http11
        self._event: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self.fields = fields
        self.notes = notes
        self.keep_alive = keep_alive
        self.gone = False
        self.on_leave: Hook | None = None
        self.paused = paused
        self.on_pause: Hook | None = None
        self.on_resume: Hook | None = None
        # The request body.
        self._chunks: list[bytes] = [] if body is None else [body]
        self.unread = self.body_bytes = 0 if body is None else len(body)
        self.more_body = body is None
        self._body_taken = False
        self._send_continue = b"expect" in fields and http11 and fields[b"expect"].lower() == b"100-continue"
        # The response.
        self._head = b""
        self._mode = _NO_BODY if is_head else _UNDECIDED
        self._remaining = 0
        self.started = False
        self.complete = False

    # Called by the connection.

    def add_body(self, data: bytes) -> None:
        """Add a piece of the request body."""
        self._chunks.append(data)
        self.unread += len(data) + _PIECE_BYTES
        self.body_bytes += len(data)
        self._send_continue = False
        if self._event is not None:
            self._event.set()

    def end_body(self) -> None:
        """Mark the request as complete."""
        self.more_body = False
        self._send_continue = False
        if self._event is not None:
            self._event.set()

    def client_gone(self) -> None:
        """Record that the client has disconnected, or counts as disconnected.

        Only the first call has an effect, and only before the response is complete.
        """
        if self.gone or self.complete:
            return
        on_leave = self.on_leave
        self._finish()
        self.gone = True
        if on_leave is not None:
            on_leave()

    def pause(self) -> None:
        """Pause writing: the client reads more slowly than the application writes."""
        self.paused = True
        if self.on_pause is not None:
            self.on_pause()

    def resume(self) -> None:
        """Resume writing: the write buffer has room again."""
        self.paused = False
        if self._event is not None:
            self._event.set()
        if self.on_resume is not None:
            self.on_resume()

    # The application's task.

    def start(self, loop: asyncio.AbstractEventLoop, handler: Handler, tasks: set[asyncio.Task[None]]) -> None:
        """Run the handler in a task, which stays in `tasks` while it runs."""
        self._task = loop.create_task(self._run(handler, tasks))
        tasks.add(self._task)

    def start_at_once(self, loop: asyncio.AbstractEventLoop, handler: Handler, tasks: set[asyncio.Task[None]]) -> None:
        """Do the same, and run the handler up to its first wait, which saves a turn of the event loop.

        With Python 3.11, which cannot do that, it is `start`.
        """
        if sys.version_info < (3, 12):
            self.start(loop, handler, tasks)
            return
        task = asyncio.Task(self._run(handler, tasks), loop=loop, eager_start=True)
        if not task.done():
            self._task = task
            tasks.add(task)

    async def _run(self, handler: Handler, tasks: set[asyncio.Task[None]]) -> None:
        try:
            await handler(self)
            if not (self.complete or self.gone):
                _log.error("the application returned before it completed its response")
        except Exception:
            _log.exception("the application raised an exception")
        finally:
            # Cheaper than a done callback, which costs each request a turn of the event loop.
            if self._task is not None:
                tasks.discard(self._task)
                self._task = None  # a cancelled task holds the frames of the application
            if not (self.complete or self.gone):
                self._abandon()

    def _abandon(self) -> None:
        self._finish()
        self.gone = True
        if not self.started:
            self._transport.write(error_answer(500, None, "The gateway failed to answer.", SERVER_ERROR))
        self._owner.close_after_flush()

    # ASGI.

    async def receive(self) -> AsgiMessage:
        """Return the next piece of the body.

        After its end, return `http.disconnect` once the client has disconnected or the response is
        complete.
        """
        if self._send_continue and not self.gone:
            self._send_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.complete):
            if self._chunks or not (self.more_body or self._body_taken):
                return self._take_body()
            self._owner.resume_body()
            await self._wait_for_change()
        return {"type": "http.disconnect"}

    async def send(self, message: AsgiMessage) -> None:
        """Send an ASGI message.

        `http.response.start` is held until the first piece of the body, as ASGI requires, so that
        both leave in one packet.
        """
        while self.paused and not self.gone:
            await self._wait_for_change()
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body":
            self._emit(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and not self._head:
            self._begin(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r} from the application")

    def write(self, data: bytes) -> None:
        """Send `data` as one piece of the body, after `http.response.start`.

        Does nothing if `data` is empty or the client is gone.
        """
        if self.gone or not data:
            return
        if self._mode == _CHUNKED:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._emit(data, True)
        if self.paused:
            self._owner.add_unsent(len(data))

    def chunk_line(self, size: int) -> bytes | None:
        """Return the size line of a chunk for `write_chunk`; None if the response is not sent in chunks."""
        return b"%x\r\n" % size if self._mode == _CHUNKED else None

    def write_chunk(self, chunk: bytes) -> None:
        """Send a piece of the body that is a whole chunk already: its size line, the piece and CRLF.

        Does nothing if the client is gone.
        """
        if not self.gone:
            self._transport.write(chunk)
            if self.paused:
                self._owner.add_unsent(len(chunk))

    def open(self, status: int, header_lines: bytes) -> None:
        """Set the response head without waiting; the first `write` sends it.

        `header_lines` are complete lines, without the headers that frame the body.
        """
        if not self.gone:
            self._head = STATUS_LINES[status] + header_lines

    def end(self) -> None:
        """Complete the response."""
        if not self.gone:
            self._emit(b"", False)

    def answer(self, status: int, header_lines: bytes, body: bytes | list[bytes]) -> None:
        """Send a complete response in one call. The parts of a long body are not joined."""
        if self.gone:
            return
        if isinstance(body, list):
            self._answer_in_parts(status, header_lines, body)
            return
        if self._mode == _UNDECIDED and self.keep_alive and not (self.more_body or self.started):
            # Nearly all responses: one write with the bytes that `_emit` would produce.
            self._transport.write(
                b"%b%bcontent-length: %d\r\n\r\n%b" % (STATUS_LINES[status], header_lines, len(body), body)
            )
            self.started = self.complete = True
            self._finish()
            self._owner.answered()
            return
        self._head = STATUS_LINES[status] + header_lines
        self._emit(body, False)

    def _answer_in_parts(self, status: int, header_lines: bytes, parts: list[bytes]) -> None:
        if self._mode != _UNDECIDED:
            self.answer(status, header_lines, b"".join(parts))
            return
        self._head = STATUS_LINES[status] + header_lines
        self._transport.writelines((self._end_head(sum(map(len, parts)), False), *parts))
        self.started = self.complete = True
        self._finish()
        self._owner.answered()

    def whole_body(self) -> bytes | None:
        """Return the request body if it is complete and in one piece, without waiting.

        Otherwise, or if `receive` has already returned it, return None.
        """
        if self.more_body or self.gone or len(self._chunks) != 1:
            return None
        body = self._chunks.pop()
        self.unread = 0
        self._body_taken = True
        return body

    def _take_body(self) -> AsgiMessage:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self.unread = 0
        self._body_taken = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def _wait_for_change(self) -> None:
        """Wait for any change of state.

        The hot path never waits, so the event is created here and not in the constructor.
        """
        if self._event is None:
            self._event = asyncio.Event()
        self._event.clear()
        await self._event.wait()

    # The bytes of the response.

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        head = asgi_head(status, headers)
        if status in (204, 304):
            self._mode = _NO_BODY
        if head.closes:
            self.keep_alive = False
        if head.content_length is not None and self._mode == _UNDECIDED:
            self._mode = _CONTENT_LENGTH
            self._remaining = int(head.content_length)
        self._head = head.lines

    def _end_head(self, size: int, more: bool) -> bytes:
        """Return the complete head, now that the first piece of the body is known."""
        if not self._head:
            raise RuntimeError("the application sent a body before http.response.start")
        head = self._head
        if self._mode == _UNDECIDED:
            if not more:
                self._mode = _CONTENT_LENGTH
                self._remaining = size
                head += b"content-length: %d\r\n" % size
            elif self._http11:
                self._mode = _CHUNKED
                head += b"transfer-encoding: chunked\r\n"
            else:
                self._mode = _UNTIL_CLOSE
        if self.more_body:
            self.keep_alive = False
        return head + (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")

    def _emit(self, data: bytes, more: bool) -> None:
        if self._mode == _ENDED:
            raise RuntimeError("the response is already complete")
        out = b"" if self.started else self._end_head(len(data), more)
        if self._mode == _CHUNKED:
            if data:
                out = b"%b%x\r\n%b\r\n" % (out, len(data), data)
            if not more:
                out += b"0\r\n\r\n"
        elif self._mode == _CONTENT_LENGTH:
            self._remaining -= len(data)
            if self._remaining < 0 or (self._remaining and not more):
                raise RuntimeError("the length of the response body differs from its content-length")
            out += data
        elif self._mode == _UNTIL_CLOSE:
            out += data
        self.started = True
        if out:
            self._transport.write(out)
        if not more:
            self.complete = True
            self._finish()
            self._owner.answered()

    def _finish(self) -> None:
        """Allow no further bytes, and drop the hooks, which hold references to the application.

        What was not read of the request body is dropped too.
        """
        self._mode = _ENDED
        if self._chunks:
            self._chunks.clear()
        self.on_leave = self.on_pause = self.on_resume = None
        if self._event is not None:
            self._event.set()
