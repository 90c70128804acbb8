"""The door: uvicorn's httptools protocol with deadlines, bounds, strict framing, write stalls and errors in our shape.

What it does that uvicorn does not (facts of uvicorn 0.54, httptools 0.9):

- Head and body have deadlines, the head has bounds, and a client that takes no byte of its answer is cut off.
- A head goes to the application only if its framing has one reading. llhttp, with no leniency, refuses most of what has two,
  `framing.py` the rest. All refusals are JSON and close the connection, and nothing of the request is echoed.
- A second request before the first answer is whole is dropped, and the connection closes after the first. Reading goes on, so a
  client that leaves is still seen.
- End of input means that the client has left, even if it only closed its sending side: no known client of this API half-closes.
- `Upgrade` is taken out of the head before the parser sees it, since httptools hands over no body once it has seen one.
"""

import asyncio
import select
from dataclasses import dataclass
from typing import Any

from httptools import HttpParserError, HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from gateway.downstream.cycle import RequestResponseCycle, Scope, error_answer
from gateway.downstream.request_head import (
    CachedHead,
    HeadRefused,
    UpgradeWanted,
    cache_head,
    parse_head,
    too_large,
    without_upgrade,
)
from gateway.downstream.write_timeout import NEVER, WriteTimeout

_NEW_SECONDS = 0.5
_HIGH_WATER = 65536  # bytes, of a body that the application has not read and of an answer that the client has not taken
_BODY_BYTES_PER_SECOND = 65536
_HEAD, _BODY_OF_KNOWN, _BODY, _ANSWER, _LINGER, _CLOSED = range(6)


@dataclass(frozen=True)
class ServerLimits:
    """What a client may take. Times in seconds.

    The body has `body_seconds` in all, and a second more for every 64 KiB of it that have come. Time in which the door itself does not
    read, because the application leaves 64 KiB unread, does not count.
    """

    idle_seconds: float = 10
    """From accepting a connection to its first byte."""
    header_seconds: float = 10
    """From the first byte of a head to its end."""
    body_seconds: float = 30
    keep_alive_seconds: float = 75
    """From an answer to the next request; longer than clients and proxies commonly keep a connection (60)."""
    write_stall_seconds: float = 60
    """Without one byte of a waiting answer taken; found out within a quarter more."""
    linger_seconds: float = 5
    """After an answer that came before the end of its request: so long the rest is read, since closing at once would reset the answer."""
    max_header_bytes: int = 65536
    max_header_count: int = 100


class _SecondRequest(Exception):
    """Bytes of a further request behind a whole one."""


class HttpProtocol(HttpToolsProtocol):
    """One client's connection. Its states: head → body → answer → head …, or → linger → closed.

    There is one timer, never earlier than the nearest deadline when it was set and moved forward when it fires, so that a keep-alive
    request costs none.
    """

    bounds = ServerLimits()
    on_message_begin = None  # type: ignore[assignment]  # httptools then calls nothing

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = HttpRequestParser(self)  # uvicorn's own is lenient about data after `Connection: close`
        self._state = _HEAD
        self._cycle: RequestResponseCycle | None = None
        self._scope: Scope | None = None
        self._raw: bytes | bytearray = b""  # the head, as far as it has come
        self._url = b""
        self._host: bytes | None = None  # the last one that was checked
        self._known: CachedHead | None = None
        self._received = 0  # bytes of this request
        self._size = 0  # what they should come to; -1 when chunks tell
        self._second_request = False
        self._last_request = False
        self._opened = 0.0
        self._body_since = 0.0
        self._read_paused_at: float | None = None
        self._deadline = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._write_paused = False
        self._stall = WriteTimeout(self.bounds.write_stall_seconds)

    # The transport's calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._opened = self.loop.time()
        self.connections.add(self)
        self.transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._common = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "server": get_local_addr(transport),
            "client": get_remote_addr(transport),
            "scheme": "https" if is_ssl(transport) else "http",
            "root_path": self.root_path,
        }
        self._arm(self.bounds.idle_seconds)

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _HEAD:
            if self._raw:
                self._raw += data
            elif self._known is not None and self._serve_repeated_head(self._known, data):
                return
            else:
                if data[0] in b"\r\n":  # blank lines before a request, RFC 9112 §2.2
                    data = data.lstrip(b"\r\n")
                    if not data:
                        return
                self._raw = data
            self._received = len(self._raw)
            self._parse(data)
        elif state == _BODY:
            self._received += len(data)
            self._parse(data)
        elif state == _BODY_OF_KNOWN:
            self._gather(data)
        elif state == _ANSWER and data.strip(b"\r\n"):
            self._drop_second_request()

    def eof_received(self) -> None:
        cycle = self._cycle
        if cycle is None or cycle.complete or cycle.gone:
            self._close()
        else:
            self.transport.abort()  # not close: what the client has not taken would hold the connection
            cycle.client_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self._state = _CLOSED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.parser = None  # type: ignore[assignment]  # it holds this object
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            cycle.client_gone()

    def pause_writing(self) -> None:
        self._write_paused = True
        self._arm_write_timeout()
        if self._cycle is not None:
            self._cycle.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._state < _LINGER:  # after that, what is left must be taken too
            self._stall.clear()
        if self._cycle is not None:
            self._cycle.resume()

    # The server's calls.

    def retire(self) -> None:
        """Close after the next answer, which says so: a client that goes on has moved to another connection before this one is closed."""
        self._last_request = True
        if self._state != _HEAD and self._cycle is not None:
            self._cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close after the running request, or at once if none has begun. May be called again; a request that is on its way is waited for."""
        self.retire()
        if self._state == _HEAD and not self._raw and self._is_silent() and not self._is_new():
            self._close()

    def _is_silent(self) -> bool:
        """No bytes wait to be read: what the loop has not read yet would be lost."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def _is_new(self) -> bool:
        """The client has just connected; its first request is a round trip behind."""
        return self._cycle is None and self.loop.time() < self._opened + _NEW_SECONDS

    def abort(self) -> None:
        """Close at once, whatever is unsent."""
        self.transport.abort()

    # Parsing.

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            if self._state != _ANSWER:
                self._refuse_or_reread(error)
                return
            self._drop_second_request()  # the request is whole: what follows it does not parse, or must not be parsed yet
        if self._state == _HEAD:
            self._await_head()
            return
        if self._scope is not None:
            assert self._cycle is not None
            scope, self._scope = self._scope, None
            self._raw = b""
            self._cycle.start(self.loop, self.app, scope, self.tasks)
            if self._state == _BODY:
                self._body_since = self.loop.time()
                self._arm(self.bounds.body_seconds)
        if self._state == _ANSWER:
            surplus = self._received - self._size if self._size >= 0 else int(data[-1] != 10)
            if surplus and data[-surplus:].strip(b"\r\n"):
                self._drop_second_request()
        elif self._size < 0:
            self._check_overhead()

    def _serve_repeated_head(self, known: CachedHead, data: bytes) -> bool:
        """Serve a request whose head llhttp has judged before, as soon as its body is whole; False if `data` is not just that, or large."""
        found = known.length_and_rest(data)
        if found is None:
            return False
        length, body = found
        size = int(length)
        if size != len(body):
            return len(body) < size <= _HIGH_WATER and self._await_body(known, data, size - len(body))
        scope = known.scope(length)
        cycle = self._cycle = RequestResponseCycle(
            self,
            self.transport,
            known.fields(length),
            known.notes,
            False,
            True,
            not self._last_request,
            self._write_paused,
            body,
        )
        scope["extensions"] = {"gateway.client": cycle}
        self._state = _ANSWER
        self._deadline = NEVER
        cycle.start(self.loop, self.app, scope, self.tasks)
        return True

    def _await_body(self, known: CachedHead, data: bytes, missing: int) -> bool:
        """Most clients write head and body one after the other. The application is not told before the body, if it has noted something on this
        head: then it has let it in."""
        if not known.notes:
            return False
        self._state = _BODY_OF_KNOWN
        self._raw = bytearray(data)
        self._received = len(data)
        self._size = len(data) + missing
        self._body_since = self.loop.time()
        self._arm(self.bounds.body_seconds)
        return True

    def _gather(self, data: bytes) -> None:
        self._raw += data
        self._received += len(data)
        if self._received >= self._size:
            raw, self._raw, self._state = bytes(self._raw), b"", _HEAD
            self.data_received(raw)  # as though it had come in one

    def _refuse_or_reread(self, error: HttpParserError) -> None:
        cause = error.__context__  # what a callback of ours raised
        if cause is None:
            self._refuse(400, "invalid_value", "The request is not valid HTTP/1.1.")
        elif isinstance(cause, HeadRefused):
            self._refuse(*cause.answer)
        elif isinstance(cause, UpgradeWanted):
            self._reread_without_upgrade()
        else:
            raise error

    def _reread_without_upgrade(self) -> None:
        self._raw = without_upgrade(self._raw)
        self._received = len(self._raw)
        self.parser = HttpRequestParser(self)
        self._parse(self._raw)

    def _await_head(self) -> None:
        if len(self._raw) > self.bounds.max_header_bytes:
            self._refuse(*too_large().answer)
        elif isinstance(self._raw, bytes):  # its first piece
            self._raw = bytearray(self._raw)
            self._arm(self.bounds.header_seconds)

    def on_url(self, url: bytes) -> None:
        if self._state != _HEAD:
            raise _SecondRequest
        self._url += url

    on_header = None  # type: ignore[assignment]  # uvicorn's; httptools calls what is there, and `judge` reads them for less

    def on_headers_complete(self) -> None:
        url, self._url = self._url, b""
        raw, bounds = bytes(self._raw), self.bounds
        method = self.parser.get_method()
        head = parse_head(raw, method, url, bounds.max_header_bytes, bounds.max_header_count, self._host)
        self._host = head.fields.get(b"host")
        self._size = head.size
        keep_alive = head.http11 and self.parser.should_keep_alive() and not self._last_request
        scope = {**self._common, **head.scope(self.root_path)}
        self._known = cache_head(raw, head, scope) if keep_alive and method == b"POST" else None
        notes = {} if self._known is None else self._known.notes
        cycle = self._cycle = RequestResponseCycle(
            self, self.transport, head.fields, notes, method == b"HEAD", head.http11, keep_alive, self._write_paused
        )
        self._scope = {**scope, "extensions": {"gateway.client": cycle}}
        self._state = _BODY

    def _check_overhead(self) -> None:
        """Chunk extensions and trailers reach nobody; without a bound they could come for ever."""
        assert self._cycle is not None
        body = self._cycle.body_bytes
        if self._received - body > 2 * self.bounds.max_header_bytes + 8 * body:  # chunks of one byte take 5 bytes each
            self._refuse(400, "invalid_value", "The chunks of the request's body hold too little.")

    def on_body(self, body: bytes) -> None:
        assert self._cycle is not None
        self._cycle.add_body(body)
        if self._cycle.unread > _HIGH_WATER and self._read_paused_at is None and not self.transport.is_closing():
            self._read_paused_at = self.loop.time()
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        assert self._cycle is not None
        self._state = _ANSWER
        self._deadline = NEVER
        self.resume_body()  # else nobody would see the client leave
        self._cycle.end_body()

    # The cycle's calls.

    def resume_body(self) -> None:
        if self._read_paused_at is not None:
            self._body_since += self.loop.time() - self._read_paused_at
            self._read_paused_at = None
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def add_unsent(self, size: int) -> None:
        self._stall.add(size)

    def answered(self) -> None:
        self.server_state.total_requests += 1
        assert self._cycle is not None
        if self._state == _ANSWER and self._cycle.keep_alive:
            self._state = _HEAD
            self._arm(self.bounds.keep_alive_seconds)
        else:
            self.close_after_flush()

    def close_after_flush(self) -> None:
        if self._state == _ANSWER and not self._second_request:
            self._close()
        else:
            self._linger()

    # Endings.

    def _drop_second_request(self) -> None:
        assert self._cycle is not None
        self._second_request = True
        self._cycle.keep_alive = False

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer instead of the application, which has seen nothing or is told that its client is gone."""
        cycle = self._cycle
        self._scope = None
        if cycle is not None and cycle.started and not cycle.complete:
            self.transport.abort()
        else:
            self.transport.write(error_answer(status, code, message))
            self._linger()
        if cycle is not None:
            cycle.client_gone()

    def _linger(self) -> None:
        """Read on and drop it until the client has closed: unread input would make the kernel reset the connection, and lose the answer."""
        self._state = _LINGER
        self.resume_body()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(self.bounds.linger_seconds)
        self._arm_write_timeout()

    def _close(self) -> None:
        """Close once the answer is sent; `_on_timer` aborts if the client does not take it."""
        self._state = _CLOSED
        self._deadline = NEVER
        self.transport.close()
        self._arm_write_timeout()

    # Deadlines.

    def _arm(self, seconds: float) -> None:
        self._deadline = self.loop.time() + seconds
        self._set_timer(self._deadline)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self.loop.time()
        if now >= self._stall.deadline and self._stall.has_expired(self.transport.get_write_buffer_size(), now):
            self.transport.abort()
        if now >= self._deadline:
            self._deadline = NEVER
            self._on_deadline(now)
        nearest = min(self._deadline, self._stall.deadline)
        if nearest != NEVER and not (self._state == _CLOSED and self.transport.get_write_buffer_size() == 0):
            self._set_timer(nearest)

    def _on_deadline(self, now: float) -> None:
        if self._state in (_BODY, _BODY_OF_KNOWN):
            if self._read_paused_at is not None:
                self._arm(self.bounds.body_seconds)
                return
            allowed = self.bounds.body_seconds + self._received / _BODY_BYTES_PER_SECOND
            if now < self._body_since + allowed:
                self._deadline = self._body_since + allowed
                return
            self._refuse(408, "request_timeout", "The body of the request did not come in time.")
        elif self._state == _HEAD and self._raw:
            self._refuse(408, "request_timeout", "The headers of the request did not come in time.")
        else:
            self._close()

    def _arm_write_timeout(self) -> None:
        self._stall.watch(self.transport.get_write_buffer_size(), self.loop.time())
        if self._stall.deadline != NEVER:
            self._set_timer(self._stall.deadline)


def bind_limits(bounds: ServerLimits) -> type[HttpProtocol]:
    """The protocol class for `uvicorn.Config(http=...)` with these bounds."""
    return type("BoundDoor", (HttpProtocol,), {"bounds": bounds})
