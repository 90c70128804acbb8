"""Backend for `redis_replicas.py` that counts: requests in flight, the most ever, when each began and ended."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

MODEL = "bench-model"
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_VIA = re.compile(rb"x-gateway-via: (\S+)", re.IGNORECASE)
_ANSWER = json.dumps(
    {
        "id": "c",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
).encode()
_MODELS = json.dumps({"data": [{"id": MODEL}]}).encode()


class Served(NamedTuple):
    """One request: the gateway that sent it, and when it began and ended."""

    gateway: bytes
    began: float
    ended: float


class CountingBackend:
    """A vLLM whose every answer takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running = 0
        self.most = 0
        self.served: list[Served] = []

    def begin(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    def reset(self) -> None:
        """Forget the most in flight and the requests so far."""
        self.most = self.running
        self.served.clear()


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, backend: CountingBackend) -> None:
        self._backend = backend
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._backend.running -= 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not separator or len(body) < (int(length[1]) if length else 0):
            return
        self._received = b""
        if not head.startswith(b"POST"):
            self._answer(_MODELS)
            return
        via = _VIA.search(head)
        self._backend.begin()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._backend.seconds, self._end, via[1] if via else b"", time.monotonic())

    def _end(self, gateway: bytes, began: float) -> None:
        self._timer = None
        self._backend.running -= 1
        self._backend.served.append(Served(gateway, began, time.monotonic()))
        self._answer(_ANSWER)

    def _answer(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


@asynccontextmanager
async def serving(seconds: float) -> AsyncIterator[tuple[CountingBackend, str]]:
    """Serve a backend whose every answer takes `seconds`; yield it and its URL."""
    backend = CountingBackend(seconds)
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(backend), "127.0.0.1", 0)
    try:
        yield backend, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
