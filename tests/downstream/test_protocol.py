"""The protocol on real sockets: deadlines, second requests, disconnects and slow clients."""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from tests.downstream.server_thread import (
    CHUNKED,
    GET,
    HEAD,
    PATIENCE,
    SHORT,
    ScriptedApp,
    ServerThread,
    assert_refused,
    eventually,
    noted,
    read_all,
    read_response,
    serving,
)

# Bodies of repeated heads


def test_second_request_in_the_packet_of_a_repeated_head_is_dropped(default_server: ServerThread) -> None:
    request = HEAD + b"Content-Length: 3\r\n\r\nabc"
    with default_server.connect(request) as client:
        assert read_response(client)[::2] == (200, b"abc")
        client.sendall(request + request)
        status, headers, body = read_response(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        assert client.recv(1) == b""


def test_application_with_notes_on_a_head_is_called_once_the_body_is_complete(default_server: ServerThread) -> None:
    request = noted(b"hello world")
    head = request.index(b"hello")
    with default_server.connect(request) as client:
        read_response(client)
        seen = len(default_server.app.scopes)
        for cut in range(head, len(request)):
            client.sendall(request[:cut])
            eventually(default_server.is_buffering_body)
            assert len(default_server.app.scopes) == seen
            client.sendall(request[cut:])
            status, headers, body = read_response(client)
            assert (status, body, "connection" in headers) == (200, b"hello world", False)
            seen += 1
        first, *others = [
            {**scope, "extensions": None} for scope in default_server.app.scopes[-(len(request) - head) - 1 :]
        ]
        assert all(other == first for other in others)


def test_application_without_notes_on_a_head_is_called_before_the_body(default_server: ServerThread) -> None:
    """The application may refuse the request from its head alone."""
    request = HEAD + b"Content-Length: 5\r\n\r\nhello"
    with default_server.connect(request) as client:
        read_response(client)
        seen = len(default_server.app.scopes)
        client.sendall(request[:-1])
        eventually(lambda: len(default_server.app.scopes) == seen + 1)


def test_large_body_of_a_repeated_head_is_not_buffered(default_server: ServerThread) -> None:
    request = noted(b"x" * 200_000)
    with default_server.connect(request) as client:
        read_response(client)
        seen = len(default_server.app.scopes)
        client.sendall(request[:-1])
        eventually(lambda: len(default_server.app.scopes) == seen + 1)
        client.sendall(request[-1:])
        assert read_response(client)[::2] == (200, b"x" * 200_000)


def test_second_request_behind_a_buffered_body_is_dropped(default_server: ServerThread) -> None:
    request = noted(b"abc")
    with default_server.connect(request) as client:
        read_response(client)
        seen = len(default_server.app.scopes)
        client.sendall(request[:-1])
        eventually(default_server.is_buffering_body)
        client.sendall(request[-1:] + request)
        status, headers, body = read_response(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        assert client.recv(1) == b""
    assert len(default_server.app.scopes) == seen + 1


def test_buffered_body_that_does_not_arrive_in_time_gets_408(loop: str) -> None:
    with serving(loop, ServerLimits(body_seconds=0.2)) as server, server.connect(noted(b"abc")) as client:
        read_response(client)
        client.sendall(noted(b"abc")[:-1])
        assert_refused(read_all(client), 408, "request_timeout")
        assert len(server.app.scopes) == 1


@pytest.mark.parametrize(
    "leave",
    [socket.socket.close, lambda client: client.shutdown(socket.SHUT_WR)],
    ids=["close", "half-close"],
)
def test_disconnect_during_a_buffered_body_leaves_no_connection(
    loop: str, leave: Callable[[socket.socket], None]
) -> None:
    with serving(loop, ServerLimits()) as server, server.connect(noted(b"abc")) as client:
        read_response(client)
        client.sendall(noted(b"abc")[:-1])
        eventually(server.is_buffering_body)
        leave(client)
        eventually(lambda: server.connections == 0)
        assert (len(server.app.scopes), server.app.disconnected) == (1, [])


class MemoryTransport(asyncio.Transport):
    """Transport in memory that records the bytes written to it, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.data = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.data += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


CUTS = st.sets(st.integers(0, 8), max_size=3) | st.sets(st.integers(-70, 8), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=9), CUTS), min_size=1, max_size=6))
def test_requests_are_served_alike_however_their_bytes_are_split(
    requests: list[tuple[bool, bytes, set[int]]],
) -> None:
    """Requests with cached heads, parsed heads and buffered bodies alternate on one connection.

    Cuts are offsets from the start of the body.
    """

    async def serve() -> None:
        app, transport = ScriptedApp(), MemoryTransport()
        config = uvicorn.Config(
            app, http=bind_limits(ServerLimits()), interface="asgi3", lifespan="off", log_config=None
        )
        config.load()
        protocol_class: Any = config.http_protocol_class
        connection = protocol_class(config=config, server_state=ServerState(), app_state={})
        connection.connection_made(transport)
        for is_noted, body, cuts in requests:
            request = noted(body) if is_noted else HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            body_at = len(request) - len(body)
            places = sorted({0, len(request)} | {body_at + cut for cut in cuts if 0 < body_at + cut < len(request)})
            transport.data = b""
            for start, end in itertools.pairwise(places):
                connection.data_received(request[start:end])
                await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE):
                while not transport.data.endswith(b"\r\n\r\n" + body):
                    await asyncio.sleep(0)
            assert transport.data == b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            assert not transport.closed
        assert app.bodies == [body for _, body, _ in requests]
        connection.connection_lost(None)

    asyncio.run(serve())


# Deadlines


def test_connection_without_a_request_is_closed_without_a_response(server: ServerThread) -> None:
    assert server.ask() == b""


@pytest.mark.parametrize(
    "sent",
    [b"G", GET[:-2], HEAD + b"Content-Length: 5\r\n"],
    ids=["one byte", "no blank line", "no blank line, with a length"],
)
def test_head_that_does_not_arrive_in_time_gets_408(server: ServerThread, sent: bytes) -> None:
    assert_refused(server.ask(sent), 408, "request_timeout")
    assert server.app.scopes == []


def test_sending_single_bytes_does_not_extend_the_deadlines(server: ServerThread) -> None:
    for start in (b"GET /", HEAD + b"Content-Length: 100000\r\n\r\n"):
        with server.connect(start) as client:
            client.settimeout(0.01)
            end = time.monotonic() + PATIENCE
            answer = b""
            while not answer:
                assert time.monotonic() < end
                client.send(b"E")
                with contextlib.suppress(TimeoutError):
                    answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408 ")
    eventually(lambda: server.app.disconnected == ["/echo"])


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 5\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["content length", "chunked"],
)
def test_body_that_does_not_arrive_in_time_gets_408_and_the_application_is_notified(
    server: ServerThread, framing: bytes
) -> None:
    assert_refused(server.ask(HEAD + framing), 408, "request_timeout")
    eventually(lambda: server.app.ended == ["/echo"])
    assert server.app.bodies == []
    assert server.app.disconnected == ["/echo"]


def test_body_deadline_grows_by_a_second_for_every_64_kib(loop: str) -> None:
    head, piece = HEAD + b"Content-Length: 1000000\r\n\r\n", b"x" * 500_000
    with serving(loop, ServerLimits(body_seconds=0.1)) as server, server.connect(head + piece) as client:
        time.sleep(0.3)  # a slow client is what the test is about
        client.sendall(piece)
        assert read_response(client)[2] == 2 * piece


def test_idle_keep_alive_connection_is_closed_after_its_timeout(server: ServerThread) -> None:
    begun = time.monotonic()
    with server.connect(GET) as client:
        read_response(client)
        assert client.recv(1) == b""
        assert time.monotonic() - begun >= SHORT.keep_alive_seconds


def test_slow_response_has_no_deadline_in_the_server(server: ServerThread) -> None:
    with server.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        eventually(lambda: server.app.scopes)
        client.settimeout(0.6)
        with pytest.raises(TimeoutError):
            client.recv(1)
        server.app.release.set()
        assert read_response(client)[2] == b"slow"


def test_thousand_idle_and_half_sent_connections_are_closed_in_time(loop: str) -> None:
    starts = [b"", b"GET / HT", HEAD + b"Content-Length: 5\r\n\r\nab"]
    with (
        serving(loop, ServerLimits(idle_seconds=1, header_seconds=1, body_seconds=1, linger_seconds=0.5)) as server,
        contextlib.ExitStack() as stack,
    ):
        for number in range(999):
            stack.enter_context(server.connect(starts[number % 3]))
        assert server.ask(b"GET /hello HTTP/1.0\r\n\r\n").endswith(b"hello")
        eventually(lambda: server.connections == 0)


# Second requests


@pytest.mark.parametrize(
    "first",
    [
        b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nG",
        b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nG\r\n0\r\n\r\n",
    ],
    ids=["no body", "content length", "chunked"],
)
@pytest.mark.parametrize(
    "second",
    [GET, b"G", b"GET / HTTP/1.1\r\n", b"garbage\n"],
    ids=["complete request", "one byte", "request line", "garbage"],
)
@pytest.mark.parametrize("together", [True, False], ids=["same packet", "next packet"])
def test_second_request_before_the_first_response_is_dropped_and_the_connection_closed(
    default_server: ServerThread, first: bytes, second: bytes, together: bool
) -> None:
    app = default_server.app
    seen = len(app.scopes)
    app.release.clear()
    with default_server.connect(first + second if together else first) as client:
        eventually(lambda: len(app.scopes) == seen + 1)
        if not together:
            client.sendall(second)
            eventually(lambda: not app.clients[-1].keep_alive)
        app.release.set()
        status, headers, body = read_response(client)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert client.recv(1) == b""
    assert len(app.scopes) == seen + 1


def test_disconnect_behind_a_second_request_is_noticed(server: ServerThread) -> None:
    with server.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" + GET):
        eventually(lambda: server.app.scopes)
    eventually(lambda: server.app.ended == ["/slow"])
    assert server.app.disconnected == ["/slow"]


def test_blank_line_after_a_body_is_not_a_second_request(default_server: ServerThread) -> None:
    with default_server.connect() as client:
        for _ in range(2):
            client.sendall(HEAD + b"Content-Length: 1\r\n\r\na\r\n")
            assert "connection" not in read_response(client)[1]


# Clients that disconnect, or do not read the response


@pytest.mark.parametrize("path", ["/slow", "/wait", "/endless", "/until_cut"])
@pytest.mark.parametrize("manner", ["close", "reset", "half-close"])
def test_application_is_notified_of_a_disconnect_at_once_and_only_once(
    server: ServerThread, path: str, manner: str
) -> None:
    with server.connect(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode()) as client:
        eventually(lambda: server.app.scopes)
        if manner == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if manner == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        eventually(lambda: server.app.disconnected == [path])
        eventually(lambda: server.connections == 0)
        if path == "/until_cut":
            server.call(server.app.cut.set)
        eventually(lambda: server.app.ended == [path])
    assert server.app.disconnected == [path]
    assert server.app.clients[0].gone


def test_application_is_notified_of_a_disconnect_during_the_body(server: ServerThread) -> None:
    with server.connect(HEAD + b"Content-Length: 5\r\n\r\nab"):
        eventually(lambda: server.app.scopes)
    eventually(lambda: server.app.ended == ["/echo"])
    assert server.app.disconnected == ["/echo"]


def test_disconnect_after_the_response_is_not_reported(server: ServerThread) -> None:
    with server.connect(GET) as client:
        read_response(client)
    eventually(lambda: server.connections == 0)
    assert server.app.disconnected == []


def test_client_that_stops_reading_a_stream_is_cut_off(server: ServerThread) -> None:
    with server.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096):
        eventually(lambda: server.app.disconnected == ["/endless"])
    assert server.app.flow[0] == "pause"


def test_client_that_reads_slowly_is_not_cut_off(loop: str) -> None:
    with (
        serving(loop, ServerLimits(write_stall_seconds=1)) as server,
        server.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096) as client,
    ):
        deadline = time.monotonic() + 2  # twice the write timeout
        while time.monotonic() < deadline:
            client.recv(262144)
        assert server.app.disconnected == []
        eventually(lambda: "resume" in server.app.flow or not client.recv(262144))
        assert "resume" in server.app.flow


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_client_that_stops_reading_is_cut_off_after_the_application_has_returned(
    server: ServerThread, connection: bytes
) -> None:
    with server.connect(
        b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: " + connection + b"\r\n\r\n", receive_buffer=4096
    ):
        eventually(lambda: server.app.ended == ["/large"])
        eventually(lambda: server.connections == 0)


# Request bodies


def test_response_before_the_end_of_the_body_reaches_a_client_that_is_still_sending(loop: str) -> None:
    with (
        serving(loop, ServerLimits()) as server,
        server.connect(b"POST /unauthorized HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n") as client,
    ):
        client.sendall(b"x" * 20_000_000)
        status, headers, _ = read_response(client)
        assert (status, headers["connection"]) == (401, "close")
        assert client.recv(1) == b""
    assert len(server.app.scopes) == 1


def test_rest_of_a_refused_body_is_read_for_a_limited_time(server: ServerThread) -> None:
    with server.connect(b"POST /unauthorized HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n") as client:
        assert read_response(client)[0] == 401
        eventually(lambda: server.connections == 0)


def test_large_body_arrives_complete(default_server: ServerThread) -> None:
    body = os.urandom(5_000_000)
    with default_server.connect(HEAD + b"Content-Length: 5000000\r\n\r\n") as client:
        client.sendall(body)
        assert read_response(client)[2] == body


def test_endless_chunk_extensions_are_refused(default_server: ServerThread) -> None:
    with default_server.connect(CHUNKED + b"1;") as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                client.sendall(b"a" * 1000)
        assert_refused(read_all(client), 400, "invalid_value")


@pytest.mark.parametrize("note", [b"", b"X-Noted: yes\r\n"], ids=["without notes", "with notes"])
def test_request_behind_an_unread_response_waits_before_it_writes(default_server: ServerThread, note: bytes) -> None:
    """Otherwise each request of a client that does not read would fill the memory further."""
    app = default_server.app
    request = b"POST /large HTTP/1.1\r\nHost: gateway\r\n" + note + b"Content-Length: 0\r\n\r\n"
    with default_server.connect() as client:
        seen = len(app.scopes)
        client.sendall(request)
        eventually(lambda: len(app.scopes) == seen + 1 and app.clients[-1].complete)
        client.sendall(request)
        eventually(lambda: len(app.scopes) == seen + 2)
        assert app.clients[-1].paused
        assert not app.clients[-1].started
