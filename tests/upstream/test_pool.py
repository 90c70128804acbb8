"""Connections to one server: what they read however the bytes are cut, when they are kept, and that nothing is left of one that is given up."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.upstream import connection as connection_module
from gateway.upstream.connection import READ_BYTES, Connection, ConnectionLimits, WireError
from gateway.upstream.pool import Origin, Pool
from tests.fakes.fault_backend import TEXT, FaultBackend
from tests.fakes.running_gateway import until

pytestmark = pytest.mark.both_loops

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
REQUEST = b'{"model":"served-model"}'
STREAM = b'{"stream":true}'
LIMIT = 1000
UNREAD = 4000


class FakeTransport(asyncio.Transport):
    """Takes what is written and passes on what the test feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = socket.socketpair()
        self.written = b""
        self.is_paused = False
        self.connection: Connection | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.ends[0] if name == "socket" else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.connection is None

    def pause_reading(self) -> None:
        assert not self.is_paused
        self.is_paused = True

    def resume_reading(self) -> None:
        assert self.is_paused
        self.is_paused = False

    def abort(self) -> None:
        self.lose(None)

    def lose(self, exc: Exception | None) -> None:
        connection, self.connection = self.connection, None
        for end in self.ends:
            end.close()
        if connection is not None:
            asyncio.get_running_loop().call_soon(connection.connection_lost, exc)


class FakePool(Pool):
    """A pool whose connections lead to a `FakeTransport`, the newest in `transport`."""

    def __init__(self, bounds: ConnectionLimits | None = None) -> None:
        super().__init__(Origin("backend", 80), connect_timeout=1, idle_seconds=30, bounds=bounds)
        self.made = 0

    async def connect(self, connect_timeout: float | None = None) -> Connection:
        self.made += 1
        self.transport = FakeTransport()
        connection = Connection(self, asyncio.get_running_loop(), self._limits)
        self.transport.connection = connection
        connection.connection_made(self.transport)
        return connection

    def feed(self, data: bytes) -> None:
        """As one read of the socket, or several where it is too much for one."""
        for start in range(0, len(data), READ_BYTES):
            part = data[start : start + READ_BYTES]
            if self.transport.connection is not None:
                self.transport.connection.get_buffer(-1)[: len(part)] = part
                self.transport.connection.buffer_updated(len(part))

    def ask(self) -> Any:
        return self.request(self.head("POST", "/", []), REQUEST)


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
KEPT, CLOSED = True, False
# What comes from the server, and what the caller gets: status, body and whether the connection is kept; or the fault, after which piece of the body.
ANSWERS = {
    "with a length": (OK + b"Content-Length: 5\r\n\r\nhello", (200, b"hello", KEPT)),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", (200, b"", KEPT)),
    "in chunks": (CHUNKED + chunked(b"hel", b"lo"), (200, b"hello", KEPT)),
    "in chunks of lines": (CHUNKED + chunked(b"a\n\n", b"b\n\n", b"\r\n"), (200, b"a\n\nb\n\n\r\n", KEPT)),
    "with chunk extensions and trailers": (CHUNKED + b"5;a=b\r\nhello\r\n0\r\nX-T: 1\r\n\r\n", (200, b"hello", KEPT)),
    "after informational ones": (b"HTTP/1.1 102 P\r\nA: b\r\n\r\n" * 3 + OK + b"Content-Length: 5\r\n\r\nhello", (200, b"hello", KEPT)),
    "until the end of the connection": (OK + b"\r\nhello", (200, b"hello", CLOSED)),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello", CLOSED)),
    "that closes": (OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello", CLOSED)),
    "without a body": (b"HTTP/1.1 204 No\r\n\r\n", (204, b"", KEPT)),
    "without a body but with bytes behind": (b"HTTP/1.1 204 No\r\n\r\nhello", (204, b"", CLOSED)),
    "with a byte too many": (OK + b"Content-Length: 5\r\n\r\nhello!", (200, b"hello", CLOSED)),
    "in chunks with a byte too many": (CHUNKED + chunked(b"hello") + b"!", (200, b"hello", CLOSED)),
    "twice": ((OK + b"Content-Length: 5\r\n\r\nhello") * 2, (200, b"hello", CLOSED)),
    "too short": (OK + b"Content-Length: 6\r\n\r\nhello", ("truncated", b"hello")),
    "in chunks without an end": (CHUNKED + chunked(b"hello")[:-5], ("truncated", b"hello")),
    "with a bad chunk size": (CHUNKED + chunked(b"hello")[:-5] + b"zz\r\n", ("protocol", b"hello")),
    "with a length of 5,000 digits": (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhello", ("protocol", b"")),
    "with a length of 5,000 zeros": (OK + b"Content-Length: " + b"0" * 5000 + b"5\r\n\r\nhello", (200, b"hello", KEPT)),
    "with a signed length": (OK + b"Content-Length: +5\r\n\r\nhello", ("protocol", b"")),
    "with a negative length": (OK + b"Content-Length: -5\r\n\r\nhello", ("protocol", b"")),
    "with an underscore in its length": (OK + b"Content-Length: 0_5\r\n\r\nhello", ("protocol", b"")),
    "with a chunk size of 5,000 digits": (CHUNKED + b"f" * 5000 + b"\r\nhello", ("protocol", b"")),
    "with a negative chunk size": (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", ("protocol", b"")),
    "with a status of 5,000 digits": (b"HTTP/1.1 " + b"2" * 5000 + b" OK\r\n\r\n", ("protocol", b"")),
    "with a negative status": (b"HTTP/1.1 -200 OK\r\n\r\n", ("protocol", b"")),
    "cut in its head": (OK + b"Content-Le", ("closed", b"")),
    "that is none": (b"\x00\xffhello\r\n\r\n", ("protocol", b"")),
    "with two lengths": (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", ("protocol", b"")),
    "with a length and chunks": (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"hello"), ("protocol", b"")),
    "that changes the protocol": (b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nPRI", ("protocol", b"")),
}  # fmt: skip


async def read_whole(connection: Connection, pieces: list[bytes]) -> None:
    pieces.append(await connection.read(LIMIT))


async def read_pieces(connection: Connection, pieces: list[bytes]) -> None:
    await connection.stream(pieces.append)


async def outcome(reader: Callable[[Connection, list[bytes]], Awaitable[None]], *reads: bytes) -> tuple[Any, ...]:
    """What an exchange comes to whose answer arrives in these reads, followed by the server's end."""
    pool = FakePool()
    pieces: list[bytes] = []

    async def exchange() -> int:
        with await pool.ask() as connection:
            await reader(connection, pieces)
            return int(connection.status)

    task = asyncio.create_task(exchange())
    await turn()
    for data in reads:
        pool.feed(data)
        await turn()
    if not task.done():
        pool.transport.lose(None)
    try:
        status = await task
    except WireError as error:
        await turn()
        assert pool.open_connections == 0
        return error.fault, b"".join(pieces)
    await turn()
    is_kept = pool.open_connections == 1 and pool.acquire() is not None
    pool.close()
    await turn()
    assert pool.open_connections == 0
    return status, b"".join(pieces), is_kept


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answer_is_read_the_same_wherever_its_bytes_are_cut(answer: str) -> None:
    raw, expected = ANSWERS[answer]
    for reader in (read_pieces, read_whole):
        wanted = (expected[0], b"") if reader is read_whole and len(expected) == 2 else expected
        assert await outcome(reader, raw) == wanted
        assert await outcome(reader, *(raw[index : index + 1] for index in range(len(raw)))) == wanted
        for cut in range(1, len(raw)):
            got = await outcome(reader, raw[:cut], raw[cut:])
            assert got == wanted, f"cut after {raw[:cut]!r}"


NASTY = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"a\n", b"1", b"3\r\n", b"0\r\n", b"\n\n", b"data: x\n\n", b"b" * 300]),
    min_size=1,
    max_size=4,
)
BETWEEN = st.sampled_from(
    [
        b"",
        b"",
        b"",
        b"",
        b"1\r\naXX",
        b"1\r\n\n\r\n",
        b"0\r\n\r\n",
        b"01\r\na\r\n",
        b"1;a=b\r\na\r\n",
        b"2\r\na\n\n\r\n",
        b"\r\n",
        b"!",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(NASTY.map(b"".join), BETWEEN), min_size=1, max_size=8),
    st.lists(st.integers(0, 400), max_size=2),
    st.booleans(),
)
def test_chunks_that_pass_the_parser_by_are_read_as_it_reads_them(
    pieces: list[tuple[bytes, bytes]], cuts: list[int], is_whole: bool
) -> None:
    """Each chunk is a read of its own, as servers send tokens, but where it is cut."""
    whole = [OK + b"Transfer-Encoding: chunked\r\n\r\n"]
    whole += [read for piece, between in pieces for read in (b"%x\r\n%b\r\n" % (len(piece), piece), between) if read]
    reads = whole + [b"0\r\n\r\n"] * is_whole
    for cut in cuts:
        index = cut % len(reads)
        reads[index : index + 1] = [part for part in (reads[index][:cut], reads[index][cut:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        got = asyncio.run(outcome(read_pieces, *reads))
        patch.setattr(connection_module, "_SIZE_LINES", {})
        assert asyncio.run(outcome(read_pieces, *reads)) == got


async def test_chunk_within_a_chunk_is_text() -> None:
    reads = CHUNKED, b"a\r\nx\n\r\n", b"1\r\na\r\n", b"\r\n0\r\n\r\n"
    assert await outcome(read_pieces, *reads) == (200, b"x\n\r\n1\r\na\r\n", KEPT)


# The pool, against real sockets


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
    **bounds: int,
) -> Pool:
    return Pool(
        Origin(backend.host, backend.port, tls),
        connect_timeout=connect_timeout,
        idle_seconds=idle_seconds,
        bounds=ConnectionLimits(**bounds),
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


async def test_connection_is_used_again(backend: FaultBackend, pool: Pool) -> None:
    for _ in range(5):
        assert TEXT.encode() in await ask(pool)
    assert len(backend.peers) == 1
    assert pool.open_connections == 1


async def test_requests_at_the_same_time_have_a_connection_each(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "brief"
    await asyncio.gather(*(ask(pool) for _ in range(8)))
    assert (len(backend.peers), backend.most_at_once, pool.open_connections) == (8, 8, 8)


async def test_idle_connection_is_closed_in_time_without_a_request(backend: FaultBackend) -> None:
    pool = pool_for(backend, idle_seconds=0.05)
    await ask(pool)
    await until(lambda: pool.open_connections == 0, patience=0.5)
    await until(lambda: not backend.open_peers)
    await ask(pool)
    assert len(backend.peers) == 2
    pool.close()


async def test_idle_connection_that_the_server_closes_is_forgotten(backend: FaultBackend, pool: Pool) -> None:
    await ask(pool)
    backend.peers[0].transport.close()
    await until(lambda: pool.open_connections == 0)
    with await pool.request(head(pool), REQUEST) as response:
        await response.read(LIMIT)
    assert len(backend.peers) == 2


async def test_byte_that_the_busy_loop_has_not_read_yet_never_reaches_the_next_request() -> None:
    """The loop gets no turn between the stray bytes and the next request."""
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
    backend.script.extend([mode, mode, mode])
    with pytest.raises(WireError) as raised:
        await ask(pool)
    assert (raised.value.fault, raised.value.answered) == ("closed" if mode == "close" else "reset", False)
    assert len(backend.requests) == 5  # the kept one and a fresh one


async def test_fresh_connection_that_closes_is_not_tried_again(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "close"
    with pytest.raises(WireError) as raised:
        await ask(pool)
    assert raised.value.fault == "closed"
    assert len(backend.requests) == 1


async def test_connection_that_has_answered_a_byte_is_not_tried_again(backend: FaultBackend, pool: Pool) -> None:
    await ask(pool)
    backend.mode = "garbage"
    with pytest.raises(WireError) as raised:
        await ask(pool)
    assert (raised.value.fault, raised.value.answered) == ("protocol", True)
    assert len(backend.requests) == 2


@pytest.mark.parametrize(
    "mode", ["surplus", "truncated", "garbage", "bad_chunk", "killed", "big_header", "many_headers"]
)
@pytest.mark.parametrize("body", [REQUEST, STREAM], ids=["plain", "stream"])
async def test_connection_that_saw_anything_unexpected_is_never_used_again(
    backend: FaultBackend, pool: Pool, mode: str, body: bytes
) -> None:
    backend.script.append(mode)
    with suppress(WireError), await pool.request(head(pool), body) as response:
        async with asyncio.timeout(0.2):
            await response.read(10_000_000)
    await until(lambda: not backend.open_peers)
    assert pool.open_connections == 0
    assert TEXT.encode() in await ask(pool)
    assert len(backend.peers) == 2


async def test_byte_on_an_idle_connection_closes_it() -> None:
    pool = FakePool()
    task = asyncio.create_task(exchange_once(pool))
    await turn()
    pool.feed(OK + b"Content-Length: 0\r\n\r\n")
    await task
    assert pool.open_connections == 1
    pool.feed(b"!")
    await turn()
    assert pool.open_connections == 0
    assert pool.acquire() is None


async def exchange_once(pool: FakePool) -> bytes:
    with await pool.ask() as response:
        return bytes(await response.read(LIMIT))


async def test_informational_answers_without_end_are_not_read_on() -> None:
    pool = FakePool(ConnectionLimits(informational=10))
    task = asyncio.create_task(exchange_once(pool))
    await turn()
    pool.feed(b"HTTP/1.1 102 Processing\r\n\r\n" * 11)
    await turn()
    assert pool.transport.is_paused
    assert not task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await turn()
    assert pool.open_connections == 0


# Bounds and back-pressure


@pytest.mark.parametrize(
    "raw",
    [
        OK + b"A: " + b"b" * 3000 + b"\r\n\r\n",
        OK + b"A: b\r\n" * 30 + b"\r\n",
        b"HTTP/1.1 200 " + b"O" * 3000,
        OK + b"A" * 3000,
    ],
    ids=["one header", "many headers", "status line", "name"],
)
async def test_head_is_bounded(raw: bytes) -> None:
    pool = FakePool(ConnectionLimits(head=2000, headers=20))
    task = asyncio.create_task(exchange_once(pool))
    await turn()
    for start in range(0, len(raw), 500):
        pool.feed(raw[start : start + 500])
    pool.feed(b"Content-Length: 0\r\n\r\n")
    with pytest.raises(WireError) as raised:
        await task
    assert raised.value.fault == "protocol"
    await turn()
    assert pool.open_connections == 0


@pytest.mark.parametrize("is_read", [True, False], ids=["whole body", "stream"])
@pytest.mark.parametrize(
    "start",
    [b"0\r\nX-T: ", b"0\r\n" + b"A: b\r\n" * 10, b"0\r\nX", b"5;a="],
    ids=["value", "lines", "name", "extension"],
)
async def test_trailer_or_chunk_extension_without_end_is_not_read_on(start: bytes, is_read: bool) -> None:
    """The parser would collect a trailer in memory for as long as the backend sends it."""
    pool = FakePool(ConnectionLimits(head=2000))

    async def exchange() -> None:
        with await pool.ask() as response:
            if is_read:
                await response.read(LIMIT)
            else:
                await response.stream(lambda piece: None)

    task = asyncio.create_task(exchange())
    await turn()
    pool.feed(CHUNKED + b"5\r\nhello\r\n" + start)
    await turn()
    fed = 0
    while not task.done():
        pool.feed(b"A: bbbbb\r\n" * 50 if b"\n" in start[3:] else b"x" * 500)
        fed += 500
        await turn()
        assert fed < 4000
    with pytest.raises(WireError) as raised:
        await task
    assert raised.value.fault == "protocol"
    await turn()
    assert pool.open_connections == 0


async def test_body_of_many_reads_may_have_small_trailers_and_extensions() -> None:
    pool = FakePool(ConnectionLimits(head=2000))
    task = asyncio.create_task(exchange_once(pool))
    await turn()
    pool.feed(CHUNKED)
    for _ in range(10):
        pool.feed(b"5;" + b"a" * 900)
        pool.feed(b"\r\nhello\r\n")
        await turn()
    pool.feed(b"0\r\n")
    pool.feed(b"X-T: " + b"b" * 1000 + b"\r\n\r\n")
    assert await task == b"hello" * 10
    pool.close()


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
@pytest.mark.parametrize("is_one_read", [True, False])
async def test_whole_body_is_bounded(size: int, is_one_read: bool) -> None:
    pool = FakePool()
    task = asyncio.create_task(exchange_once(pool))
    await turn()
    answer = OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    for part in [answer] if is_one_read else [answer[:100], answer[100:]]:
        pool.feed(part)
        await turn()
    if size == LIMIT:
        assert len(await task) == size
        pool.close()
        return
    with pytest.raises(WireError) as raised:
        await task
    assert raised.value.fault == "too_large"


async def test_body_that_nobody_reads_pauses_the_socket() -> None:
    pool = FakePool(ConnectionLimits(unread=UNREAD))
    pieces: list[bytes] = []
    task = asyncio.create_task(pool.ask())
    await turn()
    pool.feed(CHUNKED)
    response = await task
    pool.feed(b"1000\r\n" + b"x" * UNREAD)
    assert not pool.transport.is_paused
    pool.feed(b"x")
    assert pool.transport.is_paused
    pumping = asyncio.create_task(response.stream(pieces.append))
    await turn()
    assert not pool.transport.is_paused
    assert len(b"".join(pieces)) == UNREAD + 1
    pumping.cancel()
    response.abort()
    await asyncio.gather(pumping, return_exceptions=True)


async def test_caller_that_cannot_take_more_pauses_the_socket() -> None:
    """Also one that says so within the very first piece, and before it reads at all."""
    pool = FakePool()
    task = asyncio.create_task(pool.ask())
    await turn()
    pool.feed(CHUNKED + b"5\r\nhello\r\n")
    response = await task
    response.pause()
    assert pool.transport.is_paused
    pumping = asyncio.create_task(response.stream(lambda piece: None))
    await turn()
    assert pool.transport.is_paused
    response.resume()
    assert not pool.transport.is_paused
    pumping.cancel()
    response.abort()
    await asyncio.gather(pumping, return_exceptions=True)

    task = asyncio.create_task(pool.ask())
    await turn()
    pool.feed(CHUNKED + b"5\r\nhello\r\n")
    response = await task
    pumping = asyncio.create_task(response.stream(lambda piece: response.pause()))
    await turn()
    assert pool.transport.is_paused
    pumping.cancel()
    response.abort()
    await asyncio.gather(pumping, return_exceptions=True)


async def test_paused_reader_holds_the_server_back(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "flood"
    size = 0

    def take(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        response.pause()

    with await pool.request(head(pool), STREAM) as response:
        pumping = asyncio.create_task(response.stream(take))
        await until(lambda: size > 0)
        for _ in range(10):
            taken = size
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert size - taken <= READ_BYTES
            response.resume()
            await until(lambda taken=taken: size > taken)  # type: ignore[misc]  # the loop's own
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


async def test_what_the_caller_raises_over_a_piece_is_raised_to_it() -> None:
    """Even when the whole answer came with its head."""

    def refuse(piece: bytes) -> None:
        raise ValueError("no")

    pool = FakePool()

    async def exchange() -> None:
        with await pool.ask() as response:
            await response.stream(refuse)

    task = asyncio.create_task(exchange())
    await turn()
    pool.feed(OK + b"Content-Length: 5\r\n\r\nhello")
    with pytest.raises(ValueError, match="no"):
        await task
    await turn()
    assert pool.open_connections == 0


async def test_stop_ends_the_pump_and_keeps_the_connection_if_only_the_end_follows(
    backend: FaultBackend, pool: Pool
) -> None:
    with await pool.request(head(pool), STREAM) as response:
        await response.stream(lambda piece: response.stop() if b"[DONE]" in piece else None)
    await until(lambda: len(pool._idle) == 1)
    await ask(pool)
    assert len(backend.peers) == 1


# Connecting


async def test_refused_connection_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        pool = Pool(Origin("127.0.0.1", taken.getsockname()[1]), connect_timeout=1, idle_seconds=1)
        with pytest.raises(WireError) as raised:
            await ask(pool)
    assert (raised.value.fault, pool.open_connections) == ("connect", 0)


async def test_connection_that_does_not_come_about_is_given_up_in_time() -> None:
    """Here the handshake of TLS gets no answer; a lost SYN looks the same."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = Pool(
            Origin("127.0.0.1", server.getsockname()[1], ssl.create_default_context()),
            connect_timeout=0.1,
            idle_seconds=1,
        )
        begun = asyncio.get_running_loop().time()
        with pytest.raises(WireError) as raised:
            await ask(pool)
        assert asyncio.get_running_loop().time() - begun <= 0.5
    assert raised.value.fault == "connect_timeout"
    await until(lambda: pool.open_connections == 0)


@pytest.fixture
async def secure_backend() -> AsyncIterator[FaultBackend]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    async with FaultBackend("vllm", tls=context) as backend:
        yield backend


async def test_tls_is_spoken_and_the_connection_kept(secure_backend: FaultBackend) -> None:
    pool = pool_for(secure_backend, tls=ssl.create_default_context(cafile=PEM))
    for body in (REQUEST, STREAM, REQUEST):
        assert b"Hello" in await ask(pool, body)
    assert len(secure_backend.peers) == 1
    pool.close()
    await until(lambda: pool.open_connections == 0)
    await until(lambda: not secure_backend.open_peers)


async def test_certificate_that_nobody_vouches_for_is_refused(secure_backend: FaultBackend) -> None:
    pool = pool_for(secure_backend, tls=ssl.create_default_context())
    with pytest.raises(WireError) as raised:
        await ask(pool)
    assert (raised.value.fault, secure_backend.requests) == ("connect", [])
    await until(lambda: pool.open_connections == 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_ipv6_is_spoken() -> None:
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


def test_authority_names_the_port_only_where_it_is_not_the_schemes_own() -> None:
    tls = ssl.create_default_context()
    assert [Origin("h", 80).authority, Origin("h", 443, tls).authority, Origin("::1", 8000).authority, Origin("h", 80, tls).authority] == [
        "h", "h", "[::1]:8000", "h:80",
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "é", "a\x00"])
async def test_header_that_could_become_two_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        FakePool().head("POST", "/", [("X", value)])


# Giving up

MOMENTS = 40
"""Turns of the loop after which an exchange is cancelled, one after the other: more than a whole one takes."""


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

    for turns in range(MOMENTS):
        if is_warm:
            backend.mode = "healthy"
            await ask(pool)
        backend.mode = mode
        task = asyncio.create_task(exchange())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError, WireError):
            await task
        await until(lambda: pool.open_connections == len(pool._idle))
    pool.close()
    await until(lambda: pool.open_connections == 0)
    await until(lambda: not backend.open_peers and not backend._open)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_cancelling_while_tls_is_agreed_on_leaves_nothing_behind(secure_backend: FaultBackend) -> None:
    tasks = asyncio.all_tasks()
    context = ssl.create_default_context(cafile=PEM)
    for turns in range(MOMENTS):
        pool = pool_for(secure_backend, tls=context)
        task = asyncio.create_task(ask(pool))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        pool.close()
        await until(lambda: pool.open_connections == 0)  # noqa: B023  # awaited in the loop
    await until(lambda: not secure_backend._open)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_closing_the_pool_ends_what_runs(backend: FaultBackend, pool: Pool) -> None:
    backend.mode = "stall"
    task = asyncio.create_task(ask(pool, STREAM))
    await until(lambda: len(backend.requests) == 1)
    pool.close()
    with pytest.raises(WireError):
        await task
    await until(lambda: not backend.open_peers)
