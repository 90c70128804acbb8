"""Deadlines of a connection on a virtual clock.

Covers: gateway/downstream/protocol.py
Covers: gateway/downstream/limits.py
"""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import HttpProtocol, bind_limits
from tests.downstream.virtual_connection import Transport, VirtualLoop

LIMITS = ServerLimits(body_seconds=10, write_stall_seconds=8, linger_seconds=3, keep_alive_seconds=100)
SIZE = 1_000_000
POST = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % SIZE


class Connection:
    """Connection to a server whose application reads one piece for each `release`."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.read: asyncio.Queue[None] = asyncio.Queue()
        self.messages: list[str] = []
        config = uvicorn.Config(self._app, http=bind_limits(LIMITS), interface="asgi3", lifespan="off", log_config=None)
        config.load()
        protocol: Any = config.http_protocol_class
        self.protocol: HttpProtocol = protocol(config, ServerState(), {}, self.loop)
        self.transport = Transport()
        self.protocol.connection_made(self.transport)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            await self.read.get()
            message = await receive()
            self.messages.append(message["type"])
            more = message.get("more_body", False)
        scope["extensions"]["gateway.client"].answer(200, b"", b"done")

    def feed(self, data: bytes) -> None:
        for start in range(0, len(data), 65536):
            self.protocol.data_received(data[start : start + 65536])
        self.loop.settle()

    def release(self) -> None:
        self.read.put_nowait(None)
        self.loop.settle()

    def close(self) -> None:
        self.protocol.connection_lost(None)
        for _ in range(3):
            self.release()
        self.loop.close()


@pytest.fixture
def connection() -> Iterator[Connection]:
    connection = Connection()
    yield connection
    connection.close()


def test_client_is_not_blamed_while_the_gateway_does_not_read_its_body(connection: Connection) -> None:
    connection.feed(POST + b"x" * (SIZE - 1))
    assert connection.transport.is_paused
    connection.loop.advance(10 * LIMITS.body_seconds)
    assert connection.transport.data == b""

    for _ in range(2):
        connection.release()
    assert not connection.transport.is_paused
    allowed = LIMITS.body_seconds + SIZE / 65536  # from the start, without the pause
    connection.loop.advance(allowed - 2)
    assert connection.transport.data == b""
    connection.loop.advance(LIMITS.body_seconds + 4)
    assert connection.transport.data.startswith(b"HTTP/1.1 408 ")


def test_body_that_comes_in_time_after_a_pause_is_answered(connection: Connection) -> None:
    connection.feed(POST + b"x" * (SIZE - 1))
    connection.loop.advance(10 * LIMITS.body_seconds)
    for _ in range(2):
        connection.release()
    connection.loop.advance(LIMITS.body_seconds)
    connection.feed(b"x")
    assert connection.transport.data.startswith(b"HTTP/1.1 200 ")
    assert connection.messages == ["http.request"] * 2


def test_client_that_does_not_take_the_end_of_a_response_is_cut_off(connection: Connection) -> None:
    connection.feed(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    connection.transport.unsent = 100
    connection.release()
    assert connection.transport.is_closed
    connection.loop.advance(LIMITS.write_stall_seconds - 1)
    connection.transport.unsent = 99  # it takes a byte
    connection.loop.advance(LIMITS.write_stall_seconds - 1)
    assert not connection.transport.is_aborted
    connection.loop.advance(LIMITS.write_stall_seconds)
    assert connection.transport.is_aborted


def test_nothing_is_left_to_do_once_the_last_response_is_taken(connection: Connection) -> None:
    connection.feed(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    connection.transport.unsent = 100
    connection.release()
    connection.transport.unsent = 0
    connection.loop.advance(2 * LIMITS.write_stall_seconds)
    assert not connection.transport.is_aborted
    assert not connection.loop.has_timer


def test_deadline_of_an_earlier_request_ends_with_the_connection(connection: Connection) -> None:
    connection.feed(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    connection.release()
    connection.feed(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    connection.release()
    assert connection.transport.is_closed
    connection.loop.advance(LIMITS.keep_alive_seconds / 2)
    assert not connection.loop.has_timer


def test_lost_connection_is_freed_without_a_garbage_collection() -> None:
    connection = Connection()
    connection.feed(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    connection.release()
    assert connection.loop.has_timer
    freed = weakref.ref(connection.protocol)
    gc.disable()
    try:
        connection.protocol.connection_lost(None)
        connection.loop.settle()
        del connection.protocol
        assert freed() is None
    finally:
        gc.enable()
        connection.loop.close()
