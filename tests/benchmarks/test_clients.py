"""Clients of the long runs: how they judge an answer, and that they leave when they should."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clients import CODES, Clients, Expected, Leave, Plan, head_of, judge

ANSWER = Expected(beginnings={"vllm": "abc"}, tokens=3, prompt_tokens={"vllm": 7})
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
WHOLE = {"choices": [{"message": {"content": "abc def"}, "finish_reason": "stop"}], "usage": USAGE}
REFUSED = Expected(400, "invalid_json")


def error_body(code: str | None) -> bytes:
    return json.dumps({"error": {"message": "…", "type": "server_error", "param": None, "code": code}}).encode()


def chunk(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


def stream(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


USAGE_CHUNK = json.dumps({"choices": [], "usage": USAGE})
END = (chunk("", "stop"), USAGE_CHUNK, "[DONE]")


@pytest.mark.parametrize(
    ("body", "seen", "code"),
    [
        (json.dumps(WHOLE).encode(), "ok", None),
        (b"  \n" + json.dumps(WHOLE).encode(), "ok", None),
        (stream(chunk("abc"), chunk(" def"), *END), "ok", None),
        (b": keep-alive\n\n" + stream(chunk("abc def"), *END), "ok", None),
        (error_body("upstream_timeout"), "cut", "upstream_timeout"),
        (stream(chunk("abc"), error_body("upstream_error").decode()), "cut", "upstream_error"),
        (error_body("surprise"), "wrong", "surprise"),
        (json.dumps(WHOLE).encode()[:-5], "lost", None),
        (b"", "lost", None),
        (stream(chunk("abc def"), chunk("", "stop"), USAGE_CHUNK), "lost", None),
        (stream(chunk("abc def"), *END)[:-1], "lost", None),
        (stream(chunk("abc def"), *END, chunk("more")), "lost", None),
        (stream(chunk("abc"), error_body("upstream_error").decode(), "[DONE]"), "lost", None),
        (stream(chunk("another"), *END), "wrong", None),
        (stream(chunk("abc def"), USAGE_CHUNK, "[DONE]"), "wrong", None),
        (stream(chunk("abc def"), chunk("", "stop"), "[DONE]"), "wrong", None),
        (json.dumps(WHOLE | {"usage": USAGE | {"completion_tokens": 2}}).encode(), "wrong", None),
        (json.dumps(WHOLE | {"usage": USAGE | {"prompt_tokens": 8}}).encode(), "wrong", None),
    ],
)
def test_answer_is_ok_only_if_it_is_whole_and_right(body: bytes, seen: str, code: str | None) -> None:
    assert judge(ANSWER, 200, "vllm", body)[:2] == (seen, code)


@pytest.mark.parametrize(
    ("expected", "status", "body", "seen"),
    [
        (ANSWER, 503, error_body("queue_full"), "error"),
        (ANSWER, 502, error_body("surprise"), "wrong"),
        (ANSWER, 500, error_body(None), "wrong"),
        (ANSWER, 502, b"Bad Gateway", "wrong"),
        (ANSWER, 400, error_body("invalid_json"), "wrong"),
        (REFUSED, 400, error_body("invalid_json"), "error"),
        (REFUSED, 400, error_body("invalid_value"), "wrong"),
        (REFUSED, 200, json.dumps(WHOLE).encode(), "wrong"),
    ],
)
def test_error_needs_a_defined_code_that_fits_the_request(
    expected: Expected, status: int, body: bytes, seen: str
) -> None:
    assert judge(expected, status, "", body).seen == seen


def test_codes_are_those_that_the_documentation_defines() -> None:
    errors = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    assert set(re.findall(r"^\| \d{3} \| `(\w+)`", errors, re.MULTILINE)) == CODES


@pytest.mark.parametrize(("count", "seen"), [(2, "ok"), (1, "wrong"), (3, "wrong")])
def test_answer_with_embeddings_has_one_for_each_text(count: int, seen: str) -> None:
    body = json.dumps({"data": [{"embedding": [0.5]} for _ in range(count)]}).encode()
    assert judge(Expected(vectors=2), 200, "ollama", body).seen == seen


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def clients_of(handle: Handler) -> AsyncIterator[Clients]:
    """Serve every connection with `handle`, and yield clients of that server.

    At the end of the block all connections have been handled to their end.
    """
    handlers: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    clients = Clients(server.sockets[0].getsockname()[1])
    try:
        yield clients
    finally:
        clients.close()
        await asyncio.gather(*filter(None, handlers))
        server.close()
        await server.wait_closed()


def plan(leave: Leave | None = None, *, body: bytes = b"x" * 100, kept: bool = False, deadline: float = 10.0) -> Plan:
    return Plan("id-1", "plain", head_of("id-1", "/", len(body), kept=kept), body, ANSWER, deadline, leave, kept)


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nx-gateway-backend: vllm\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    await reader.readuntil(b"\r\n\r\n")
    return await reader.readexactly(100)


async def test_client_that_leaves_while_uploading_sends_only_its_share() -> None:
    got: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        got.append(await reader.read())

    async with clients_of(handle) as clients:
        record = await clients.send(plan(Leave("uploading", 0.5)))
    assert (record.seen, record.note) == ("left", "uploading")
    assert got == [b"x" * 50]


async def test_client_that_leaves_while_waiting_resets_if_it_should() -> None:
    ended: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        try:
            ended.append("closed" if await reader.read() == b"" else "data")
        except ConnectionResetError:
            ended.append("reset")

    async with clients_of(handle) as clients:
        assert (await clients.send(plan(Leave("waiting", 0.01)))).seen == "left"
        assert (await clients.send(plan(Leave("waiting", 0.01, resets=True)))).seen == "left"
    assert ended == ["closed", "reset"]


async def test_client_that_leaves_a_stream_has_its_pieces_before() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        with suppress(ConnectionResetError):
            await send_two_pieces(reader, writer)

    async def send_two_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(2):
            piece = b'data: {"choices":[{"delta":{"content":"abc"}}]}\n\n'
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await reader.read()

    async with clients_of(handle) as clients:
        assert (await clients.send(plan(Leave("streaming", 2)))).seen == "left"
        assert (await clients.send(plan(Leave("streaming", 3), deadline=0.1))).seen == "hung"


async def test_broken_connection_is_lost_and_silence_hangs() -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer(json.dumps(WHOLE).encode())[:-1])

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with clients_of(broken) as clients:
        assert (await clients.send(plan())).seen == "lost"
    async with clients_of(silent) as clients:
        assert (await clients.send(plan(deadline=0.1))).seen == "hung"


async def test_kept_connection_carries_the_next_kept_request() -> None:
    connections: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        while True:
            try:
                await read_request(reader)
            except asyncio.IncompleteReadError:
                return
            connections[-1] += 1
            writer.write(answer(json.dumps(WHOLE).encode()))

    async with clients_of(handle) as clients:
        assert [(await clients.send(plan(kept=True))).seen for _ in range(3)] == ["ok"] * 3
        assert (await clients.send(plan())).seen == "ok"
    assert connections == [3, 1]


async def test_client_that_was_held_up_after_connecting_connects_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []
    delays = [0.1]
    connect = asyncio.open_connection

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read(1))
        writer.write(answer(json.dumps(WHOLE).encode()))

    async def connect_slowly(*args: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        opened = await connect(*args, **kwargs)
        if delays:
            await asyncio.sleep(delays.pop())
        return opened

    monkeypatch.setattr(asyncio, "open_connection", connect_slowly)
    monkeypatch.setattr("benchmarks.clients._CONNECT_SECONDS", 0.05)
    async with clients_of(handle) as clients:
        assert (await clients.send(plan())).seen == "ok"
    assert sorted(requests) == [b"", b"P"]
