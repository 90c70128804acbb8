"""Happy Eyeballs on real sockets: a server with several addresses, some of which are dead."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway.upstream import connector as module
from gateway.upstream.connection import Connection
from gateway.upstream.connector import Address, Connector, _interleaved
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.resolver import Resolver
from gateway.upstream.transport_error import TransportError
from tests.fakes.fault_backend import TEXT, FaultBackend
from tests.fakes.networks import NAME, names, swallowing
from tests.fakes.running_gateway import open_descriptors, until

pytestmark = [
    pytest.mark.both_loops,
    pytest.mark.skipif(not Path("/proc").exists(), reason="needs the loopback network of Linux"),
]

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
LIVE = "127.0.0.9"
DEAD = "127.0.0.10"
"""Address whose ports only these tests use: one of 127.0.0.1 may be that of another program's client."""
STREAM = b'{"stream":true}'


@asynccontextmanager
async def server_at(*addresses: str, connect_timeout: float = 2.0) -> AsyncIterator[tuple[Pool, FaultBackend]]:
    """Run a server at `LIVE`, and yield it with a pool for a name that has `addresses`."""
    with names(backend=list(addresses)):
        async with FaultBackend("vllm", host=LIVE) as backend:
            pool = Pool(Origin(NAME, backend.port), connect_timeout=connect_timeout, idle_seconds=30)
            try:
                yield pool, backend
            finally:
                pool.close()
                await until(lambda: pool.open_connections == 0)


async def ask(pool: Pool) -> bytes:
    with await pool.request(pool.head("POST", "/v1/chat/completions", []), STREAM) as response:
        return await response.read(1_000_000)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses in the order of the attempts to connect to them."""
    found: list[str] = []
    attempt = Connector._attempt

    async def noted(self: Connector, host: str) -> Connection:
        found.append(host)
        return await attempt(self, host)

    monkeypatch.setattr(Connector, "_attempt", noted)
    return found


async def timed_connect(pool: Pool) -> float:
    """Open and close a connection; return the seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    connection = await pool.connect()
    seconds = loop.time() - began
    assert connection.address == LIVE
    connection.abort()
    return seconds


async def test_request_reaches_the_address_that_answers_although_the_first_swallows_it() -> None:
    async with server_at(DEAD, LIVE) as (pool, backend):
        with swallowing(DEAD, backend.port):
            assert TEXT[:5].encode() in await ask(pool)
            assert f"Host: {NAME}:{backend.port}\r\n".encode() in backend.requests[0]


async def test_address_that_swallows_costs_one_delay_and_then_is_tried_last(attempts: list[str]) -> None:
    async with server_at(DEAD, LIVE) as (pool, backend):
        with swallowing(DEAD, backend.port):
            assert await timed_connect(pool) >= 0.2
            assert attempts == [DEAD, LIVE]
            await timed_connect(pool)
            assert attempts == [DEAD, LIVE, LIVE]


async def test_address_that_was_tried_last_gets_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIED_LAST_SECONDS", 0.0)
    async with server_at(DEAD, LIVE) as (pool, backend):
        with swallowing(DEAD, backend.port):
            for _ in range(2):
                assert await timed_connect(pool) >= 0.2


async def test_address_that_refuses_costs_no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTEMPT_DELAY", 10.0)
    refusing = [f"127.0.1.{number}" for number in range(1, 30)]
    async with server_at(*refusing, LIVE, connect_timeout=600) as (pool, _):
        assert await timed_connect(pool) < 10


async def test_all_of_thirty_addresses_are_tried_in_time(attempts: list[str]) -> None:
    """With the usual delay between them, it would take 7 s."""
    dead = [f"127.0.1.{number}" for number in range(1, 30)]
    async with server_at(*dead, LIVE, connect_timeout=4) as (pool, backend):
        with ExitStack() as stack:
            for host in dead:
                stack.enter_context(swallowing(host, backend.port))
            await timed_connect(pool)
            assert attempts == [*dead, LIVE]


async def test_dead_addresses_together_take_no_longer_than_the_timeout_of_one() -> None:
    dead = [f"127.0.1.{number}" for number in range(1, 30)]
    tasks = asyncio.all_tasks()
    async with server_at(*dead, connect_timeout=1) as (pool, backend):
        with ExitStack() as stack:
            for host in dead:
                stack.enter_context(swallowing(host, backend.port))
            loop = asyncio.get_running_loop()
            began, files = loop.time(), open_descriptors()
            with pytest.raises(TransportError) as raised:
                await ask(pool)
            assert raised.value.fault == "connect_timeout"
            assert loop.time() - began < 15  # one after the other would take 29 s
            await until(lambda: asyncio.all_tasks() == tasks)
            await until(lambda: open_descriptors() == files)


async def test_addresses_that_refuse_are_an_error_at_once() -> None:
    async with server_at("127.0.1.1", "127.0.1.2", "::1") as (pool, _):
        with pytest.raises(TransportError) as raised:
            await ask(pool)
        assert raised.value.fault == "connect"
        assert isinstance(raised.value.__cause__, ConnectionRefusedError)


async def test_name_without_an_address_is_an_error_at_once() -> None:
    async with server_at() as (pool, _):
        with pytest.raises(TransportError) as raised:
            await ask(pool)
        assert raised.value.fault == "connect"
        assert isinstance(raised.value.__cause__, socket.gaierror)


async def test_resolver_that_hangs_is_the_stated_cause_of_the_timeout() -> None:
    with names(backend=[LIVE]) as dns:
        dns.answers.clear()
        pool = Pool(Origin(NAME, 1), connect_timeout=0.05, idle_seconds=30)
        with pytest.raises(TransportError) as raised:
            await pool.connect()
        assert raised.value.fault == "connect_timeout"
        assert isinstance(raised.value.__cause__, socket.gaierror)


class _Resetting(asyncio.Protocol):
    """Resets its connection when a byte arrives on it."""

    def __init__(self, accepted: list[object]) -> None:
        self._accepted = accepted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accepted.append(transport)
        self._socket = transport.get_extra_info("socket")
        self._abort = transport.abort  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self._abort()


@asynccontextmanager
async def resetting(host: str, port: int) -> AsyncIterator[list[object]]:
    """Accept connections at `host` and reset each one when its first bytes arrive."""
    accepted: list[object] = []
    server = await asyncio.get_running_loop().create_server(lambda: _Resetting(accepted), host, port)
    async with server:
        yield accepted


async def test_address_that_resets_its_connections_is_tried_last_by_the_next_request() -> None:
    async with server_at(DEAD, LIVE) as (pool, backend), resetting(DEAD, backend.port) as accepted:
        with pytest.raises(TransportError) as raised:
            await ask(pool)
        assert raised.value.fault in ("reset", "closed")
        for _ in range(3):
            assert TEXT[:5].encode() in await ask(pool)
        assert len(accepted) == 1


async def test_address_that_resets_the_tls_handshake_is_passed_over() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    trusting = ssl.create_default_context(cafile=PEM)
    trusting.check_hostname = False  # the certificate is for 127.0.0.1
    with names(backend=[DEAD, LIVE]):
        async with FaultBackend("vllm", host=LIVE, tls=context) as backend:
            pool = Pool(Origin(NAME, backend.port, trusting), connect_timeout=2, idle_seconds=30)
            async with resetting(DEAD, backend.port):
                assert TEXT[:5].encode() in await ask(pool)
            pool.close()
            await until(lambda: pool.open_connections == 0)


async def test_host_name_and_not_the_address_is_checked_in_a_certificate() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    with names(backend=["127.0.0.1"]):
        async with FaultBackend("vllm", tls=context) as backend:
            pool = Pool(
                Origin(NAME, backend.port, ssl.create_default_context(cafile=PEM)), connect_timeout=2, idle_seconds=30
            )
            with pytest.raises(TransportError) as raised:
                await ask(pool)
            assert f"'{NAME}'" in str(raised.value.__cause__)


@pytest.mark.parametrize("step", range(0, 40, 3))
async def test_client_that_leaves_while_connecting_leaves_nothing_behind(step: int) -> None:
    tasks = asyncio.all_tasks()
    async with server_at(DEAD, "127.0.1.1", LIVE) as (pool, backend):
        with swallowing(DEAD, backend.port), swallowing("127.0.1.1", backend.port):
            files = open_descriptors()
            task = asyncio.create_task(ask(pool))
            for _ in range(step):
                await asyncio.sleep(0)
            if step > 30:
                await until(lambda: len(asyncio.all_tasks() - tasks) >= 3)  # more than one attempt runs
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await until(lambda: asyncio.all_tasks() == tasks)
            await until(lambda: pool.open_connections == 0)
            await until(lambda: not backend.open_peers)
            await until(lambda: open_descriptors() <= files)


async def test_attempts_that_complete_together_leave_one_connection() -> None:
    async with FaultBackend("vllm", host="127.0.0.8") as one, server_at("127.0.0.8", LIVE) as (pool, backend):
        pool._connector._port = one.port
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "ATTEMPT_DELAY", 0.0)
            patch.setattr(module, "SHORTEST_DELAY", 0.0)
            for _ in range(20):
                (await pool.connect()).abort()
                await until(lambda: pool.open_connections == 0)
        await until(lambda: not one.open_peers and not backend.open_peers)


def test_families_take_turns() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    addresses = [Address(six, "a"), Address(six, "b"), Address(six, "c"), Address(four, "d"), Address(four, "e")]
    assert [address.host for address in _interleaved(addresses)] == ["a", "d", "b", "e", "c"]


async def test_connection_to_an_address_that_the_name_has_lost_is_retired() -> None:
    with names(backend=["127.0.0.1"]) as dns:
        async with FaultBackend("vllm") as old, FaultBackend("vllm", host=LIVE) as new:
            pool = Pool(Origin(NAME, old.port), connect_timeout=2, idle_seconds=30)
            busy = await pool.request(pool.head("POST", "/v1/chat/completions", []), STREAM)
            await ask(pool)
            assert (len(pool._open), len(pool._idle)) == (2, 1)
            dns.addresses[NAME] = [LIVE]
            pool._connector._port = new.port
            resolver: Resolver = pool._connector._resolver
            resolver._current_until = 0.0
            await ask(pool)  # it still uses the kept connection: nobody has looked yet
            assert len(old.requests) == 3
            (await pool.connect()).abort()
            await ask(pool)
            assert (len(old.requests), len(new.requests)) == (3, 1)
            assert TEXT[:5].encode() in await busy.read(1_000_000)  # the answer that runs is finished
            busy.release()
            await until(lambda: not old.open_peers)
            pool.close()
            await until(lambda: pool.open_connections == 0)
