"""The door on real sockets: what it refuses, what it serves, when it cuts off."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from gateway.downstream import protocol as front
from gateway.downstream.cycle import RequestResponseCycle
from gateway.downstream.protocol import ServerLimits, bind_limits
from gateway.downstream.server import GracefulServer, listen

LOOPS = ["asyncio", "uvloop"]
SHORT = ServerLimits(
    idle_seconds=0.2,
    header_seconds=0.2,
    body_seconds=0.2,
    keep_alive_seconds=0.3,
    write_stall_seconds=0.2,
    linger_seconds=0.3,
)
HEAD = b"POST /echo HTTP/1.1\r\nHost: gateway\r\n"
GET = b"GET /hello HTTP/1.1\r\nHost: gateway\r\n\r\n"


def eventually(condition: Callable[[], Any], seconds: float = 3) -> None:
    """Poll `condition` until it holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


class App:
    """A raw ASGI application whose path says what it does, and which notes what it has seen."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.left: list[str] = []
        self.ended: list[str] = []
        self.clients: list[RequestResponseCycle] = []
        self.flow: list[str] = []
        self.lifespan: list[str] = []
        self.cut = asyncio.Event()
        self.release = threading.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                self.lifespan.append(f"{step} with {len(self.scopes) - len(self.ended)} running")
                await send({"type": f"lifespan.{step}.complete"})
            return
        self.scopes.append(scope)
        client = scope["extensions"]["gateway.client"]
        self.clients.append(client)
        if b"x-noted" in client.fields:
            client.notes["seen"] = True
        path = scope["path"]
        client.on_leave = lambda: self.left.append(path)
        try:
            await getattr(self, path.strip("/").split("/")[0] or "hello", self.hello)(receive, send, client)
        finally:
            self.ended.append(path)

    async def body(self, receive: Any) -> bytes:
        pieces = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            pieces.append(message["body"])
            if not message["more_body"]:
                self.bodies.append(b"".join(pieces))
                return self.bodies[-1]

    async def answer(self, send: Any, status: int, body: bytes) -> None:
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"Content-Length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body})

    async def hello(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.answer(send, 200, b"hello")

    async def echo(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        with contextlib.suppress(ConnectionError):
            await self.answer(send, 200, await self.body(receive))

    async def unauthorized(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.answer(send, 401, b"no")

    async def no_length(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one piece"})

    async def stream(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        client.write(b"one")
        client.write(b"")
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        client.write(b"three")
        await send({"type": "http.response.body", "body": b""})

    async def slow(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        """Waits until the test lets it answer, or the client leaves."""
        await self.body(receive)
        while not (self.release.is_set() or client.gone):
            await asyncio.sleep(0.005)
        await self.answer(send, 200, b"slow")

    async def wait(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.body(receive)
        assert (await receive())["type"] == "http.disconnect"

    async def endless(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        client.on_pause = lambda: self.flow.append("pause")
        client.on_resume = lambda: self.flow.append("resume")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not client.gone:
            if client.paused:
                await asyncio.sleep(0.002)
            else:
                client.write(b"x" * 16384)
                await asyncio.sleep(0)

    async def large(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.answer(send, 200, b"x" * 30_000_000)

    async def until_cut(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await self.cut.wait()
        await send({"type": "http.response.body", "body": b"cut"})

    async def deaf(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await asyncio.Event().wait()

    async def fail(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        raise ValueError("a secret")

    async def fail_late(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        raise ValueError("a secret")

    async def silent(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        pass

    async def injected(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nset-cookie: b")]})


class Gate:
    """A server with the door in a thread of its own."""

    def __init__(self, loop: str, bounds: ServerLimits, **drain: Any) -> None:
        self.app = App()
        self.hooks: list[str] = []
        self.on_cutoff: Callable[[], None] = lambda: None
        config = uvicorn.Config(
            self.app,
            http=bind_limits(bounds),
            loop=loop,
            interface="asgi3",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
        )
        self.server = GracefulServer(
            config, on_drain=lambda: self.hooks.append("drain"), on_cutoff=self._cutoff, **drain
        )
        self.listener = listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        eventually(lambda: self.server.started)

    def _cutoff(self) -> None:
        self.hooks.append("cutoff")
        self.on_cutoff()

    def call(self, function: Callable[[], None]) -> None:
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        eventually(lambda: self.server._loop is not None)
        self.call(self.server.stop)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, data: bytes = b"", *, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(5)
        try:
            client.connect(self.address)
            client.sendall(data)
        except OSError:
            client.close()
            raise
        return client

    def ask(self, *pieces: bytes) -> bytes:
        """All that comes until the server closes."""
        with self.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.sendall(piece)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


def read_answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    status, headers = parse_head(head)
    while len(body) < int(headers["content-length"]):
        body += client.recv(65536)
    return status, headers, body


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines)


def assert_refused(data: bytes, status: int, code: str) -> None:
    head, _, body = data.partition(b"\r\n\r\n")
    got, headers = parse_head(head)
    assert got == status
    assert re.fullmatch(r"req-[0-9a-f]{24}", headers.pop("x-request-id"))
    assert headers == {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    error = json.loads(body)["error"]
    assert error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": code}


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def serving(loop: str, bounds: ServerLimits = SHORT, **drain: Any) -> Iterator[Gate]:
    """A gate that is cut off at the end, and must then have neither connection nor task left."""
    gate = Gate(loop, bounds, **drain)
    try:
        yield gate
    finally:
        gate.app.release.set()
        if gate.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the first may have closed the loop already
                gate.stop()
                gate.stop()
        gate.thread.join(5)
        assert not gate.thread.is_alive()
        assert not gate.server.server_state.connections
        assert not gate.server.server_state.tasks


@pytest.fixture
def gate(loop: str) -> Iterator[Gate]:
    with serving(loop) as gate:
        yield gate


@pytest.fixture(scope="module", params=LOOPS)
def calm_gate(request: pytest.FixtureRequest) -> Iterator[Gate]:
    """A gate with the bounds of production."""
    with serving(request.param, ServerLimits()) as gate:
        yield gate


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "length list": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "negative length": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "hexadecimal length": HEAD + b"Content-Length: 0x3\r\n\r\nabc",
    "empty length": HEAD + b"Content-Length:\r\n\r\n",
    "length over 64 bits": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    "length with a blank": HEAD + b"Content-Length: 3 3\r\n\r\nabc",
    "length, then chunked": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "unknown encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "gzip and chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked and gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "vertical tab before chunked": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"A: b\r\n c\r\n\r\n",
    "folded encoding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare LF after a header": b"GET / HTTP/1.1\r\nHost: a\nB: c\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "bare CR in a header": HEAD + b"A: b\rc\r\n\r\n",
    "NUL in a header": HEAD + b"A: b\0c\r\n\r\n",
    "control character in a header": HEAD + b"A: b\x01c\r\n\r\n",
    "blank before the colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "blank before the first name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "header without a name": HEAD + b": b\r\n\r\n",
    "header without a colon": HEAD + b"abc\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "the same Host twice": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with a blank": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with a user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "Host with a high byte": b"GET / HTTP/1.1\r\nHost: a\xe4\r\n\r\n",
    "two Hosts in 1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "absolute target": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT with a path": b"CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n",
    "star without OPTIONS": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "blank in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in the target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "control character in the target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "two blanks in the request line": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab in the request line": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "RTSP": b"GET / RTSP/1.0\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100f1010000ed0303"),
    "unknown method": b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "chunk size over 64 bits": CHUNKED + b"fffffffffffffffff\r\nabc",
    "chunk size no number": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\nabc\r\n0\r\n\r\n",
    "blank after the chunk size": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "bare LF after the chunk size": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "bare LF after the chunk": CHUNKED + b"3\r\nabc\n0\r\n\r\n",
    "bare LF in the extension": CHUNKED + b"3;a=b\nabc\r\n0\r\n\r\n",
    "bare LF in the trailers": CHUNKED + b"3\r\nabc\r\n0\r\nA: b\n\r\n",
    "length in the trailers": CHUNKED + b"3\r\nabc\r\n0\r\nContent-Length: 5\r\n\r\n",
    "upgrade of an ambiguous request": HEAD
    + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
}
TOO_LARGE = {
    "101 headers": HEAD + b"".join(b"a%d: b\r\n" % number for number in range(100)) + b"\r\n",
    "one header of 64 KiB": HEAD + b"A: " + b"b" * 65536 + b"\r\n\r\n",
    "a target of 64 KiB": b"GET /" + b"b" * 65536 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "64 KiB without an end": HEAD + b"A: " + b"b" * 65536,
}


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED.keys())
def test_request_with_more_than_one_reading_is_refused_before_the_application(
    calm_gate: Gate, request_bytes: bytes
) -> None:
    seen = len(calm_gate.app.scopes)
    assert_refused(calm_gate.ask(request_bytes), 400, "invalid_value")
    assert len(calm_gate.app.scopes) == seen


@pytest.mark.parametrize("request_bytes", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_head_over_its_bounds_is_refused_with_431(calm_gate: Gate, request_bytes: bytes) -> None:
    seen = len(calm_gate.app.scopes)
    assert_refused(calm_gate.ask(request_bytes), 431, "headers_too_large")
    assert len(calm_gate.app.scopes) == seen


def test_refusal_of_a_request_behind_a_served_one_comes_too(calm_gate: Gate) -> None:
    with calm_gate.connect(GET) as client:
        assert read_answer(client)[0] == 200
        client.sendall(REFUSED["two Hosts"])
        assert_refused(read_all(client), 400, "invalid_value")


SERVED = {
    "plain": GET,
    "HTTP/1.0 without Host": b"GET /hello HTTP/1.0\r\n\r\n",
    "IPv6 Host": b"GET /hello HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    "blank line before": b"\r\n" + GET,
    "query": b"GET /hello?a=b%20c HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in a header": b"GET /hello HTTP/1.1\r\nHost: a\r\nX: \xe4\r\n\r\n",
    "100 headers": b"GET /hello HTTP/1.1\r\nHost: a\r\n"
    + b"".join(b"a%d: b\r\n" % number for number in range(99))
    + b"\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "WebSocket": b"GET /hello HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", SERVED.values(), ids=SERVED.keys())
def test_sound_request_is_served_whole_and_byte_by_byte(calm_gate: Gate, request_bytes: bytes) -> None:
    for pieces in ([request_bytes], [bytes([byte]) for byte in request_bytes[:300]] + [request_bytes[300:]]):
        with calm_gate.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.sendall(piece)
            assert read_answer(client)[::2] == (200, b"hello")


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 11\r\n\r\nhello world",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX: y\r\n\r\n",
    ],
)
@pytest.mark.parametrize(
    "upgrade",
    [
        b"",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"UPGRADE:h2c\r\nConnection: upgrade\r\n",
    ],
)
def test_body_arrives_whole_with_and_without_an_upgrade_cut_at_every_byte(
    calm_gate: Gate, framing: bytes, upgrade: bytes
) -> None:
    request = HEAD + upgrade + framing
    with calm_gate.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(request)):
            client.sendall(request[:cut])
            client.sendall(request[cut:])
            status, headers, body = read_answer(client)
            assert (status, body) == (200, b"hello world")
            assert "connection" not in headers
        names = {name for name, _ in calm_gate.app.scopes[-1]["headers"]}
        assert b"upgrade" not in names
        assert b"x" not in names, "a trailer has become a header"


def test_requests_with_the_head_of_the_one_before_have_their_own_length_body_and_scope(calm_gate: Gate) -> None:
    seen = len(calm_gate.app.scopes)
    bodies = [b"first", b"2", b"", b"a" * 70_000, b"again"]
    with calm_gate.connect() as client:
        for body in bodies:
            client.sendall(HEAD + b"X-Key: One\r\nContent-Length: %d\r\nX-Last: two\r\n\r\n%b" % (len(body), body))
            status, headers, echo = read_answer(client)
            assert (status, echo) == (200, body)
            assert "connection" not in headers
    for scope, body in zip(calm_gate.app.scopes[seen:], bodies, strict=True):
        length = b"%d" % len(body)
        assert scope["headers"] == [
            (b"host", b"gateway"),
            (b"x-key", b"One"),
            (b"content-length", length),
            (b"x-last", b"two"),
        ]
        assert scope["extensions"]["gateway.client"].fields == dict(scope["headers"])
        assert (scope["method"], scope["path"], scope["http_version"]) == ("POST", "/echo", "1.1")
    assert len({id(client) for client in calm_gate.app.clients[-len(bodies) :]}) == len(bodies)


def test_notes_on_a_head_reach_only_requests_with_the_same_head(calm_gate: Gate) -> None:
    with calm_gate.connect() as client:
        for key in (b"One", b"One", b"Two"):
            client.sendall(HEAD + b"X-Key: %b\r\nContent-Length: 0\r\n\r\n" % key)
            read_answer(client)
            calm_gate.app.clients[-1].notes.setdefault("key", key)
    assert [client.notes for client in calm_gate.app.clients[-3:]] == [
        {"key": b"One"},
        {"key": b"One"},
        {"key": b"Two"},
    ]


@pytest.mark.parametrize("request_bytes", [bad for bad in REFUSED.values() if bad.startswith(HEAD)])
def test_known_head_gives_no_request_behind_it_a_second_reading(calm_gate: Gate, request_bytes: bytes) -> None:
    with calm_gate.connect() as client:
        for _ in range(2):
            client.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
            assert read_answer(client)[::2] == (200, b"abc")
        seen = len(calm_gate.app.scopes)
        client.sendall(request_bytes)
        assert_refused(read_all(client), 400, "invalid_value")
    assert len(calm_gate.app.scopes) == seen


def test_request_behind_one_with_a_known_head_in_the_same_packet_is_dropped(calm_gate: Gate) -> None:
    request = HEAD + b"Content-Length: 3\r\n\r\nabc"
    with calm_gate.connect(request) as client:
        assert read_answer(client)[::2] == (200, b"abc")
        client.sendall(request + request)
        status, headers, body = read_answer(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        assert client.recv(1) == b""


def noted(body: bytes) -> bytes:
    """A request whose head the application takes a note on."""
    return HEAD + b"X-Noted: yes\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def awaits_body(gate: Gate) -> bool:
    return any(connection._state == front._BODY_OF_KNOWN for connection in gate.server.server_state.connections)


def test_application_that_knows_the_head_is_told_of_a_request_when_its_body_is_whole(calm_gate: Gate) -> None:
    request = noted(b"hello world")
    head = request.index(b"hello")
    with calm_gate.connect(request) as client:
        read_answer(client)
        seen = len(calm_gate.app.scopes)
        for cut in range(head, len(request)):
            client.sendall(request[:cut])
            eventually(lambda: awaits_body(calm_gate))
            assert len(calm_gate.app.scopes) == seen
            client.sendall(request[cut:])
            status, headers, body = read_answer(client)
            assert (status, body, "connection" in headers) == (200, b"hello world", False)
            seen += 1
        first, *others = [{**scope, "extensions": None} for scope in calm_gate.app.scopes[-(len(request) - head) - 1 :]]
        assert all(other == first for other in others)


def test_application_that_does_not_know_the_head_is_told_before_the_body(calm_gate: Gate) -> None:
    """It may refuse it."""
    request = HEAD + b"Content-Length: 5\r\n\r\nhello"
    with calm_gate.connect(request) as client:
        read_answer(client)
        seen = len(calm_gate.app.scopes)
        client.sendall(request[:-1])
        eventually(lambda: len(calm_gate.app.scopes) == seen + 1)


def test_large_body_behind_a_known_head_is_not_gathered_by_the_door(calm_gate: Gate) -> None:
    request = noted(b"x" * 200_000)
    with calm_gate.connect(request) as client:
        read_answer(client)
        seen = len(calm_gate.app.scopes)
        client.sendall(request[:-1])
        eventually(lambda: len(calm_gate.app.scopes) == seen + 1)
        client.sendall(request[-1:])
        assert read_answer(client)[::2] == (200, b"x" * 200_000)


def test_request_behind_the_body_of_a_known_head_is_dropped(calm_gate: Gate) -> None:
    request = noted(b"abc")
    with calm_gate.connect(request) as client:
        read_answer(client)
        seen = len(calm_gate.app.scopes)
        client.sendall(request[:-1])
        eventually(lambda: awaits_body(calm_gate))
        client.sendall(request[-1:] + request)
        status, headers, body = read_answer(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        assert client.recv(1) == b""
    assert len(calm_gate.app.scopes) == seen + 1


def test_body_of_a_known_head_that_does_not_come_in_time_is_answered_408(gate: Gate) -> None:
    with gate.connect(noted(b"abc")) as client:
        read_answer(client)
        client.sendall(noted(b"abc")[:-1])
        assert_refused(read_all(client), 408, "request_timeout")
    assert len(gate.app.scopes) == 1


@pytest.mark.parametrize("leave", [socket.socket.close, lambda client: client.shutdown(socket.SHUT_WR)])
def test_client_that_leaves_before_the_body_of_a_known_head_leaves_nothing(
    gate: Gate, leave: Callable[[socket.socket], None]
) -> None:
    with gate.connect(noted(b"abc")) as client:
        read_answer(client)
        client.sendall(noted(b"abc")[:-1])
        eventually(lambda: awaits_body(gate))
        leave(client)
        eventually(lambda: gate.connections == 0)
    assert (len(gate.app.scopes), gate.app.left) == (1, [])


def test_drain_waits_for_the_body_of_a_known_head(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=5) as gate, gate.connect(noted(b"abc")) as client:
        read_answer(client)
        client.sendall(noted(b"abc")[:-1])
        eventually(lambda: awaits_body(gate))
        gate.stop()
        eventually(lambda: gate.hooks == ["drain"])
        client.sendall(b"c")
        status, headers, body = read_answer(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        gate.thread.join(2)
        assert not gate.thread.is_alive()


class Taken(asyncio.Transport):
    """A client's connection in memory: what is written to it, and whether it was closed."""

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
def test_requests_of_one_connection_are_served_alike_however_they_are_cut(
    requests: list[tuple[bool, bytes, set[int]]],
) -> None:
    """Whether the door knows the head, parses it or gathers its body: by turns on the same connection. Cuts are counted from the body's beginning."""

    async def serve() -> None:
        app, transport = App(), Taken()
        config = uvicorn.Config(
            app, http=bind_limits(ServerLimits()), interface="asgi3", lifespan="off", log_config=None
        )
        config.load()
        protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[operator, call-arg]
        protocol.connection_made(transport)
        for is_noted, body, cuts in requests:
            request = noted(body) if is_noted else HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            body_at = len(request) - len(body)
            places = sorted({0, len(request)} | {body_at + cut for cut in cuts if 0 < body_at + cut < len(request)})
            transport.data = b""
            for start, end in itertools.pairwise(places):
                protocol.data_received(request[start:end])
                await asyncio.sleep(0)
            async with asyncio.timeout(5):
                while not transport.data.endswith(b"\r\n\r\n" + body):
                    await asyncio.sleep(0)
            assert transport.data == b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            assert not transport.closed
        assert app.bodies == [body for _, body, _ in requests]
        protocol.connection_lost(None)

    asyncio.run(serve())


def test_scope_tells_the_request(calm_gate: Gate) -> None:
    calm_gate.ask(
        b"POST /echo/a%20b?c=d%20e HTTP/1.1\r\nHost: gateway\r\nX-Key: Value\r\nX-Key: Two\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    scope = calm_gate.app.scopes[-1]
    assert scope["method"] == "POST"
    assert scope["path"] == "/echo/a b"
    assert scope["raw_path"] == b"/echo/a%20b"
    assert scope["query_string"] == b"c=d%20e"
    assert scope["http_version"] == "1.1"
    assert scope["client"][0] == "127.0.0.1"
    assert scope["server"] == calm_gate.address
    assert scope["headers"][1:3] == [(b"x-key", b"Value"), (b"x-key", b"Two")]
    assert scope["extensions"]["gateway.client"].fields[b"x-key"] == b"Two"


def test_answer_without_a_length_gets_one(calm_gate: Gate) -> None:
    with calm_gate.connect(b"GET /no_length HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        assert read_answer(client)[2] == b"one piece"


def test_stream_is_chunked_in_http11_and_ends_with_the_connection_in_http10(calm_gate: Gate) -> None:
    answer = calm_gate.ask(b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
    assert b"transfer-encoding: chunked\r\n" in answer
    answer = calm_gate.ask(b"GET /stream HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"connection: close\r\n\r\nonetwothree")
    assert b"transfer-encoding" not in answer


def test_head_request_gets_no_body(calm_gate: Gate) -> None:
    answer = calm_gate.ask(b"HEAD /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("path", [b"fail", b"silent", b"injected"])
def test_application_that_fails_before_its_answer_gives_500_without_its_reason(
    calm_gate: Gate, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL, "gateway.front"):
        answer = calm_gate.ask(b"GET /" + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
    assert b"secret" not in answer
    assert b"cookie" not in answer


def test_application_that_fails_in_mid_stream_leaves_the_stream_without_an_end(calm_gate: Gate) -> None:
    answer = calm_gate.ask(b"GET /fail_late HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.endswith(b"5\r\nbegun\r\n")


# Deadlines.


def test_connection_on_which_nothing_is_sent_is_closed_without_a_word(gate: Gate) -> None:
    assert gate.ask() == b""


@pytest.mark.parametrize("sent", [b"G", GET[:-2], HEAD + b"Content-Length: 5\r\n"])
def test_head_that_does_not_end_in_time_is_answered_408(gate: Gate, sent: bytes) -> None:
    assert_refused(gate.ask(sent), 408, "request_timeout")
    assert gate.app.scopes == []


def test_trickling_does_not_prolong_the_head_or_the_body(gate: Gate) -> None:
    for start in (b"GET /", HEAD + b"Content-Length: 100000\r\n\r\n"):
        with gate.connect(start) as client:
            client.settimeout(0.01)
            begun = time.monotonic()
            answer = b""
            while not answer:
                assert time.monotonic() < begun + 3
                client.send(b"E")
                with contextlib.suppress(TimeoutError):
                    answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - begun < 1
    eventually(lambda: gate.app.left == ["/echo"])


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
def test_body_that_does_not_come_in_time_is_answered_408_and_the_application_told(gate: Gate, framing: bytes) -> None:
    assert_refused(gate.ask(HEAD + framing), 408, "request_timeout")
    eventually(lambda: gate.app.ended == ["/echo"])
    assert gate.app.bodies == []
    assert gate.app.left == ["/echo"]


def test_body_gets_a_second_more_for_every_64_kib(loop: str) -> None:
    with (
        serving(loop, ServerLimits(body_seconds=0.1)) as gate,
        gate.connect(HEAD + b"Content-Length: 200000\r\n\r\n") as client,
    ):
        for size in (100000, 50000, 50000):
            client.sendall(b"x" * size)
            time.sleep(0.15)  # the slowness of this client is what is tested
        assert read_answer(client)[2] == b"x" * 200000


def test_kept_connection_is_closed_after_its_idle_time(gate: Gate) -> None:
    with gate.connect(GET) as client:
        read_answer(client)
        begun = time.monotonic()
        assert client.recv(1) == b""
        assert 0.2 < time.monotonic() - begun < 1


def test_slow_answer_has_no_deadline_here(gate: Gate) -> None:
    with gate.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        eventually(lambda: gate.app.scopes)
        client.settimeout(0.6)
        with pytest.raises(TimeoutError):
            client.recv(1)
        gate.app.release.set()
        assert read_answer(client)[2] == b"slow"


def test_thousand_idle_half_head_and_half_body_connections_are_closed_in_time(loop: str) -> None:
    starts = [b"", b"GET / HT", HEAD + b"Content-Length: 5\r\n\r\nab"]
    with (
        serving(loop, ServerLimits(idle_seconds=1, header_seconds=1, body_seconds=1, linger_seconds=0.5)) as gate,
        contextlib.ExitStack() as stack,
    ):
        for number in range(999):
            stack.enter_context(gate.connect(starts[number % 3]))
        assert gate.ask(b"GET /hello HTTP/1.0\r\n\r\n").endswith(b"hello")
        eventually(lambda: gate.connections == 0, 10)


# Second requests.


@pytest.mark.parametrize(
    "first",
    [
        b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nG",
        b"POST /slow HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nG\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("second", [GET, b"G", b"GET / HTTP/1.1\r\n", b"garbage\n"])
@pytest.mark.parametrize("together", [True, False])
def test_second_request_before_the_first_answer_is_dropped_and_the_connection_closed(
    calm_gate: Gate, first: bytes, second: bytes, together: bool
) -> None:
    app = calm_gate.app
    seen = len(app.scopes)
    app.release.clear()
    with calm_gate.connect(first + second if together else first) as client:
        eventually(lambda: len(app.scopes) == seen + 1)
        if not together:
            client.sendall(second)
            eventually(lambda: not app.clients[-1].keep_alive)
        app.release.set()
        status, headers, body = read_answer(client)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert client.recv(1) == b""
    assert len(app.scopes) == seen + 1


def test_client_that_leaves_behind_a_second_request_is_noticed(gate: Gate) -> None:
    with gate.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" + GET):
        eventually(lambda: gate.app.scopes)
    eventually(lambda: gate.app.ended == ["/slow"])
    assert gate.app.left == ["/slow"]


def test_blank_line_behind_a_body_is_no_second_request(calm_gate: Gate) -> None:
    with calm_gate.connect() as client:
        for _ in range(2):
            client.sendall(HEAD + b"Content-Length: 1\r\n\r\na\r\n")
            assert "connection" not in read_answer(client)[1]


# Clients that leave, or do not take their answer.


@pytest.mark.parametrize("path", ["/slow", "/wait", "/endless", "/until_cut"])
@pytest.mark.parametrize("manner", ["close", "reset", "half-close"])
def test_client_that_leaves_is_told_at_once_and_once(gate: Gate, path: str, manner: str) -> None:
    with gate.connect(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode()) as client:
        eventually(lambda: gate.app.scopes)
        if manner == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if manner == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        eventually(lambda: gate.app.left == [path], 1)
        eventually(lambda: gate.connections == 0)
        if path == "/until_cut":
            gate.call(gate.app.cut.set)
        eventually(lambda: gate.app.ended == [path])
    assert gate.app.left == [path]
    assert gate.app.clients[0].gone


def test_client_that_leaves_in_mid_body_is_told(gate: Gate) -> None:
    with gate.connect(HEAD + b"Content-Length: 5\r\n\r\nab"):
        eventually(lambda: gate.app.scopes)
    eventually(lambda: gate.app.ended == ["/echo"])
    assert gate.app.left == ["/echo"]


def test_client_that_leaves_after_its_answer_has_not_left_it(gate: Gate) -> None:
    with gate.connect(GET) as client:
        read_answer(client)
    eventually(lambda: gate.connections == 0)
    assert gate.app.left == []


def test_client_that_stops_reading_a_stream_is_cut_off(gate: Gate) -> None:
    with gate.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096):
        eventually(lambda: gate.app.left == ["/endless"])
    assert gate.app.flow[0] == "pause"


def test_client_that_reads_slowly_is_not_cut_off(gate: Gate) -> None:
    with gate.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096) as client:
        taken = 0
        deadline = time.monotonic() + 1  # five times the bound
        while time.monotonic() < deadline:
            taken += len(client.recv(262144))
        assert gate.app.left == []
        eventually(lambda: "resume" in gate.app.flow or not client.recv(262144))
        assert "resume" in gate.app.flow


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_client_that_stops_reading_is_cut_off_after_the_application_has_returned(gate: Gate, connection: bytes) -> None:
    with gate.connect(
        b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: " + connection + b"\r\n\r\n", receive_buffer=4096
    ):
        eventually(lambda: gate.app.ended == ["/large"])
        eventually(lambda: gate.connections == 0)


# Answers before the end of the request.


def test_answer_before_the_body_reaches_a_client_that_is_still_sending(loop: str) -> None:
    with (
        serving(loop, ServerLimits()) as gate,
        gate.connect(b"POST /unauthorized HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n") as client,
    ):
        client.sendall(b"x" * 20_000_000)
        status, headers, _ = read_answer(client)
        assert (status, headers["connection"]) == (401, "close")
        assert client.recv(1) == b""
    assert len(gate.app.scopes) == 1


def test_rest_of_a_refused_body_is_read_for_a_bounded_time(gate: Gate) -> None:
    with gate.connect(b"POST /unauthorized HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n") as client:
        assert read_answer(client)[0] == 401
        eventually(lambda: gate.connections == 0)


def test_100_continue_is_sent_only_to_who_reads_the_body(calm_gate: Gate) -> None:
    expect = b"HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with calm_gate.connect(b"POST /echo " + expect) as client:
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"ab")
        assert read_answer(client)[2] == b"ab"
    with calm_gate.connect(b"POST /unauthorized " + expect) as client:
        assert read_answer(client)[0] == 401
        assert client.recv(1) == b""


def test_large_body_arrives_whole_and_is_not_gathered_unread(calm_gate: Gate) -> None:
    body = os.urandom(5_000_000)
    with calm_gate.connect(HEAD + b"Content-Length: 5000000\r\n\r\n") as client:
        client.sendall(body)
        assert read_answer(client)[2] == body


def test_endless_chunk_extensions_are_refused(calm_gate: Gate) -> None:
    with calm_gate.connect(CHUNKED + b"1;") as client:
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                client.sendall(b"a" * 1000)
        assert_refused(read_all(client), 400, "invalid_value")


# The drain.


def test_drain_finishes_what_runs_and_refuses_nothing_before_the_delay_is_over(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_delay=0.3, drain_timeout=5) as gate:
        running = gate.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        kept = gate.connect(GET)
        read_answer(kept)
        eventually(lambda: len(gate.app.scopes) == 2)
        gate.stop()
        eventually(lambda: gate.hooks == ["drain"], 0.2)
        with gate.connect(GET) as client:
            assert read_answer(client)[0] == 200
        assert kept.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            gate.connect()
        gate.app.release.set()
        status, headers, body = read_answer(running)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert running.recv(1) == b""
        gate.thread.join(1)
        assert gate.app.lifespan[1:] == ["shutdown with 0 running"]
        assert gate.hooks == ["drain"]
        running.close()
        kept.close()


def test_answer_during_the_delay_ends_its_connection(loop: str) -> None:
    """Who goes on asking is on another connection when the door closes."""
    with serving(loop, ServerLimits(), drain_delay=30, drain_timeout=1) as gate, gate.connect(GET) as kept:
        assert "connection" not in read_answer(kept)[1]
        gate.stop()
        eventually(lambda: gate.hooks == ["drain"], 0.2)
        with gate.connect() as new:
            time.sleep(0.1)  # connections are told every 20 ms
            for client in (kept, new):
                client.sendall(GET)
                status, headers, _ = read_answer(client)
                assert (status, headers["connection"], client.recv(1)) == (200, "close", b"")
        gate.stop()
        gate.thread.join(2)


def test_request_that_is_a_moment_behind_its_connection_is_served(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=5) as gate, gate.connect() as client:
        eventually(lambda: len(gate.server.server_state.connections) == 1)
        gate.stop()
        eventually(lambda: gate.hooks == ["drain"], 0.2)
        client.sendall(GET)
        assert read_answer(client)[0] == 200
        gate.thread.join(2)
        assert not gate.thread.is_alive()


def test_connection_on_which_nothing_comes_does_not_hold_up_the_end(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=30) as gate, gate.connect() as client:
        eventually(lambda: len(gate.server.server_state.connections) == 1)
        gate.stop()
        assert client.recv(1) == b""
        gate.thread.join(2)
        assert not gate.thread.is_alive()


def test_cutoff_lets_streams_end_with_a_last_event(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=0.2) as gate:
        gate.on_cutoff = gate.app.cut.set
        clients = [gate.connect(b"GET /until_cut HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(50)]
        eventually(lambda: len(gate.app.scopes) == 50)
        begun = time.monotonic()
        gate.stop()
        for client in clients:
            assert read_all(client).endswith(b"3\r\ncut\r\n0\r\n\r\n")
            client.close()
        gate.thread.join(2)
        assert time.monotonic() - begun < 1.5
        assert gate.hooks == ["drain", "cutoff"]
        assert gate.app.lifespan[1:] == ["shutdown with 0 running"]


def test_what_does_not_listen_is_cut_off_within_two_seconds(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=0.1) as gate:
        deaf = gate.connect(b"GET /deaf HTTP/1.1\r\nHost: a\r\n\r\n")
        stalled = gate.connect(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096)
        eventually(lambda: len(gate.app.scopes) == 2)
        begun = time.monotonic()
        gate.stop()
        gate.thread.join(4)
        assert not gate.thread.is_alive()
        assert time.monotonic() - begun < 2.1
        assert gate.app.lifespan[1:] == ["shutdown with 0 running"]
        deaf.close()
        stalled.close()


PROGRAM = """
import sys, uvicorn
from gateway.drain import Server, listen
from gateway.front import Bounds, door

async def app(scope, receive, send):
    print("request", flush=True)
    await receive()
    await receive()

listener = listen("127.0.0.1", 0)
config = uvicorn.Config(app, http=door(Bounds()), loop=sys.argv[1], lifespan="off", log_config=None)

def tell():
    print(listener.getsockname()[1], flush=True)

Server(config, drain_timeout=30, on_open=tell, on_drain=lambda: print("drain", flush=True)).run(sockets=[listener])
print("ended", flush=True)
"""


def test_door_is_open_when_that_is_told(loop: str) -> None:
    """Who waits for the line that tells the address is not refused then."""
    command = [sys.executable, "-c", PROGRAM, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=5):
            process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_second_signal_ends_the_process_at_once_with_status_0(loop: str) -> None:
    command = [sys.executable, "-c", PROGRAM, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.socket() as client:
            client.connect(address)
            client.sendall(GET)
            assert process.stdout.readline() == "request\n"  # else the drain has nothing to wait for
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "drain\n"
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "ended\n"
            assert process.wait(5) == 0
            assert time.monotonic() - begun < 3


def test_signals_after_that_change_nothing(loop: str) -> None:
    """Who is impatient, at a terminal say, does not break off what is written last."""
    late = "\nimport os, signal\nfor number in (signal.SIGTERM, signal.SIGINT):\n    os.kill(os.getpid(), number)\n"
    command = [sys.executable, "-c", PROGRAM + late, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_listening_socket_finds_half_open_clients_within_a_minute() -> None:
    with listen("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if sys.platform == "linux":
                probing = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * accepted.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_KEEPCNT
                )
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) + probing <= 60
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_listening_works_on_ipv6() -> None:
    try:
        listener = listen("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert listener.family == socket.AF_INET6
