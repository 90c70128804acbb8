"""HTTP/1.1 protocol: uvicorn's httptools protocol with timeouts, size limits and strict framing.

Differences from uvicorn (as of uvicorn 0.54 and httptools 0.9):

- Head and body have deadlines, the size of the head is limited, and a client that takes no byte of
  its response is cut off.
- A head reaches the application only if its framing is unambiguous. llhttp, without leniency,
  refuses most ambiguous heads, and `request_head.py` the rest. Refusals are JSON in OpenAI's error
  format, close the connection and never echo the request.
- A second request that arrives before the first response is complete is dropped, and the
  connection closes after the first response. Reading continues, so that a disconnect is noticed.
- End of input counts as a disconnect, even if the client has only closed its sending side: no known
  client of this API half-closes.
- `Upgrade` headers are removed and the head is parsed again, since httptools does not deliver the
  body of a request that has one.
"""

import asyncio
import select
import sys
from typing import Any

from httptools import HttpParserError, HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_remote_addr
from uvicorn.server import ServerState

from gateway.body_memory import BodyMemory, HeldBody
from gateway.downstream.asgi import asgi_handler, connection_scope
from gateway.downstream.body_timeout import BodyTimeout
from gateway.downstream.connection_limit import ConnectionLimit, TooManyConnections
from gateway.downstream.connection_timer import ConnectionTimer
from gateway.downstream.cycle import HANDLER, Handler, RequestResponseCycle
from gateway.downstream.limits import ServerLimits
from gateway.downstream.request_head import (
    CachedHead,
    HeadRefused,
    UpgradeWanted,
    cache_head,
    parse_head,
    too_large,
    without_upgrade,
)
from gateway.downstream.responses import error_answer
from gateway.downstream.write_timeout import NEVER, WriteTimeout
from gateway.errors import ConcurrencyExceeded

_NEW_CONNECTION_SECONDS = 0.5
_HIGH_WATER = 65536  # bytes: of the request body not yet read, and of the response not yet sent
_HEAD, _BODY_OF_CACHED_HEAD, _BODY, _RESPONSE, _LINGER, _CLOSED = range(6)


class _SecondRequest(Exception):
    """Raised for the start of another request behind a complete one."""


class HttpProtocol(HttpToolsProtocol):
    """Connection of one client. Its states: head → body → response → head …, or → linger → closed."""

    limits = ServerLimits()
    body_memory = BodyMemory(sys.maxsize)
    connection_limit: ConnectionLimit | None = None
    on_message_begin = None  # type: ignore[assignment]  # httptools then skips the callback

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = HttpRequestParser(self)  # uvicorn's accepts data after `Connection: close`
        self._state = _HEAD
        self._cycle: RequestResponseCycle | None = None
        self._handler: Handler | None = None  # of the request whose head has just been parsed
        self._raw: bytes | bytearray = b""  # the part of the head that has arrived
        self._url = b""
        self._valid_host: bytes | None = None  # the last Host that passed the check
        self._cached_head: CachedHead | None = None
        self._buffered: HeldBody | None = None  # a request that waits for the rest of its body
        self._received = 0  # bytes of this request so far
        self._size = 0  # bytes of the whole request; -1 with chunked encoding
        self._second_request = False
        self._last_request = False
        self._connected_at = 0.0
        self._counted_as: int | str | None = None  # at the connection limit
        self._read_paused_at: float | None = None
        self._write_paused = False
        self._body_timeout = BodyTimeout(self.limits.body_seconds, self.limits.tight_seconds)
        self._write_timeout = WriteTimeout(self.limits.write_stall_seconds)
        self._timer = ConnectionTimer(self.loop, self._write_timeout, self)

    # Called by the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        self._connected_at = self.loop.time()
        self.transport = transport
        if self.connection_limit is not None and not self._is_within(self.connection_limit):
            return
        self.connections.add(self)
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._connection_scope = connection_scope(transport, self.asgi_version, self.root_path)
        self._timer.arm(self.limits.idle_seconds)

    def _is_within(self, limit: ConnectionLimit) -> bool:
        """Count the connection, or refuse it: a refused one is closed at once, since it is there to be held."""
        client = get_remote_addr(self.transport)
        try:
            self._counted_as = None if client is None else limit.enter(client[0])
        except TooManyConnections:
            self._state = _CLOSED
            message = "There are too many connections from this address."
            self.transport.write(
                error_answer(429, ConcurrencyExceeded.code, message, ConcurrencyExceeded.type, b"retry-after: 1\r\n")
            )
            self.transport.close()
            return False
        return True

    def data_received(self, data: bytes) -> None:
        state = self._state
        if state == _HEAD:
            if self._raw:
                self._raw += data
            elif self._cached_head is not None and self._serve_repeated_head(self._cached_head, data):
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
        elif state == _BODY_OF_CACHED_HEAD:
            self._buffer_body(data)
        elif state == _RESPONSE and data.strip(b"\r\n"):
            self._drop_second_request()

    def eof_received(self) -> None:
        cycle = self._cycle
        if cycle is None or cycle.complete or cycle.gone:
            self._close()
        else:
            self.transport.abort()  # not close, which would wait for the client to read the rest
            cycle.client_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self.connection_limit is not None and self._counted_as is not None:
            self.connection_limit.leave(self._counted_as)
        self._state = _CLOSED
        self._timer.stop()
        self.parser = None  # type: ignore[assignment]  # it holds a reference to this object
        self._raw = b""
        self._release_buffered()
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            cycle.client_gone()

    def pause_writing(self) -> None:
        self._write_paused = True
        self._timer.watch_unsent()
        if self._cycle is not None:
            self._cycle.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._state < _LINGER:  # later, the rest must be taken in time too
            self._write_timeout.clear()
        if self._cycle is not None:
            self._cycle.resume()

    # Called by the server.

    def retire(self) -> None:
        """Close after the next response, which announces it with `Connection: close`.

        The client then opens another connection before this one is closed.
        """
        self._last_request = True
        if self._state != _HEAD and self._cycle is not None:
            self._cycle.keep_alive = False

    def shutdown(self) -> None:
        """Close after the request in flight, or at once if none has begun.

        A request that is still arriving is served. May be called repeatedly.
        """
        self.retire()
        if self._state == _HEAD and not self._raw and self._is_input_empty() and not self._is_new():
            self._close()

    def _is_input_empty(self) -> bool:
        """Return whether the socket has no unread bytes, which closing would lose."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def _is_new(self) -> bool:
        """Return whether the client has just connected.

        Its first request arrives a round trip later.
        """
        return self._cycle is None and self.loop.time() < self._connected_at + _NEW_CONNECTION_SECONDS

    def abort(self) -> None:
        """Close at once and discard unsent bytes."""
        self.transport.abort()

    # Parsing.

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            if self._state != _RESPONSE:
                self._refuse_or_reread(error)
                return
            # The request is complete: what follows it does not parse, or must not be parsed yet.
            self._drop_second_request()
        if self._state == _HEAD:
            self._await_rest_of_head()
            return
        if self._handler is not None:
            assert self._cycle is not None
            handler, self._handler = self._handler, None
            self._raw = b""
            self._cycle.start(self.loop, handler, self.tasks)
            if self._state == _BODY:
                self._timer.arm(self._body_timeout.begin(self._received, self.loop.time()))
        if self._state == _RESPONSE:
            surplus = self._received - self._size if self._size >= 0 else int(data[-1] != 10)
            if surplus and data[-surplus:].strip(b"\r\n"):
                self._drop_second_request()
        elif self._size < 0:
            self._check_chunk_overhead()

    def _serve_repeated_head(self, cached: CachedHead, data: bytes) -> bool:
        """Serve a request that repeats a head which llhttp has already checked.

        The handler that the application has left for this head, or else the application, is called
        once the body is complete. Return False if `data` is something else, or if the body is large.
        """
        found = cached.length_and_rest(data)
        if found is None:
            return False
        length, body = found
        size = int(length)
        if size != len(body):
            return len(body) < size <= _HIGH_WATER and self._await_body(cached, data, size - len(body))
        notes = cached.notes
        handler: Handler | None = notes.get(HANDLER)
        if handler is None:
            handler, fields = asgi_handler(self.app, cached.scope(length)), cached.fields(length)
        else:
            fields = cached.other_fields
        cycle = self._cycle = RequestResponseCycle(
            self, self.transport, fields, notes, False, True, not self._last_request, self._write_paused, body
        )
        self._state = _RESPONSE
        cycle.start_at_once(self.loop, handler, self.tasks)
        return True

    def _await_body(self, cached: CachedHead, data: bytes, missing: int) -> bool:
        """Buffer the request until its body is complete; return whether it does so.

        Most clients write head and body separately. The request is buffered only if the application
        has notes on its head: it has then admitted such a request before. While much memory is in
        use, the application reads the body itself, and decides whether there is room for it.
        """
        if not cached.notes or self.body_memory.is_tight:
            return False
        self._buffered = HeldBody(self.body_memory)
        self._buffered.resize(len(data) + missing, may_refuse=False)
        self._state = _BODY_OF_CACHED_HEAD
        self._raw = bytearray(data)
        self._received = len(data)
        self._size = len(data) + missing
        self._timer.arm(self._body_timeout.begin(self._received, self.loop.time()))
        return True

    def _buffer_body(self, data: bytes) -> None:
        self._raw += data
        self._received += len(data)
        if self._received >= self._size:
            raw, self._raw, self._state = bytes(self._raw), b"", _HEAD
            self._release_buffered()
            self.data_received(raw)  # as if it had arrived in one piece

    def _release_buffered(self) -> None:
        if self._buffered is not None:
            self._buffered.release()
            self._buffered = None

    def _refuse_or_reread(self, error: HttpParserError) -> None:
        cause = error.__context__  # the exception that one of our callbacks raised
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

    def _await_rest_of_head(self) -> None:
        if len(self._raw) > self.limits.max_header_bytes:
            self._refuse(*too_large().answer)
        elif isinstance(self._raw, bytes):  # the first piece
            self._raw = bytearray(self._raw)
            self._timer.arm(self.limits.header_seconds)

    def on_url(self, url: bytes) -> None:
        if self._state != _HEAD:
            raise _SecondRequest
        self._url += url

    # Disables uvicorn's callback: `parse_head` reads the headers at a lower cost.
    on_header = None  # type: ignore[assignment]

    def on_headers_complete(self) -> None:
        url, self._url = self._url, b""
        raw, limits = bytes(self._raw), self.limits
        method = self.parser.get_method()
        head = parse_head(raw, method, url, limits.max_header_bytes, limits.max_header_count, self._valid_host)
        self._valid_host = head.fields.get(b"host")
        self._size = head.size
        keep_alive = head.http11 and self.parser.should_keep_alive() and not self._last_request
        scope = {**self._connection_scope, **head.scope(self.root_path)}
        self._cached_head = cache_head(raw, head, scope) if keep_alive and method == b"POST" else None
        notes = {} if self._cached_head is None else self._cached_head.notes
        self._cycle = RequestResponseCycle(
            self, self.transport, head.fields, notes, method == b"HEAD", head.http11, keep_alive, self._write_paused
        )
        self._handler = asgi_handler(self.app, scope.copy())
        self._state = _BODY

    def _check_chunk_overhead(self) -> None:
        """Limit chunk extensions and trailers, which are discarded and could be endless."""
        assert self._cycle is not None
        body = self._cycle.body_bytes
        # A chunk of one byte has 5 bytes of framing.
        if self._received - body > 2 * self.limits.max_header_bytes + 8 * body:
            self._refuse(400, "invalid_value", "The chunked encoding of the request body has too much overhead.")

    def on_body(self, body: bytes) -> None:
        assert self._cycle is not None
        self._cycle.add_body(body)
        if self._cycle.unread > _HIGH_WATER and self._read_paused_at is None and not self.transport.is_closing():
            self._read_paused_at = self.loop.time()
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        assert self._cycle is not None
        self._state = _RESPONSE
        self.resume_body()  # otherwise a disconnect would not be noticed
        self._cycle.end_body()

    # Called by the cycle.

    def resume_body(self) -> None:
        if self._read_paused_at is not None:
            self._body_timeout.extend(self.loop.time() - self._read_paused_at)
            self._read_paused_at = None
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def add_unsent(self, size: int) -> None:
        self._write_timeout.add(size)

    def answered(self) -> None:
        self.server_state.total_requests += 1
        assert self._cycle is not None
        if self._state == _RESPONSE and self._cycle.keep_alive:
            self._state = _HEAD
            self._timer.arm(self.limits.keep_alive_seconds)
        else:
            self.close_after_flush()

    def close_after_flush(self) -> None:
        if self._state == _RESPONSE and not self._second_request:
            self._close()
        else:
            self._linger()

    # Closing.

    def _drop_second_request(self) -> None:
        assert self._cycle is not None
        self._second_request = True
        self._cycle.keep_alive = False

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Respond with an error in place of the application.

        The application has not been called, or learns that its client is gone.
        """
        cycle = self._cycle
        self._handler = None
        self._raw = b""
        self._release_buffered()
        if cycle is not None and cycle.started and not cycle.complete:
            self.transport.abort()
        else:
            self.transport.write(error_answer(status, code, message))
            self._linger()
        if cycle is not None:
            cycle.client_gone()

    def _linger(self) -> None:
        """Read and discard input until the client closes the connection.

        Unread input would make the kernel reset the connection, and the client would lose the
        response.
        """
        self._state = _LINGER
        self.resume_body()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer.arm(self.limits.linger_seconds)
        self._timer.watch_unsent()

    def _close(self) -> None:
        """Close once the response is sent; the timer aborts if the client does not take it."""
        self._state = _CLOSED
        self._timer.deadline = NEVER
        self.transport.close()
        self._timer.watch_unsent()

    # Called by the timer.

    def on_deadline(self, now: float) -> None:
        if self._state in (_BODY, _BODY_OF_CACHED_HEAD):
            self._check_body_timeout(now)
        elif self._state == _HEAD and self._raw:
            self._refuse(408, "request_timeout", "The request headers did not arrive in time.")
        elif self._state != _RESPONSE:  # a response has no deadline: the one that is left is its request's
            self._close()

    def _check_body_timeout(self, now: float) -> None:
        if self._read_paused_at is not None:
            self._timer.arm(self.limits.tight_seconds)
            return
        next_check = self._body_timeout.next_check(self._received, self.body_memory.is_tight, now)
        if next_check is None:
            self._refuse(408, "request_timeout", "The request body did not arrive in time.")
        else:
            self._timer.deadline = next_check


def bind_limits(
    limits: ServerLimits, body_memory: BodyMemory | None = None, connection_limit: ConnectionLimit | None = None
) -> type[HttpProtocol]:
    """Return the protocol class with these limits, for `uvicorn.Config(http=...)`.

    `body_memory` counts the bodies that are buffered before the application is called.
    """
    bound = {
        "limits": limits,
        "body_memory": body_memory or HttpProtocol.body_memory,
        "connection_limit": connection_limit,
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), bound)
