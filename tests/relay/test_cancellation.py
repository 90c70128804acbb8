"""Clients that leave, stall or half-close, through the whole gateway on real sockets.

Case numbers are those of the table of faults: 37 to 42.
"""

import asyncio
import os
import random
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from gateway.downstream import cycle
from gateway.downstream.limits import ServerLimits
from gateway.upstream import health_checks, probe
from tests.fakes.fault_backend import TEXT, FaultBackend, Kind
from tests.fakes.running_gateway import Raw, Running, open_descriptors, request_bytes, running, settings_for, until
from tests.fakes.virtual_time import within

pytestmark = pytest.mark.uvloop

AT_ONCE = 0.1
"""Seconds from a client's disconnect until the backend sees it and the request holds nothing."""
HALF_OPEN_SECONDS = 60
PER_STREAM_BYTES = 256 * 1024
PATIENT = {"first_token_timeout": 300, "idle_timeout": 300, "total_timeout": 300, "queue_timeout": 300}


@pytest.fixture(params=["ollama", "vllm"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[FaultBackend]:
    kind: Kind = request.param
    async with FaultBackend(kind, "slow") as backend:
        yield backend


@pytest.fixture
async def gateway(backend: FaultBackend, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Running]:
    """A gateway that serves one request at a time, without deadlines in the way.

    The event loop and the HTTP server warn of writes to a closed connection: there are none.
    """
    async with running(settings_for(backend, **PATIENT, max_concurrency=1)) as gateway:
        yield gateway
    assert [record for record in caplog.records if record.name in ("asyncio", cycle._log.name)] == []


@pytest.fixture(params=[True, False], ids=["stream", "plain"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def check_left(gateway: Running, raw: Raw, phase: str, others: int = 0) -> None:
    """Let the client leave; check that the request then holds nothing and is counted."""
    left = raw.leave()
    await until(lambda: len(gateway.live) == others)
    assert asyncio.get_running_loop().time() - left <= within(AT_ONCE)
    if not others:
        await until(gateway.is_idle, patience=within(AT_ONCE))
        assert gateway.upstream_connections == 0
    assert (gateway.running, gateway.waiting) == (others, 0)
    line = gateway.exchanges()[-1]
    assert (line["status"], line["outcome"]) == (499, "cancelled")
    assert gateway.metric("gateway_client_disconnects_total", phase=phase) == 1
    assert gateway.metric("gateway_client_disconnects_total") == 1
    assert gateway.metric("gateway_requests_total", outcome="cancelled") == 1
    assert gateway.metric("gateway_upstream_errors_total") == 0


async def check_closed(backend: FaultBackend) -> None:
    """Check that the backend sees its only connection closed at once."""
    (peer,) = backend.peers
    await until(lambda: peer.closed_at is not None, patience=within(AT_ONCE))
    assert backend.most_at_once == 1


async def check_next_is_served(gateway: Running, backend: FaultBackend) -> None:
    backend.mode = "healthy"
    reply = await gateway.ask({"stream": True})
    assert (reply.status, reply.text) == (200, TEXT)


@pytest.mark.virtual_time
async def test_client_that_leaves_the_queue_frees_its_place(
    gateway: Running, backend: FaultBackend, stream: bool
) -> None:
    """Case 37: the backend never sees the request."""
    async with gateway.sent({"stream": True}):
        await until(lambda: len(backend.requests) == 1)
        async with gateway.sent({"stream": stream}) as raw:
            await until(lambda: gateway.waiting == 1)
            await check_left(gateway, raw, "queued", others=1)
        assert len(backend.requests) == 1
        assert backend.open_peers
    await until(gateway.is_idle)
    assert len(backend.requests) == 1


@pytest.mark.virtual_time
async def test_client_that_leaves_before_the_first_token_ends_the_upstream_request(
    gateway: Running, backend: FaultBackend, stream: bool
) -> None:
    """Cases 38 and 40: during prefill, and during a plain answer."""
    backend.mode = "silent"
    async with gateway.sent({"stream": stream}) as raw:
        await until(lambda: len(backend.requests) == 1)
        await check_left(gateway, raw, "waiting")
    await check_closed(backend)
    await check_next_is_served(gateway, backend)


@pytest.mark.virtual_time
async def test_client_that_leaves_while_the_gateway_connects_ends_the_attempt(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Case 38; here the backend's TLS handshake never ends."""
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(health_checks, "FIRST_ATTEMPTS", 1)
    ended: list[float] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.append(asyncio.get_running_loop().time())
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        backend = FaultBackend("vllm", tls=None, port=server.sockets[0].getsockname()[1])
        settings = settings_for(backend, **PATIENT, connect_timeout=300)
        secure = (
            settings.backends["vllm"]
            .servers[0]
            .model_copy(update={"base_url": backend.base_url.replace("http:", "https:")})
        )
        altered = settings.backends["vllm"].model_copy(update={"servers": (secure,)})
        settings = settings.model_copy(update={"backends": {"vllm": altered}})
        async with running(settings) as gateway:
            await until(lambda: len(ended) == 1)  # the probe
            gateway.gateway._backends["vllm"].servers[0].circuit.probe_answered()
            async with gateway.sent({"stream": stream}) as raw:
                await until(lambda: gateway.running == 1)
                await asyncio.sleep(0.02)
                await check_left(gateway, raw, "waiting")
            await until(lambda: len(ended) == 2, patience=within(AT_ONCE))


async def test_client_that_leaves_in_mid_stream_ends_the_upstream_request(
    gateway: Running, backend: FaultBackend
) -> None:
    """Case 39."""
    async with gateway.sent({"stream": True}) as raw:
        await raw.head()
        await raw.reader.readuntil(b"word")
        await check_left(gateway, raw, "streaming")
    await check_closed(backend)
    await check_next_is_served(gateway, backend)


async def test_client_that_leaves_with_a_pipelined_request_is_noticed(gateway: Running, backend: FaultBackend) -> None:
    """Case 39; the second request never runs."""
    async with gateway.sent({"stream": True}, behind=request_bytes({"stream": True})) as raw:
        await raw.head()
        await raw.reader.readuntil(b"word")
        await check_left(gateway, raw, "streaming")
    await check_closed(backend)
    assert len(backend.requests) == 1
    await check_next_is_served(gateway, backend)


async def test_client_that_leaves_a_plain_answer_ends_the_upstream_request(
    gateway: Running, backend: FaultBackend
) -> None:
    """Case 40: pieces of Ollama's answer have arrived by then, nothing of vLLM's."""
    async with gateway.sent({"stream": False}) as raw:
        await until(lambda: bool(backend.requests))
        if backend.kind == "ollama":
            await until(lambda: any(relay._meter.first_piece for relay in gateway.live))
        await check_left(gateway, raw, "streaming" if backend.kind == "ollama" else "waiting")
    await check_closed(backend)
    await check_next_is_served(gateway, backend)


async def test_client_that_closes_only_its_sending_side_has_left(gateway: Running, backend: FaultBackend) -> None:
    async with gateway.sent({"stream": True}) as raw:
        await raw.reader.readuntil(b"word")
        raw.writer.write_eof()
        await check_closed(backend)
        await until(gateway.is_idle)


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
async def test_kernel_detects_a_client_whose_cable_is_pulled(gateway: Running, backend: FaultBackend) -> None:
    """Case 41: by TCP keep-alive while nothing is sent, by `TCP_USER_TIMEOUT` while data is."""
    async with gateway.sent({"stream": True}) as raw:
        await raw.head()
        (connection,) = gateway.server.server_state.connections
        with socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno())) as accepted:

            def option(name: int) -> int:
                return accepted.getsockopt(socket.IPPROTO_TCP, name)

            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert (
                option(socket.TCP_KEEPIDLE) + option(socket.TCP_KEEPINTVL) * option(socket.TCP_KEEPCNT)
                <= HALF_OPEN_SECONDS
            )
            assert 0 < option(socket.TCP_USER_TIMEOUT) <= HALF_OPEN_SECONDS * 1000


async def test_client_that_stops_reading_is_buffered_within_bounds_and_cut_off(backend: FaultBackend) -> None:
    """Case 42."""
    backend.mode = "flood"
    stall = 0.4
    async with (
        running(settings_for(backend, **PATIENT), ServerLimits(write_stall_seconds=stall)) as gateway,
        gateway.sent({"stream": True}) as raw,
    ):
        begun = asyncio.get_running_loop().time()
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport too
        most = 0
        await until(lambda: bool(gateway.server.server_state.connections))
        (connection,) = gateway.server.server_state.connections
        # Small buffers fill up soon, whatever else the machine does.
        for end, option in ((raw.writer, socket.SO_RCVBUF), (connection, socket.SO_SNDBUF)):
            end.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)

        def is_over() -> bool:
            nonlocal most
            most = max(most, connection.transport.get_write_buffer_size())
            return gateway.is_idle()

        await until(lambda: bool(gateway.live))
        await until(is_over)
        assert 65536 < most <= PER_STREAM_BYTES
        assert asyncio.get_running_loop().time() - begun >= stall
        (peer,) = backend.peers
        await until(lambda: peer.closed_at is not None, patience=within(AT_ONCE))
        assert gateway.metric("gateway_client_disconnects_total", phase="streaming") == 1
        assert gateway.exchanges()[-1]["status"] == 499


async def test_slow_reader_slows_the_backend_down(backend: FaultBackend) -> None:
    """Back-pressure reaches through the gateway: a slow reader does not fill its memory."""
    backend.mode = "flood"
    async with running(settings_for(backend, **PATIENT)) as gateway, gateway.sent({"stream": True}) as raw:
        await raw.head()
        (connection,) = gateway.server.server_state.connections
        most = 0
        for _ in range(300):
            await raw.reader.readexactly(2**15)
            most = max(most, connection.transport.get_write_buffer_size())
        assert most <= PER_STREAM_BYTES


async def test_backend_is_not_read_for_a_client_that_does_not_read_when_its_stream_begins(
    backend: FaultBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's connection may have the unread answer to an earlier request in front of it."""
    cycles: list[cycle.RequestResponseCycle] = []

    class PausedCycle(cycle.RequestResponseCycle):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            self.paused = True
            cycles.append(self)

    monkeypatch.setattr("gateway.downstream.protocol.RequestResponseCycle", PausedCycle)
    async with running(settings_for(backend, **PATIENT)) as gateway, gateway.sent({"stream": True}) as raw:

        def reading() -> list[bool]:
            """Return whether the gateway reads from the backend, for each connection."""
            servers = [server for backend in gateway.gateway._backends.values() for server in backend.servers]
            return [not connection.is_paused for server in servers for connection in server.pool._open]

        await until(lambda: reading() == [False])
        (begun,) = cycles
        begun.resume()
        assert (await raw.head())[0] == 200
        assert reading() == [True]


LEAVERS = 500
TOGETHER = 50


async def test_five_hundred_clients_that_leave_at_random_leak_nothing(backend: FaultBackend) -> None:
    """Clients leave in all four phases: queued, waiting, streaming, and during a plain answer."""
    chance = random.Random(20261121)
    limit = 4
    descriptors = open_descriptors()
    tasks = asyncio.all_tasks()
    async with running(settings_for(backend, **PATIENT, max_concurrency=limit, max_queue=1000)) as gateway:
        backend.script = deque(chance.choices(["slow", "silent", "brief", "healthy"], k=4 * LEAVERS))

        async def come_and_go(number: int) -> None:
            stay = 0.2 if number % 5 == 0 else chance.choice([0, 0.01, 0.05]) * chance.random()
            async with gateway.sent({"stream": chance.random() < 0.7}) as raw:
                with suppress(TimeoutError):
                    async with asyncio.timeout(stay):
                        await raw.reader.read()

        for _ in range(LEAVERS // TOGETHER):
            async with asyncio.TaskGroup() as group:
                for number in range(TOGETHER):
                    group.create_task(come_and_go(number))
        await until(gateway.is_idle)
        assert backend.most_at_once <= limit
        assert (gateway.running, gateway.waiting) == (0, 0)
        phases = {
            phase: gateway.metric("gateway_client_disconnects_total", phase=phase)
            for phase in ("queued", "waiting", "streaming")
        }
        assert all(phases.values()), phases
        assert gateway.metric("gateway_requests_total", outcome="ok") + sum(phases.values()) == LEAVERS
        backend.script.clear()
        await check_next_is_served(gateway, backend)
    await until(lambda: asyncio.all_tasks() == tasks)
    await until(lambda: not backend.open_peers)
    assert open_descriptors() == descriptors
