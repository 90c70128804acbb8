"""Connections: what they read however the bytes are split, and the limits of what they keep."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.upstream import connection as connection_module
from gateway.upstream.connection import READ_BYTES, Connection, ConnectionLimits
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.transport_error import TransportError
from tests.fakes.running_gateway import until

pytestmark = pytest.mark.both_loops

REQUEST = b'{"model":"served-model"}'
LIMIT = 1000
UNREAD = 4000


class FakeTransport(asyncio.Transport):
    """Transport that records what is written and passes on what the test feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = socket.socketpair()
        self.written = b""
        self.is_paused = False
        self.unsent = 0
        self.connection: Connection | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.ends[0] if name == "socket" else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

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
    """Pool whose connections use a `FakeTransport`; `transport` is the newest one."""

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        super().__init__(Origin("backend", 80), connect_timeout=1, idle_seconds=30, limits=limits)
        self.made = 0

    async def connect(self, connect_timeout: float | None = None) -> Connection:
        self.made += 1
        self.transport = FakeTransport()
        connection = Connection(self, asyncio.get_running_loop(), self._limits)
        self.transport.connection = connection
        connection.connection_made(self.transport)
        return connection

    def feed(self, data: bytes) -> None:
        """Deliver `data` as one read of the socket, or as several if it is too long for one."""
        for start in range(0, len(data), READ_BYTES):
            part = data[start : start + READ_BYTES]
            if self.transport.connection is not None:
                self.transport.connection.get_buffer(-1)[: len(part)] = part
                self.transport.connection.buffer_updated(len(part))

    def ask(self) -> Any:
        return self.request(self.head("POST", "/", []), REQUEST)


async def run_loop() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
INFORMATIONAL = b"HTTP/1.1 102 P\r\nA: b\r\n\r\n"
KEPT, CLOSED = True, False
# Bytes from the server, and what the caller gets: status, body and whether the connection is kept;
# or the fault, and the body before it.
ANSWERS = {
    "with a length": (OK + b"Content-Length: 5\r\n\r\nhello", (200, b"hello", KEPT)),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", (200, b"", KEPT)),
    "in chunks": (CHUNKED + chunked(b"hel", b"lo"), (200, b"hello", KEPT)),
    "in chunks of lines": (CHUNKED + chunked(b"a\n\n", b"b\n\n", b"\r\n"), (200, b"a\n\nb\n\n\r\n", KEPT)),
    "with chunk extensions and trailers": (CHUNKED + b"5;a=b\r\nhello\r\n0\r\nX-T: 1\r\n\r\n", (200, b"hello", KEPT)),
    "after informational answers": (
        INFORMATIONAL * 3 + OK + b"Content-Length: 5\r\n\r\nhello", (200, b"hello", KEPT),
    ),
    "delimited by the end of the connection": (OK + b"\r\nhello", (200, b"hello", CLOSED)),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello", CLOSED)),
    "with connection close": (OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello", (200, b"hello", CLOSED)),
    "without a body": (b"HTTP/1.1 204 No\r\n\r\n", (204, b"", KEPT)),
    "without a body but with bytes after it": (b"HTTP/1.1 204 No\r\n\r\nhello", (204, b"", CLOSED)),
    "with a byte too many": (OK + b"Content-Length: 5\r\n\r\nhello!", (200, b"hello", CLOSED)),
    "in chunks with a byte too many": (CHUNKED + chunked(b"hello") + b"!", (200, b"hello", CLOSED)),
    "sent twice": ((OK + b"Content-Length: 5\r\n\r\nhello") * 2, (200, b"hello", CLOSED)),
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
    "truncated in its head": (OK + b"Content-Le", ("closed", b"")),
    "that is not HTTP": (b"\x00\xffhello\r\n\r\n", ("protocol", b"")),
    "with two lengths": (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", ("protocol", b"")),
    "with a length and chunks": (
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"hello"), ("protocol", b""),
    ),
    "that switches protocols": (
        b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nPRI", ("protocol", b""),
    ),
}  # fmt: skip


async def read_whole(connection: Connection, pieces: list[bytes]) -> None:
    pieces.append(await connection.read(LIMIT))


async def read_pieces(connection: Connection, pieces: list[bytes]) -> None:
    await connection.stream(pieces.append)


async def outcome(reader: Callable[[Connection, list[bytes]], Awaitable[None]], *reads: bytes) -> tuple[Any, ...]:
    """Return the outcome of an exchange whose answer arrives in these reads.

    The server closes the connection after the last one.
    """
    pool = FakePool()
    pieces: list[bytes] = []

    async def exchange() -> int:
        with await pool.ask() as connection:
            await reader(connection, pieces)
            return int(connection.status)

    task = asyncio.create_task(exchange())
    await run_loop()
    for data in reads:
        pool.feed(data)
        await run_loop()
    if not task.done():
        pool.transport.lose(None)
    try:
        status = await task
    except TransportError as error:
        await run_loop()
        assert pool.open_connections == 0
        return error.fault, b"".join(pieces)
    await run_loop()
    is_kept = pool.open_connections == 1 and pool.acquire() is not None
    pool.close()
    await run_loop()
    assert pool.open_connections == 0
    return status, b"".join(pieces), is_kept


async def exchange_once(pool: FakePool) -> bytes:
    with await pool.ask() as response:
        return bytes(await response.read(LIMIT))


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answer_is_read_the_same_however_its_bytes_are_split(answer: str) -> None:
    raw, expected = ANSWERS[answer]
    for reader in (read_pieces, read_whole):
        wanted = (expected[0], b"") if reader is read_whole and len(expected) == 2 else expected
        assert await outcome(reader, raw) == wanted
        assert await outcome(reader, *(raw[index : index + 1] for index in range(len(raw)))) == wanted
        for cut in range(1, len(raw)):
            got = await outcome(reader, raw[:cut], raw[cut:])
            assert got == wanted, f"cut after {raw[:cut]!r}"


TRICKY = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"a\n", b"1", b"3\r\n", b"0\r\n", b"\n\n", b"data: x\n\n", b"b" * 300]),
    min_size=1,
    max_size=4,
)
SEPARATORS = st.sampled_from(
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
    st.lists(st.tuples(TRICKY.map(b"".join), SEPARATORS), min_size=1, max_size=8),
    st.lists(st.integers(0, 400), max_size=2),
    st.booleans(),
)
def test_chunks_that_skip_the_parser_are_read_as_the_parser_reads_them(
    pieces: list[tuple[bytes, bytes]], cuts: list[int], is_whole: bool
) -> None:
    """Each chunk is a read of its own, as servers send tokens, unless it is cut."""
    whole = [OK + b"Transfer-Encoding: chunked\r\n\r\n"]
    whole += [read for piece, between in pieces for read in (b"%x\r\n%b\r\n" % (len(piece), piece), between) if read]
    reads = whole + [b"0\r\n\r\n"] * is_whole
    for cut in cuts:
        index = cut % len(reads)
        reads[index : index + 1] = [part for part in (reads[index][:cut], reads[index][cut:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        got = asyncio.run(outcome(read_pieces, *reads))
        patch.setattr(connection_module, "SIZE_LINES", {})
        assert asyncio.run(outcome(read_pieces, *reads)) == got


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([name for name, (raw, _) in ANSWERS.items() if len(raw) < 1000]), max_size=4),
    st.sampled_from([OK, OK.replace(b"200", b"500"), OK + b"A: b\r\n", OK + b"a: c\r\n"]),
    st.binary(max_size=30),
    st.integers(0, 100),
)
def test_answer_that_skips_the_parser_is_read_as_the_parser_reads_it(
    earlier: list[str], start: bytes, body: bytes, cut: int
) -> None:
    """The heads of earlier answers are known, and this one may have the same."""
    raw = [*(ANSWERS[name][0] for name in earlier), OK + b"Content-Length: 2\r\n\r\nok"]
    raw += [start + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)] * 2
    raw += [start + b"Content-Length: %d\r\n\r\n%b" % (len(body) + 1 - cut % 3, body)]

    async def outcomes() -> list[Any]:
        pool = FakePool()
        got: list[Any] = []
        for index, answer in enumerate(raw):
            task = asyncio.create_task(exchange_once(pool))
            await run_loop()
            parts = [answer] if index % 2 else [answer[:cut], answer[cut:]]
            for part in parts:
                if part:
                    pool.feed(part)
                    await run_loop()
            if not task.done():
                pool.transport.lose(None)
            try:
                got.append(await task)
            except TransportError as error:
                got.append(error.fault)
            got.append(pool.open_connections)
        pool.close()
        await run_loop()
        return got

    got = asyncio.run(outcomes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_module, "answer_head", lambda *_: None)
        assert asyncio.run(outcomes()) == got


async def test_repeated_head_needs_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FakePool()
    for number in range(3):
        task = asyncio.create_task(exchange_once(pool))
        await run_loop()
        pool.feed(OK + b"Content-Length: %d\r\n\r\n%b" % (number + 5, b"x" * (number + 5)))
        if number == 0:
            await task
            connection = next(iter(pool._open))
            monkeypatch.setattr(connection, "_parser", object())  # which cannot parse
    assert await task == b"x" * 7
    assert pool.open_connections == 1
    pool.close()
    await run_loop()


async def test_chunks_go_to_the_shortcut_and_what_it_leaves_to_the_parser() -> None:
    pool = FakePool()
    offered: list[bytes] = []
    pieces: list[bytes] = []

    def shortcut(data: bytes) -> bool:
        offered.append(data)
        return data.endswith(b"!\n\r\n")

    async def exchange() -> None:
        with await pool.ask() as response:
            response.on_chunks = shortcut
            await response.stream(pieces.append)

    task = asyncio.create_task(exchange())
    await run_loop()
    one, two, three, four = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (b"a\n", b"b!\n", b"c\n", b"d!\n"))
    for data in (CHUNKED, one, two, three, two + four, three + four[:2], four[2:], two, b"0\r\n\r\n"):
        pool.feed(data)
        await run_loop()
    await task
    assert offered == [two, three, two + four, three + four[:2], two, b"0\r\n\r\n"]
    assert b"".join(pieces) == b"a\nc\nc\nd!\n"
    assert pool.open_connections == 1
    pool.close()
    await run_loop()


async def test_exception_of_the_shortcut_is_raised_to_the_caller() -> None:
    pool = FakePool()

    def shortcut(data: bytes) -> bool:
        raise RuntimeError("cannot be shown")

    async def exchange() -> None:
        with await pool.ask() as response:
            response.on_chunks = shortcut
            await response.stream(lambda piece: None)

    task = asyncio.create_task(exchange())
    await run_loop()
    for data in (CHUNKED, b"2\r\na\n\r\n", b"2\r\nb\n\r\n"):
        pool.feed(data)
        await run_loop()
    with pytest.raises(RuntimeError, match="cannot be shown"):
        await task
    await run_loop()
    assert pool.open_connections == 0


async def test_chunk_inside_a_chunk_is_content() -> None:
    reads = CHUNKED, b"a\r\nx\n\r\n", b"1\r\na\r\n", b"\r\n0\r\n\r\n"
    assert await outcome(read_pieces, *reads) == (200, b"x\n\r\n1\r\na\r\n", KEPT)


async def test_byte_on_an_idle_connection_closes_it() -> None:
    pool = FakePool()
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    pool.feed(OK + b"Content-Length: 0\r\n\r\n")
    await task
    assert pool.open_connections == 1
    pool.feed(b"!")
    await run_loop()
    assert pool.open_connections == 0
    assert pool.acquire() is None


# Limits and back-pressure


async def test_endless_informational_answers_pause_the_socket() -> None:
    pool = FakePool(ConnectionLimits(informational=10))
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    pool.feed(b"HTTP/1.1 102 Processing\r\n\r\n" * 11)
    await run_loop()
    assert pool.transport.is_paused
    assert not task.done()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await run_loop()
    assert pool.open_connections == 0


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
async def test_size_of_the_head_is_limited(raw: bytes) -> None:
    pool = FakePool(ConnectionLimits(head=2000, headers=20))
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    for start in range(0, len(raw), 500):
        pool.feed(raw[start : start + 500])
    pool.feed(b"Content-Length: 0\r\n\r\n")
    with pytest.raises(TransportError) as raised:
        await task
    assert raised.value.fault == "protocol"
    await run_loop()
    assert pool.open_connections == 0


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1], ids=["at the limit", "over the limit"])
@pytest.mark.parametrize("is_one_read", [True, False], ids=["one read", "two reads"])
async def test_size_of_the_body_is_limited(size: int, is_one_read: bool) -> None:
    pool = FakePool()
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    answer = OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    for part in [answer] if is_one_read else [answer[:100], answer[100:]]:
        pool.feed(part)
        await run_loop()
    if size == LIMIT:
        assert len(await task) == size
        pool.close()
        return
    with pytest.raises(TransportError) as raised:
        await task
    assert raised.value.fault == "too_large"


async def test_unread_body_pauses_the_socket() -> None:
    pool = FakePool(ConnectionLimits(unread=UNREAD))
    pieces: list[bytes] = []
    task = asyncio.create_task(pool.ask())
    await run_loop()
    pool.feed(CHUNKED)
    response = await task
    pool.feed(b"1000\r\n" + b"x" * UNREAD)
    assert not pool.transport.is_paused
    pool.feed(b"x")
    assert pool.transport.is_paused
    streaming = asyncio.create_task(response.stream(pieces.append))
    await run_loop()
    assert not pool.transport.is_paused
    assert len(b"".join(pieces)) == UNREAD + 1
    streaming.cancel()
    response.abort()
    await asyncio.gather(streaming, return_exceptions=True)


async def test_caller_that_cannot_take_more_pauses_the_socket() -> None:
    """This holds before it reads at all, and within its very first piece."""
    pool = FakePool()
    task = asyncio.create_task(pool.ask())
    await run_loop()
    pool.feed(CHUNKED + b"5\r\nhello\r\n")
    response = await task
    response.pause()
    assert pool.transport.is_paused
    streaming = asyncio.create_task(response.stream(lambda piece: None))
    await run_loop()
    assert pool.transport.is_paused
    response.resume()
    assert not pool.transport.is_paused
    streaming.cancel()
    response.abort()
    await asyncio.gather(streaming, return_exceptions=True)

    task = asyncio.create_task(pool.ask())
    await run_loop()
    pool.feed(CHUNKED + b"5\r\nhello\r\n")
    response = await task
    streaming = asyncio.create_task(response.stream(lambda piece: response.pause()))
    await run_loop()
    assert pool.transport.is_paused
    streaming.cancel()
    response.abort()
    await asyncio.gather(streaming, return_exceptions=True)


async def test_exception_about_a_piece_is_raised_to_the_caller() -> None:
    """This holds even if the whole answer arrived with its head."""

    def refuse(piece: bytes) -> None:
        raise ValueError("no")

    pool = FakePool()

    async def exchange() -> None:
        with await pool.ask() as response:
            await response.stream(refuse)

    task = asyncio.create_task(exchange())
    await run_loop()
    pool.feed(OK + b"Content-Length: 5\r\n\r\nhello")
    with pytest.raises(ValueError, match="no"):
        await task
    await run_loop()
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
    await run_loop()
    pool.feed(CHUNKED + b"5\r\nhello\r\n" + start)
    await run_loop()
    fed = 0
    while not task.done():
        pool.feed(b"A: bbbbb\r\n" * 50 if b"\n" in start[3:] else b"x" * 500)
        fed += 500
        await run_loop()
        assert fed < 4000
    with pytest.raises(TransportError) as raised:
        await task
    assert raised.value.fault == "protocol"
    await run_loop()
    assert pool.open_connections == 0


async def test_body_of_many_reads_may_have_small_trailers_and_extensions() -> None:
    pool = FakePool(ConnectionLimits(head=2000))
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    pool.feed(CHUNKED)
    for _ in range(10):
        pool.feed(b"5;" + b"a" * 900)
        pool.feed(b"\r\nhello\r\n")
        await run_loop()
    pool.feed(b"0\r\n")
    pool.feed(b"X-T: " + b"b" * 1000 + b"\r\n\r\n")
    assert await task == b"hello" * 10
    pool.close()


@pytest.mark.parametrize("answer", [b"", b"H", OK, OK + b"Content-Length: 5\r\n\r\nhel"])
@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["closed", "reset"])
async def test_request_is_sent_again_only_if_the_kept_connection_ended_before_a_byte_of_an_answer(
    answer: bytes, error: Exception | None
) -> None:
    pool, stale = FakePool(), list[None]()
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    pool.feed(OK + b"Content-Length: 0\r\n\r\n")
    await task

    async def exchange() -> bytes:
        with await pool.request(pool.head("POST", "/", []), REQUEST, lambda: stale.append(None)) as response:
            return bytes(await response.read(LIMIT))

    task = asyncio.create_task(exchange())
    await run_loop()
    kept = pool.transport
    pool.feed(answer)
    kept.lose(error)
    await run_loop()
    assert (pool.made, stale) == ((1, []) if answer else (2, [None]))
    if answer:
        with pytest.raises(TransportError) as raised:
            await task
        assert raised.value.answered or raised.value.fault == "truncated"
        return
    pool.feed(OK + b"Content-Length: 5\r\n\r\nhello")
    assert await task == b"hello"
    pool.close()
    await run_loop()


async def test_headers_of_an_informational_answer_are_not_those_of_the_answer() -> None:
    pool = FakePool()
    task = asyncio.create_task(pool.ask())
    await run_loop()
    pool.feed(b"HTTP/1.1 103 Early Hints\r\nRetry-After: 7\r\nX: 1\r\n\r\n" + OK + b"Content-Length: 0\r\nX: 2\r\n\r\n")
    with await task as response:
        assert response.headers == [(b"content-length", b"0"), (b"x", b"2")]
        assert response.fields == {b"content-length": b"0", b"x": b"2"}
    pool.close()
    await run_loop()


async def stopped(pool: FakePool, body: bytes) -> None:
    """Make an exchange whose caller stops at the first piece, after which only the end is missing."""
    task = asyncio.create_task(pool.ask())
    await run_loop()
    pool.feed(CHUNKED)
    with await task as response:
        streaming = asyncio.create_task(response.stream(lambda piece: response.stop()))
        await run_loop()
        pool.feed(body)
        await streaming


async def test_stopped_stream_whose_end_does_not_come_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "DRAIN_SECONDS", 0.02)
    pool = FakePool()
    await stopped(pool, b"1\r\na\r\n")
    assert (pool.open_connections, pool.acquire()) == (1, None)
    await until(lambda: pool.open_connections == 0)


async def test_stopped_stream_whose_end_comes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "DRAIN_SECONDS", 0.02)
    pool = FakePool()
    await stopped(pool, b"1\r\na\r\n")
    assert pool.acquire() is None
    pool.feed(b"0\r\n\r\n")
    kept = pool.acquire()
    assert kept is not None
    assert kept._timer is None, "it would close the connection during the next request"
    pool.close()
    await run_loop()


async def test_stopped_stream_that_goes_on_is_closed_at_once() -> None:
    pool = FakePool()
    await stopped(pool, b"1\r\na\r\n")
    pool.feed(b"1\r\nb\r\n")
    await run_loop()
    assert (pool.open_connections, pool.acquire()) == (0, None)


async def test_most_recently_used_connection_is_used_first() -> None:
    """The others can then expire."""
    pool = FakePool()
    one, two = await pool.connect(), await pool.connect()
    for connection in (one, two):
        pool.release(connection)
    assert (pool.acquire(), pool.acquire()) == (two, one)
    pool.close()
    await run_loop()


async def test_size_of_informational_answers_does_not_count_towards_the_answer() -> None:
    pool = FakePool(ConnectionLimits(head=2000))
    task = asyncio.create_task(exchange_once(pool))
    await run_loop()
    for _ in range(5):
        pool.feed(b"HTTP/1.1 102 P\r\nA: " + b"b" * 900 + b"\r\n\r\n")
    pool.feed(OK + b"Content-Length: 5\r\n\r\nhello")
    assert await task == b"hello"
    pool.close()
    await run_loop()


@pytest.mark.parametrize("unsent", [0, 1])
async def test_connection_with_a_request_that_is_not_sent_whole_is_not_kept(unsent: int) -> None:
    """A server may answer before it has read the request: the next one would follow its rest."""
    pool = FakePool()
    asking = asyncio.ensure_future(pool.ask())
    await run_loop()
    pool.transport.unsent = unsent
    pool.feed(OK + b"Content-Length: 5\r\n\r\nhello")
    with await asking as response:
        assert await response.read(10) == b"hello"
    assert (pool.acquire() is None) == bool(unsent)
    pool.close()


async def test_body_in_parts_is_sent_in_order_behind_the_head() -> None:
    pool = FakePool()
    head = pool.head("POST", "/", [])
    asking = asyncio.ensure_future(pool.request(head, [b"ab", b"", b"c" * 70_000]))
    await run_loop()
    assert pool.transport.written == head + b"Content-Length: 70002\r\n\r\nab" + b"c" * 70_000
    asking.cancel()
    await asyncio.wait([asking])
