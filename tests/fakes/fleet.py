"""Gateways with both backends, on a thread with its own event loop, and a blocking client that can
send any bytes.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Self

import uvloop

from gateway import config
from gateway.downstream.limits import ServerLimits
from tests.fakes.fault_backend import MODEL, FaultBackend, Kind
from tests.fakes.running_gateway import PATIENCE, Running, running

HASTY = ServerLimits(header_seconds=0.3, body_seconds=0.3, linger_seconds=0.3)


class Answer:
    """One complete response; header names are in lower case."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.body[:200]!r}>"

    @property
    def error(self) -> dict[str, Any]:
        """Error object, after a check of its shape."""
        assert self.headers["content-type"] == "application/json"
        document = json.loads(self.body)
        assert list(document) == ["error"]
        error: dict[str, Any] = document["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert all(isinstance(error[key], str) and error[key] for key in ("message", "type", "code"))
        assert error["param"] is None or isinstance(error["param"], str)
        return error


class Connection:
    """One client connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send as much as the gateway accepts: it may refuse a request before it has read all of
        it.
        """
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def answer(self) -> Answer:
        """Read the next response."""
        head, _, rest = self._until(b"\r\n\r\n").partition(b"\r\n\r\n")
        self._received = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Answer(int(first.split()[1]), headers, self._body(headers))

    def is_closed(self) -> bool:
        """Wait until the gateway closes, and return whether it sent nothing before that."""
        try:
            return self._received == b"" and self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        assert headers.get("transfer-encoding") == "chunked"
        pieces = []
        while True:
            size, _, self._received = self._until(b"\r\n").partition(b"\r\n")
            piece = self._exactly(int(size, 16) + 2)[:-2]
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)

    def _until(self, end: bytes) -> bytes:
        while end not in self._received:
            self._more()
        return self._received

    def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            self._more()
        body, self._received = self._received[:count], self._received[count:]
        return body

    def _more(self) -> None:
        data = self._socket.recv(65536)
        assert data, f"closed after {self._received[:200]!r}"
        self._received += data


class Fleet:
    """Gateways by name, in front of the same two backends, configured by environment variables
    only.

    `gateways` has the variables of each gateway, `limits` the HTTP limits of some. `LLM_BACKEND` is
    `kind`.
    """

    def __init__(
        self, kind: Kind, gateways: Mapping[str, Mapping[str, str]], limits: Mapping[str, ServerLimits]
    ) -> None:
        self.kind = kind
        self._environments = gateways
        self._limits = limits
        self.backends: dict[str, FaultBackend] = {}
        self.gateways: dict[str, Running] = {}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fleet on {kind}")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(4 * PATIENCE)
        assert self.gateways
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    @property
    def calls(self) -> int:
        """Chat requests that reached a backend."""
        return sum(len(backend.requests) for backend in self.backends.values())

    def connect(self, gateway: str = "open") -> Connection:
        return Connection(self.gateways[gateway].port)

    def ask(self, data: bytes, gateway: str = "open") -> Answer:
        """Send one request on a new connection and return the response."""
        with self.connect(gateway) as connection:
            connection.send(data)
            return connection.answer()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._started():
                self._ready.set()
                await self._over.wait()
        finally:
            self._ready.set()

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for kind in ("ollama", "vllm"):
                self.backends[kind] = await stack.enter_async_context(FaultBackend(kind))
            environ = {"LLM_BACKEND": self.kind, "GATEWAY_STATE_FILE": "", "GATEWAY__LOG_FORMAT": "json"}
            for kind, backend in self.backends.items():
                environ |= {f"{kind.upper()}_BASE_URL": backend.base_url, f"{kind.upper()}_MODEL": MODEL}
            for name, own in self._environments.items():
                settings = config.load(None, environ | own)
                self.gateways[name] = await stack.enter_async_context(running(settings, self._limits.get(name)))
            yield
