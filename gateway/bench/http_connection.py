"""One HTTP/1.1 connection of the load client.

Lean, so that the client is not what is measured: the parser is httptools, and each read of the socket
costs one reading of the clock and one call per body part.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

import httptools

BodySink = Callable[[bytes, float], None]
"""Takes a part of the body and the time of the read in which it came."""


class ConnectionLost(OSError):
    """The connection ended before the response was complete.

    `began` is true if a part of the response had arrived.
    """

    def __init__(self, *, began: bool) -> None:
        super().__init__("the connection was closed before the response was complete")
        self.began = began


class ResponseHead:
    """Status and headers of a response; the names of headers are in lower case."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}


class HttpConnection(asyncio.Protocol):
    """A connection that carries one exchange at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._now = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[None] | None = None
        self._sink: Callable[[ResponseHead], BodySink] | None = None
        self._body: BodySink | None = None
        self._head = ResponseHead()
        self._until_close = False
        self.idle_since = 0.0
        self.is_reusable = False
        """True between two exchanges, while the server keeps the connection open."""

    async def exchange(self, request: bytes, sink: Callable[[ResponseHead], BodySink]) -> ResponseHead:
        """Send a request and return the head when the whole response is there.

        `sink` is called with the head and returns what takes the body.

        Raises:
            ConnectionLost: the connection ended too early, or the response is not HTTP.
        """
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._head = ResponseHead()
        self._sink, self._body, self._until_close = sink, None, False
        self._done = asyncio.get_running_loop().create_future()
        self.is_reusable = False
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._done = None
        return self._head

    def abort(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not subclasses of it

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done() or self._parser is None:
            self.abort()  # a byte that nobody asked for
            return
        self._now = self._clock()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._lose()
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._until_close and exc is None and self._done is not None and not self._done.done():
            self._done.set_result(None)
        self._lose()

    def _lose(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionLost(began=self._head.status != 0))

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        assert self._sink is not None
        status = self._parser.get_status_code()
        if status < 200:
            self._head.headers.clear()
            return
        self._head.status = status
        headers = self._head.headers
        self._until_close = "content-length" not in headers and "transfer-encoding" not in headers
        self._body = self._sink(self._head)

    def on_body(self, data: bytes) -> None:
        if self._body is not None:
            self._body(data, self._now)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._head.status == 0 or self._done is None or self._done.done():
            return
        self.is_reusable = self._parser.should_keep_alive()
        self._done.set_result(None)


async def connect(host: str, port: int, tls: ssl.SSLContext | None, clock: Callable[[], float]) -> HttpConnection:
    """Open a connection.

    Raises:
        OSError: it cannot be opened.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: HttpConnection(clock), host, port, ssl=tls)
    return connection
