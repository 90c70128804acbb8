"""Requests on a server that has vanished end in every phase; those that it still works on do not.

Covers: gateway/upstream/server.py
Covers: gateway/upstream/pool.py
Covers: gateway/upstream/connection.py
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.config import ServerSettings
from gateway.upstream.connection import Connection
from gateway.upstream.liveness import DOUBT_SECONDS, FAILED_PROBES, GONE_SECONDS, RETURN_SECONDS
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.server import WATCH_SECONDS, Server
from gateway.upstream.transport_error import TransportError
from tests.fakes.fault_backend import WORDS, FaultBackend
from tests.fakes.running_gateway import until

pytestmark = pytest.mark.both_loops

STREAM = b'{"stream":true}'
LARGE = bytes(20 * 1024 * 1024)


class Watched:
    """A server, and the clock of the calls that watch it."""

    def __init__(self, host: str, port: int) -> None:
        self.pool = Pool(Origin(host, port), connect_timeout=5, idle_seconds=30)
        head = self.pool.head("POST", "/v1/chat/completions", [])
        self.head = head
        settings = ServerSettings(base_url=f"http://{host}:{port}", models=None)
        self.server = Server("box", settings, self.pool, head, head, str)
        self.time = 1000.0
        self.server.liveness.probe_answered(self.time)

    def watch(self, seconds: float = WATCH_SECONDS) -> int:
        """Let `seconds` pass; return how many requests were ended."""
        ended = 0
        for _ in range(round(seconds / WATCH_SECONDS)):
            self.time += WATCH_SECONDS
            ended += self.server.end_lost_requests(self.time)
        return ended

    def fail_probes(self) -> None:
        for _ in range(FAILED_PROBES):
            self.server.liveness.probe_failed(self.time)

    def answer_probe(self) -> None:
        self.server.liveness.probe_answered(self.time)

    async def ask(self, body: bytes = STREAM) -> bytes:
        with await self.pool.request(self.head, body) as response:
            return await response.read(1_000_000)

    async def begin(self, backend: FaultBackend, body: bytes = STREAM) -> asyncio.Task[bytes]:
        """Send a request, and return its task once the server has it."""
        seen = len(backend.requests)
        task = asyncio.create_task(self.ask(body))
        await until(lambda: len(backend.requests) > seen)
        return task


@asynccontextmanager
async def watched(mode: str = "healthy") -> AsyncIterator[tuple[Watched, FaultBackend]]:
    async with FaultBackend("vllm", mode) as backend:
        server = Watched(backend.host, backend.port)
        try:
            yield server, backend
        finally:
            server.pool.close()
            await until(lambda: server.pool.open_connections == 0)


async def fault_of(task: asyncio.Task[bytes]) -> str:
    with pytest.raises(TransportError) as raised:
        await task
    return raised.value.fault


async def read_all(server: Watched, connection: Connection, size: int) -> None:
    """Wait until `size` bytes of a body are unread, and let the server notice."""
    await until(lambda: connection._unread() >= size)
    server.watch()


@pytest.mark.parametrize("mode", ["silent", "stall"], ids=["waiting for the head", "in the body"])
async def test_request_ends_once_its_server_is_gone(mode: str) -> None:
    async with watched(mode) as (server, backend):
        task = await server.begin(backend)
        await asyncio.sleep(0.02)
        server.watch()
        server.fail_probes()
        assert server.watch(GONE_SECONDS - 1) == 0
        assert server.watch(2) == 1
        assert await fault_of(task) == "unresponsive"
        await until(lambda: not backend.open_peers)


async def test_request_that_is_being_sent_ends_once_its_server_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, and nobody reads
        server = Watched("127.0.0.1", listener.getsockname()[1])
        task = asyncio.create_task(server.ask(LARGE))
        await until(lambda: server.pool.is_waiting)
        await asyncio.sleep(0.1)  # until the buffers of the kernel are full
        server.watch()
        server.fail_probes()
        assert server.watch(GONE_SECONDS + 2) == 1
        assert await fault_of(task) == "unresponsive"
        await until(lambda: server.pool.open_connections == 0)


async def test_slow_upload_is_a_sign_of_life() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        server = Watched("127.0.0.1", listener.getsockname()[1])
        task = asyncio.create_task(server.ask(LARGE))
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        with peer:
            await until(lambda: server.pool.is_waiting)
            server.watch()
            server.fail_probes()
            (connection,) = server.pool._open
            assert connection._transport is not None
            for _ in range(4):
                unsent = connection._transport.get_write_buffer_size()
                while connection._transport.get_write_buffer_size() == unsent:
                    await asyncio.get_running_loop().sock_recv(peer, 1024 * 1024)
                assert server.watch(GONE_SECONDS - 2) == 0
            server.pool.close()
            assert await fault_of(task) in ("closed", "reset")


async def test_bytes_of_one_request_keep_the_others() -> None:
    """A server that works on one of them may have the others in its queue."""
    async with watched("silent") as (server, backend):
        waiting = await server.begin(backend)
        backend.mode = "drip"
        server.watch()
        server.fail_probes()
        for _ in range(5):
            assert server.watch(GONE_SECONDS - 2) == 0
            with await server.pool.request(server.head, STREAM) as response:
                assert response.status == 200
        assert not waiting.done()
        assert server.watch(GONE_SECONDS + 2) == 1
        assert await fault_of(waiting) == "unresponsive"


async def test_answer_to_a_probe_that_failed_is_not_a_sign_of_life() -> None:
    """It may come from a proxy in front of a host that has vanished."""
    async with watched("silent") as (server, backend):
        waiting = await server.begin(backend)
        server.watch()
        server.fail_probes()
        backend.mode = "stall"
        probe = await server.pool.connect()
        probe.is_probe = True
        await probe.send(b"%bContent-Length: %d\r\n\r\n" % (server.head, len(STREAM)), STREAM)
        assert server.watch(GONE_SECONDS + 1) == 1
        assert await fault_of(waiting) == "unresponsive"
        assert probe.is_usable()
        probe.abort()


async def test_answer_that_its_client_does_not_read_is_not_ended() -> None:
    """Nobody can tell whether the server still sends."""
    async with watched("flood") as (server, backend):
        with await server.pool.request(server.head, STREAM) as response:
            response.pause()
            server.watch()
            server.fail_probes()
            assert server.watch(3 * GONE_SECONDS) == 0
            assert response.is_usable()
            response.resume()
            await until(lambda: response.has_arrived)
            assert server.watch(GONE_SECONDS - 2) == 0
        await until(lambda: not backend.open_peers)


async def test_answer_that_began_before_an_outage_and_stays_silent_is_ended_and_no_other() -> None:
    async with watched("stall") as (server, backend):
        begun = await server.begin(backend)
        (connection,) = server.pool._open
        await read_all(server, connection, len(WORDS))
        backend.mode = "silent"
        waiting = await server.begin(backend)
        server.watch()
        server.fail_probes()
        server.watch(10)
        server.answer_probe()
        assert server.watch(RETURN_SECONDS - 1) == 0
        assert server.watch(2) == 1
        assert await fault_of(begun) == "unresponsive"
        assert server.watch(10 * GONE_SECONDS) == 0
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_answer_that_goes_on_after_an_outage_is_not_ended() -> None:
    async with watched("drip") as (server, backend):
        task = asyncio.create_task(server.ask())
        await until(lambda: bool(backend.open_peers))
        (connection,) = server.pool._open
        await read_all(server, connection, 1)
        server.fail_probes()
        server.watch(0)
        server.time += 10
        server.answer_probe()
        await until(lambda: connection.has_arrived)
        assert server.watch(10 * GONE_SECONDS) == 0
        task.cancel()
        await asyncio.wait([task])


async def test_silence_of_all_running_requests_asks_for_a_probe() -> None:
    async with watched("silent") as (server, backend):
        server.watch(DOUBT_SECONDS + 1)
        assert not server.server.doubted.is_set()  # nothing runs
        task = await server.begin(backend)
        server.watch()
        assert server.server.doubted.is_set()
        server.server.doubted.clear()
        server.answer_probe()
        server.watch(DOUBT_SECONDS - 1)
        assert not server.server.doubted.is_set()
        task.cancel()
        await asyncio.wait([task])


async def test_idle_connections_are_closed_and_those_in_use_are_not() -> None:
    async with watched() as (server, backend):
        backend.script.append("silent")
        running = await server.begin(backend)
        await server.ask()
        assert (len(server.pool._open), len(server.pool._idle)) == (2, 1)
        server.pool.close_idle()
        await until(lambda: server.pool.open_connections == 1)
        assert server.pool.acquire() is None
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
