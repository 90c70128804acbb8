"""A complete gateway in this process, on real sockets, and clients for it."""

import asyncio
import gc
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import uvicorn
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from gateway import config
from gateway.app import Gateway
from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from gateway.downstream.server import GracefulServer, listen
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.trace_context import Tracer
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.virtual_time import is_virtual, virtual_clock

PATIENCE = 20.0
"""Seconds after which a condition that has not come true is a failure."""
PROMPT = [{"role": "user", "content": "Hello?"}]
TIMES = {
    "connect_timeout": 20,
    "first_token_timeout": 20,
    "idle_timeout": 20,
    "total_timeout": 60,
    "queue_timeout": 20,
    "probe_interval": 60,
}
"""Timeouts in seconds that no request reaches which is served, however busy the machine is."""
SHORT_TIMES = {"first_token_timeout": 0.5, "idle_timeout": 0.5, "total_timeout": 1}
"""Timeouts in seconds for tests that wait for them."""


async def until(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until `condition` holds, and check it about every millisecond."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.001)


def settings_for(*backends: FaultBackend, **limits: float) -> config.Settings:
    """Return settings with one tier, `standard`, on one backend with these servers.

    Without affinity, so that the first server gets each request if both are equally busy.
    """
    kind = backends[0].kind
    balance = {} if kind == "ollama" else {"balance": "least_busy"}
    servers = [{"base_url": backend.base_url, "models": [MODEL]} for backend in backends]
    return config.build(
        {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "servers": servers, **balance, **TIMES, **limits}},
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "log_format": "json",
            "state_file": "",
        }
    )


class _Server(GracefulServer):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Running:
    """A gateway that serves on `port`."""

    def __init__(self, gateway: Gateway, server: _Server, port: int, log: io.BytesIO) -> None:
        self.gateway = gateway
        self.server = server
        self.port = port
        self.log = log

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> AsyncOpenAI:
        http = DefaultAsyncHttpxClient(timeout=PATIENCE, verify=False)  # loading the CA certificates takes 30 ms
        return AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key="any", max_retries=0, http_client=http)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels."""
        self.gateway.settle()
        registry = self.gateway._metrics.registry
        samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def exchanges(self) -> list[dict[str, Any]]:
        """Return the exchange log so far."""
        self.gateway.settle()
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    @property
    def live(self) -> set[Any]:
        """Exchanges in flight."""
        return set(self.gateway._in_flight)

    @property
    def upstream_connections(self) -> int:
        return sum(
            server.pool.open_connections for backend in self.gateway._backends.values() for server in backend.servers
        )

    @property
    def running(self) -> int:
        return sum(
            backend.admission.running(lane)
            for backend in self.gateway._backends.values()
            for lane in backend.admission.lanes
        )

    @property
    def waiting(self) -> int:
        return sum(
            backend.admission.waiting(lane)
            for backend in self.gateway._backends.values()
            for lane in backend.admission.lanes
        )

    def is_idle(self) -> bool:
        """Return whether no request holds a slot, a task or a connection; idle connections may stay
        open.
        """
        idle = sum(len(server.pool._idle) for backend in self.gateway._backends.values() for server in backend.servers)
        return not (
            self.running
            or self.waiting
            or self.live
            or self.server.server_state.tasks
            or self.upstream_connections - idle
        )

    @asynccontextmanager
    async def sent(
        self, body: Mapping[str, Any] | None = None, *headers: str, behind: bytes = b""
    ) -> AsyncIterator["Raw"]:
        """Send a chat request on a new connection, with more `headers`, and with `behind` after it.

        At the end of the block the client disconnects.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        raw = Raw(reader, writer)
        try:
            writer.write(request_bytes(body if body is not None else {}, *headers) + behind)
            yield raw
        finally:
            raw.leave()
            with suppress(OSError):
                await writer.wait_closed()

    async def ask(self, body: Mapping[str, Any] | None = None) -> "Reply":
        """Send a chat request on a new connection and return its response."""
        async with asyncio.timeout(PATIENCE), self.sent(body) as raw:
            return await raw.reply()


def request_bytes(body: Mapping[str, Any], *headers: str) -> bytes:
    """Return a chat request with these fields and headers."""
    data = json.dumps({"model": "standard", "messages": PROMPT, "max_tokens": 64, **body}).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


class Raw:
    """Client side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def leave(self) -> float:
        """Close the connection, as a program that exits does; return the loop's time."""
        self.writer.close()
        return asyncio.get_running_loop().time()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the status and the headers, whose names are in lower case."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        return int(lines[0].split()[1]), {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
        }

    async def reply(self) -> "Reply":
        """Read a complete response.

        Raises:
            asyncio.IncompleteReadError: the gateway closed before the body was complete.
        """
        status, headers = await self.head()
        if headers.get("transfer-encoding") != "chunked":
            return Reply(status, headers, await self.reader.readexactly(int(headers["content-length"])))
        chunks = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            chunks.append((await self.reader.readexactly(size + 2))[:-2])
        await self.reader.readexactly(2)
        return Reply(status, headers, b"".join(chunks))


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def names_port(self, port: int) -> bool:
        """Return whether a number in the body is `port`. Random ids and times may have its digits in them."""
        return re.search(rb"(?<![0-9A-Za-z])%d(?![0-9A-Za-z])" % port, self.body) is not None

    @property
    def events(self) -> list[Any]:
        """Events of a stream; `[DONE]` stays a string."""
        values = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [value if value == "[DONE]" else json.loads(value) for value in values]

    @property
    def is_stream(self) -> bool:
        return self.headers["content-type"].startswith("text/event-stream")

    @property
    def text(self) -> str:
        """Content of the answer, streamed or not."""
        if not self.is_stream:
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        return "".join(
            choice["delta"].get("content", "")
            for event in self.events
            if "choices" in event
            for choice in event["choices"]
        )

    @property
    def error(self) -> dict[str, Any] | None:
        """Error object of the body or of the last event."""
        value = self.events[-1] if self.is_stream else json.loads(self.body)
        return value.get("error") if isinstance(value, dict) else None


@asynccontextmanager
async def running(
    settings: config.Settings,
    limits: ServerLimits | None = None,
    *,
    shares_loop: bool = False,
    port: int = 0,
    tracer: Tracer | None = None,
    **parts: Any,
) -> AsyncIterator[Running]:
    """Serve a gateway with `settings`, set up as `gateway.serve` does.

    Of equally busy servers without affinity, the first one gets each request, so that a test knows
    which one it meets. At the end it must have left no task and no connection behind. With `shares_loop`, its servers
    run in this loop too, and only connections are checked. `parts` are more arguments of the gateway.
    """
    base_tasks = asyncio.all_tasks()
    log = io.BytesIO()
    listener = listen("127.0.0.1", port)
    clock = virtual_clock() if is_virtual() else nullcontext()
    async with AsyncExitStack() as stack:
        stack.enter_context(clock)
        gateway = await stack.enter_async_context(Gateway(settings, ExchangeLog(True, log), tracer=tracer, **parts))
        options: dict[str, Any] = {"ws": "none", "lifespan": "off", "access_log": False, "log_config": None}
        options |= {"interface": "asgi3", "server_header": False, "date_header": False, "proxy_headers": False}
        server = _Server(
            uvicorn.Config(gateway, http=bind_limits(limits or ServerLimits(), gateway.body_memory), **options),
            drain_timeout=1,
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started and gateway._health.has_asked_all)
        running_gateway = Running(gateway, server, listener.getsockname()[1], log)
        for backend in gateway._backends.values():
            backend.admission._has_several = backend.admission.affinity is not None
        try:
            yield running_gateway
        finally:
            server.stop()
            await serving
    expected = base_tasks | {asyncio.current_task()}  # a fixture's teardown runs in another task than its setup
    await until(lambda: running_gateway.upstream_connections == 0 and (shares_loop or asyncio.all_tasks() <= expected))


def open_descriptors() -> int:
    """Count the open file descriptors of this process."""
    gc.collect()
    return len(list(Path("/dev/fd").iterdir()))
