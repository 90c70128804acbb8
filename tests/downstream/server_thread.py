"""HTTP server in a thread of its own, and clients on plain sockets."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from gateway.downstream import protocol
from gateway.downstream.connection_limit import ConnectionLimit
from gateway.downstream.cycle import HANDLER, RequestResponseCycle
from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from gateway.downstream.server import GracefulServer, listen

SHORT = ServerLimits(
    idle_seconds=0.2,
    header_seconds=0.2,
    body_seconds=0.2,
    keep_alive_seconds=0.3,
    write_stall_seconds=0.2,
    linger_seconds=0.3,
)
HEAD = b"POST /echo HTTP/1.1\r\nHost: gateway\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /hello HTTP/1.1\r\nHost: gateway\r\n\r\n"


def noted(body: bytes) -> bytes:
    """Return a request on whose head `ScriptedApp` takes a note."""
    return HEAD + b"X-Noted: yes\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


PATIENCE = 20.0
"""Seconds after which a condition that has not come true, or an answer that has not come, is a failure."""


def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Poll `condition` until it holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.002)


class ScriptedApp:
    """Raw ASGI application that records its requests; the path selects what it does."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.disconnected: list[str] = []
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
        client = scope["extensions"]["gateway.client"]
        self.clients.append(client)
        self.scopes.append(scope)  # last: tests wait for it, and look at the client then
        if b"x-noted" in client.fields:
            client.notes["seen"] = True
        if b"x-handled" in client.fields:
            client.notes[HANDLER] = self.handle
        path = scope["path"]
        client.on_leave = lambda: self.disconnected.append(path)
        try:
            await getattr(self, path.strip("/").split("/")[0] or "hello", self.hello)(receive, send, client)
        finally:
            self.ended.append(path)

    async def handle(self, client: RequestResponseCycle) -> None:
        self.clients.append(client)
        client.answer(200, b"handled: yes\r\n", client.whole_body() or b"")

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

    async def respond(self, send: Any, status: int, body: bytes) -> None:
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"Content-Length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body})

    async def hello(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.respond(send, 200, b"hello")

    async def echo(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        with contextlib.suppress(ConnectionError):
            await self.respond(send, 200, await self.body(receive))

    async def unauthorized(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await self.respond(send, 401, b"no")

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
        """Respond once the test sets `release`, or the client disconnects."""
        await self.body(receive)
        while not (self.release.is_set() or client.gone):
            await asyncio.sleep(0.005)
        await self.respond(send, 200, b"slow")

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
        await self.respond(send, 200, b"x" * 30_000_000)

    async def until_cut(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await self.cut.wait()
        await send({"type": "http.response.body", "body": b"cut"})

    async def unresponsive(self, receive: Any, send: Any, client: RequestResponseCycle) -> None:
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


class ServerThread:
    """`GracefulServer` with a `ScriptedApp`, in a thread of its own."""

    def __init__(
        self, loop: str, limits: ServerLimits, connection_limit: ConnectionLimit | None = None, **drain: Any
    ) -> None:
        self.app = ScriptedApp()
        self.hooks: list[str] = []
        self.on_cutoff: Callable[[], None] = lambda: None
        config = uvicorn.Config(
            self.app,
            http=bind_limits(limits, None, connection_limit),
            loop=loop,
            interface="asgi3",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
        )
        self.uvicorn = GracefulServer(
            config, on_drain=lambda: self.hooks.append("drain"), on_cutoff=self._cutoff, **drain
        )
        self.listener = listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        eventually(lambda: self.uvicorn.started)

    def _cutoff(self) -> None:
        self.hooks.append("cutoff")
        self.on_cutoff()

    def call(self, function: Callable[[], None]) -> None:
        assert self.uvicorn._loop is not None
        self.uvicorn._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        eventually(lambda: self.uvicorn._loop is not None)
        self.call(self.uvicorn.stop)

    @property
    def connections(self) -> int:
        return len(self.uvicorn.server_state.connections)

    def is_buffering_body(self) -> bool:
        """Return whether a connection waits for the rest of a body before it calls the app."""
        connections = self.uvicorn.server_state.connections
        return any(connection._state == protocol._BODY_OF_CACHED_HEAD for connection in connections)

    def has_retired_all(self) -> bool:
        """Return whether each connection closes after its next response."""
        return all(connection._last_request for connection in tuple(self.uvicorn.server_state.connections))

    def connect(self, data: bytes = b"", *, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(PATIENCE)
        try:
            client.connect(self.address)
            client.sendall(data)
        except OSError:
            client.close()
            raise
        return client

    def ask(self, *pieces: bytes) -> bytes:
        """Send the pieces and return all bytes until the server closes the connection."""
        with self.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.sendall(piece)
            return read_all(client)


@contextlib.contextmanager
def serving(loop: str, limits: ServerLimits = SHORT, **drain: Any) -> Iterator[ServerThread]:
    """Run a server; it is cut off at the end and must then have no connection and no task left."""
    server = ServerThread(loop, limits, **drain)
    try:
        yield server
    finally:
        server.app.release.set()
        if server.thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the first may already have closed the loop
                server.stop()
                server.stop()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        assert not server.uvicorn.server_state.connections
        assert not server.uvicorn.server_state.tasks


def read_all(client: socket.socket) -> bytes:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


def read_response(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response that has a Content-Length."""
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
