"""Connection pool, on real sockets: reuse of connections, connecting, TLS, and cancellation."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.upstream.connection import READ_BYTES, ConnectionLimits
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.transport_error import TransportError
from tests.fakes.fault_backend import TEXT, FaultBackend
from tests.fakes.running_gateway import PATIENCE, until

pytestmark = pytest.mark.both_loops

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
REQUEST = b'{"model":"served-model"}'
STREAM = b'{"stream":true}'
LIMIT = 1000


@pytest.fixture
async def backend() -> AsyncIterator[FaultBackend]:
    async with FaultBackend("vllm") as backend:
        yield backend


def pool_for(
    backend: FaultBackend,
    *,
    idle_seconds: float = 30,
    connect_timeout: float = 5,
    tls: ssl.SSLContext | None = None,
    **limits: int,
) -> Pool:
    return Pool(
        Origin(backend.host, backend.port, tls),
        connect_timeout=connect_timeout,
        idle_seconds=idle_seconds,
        limits=ConnectionLimits(**limits),
    )


@pytest.fixture
async def pool(backend: FaultBackend) -> AsyncIterator[Pool]:
    pool = pool_for(backend)
    yield pool
    pool.close()
    await until(lambda: pool.open_connections == 0)


def head(pool: Pool) -> bytes:
    return pool.head("POST", "/v1/chat/completions", [("Content-Type", "application/json")])


async def ask(pool: Pool, body: bytes = REQUEST) -> bytes:
    with await pool.request(head(pool), body) as response:
        assert response.status == 200
        return await response.read(10_000_000)


# Reuse


async def test_connection_is_reused(backend: FaultBackend, pool: Pool) -> None:
    for _ in range(5):
        assert TEXT.encode() in await ask(pool)
    assert len(backend.peers) == 1
    assert pool.open_connections == 1


async def test_concurrent_requests_use_a_connection_each(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "brief"
    await asyncio.gather(*(ask(pool) for _ in range(8)))
    assert (len(backend.peers), backend.most_at_once, pool.open_connections) == (8, 8, 8)


async def test_idle_connection_is_closed_in_time_even_without_a_request(backend: FaultBackend) -> None:
    pool = pool_for(backend, idle_seconds=0.05)
    await ask(pool)
    await until(lambda: pool.open_connections == 0)
    await until(lambda: not backend.open_peers)
    await ask(pool)
    assert len(backend.peers) == 2
    pool.close()


async def test_connection_that_was_idle_for_too_long_is_not_used_even_if_its_timer_is_late(
    backend: FaultBackend, pool: Pool
) -> None:
    await ask(pool)
    (connection,) = pool._idle
    connection.idle_since -= 29
    await ask(pool)
    assert len(backend.peers) == 1
    connection.idle_since -= 31
    await ask(pool)
    assert len(backend.peers) == 2


async def test_idle_connection_that_the_server_closes_is_dropped(backend: FaultBackend, pool: Pool) -> None:
    await ask(pool)
    backend.peers[0].transport.close()
    await until(lambda: pool.open_connections == 0)
    assert pool._idle == []
    with await pool.request(head(pool), REQUEST) as response:
        await response.read(LIMIT)
    assert len(backend.peers) == 2


async def test_byte_that_the_busy_loop_has_not_read_yet_never_reaches_the_next_request() -> None:
    """The event loop does not run between the stray bytes and the next request."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        pool = Pool(Origin("127.0.0.1", listener.getsockname()[1]), connect_timeout=1, idle_seconds=5)

        async def answer() -> socket.socket:
            peer, _ = await loop.sock_accept(listener)
            await loop.sock_recv(peer, 65536)
            await loop.sock_sendall(peer, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return peer

        answering = asyncio.create_task(answer())
        assert await ask(pool) == b"ok"
        with await answering as peer:
            kept = pool.acquire()
            assert kept is not None
            pool.release(kept)
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
            assert pool.acquire() is None
        pool.close()


@pytest.mark.parametrize("mode", ["close", "rst"])
async def test_stale_connection_is_replaced_once(backend: FaultBackend, pool: Pool, mode: str) -> None:
    await ask(pool)
    backend.script.append(mode)
    stale: list[None] = []
    with await pool.request(head(pool), REQUEST, lambda: stale.append(None)) as response:
        assert TEXT.encode() in await response.read(LIMIT)
    assert len(stale) == 1
    assert len(backend.requests) == 3
    backend.script.append(mode)
    with await pool.request(head(pool), [REQUEST[:9], REQUEST[9:]]) as response:  # a body in parts is sent whole again
        assert TEXT.encode() in await response.read(LIMIT)
    assert backend.requests[-1] == backend.requests[-2] == backend.requests[-3]
    assert len(backend.requests) == 5
    backend.script.extend([mode, mode, mode])
    with pytest.raises(TransportError) as raised:
        await ask(pool)
    assert (raised.value.fault, raised.value.answered) == ("closed" if mode == "close" else "reset", False)
    assert len(backend.requests) == 7  # one on the kept connection, one on a fresh one


async def test_request_on_a_fresh_connection_that_closes_is_not_sent_again(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "close"
    with pytest.raises(TransportError) as raised:
        await ask(pool)
    assert raised.value.fault == "closed"
    assert len(backend.requests) == 1


async def test_request_that_got_a_byte_of_an_answer_is_not_sent_again(backend: FaultBackend, pool: Pool) -> None:
    await ask(pool)
    backend.mode = "garbage"
    with pytest.raises(TransportError) as raised:
        await ask(pool)
    assert (raised.value.fault, raised.value.answered) == ("protocol", True)
    assert len(backend.requests) == 2


@pytest.mark.parametrize(
    "mode", ["surplus", "truncated", "garbage", "bad_chunk", "killed", "big_header", "many_headers"]
)
@pytest.mark.parametrize("body", [REQUEST, STREAM], ids=["plain", "stream"])
async def test_connection_that_saw_anything_unexpected_is_never_reused(
    backend: FaultBackend, pool: Pool, mode: str, body: bytes
) -> None:
    backend.script.append(mode)
    with suppress(TransportError), await pool.request(head(pool), body) as response:
        async with asyncio.timeout(PATIENCE):
            await response.read(10_000_000)
    await until(lambda: not backend.open_peers)
    assert pool.open_connections == 0
    assert TEXT.encode() in await ask(pool)
    assert len(backend.peers) == 2


async def test_stop_ends_the_stream_and_keeps_the_connection_if_only_the_end_follows(
    backend: FaultBackend, pool: Pool
) -> None:
    with await pool.request(head(pool), STREAM) as response:
        await response.stream(lambda piece: response.stop() if b"[DONE]" in piece else None)
    await until(lambda: len(pool._idle) == 1)
    await ask(pool)
    assert len(backend.peers) == 1


async def test_paused_connection_holds_the_server_back(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "flood"
    size = 0

    def take(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        response.pause()

    with await pool.request(head(pool), STREAM) as response:
        streaming = asyncio.create_task(response.stream(take))
        await until(lambda: size > 0)
        for _ in range(10):
            taken = size
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert size - taken <= READ_BYTES
            response.resume()
            await until(lambda taken=taken: size > taken)  # type: ignore[misc]  # bound in the loop
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)


# Connecting


async def test_refused_connection_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        pool = Pool(Origin("127.0.0.1", taken.getsockname()[1]), connect_timeout=1, idle_seconds=1)
        with pytest.raises(TransportError) as raised:
            await ask(pool)
    assert (raised.value.fault, pool.open_connections) == ("connect", 0)


async def test_connecting_is_given_up_after_its_timeout() -> None:
    """Here the TLS handshake gets no answer. A lost SYN looks the same."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = Pool(
            Origin("127.0.0.1", server.getsockname()[1], ssl.create_default_context()),
            connect_timeout=0.1,
            idle_seconds=1,
        )
        with pytest.raises(TransportError) as raised:
            async with asyncio.timeout(PATIENCE):
                await ask(pool)
    assert raised.value.fault == "connect_timeout"
    await until(lambda: pool.open_connections == 0)


@pytest.fixture
async def secure_backend() -> AsyncIterator[FaultBackend]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    async with FaultBackend("vllm", tls=context) as backend:
        yield backend


async def test_tls_connection_works_and_is_kept(secure_backend: FaultBackend) -> None:
    pool = pool_for(secure_backend, tls=ssl.create_default_context(cafile=PEM))
    for body in (REQUEST, STREAM, REQUEST):
        assert b"Hello" in await ask(pool, body)
    assert len(secure_backend.peers) == 1
    pool.close()
    await until(lambda: pool.open_connections == 0)
    await until(lambda: not secure_backend.open_peers)


async def test_untrusted_certificate_is_refused(secure_backend: FaultBackend) -> None:
    pool = pool_for(secure_backend, tls=ssl.create_default_context())
    with pytest.raises(TransportError) as raised:
        await ask(pool)
    assert (raised.value.fault, secure_backend.requests) == ("connect", [])
    await until(lambda: pool.open_connections == 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_ipv6_works() -> None:
    try:
        backend = await FaultBackend("vllm", host="::1").__aenter__()
    except OSError:
        pytest.skip("no IPv6 on loopback")
    try:
        pool = pool_for(backend)
        assert TEXT.encode() in await ask(pool)
        assert f"Host: [::1]:{backend.port}\r\n".encode() in backend.requests[0]
        pool.close()
        await until(lambda: pool.open_connections == 0)
    finally:
        await backend.__aexit__()


def test_authority_has_the_port_only_if_it_is_not_the_default() -> None:
    tls = ssl.create_default_context()
    origins = Origin("h", 80), Origin("h", 443, tls), Origin("::1", 8000), Origin("h", 80, tls)
    assert [origin.authority for origin in origins] == ["h", "h", "[::1]:8000", "h:80"]


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "é", "a\x00"], ids=["CRLF", "LF", "not ASCII", "NUL"])
async def test_header_that_could_become_two_is_refused(value: str) -> None:
    pool = Pool(Origin("backend", 80), connect_timeout=1, idle_seconds=30)
    with pytest.raises(ValueError, match="cannot be sent"):
        pool.head("POST", "/", [("X", value)])


# Cancelling and closing

CANCEL_STEPS = 40
"""Number of loop iterations after each of which an exchange is cancelled: more than one takes."""


@pytest.mark.parametrize("mode", ["healthy", "silent", "stall", "flood", "close", "stale"])
@pytest.mark.parametrize("body", [REQUEST, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("is_warm", [True, False], ids=["kept", "fresh"])
async def test_cancelling_at_any_moment_leaves_nothing_behind(
    backend: FaultBackend, mode: str, body: bytes, is_warm: bool
) -> None:
    tasks = asyncio.all_tasks()
    pool = pool_for(backend)

    async def exchange() -> None:
        with await pool.request(head(pool), body) as response:
            await response.stream(lambda piece: None)

    for steps in range(CANCEL_STEPS):
        if is_warm:
            backend.mode = "healthy"
            await ask(pool)
        backend.mode = mode
        task = asyncio.create_task(exchange())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError, TransportError):
            await task
        await until(lambda: pool.open_connections == len(pool._idle))
    pool.close()
    await until(lambda: pool.open_connections == 0)
    await until(lambda: not backend.open_peers and not backend._open)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_cancelling_during_the_tls_handshake_leaves_nothing_behind(secure_backend: FaultBackend) -> None:
    tasks = asyncio.all_tasks()
    context = ssl.create_default_context(cafile=PEM)
    for steps in range(CANCEL_STEPS):
        pool = pool_for(secure_backend, tls=context)
        task = asyncio.create_task(ask(pool))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        pool.close()
        await until(lambda: pool.open_connections == 0)  # noqa: B023  # awaited in the loop
    await until(lambda: not secure_backend._open)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_closing_the_pool_ends_running_exchanges(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "stall"
    task = asyncio.create_task(ask(pool, STREAM))
    await until(lambda: len(backend.requests) == 1)
    pool.close()
    with pytest.raises(TransportError):
        await task
    await until(lambda: not backend.open_peers)
