"""One request and its answer as an ASGI application sees them, with a synchronous side door for the hot path. No parsing, no deadlines."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Protocol

from gateway.errors import INVALID_REQUEST, SERVER_ERROR, envelope

Scope = dict[str, Any]
AsgiMessage = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
Hook = Callable[[], None]

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection"))
# How the body of an answer is delimited; `_OPEN` until the first piece of it is known, `_ENDED` after the last.
_OPEN, _CHUNKED, _COUNTED, _UNTIL_CLOSE, _NO_BODY, _ENDED = range(6)

_log = logging.getLogger("gateway.front")


class CycleOwner(Protocol):
    """What a cycle asks of the door that it came through."""

    def resume_body(self) -> None:
        """The application wants more of the body."""

    def add_unsent(self, size: int) -> None:
        """So many bytes were written although the client does not take what waits already."""

    def answered(self) -> None:
        """The last byte of the answer has been handed to the transport."""

    def close_after_flush(self) -> None:
        """No whole answer will come: send what was written, then close."""


class RequestResponseCycle:
    """One exchange on a connection; `scope["extensions"]["gateway.client"]` is this object.

    For the application:
        fields: the request's headers by lower-case name; of a repeated one the last (`len(scope["headers"])` is larger then).
        notes: empty, or what the application has put there for an earlier request on this connection whose head was the same but for the
            length of its body.
        gone: the client has left, or the door has refused the rest of its request. Writes do nothing from then on.
        on_leave: called once and synchronously when `gone` becomes true before the answer is whole.
        paused: more than 64 KiB of the answer wait for the client. `send` waits by itself; who uses `write` must look.
        on_pause, on_resume: called when `paused` changes.
        write: one piece of the body, without a turn of the loop.
    """

    __slots__ = (
        "_chunks", "_continue", "_door", "_event", "_head", "_http11", "_left", "_mode", "_task", "_told", "_transport",
        "body_bytes", "complete", "fields", "gone", "keep_alive", "more_body", "notes", "on_leave", "on_pause", "on_resume", "paused",
        "started", "unread",
    )  # fmt: skip

    def __init__(
        self,
        door: CycleOwner,
        transport: asyncio.Transport,
        fields: dict[bytes, bytes],
        notes: dict[str, Any],
        is_head: bool,
        http11: bool,
        keep_alive: bool,
        paused: bool,
        body: bytes | None = None,
    ) -> None:
        """`body`: of a request that is whole; None: it is to come, by `add_body` and `end_body`."""
        self._door = door
        self._transport = transport
        self._http11 = http11
        self._event: asyncio.Event | None = None
        self.fields = fields
        self.notes = notes
        self.keep_alive = keep_alive
        self.gone = False
        self.on_leave: Hook | None = None
        self.paused = paused
        self.on_pause: Hook | None = None
        self.on_resume: Hook | None = None
        # The request's body.
        self._chunks: list[bytes] = [] if body is None else [body]
        self.unread = self.body_bytes = 0 if body is None else len(body)
        self.more_body = body is None
        self._told = False
        self._continue = b"expect" in fields and http11 and fields[b"expect"].lower() == b"100-continue"
        # The answer.
        self._head = b""
        self._mode = _NO_BODY if is_head else _OPEN
        self._left = 0
        self.started = False
        self.complete = False

    # What the door tells.

    def add_body(self, data: bytes) -> None:
        """A piece of the request's body has come."""
        self._chunks.append(data)
        self.unread += len(data)
        self.body_bytes += len(data)
        self._continue = False
        if self._event is not None:
            self._event.set()

    def end_body(self) -> None:
        """The request is whole."""
        self.more_body = False
        self._continue = False
        if self._event is not None:
            self._event.set()

    def client_gone(self) -> None:
        """The client is gone, or as good as gone. Only the first call counts, and none after the answer is whole."""
        if self.gone or self.complete:
            return
        on_leave = self.on_leave
        self._finish()
        self.gone = True
        if on_leave is not None:
            on_leave()

    def pause(self) -> None:
        """The client takes the answer more slowly than it is written."""
        self.paused = True
        if self.on_pause is not None:
            self.on_pause()

    def resume(self) -> None:
        """There is room for more of the answer."""
        self.paused = False
        if self._event is not None:
            self._event.set()
        if self.on_resume is not None:
            self.on_resume()

    # The application's task.

    def start(self, loop: asyncio.AbstractEventLoop, app: App, scope: Scope, tasks: set[asyncio.Task[None]]) -> None:
        """Run the application in a task, which is in `tasks` as long as it runs."""
        self._task = loop.create_task(self._run(app, scope, tasks))
        tasks.add(self._task)

    async def _run(self, app: App, scope: Scope, tasks: set[asyncio.Task[None]]) -> None:
        try:
            await app(scope, self.receive, self.send)
            if not (self.complete or self.gone):
                _log.error("the application returned before its answer was whole")
        except Exception:
            _log.exception("the application failed")
        finally:
            # Cheaper than a done callback, which costs a turn of the loop for each request.
            tasks.discard(self._task)
            if not (self.complete or self.gone):
                self._break_off()

    def _break_off(self) -> None:
        self._finish()
        self.gone = True
        if not self.started:
            self._transport.write(error_answer(500, None, "The gateway failed to answer.", SERVER_ERROR))
        self._door.close_after_flush()

    # ASGI.

    async def receive(self) -> AsgiMessage:
        """The next piece of the body; after its end, `http.disconnect` once the client has left or the answer is whole."""
        if self._continue and not self.gone:
            self._continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.complete):
            if self._chunks or not (self.more_body or self._told):
                return self._take_body()
            self._door.resume_body()
            await self._changed()
        return {"type": "http.disconnect"}

    async def send(self, message: AsgiMessage) -> None:
        """`http.response.start` waits for the first piece of the body, as ASGI asks: both leave in one packet."""
        while self.paused and not self.gone:
            await self._changed()
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body":
            self._emit(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and not self._head:
            self._begin(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"the application sent {kind!r} out of turn")

    def write(self, data: bytes) -> None:
        """Send `data` as one piece of the body after `http.response.start`; nothing if it is empty or the client is gone."""
        if self.gone or not data:
            return
        if self._mode == _CHUNKED:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._emit(data, True)
        if self.paused:
            self._door.add_unsent(len(data))

    def open(self, status: int, header_lines: bytes) -> None:
        """`http.response.start` without waiting; the head leaves with the first `write`. `header_lines` are whole lines, without framing."""
        if not self.gone:
            self._head = _STATUS_LINES[status] + header_lines

    def end(self) -> None:
        """The answer is whole."""
        if not self.gone:
            self._emit(b"", False)

    def answer(self, status: int, header_lines: bytes, body: bytes) -> None:
        """A whole answer in one call."""
        if self.gone:
            return
        if (
            self._mode == _OPEN and self.keep_alive and not (self.more_body or self.started)
        ):  # nearly all: one write, as `_emit` would make it
            self._transport.write(
                b"%b%bcontent-length: %d\r\n\r\n%b" % (_STATUS_LINES[status], header_lines, len(body), body)
            )
            self.started = self.complete = True
            self._finish()
            self._door.answered()
            return
        self._head = _STATUS_LINES[status] + header_lines
        self._emit(body, False)

    def whole_body(self) -> bytes | None:
        """The request's body in one piece, without a turn of the loop; None if it has not come in one, or `receive` has given it already."""
        if self.more_body or self.gone or len(self._chunks) != 1:
            return None
        body = self._chunks.pop()
        self.unread = 0
        self._told = True
        return body

    def _take_body(self) -> AsgiMessage:
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self.unread = 0
        self._told = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def _changed(self) -> None:
        """Wait until anything happens; the hot path never comes here, so it pays for no event."""
        if self._event is None:
            self._event = asyncio.Event()
        self._event.clear()
        await self._event.wait()

    # The answer's bytes.

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        if status in (204, 304):
            self._mode = _NO_BODY
        for name, value in headers:
            name = name.lower()
            if name in _FRAMING:
                if name != b"content-length":  # the other two are the server's own
                    self.keep_alive = self.keep_alive and not (name == b"connection" and b"close" in value.lower())
                    continue
                if self._mode == _OPEN:
                    self._mode = _COUNTED
                    self._left = int(value)
            lines.append(b"%b: %b\r\n" % (name, value))
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header of the answer holds a line end or NUL")
        self._head = head

    def _end_head(self, size: int, more: bool) -> bytes:
        """The head, now that the first piece of the body is known."""
        if not self._head:
            raise RuntimeError("the application sent a body before http.response.start")
        head = self._head
        if self._mode == _OPEN:
            if not more:
                self._mode = _COUNTED
                self._left = size
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
            raise RuntimeError("the answer is whole already")
        out = b"" if self.started else self._end_head(len(data), more)
        if self._mode == _CHUNKED:
            if data:
                out = b"%b%x\r\n%b\r\n" % (out, len(data), data)
            if not more:
                out += b"0\r\n\r\n"
        elif self._mode == _COUNTED:
            self._left -= len(data)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the length of the answer differs from its content-length")
            out += data
        elif self._mode == _UNTIL_CLOSE:
            out += data
        self.started = True
        if out:
            self._transport.write(out)
        if not more:
            self.complete = True
            self._finish()
            self._door.answered()

    def _finish(self) -> None:
        """Nothing more will be sent. The hooks go, since they hold what the application holds."""
        self._mode = _ENDED
        self.on_leave = self.on_pause = self.on_resume = None
        if self._event is not None:
            self._event.set()


def error_answer(status: int, code: str | None, message: str, kind: str = INVALID_REQUEST) -> bytes:
    """A whole answer in OpenAI's error shape, after which the connection closes."""
    body = envelope(message, kind, None, code)
    lines = (
        b"content-type: application/json\r\nx-request-id: req-%024x\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    )
    return _STATUS_LINES[status] + lines % (random.getrandbits(96), len(body)) + body
