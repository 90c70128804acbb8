"""The request/response cycle: framing of responses, and shortcuts that send the same bytes."""

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.downstream.cycle import RequestResponseCycle
from tests.downstream.server_thread import ServerThread, read_response


class FakeOwner:
    """Connection and transport in one: records what is written and which methods are called."""

    def __init__(self) -> None:
        self.sent = b""
        self.events: list[str] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.sent += b"".join(parts)

    def resume_body(self) -> None:
        self.events.append("resume_body")

    def add_unsent(self, size: int) -> None:
        self.events.append("add_unsent")

    def answered(self) -> None:
        self.events.append("answered")

    def close_after_flush(self) -> None:
        self.events.append("close_after_flush")


def begun(
    is_head: bool, http11: bool, keep_alive: bool, body: bytes | None, *, whole: bool
) -> tuple[FakeOwner, RequestResponseCycle]:
    """Return a cycle whose request body came with the head (`whole`), or in a call of its own."""
    owner = FakeOwner()
    fields = {b"host": b"gateway"}
    cycle = RequestResponseCycle(
        owner, cast("asyncio.Transport", owner), fields, {}, is_head, http11, keep_alive, False, body if whole else None
    )
    if body is not None and not whole:
        cycle.add_body(body)
        cycle.end_body()
    return owner, cycle


def state(owner: FakeOwner, cycle: RequestResponseCycle) -> tuple[Any, ...]:
    return (
        owner.sent,
        owner.events,
        cycle.started,
        cycle.complete,
        cycle.keep_alive,
        cycle.gone,
        cycle.more_body,
        cycle.unread,
        cycle.body_bytes,
    )


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.binary(max_size=20),
    st.binary(max_size=300),
    st.sampled_from([200, 404, 503]),
    st.none() | st.integers(0, 300),
)
def test_answer_sends_the_same_bytes_as_open_and_send(
    is_head: bool, http11: bool, keep_alive: bool, asked: bytes | None, body: bytes, status: int, cut: int | None
) -> None:
    """Whether the body comes whole or, if `cut` is a position, in parts."""
    owner, cycle = begun(is_head, http11, keep_alive and http11, asked, whole=True)
    assert cycle.whole_body() == asked
    cycle.answer(status, b"x-a: b\r\n", body if cut is None else [body[:cut], body[cut:]])

    other_owner, other = begun(is_head, http11, keep_alive and http11, asked, whole=False)
    assert other.whole_body() == asked
    other.open(status, b"x-a: b\r\n")
    asyncio.run(other.send({"type": "http.response.body", "body": body}))
    assert state(owner, cycle) == state(other_owner, other)
    assert owner.sent


@pytest.mark.parametrize("paused", [False, True])
def test_chunk_that_is_framed_already_is_sent_as_write_sends_the_piece(paused: bool) -> None:
    sent = []
    for is_framed in (True, False):
        owner, cycle = begun(False, True, True, b"{}", whole=True)
        assert cycle.chunk_line(5) is None  # before the head, and so the framing, is known
        cycle.open(200, b"x-a: b\r\n")
        cycle.write(b"first")
        cycle.paused = paused
        if is_framed:
            line = cycle.chunk_line(20)
            assert line is not None
            cycle.write_chunk(line + b"x" * 20 + b"\r\n")
        else:
            cycle.write(b"x" * 20)
        cycle.client_gone()
        cycle.write_chunk(b"1\r\na\r\n")  # the client is gone
        assert cycle.chunk_line(5) is None
        sent.append((owner.sent, owner.events))
    assert sent[0] == sent[1]
    assert ("add_unsent" in sent[0][1]) is paused


def test_response_that_is_not_sent_in_chunks_has_no_size_lines() -> None:
    _, cycle = begun(False, False, False, b"{}", whole=True)
    cycle.open(200, b"")
    cycle.write(b"first")
    assert cycle.chunk_line(5) is None


async def test_asgi_application_may_close_the_connection() -> None:
    owner, cycle = begun(False, True, True, b"{}", whole=True)
    await cycle.send({"type": "http.response.start", "status": 200, "headers": [(b"Connection", b"close")]})
    await cycle.send({"type": "http.response.body", "body": b"a"})
    assert owner.sent == b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\na"
    assert not cycle.keep_alive


def test_response_without_a_content_length_gets_one(default_server: ServerThread) -> None:
    with default_server.connect(b"GET /no_length HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        assert read_response(client)[2] == b"one piece"


def test_stream_is_chunked_in_http11_and_ends_with_the_connection_in_http10(default_server: ServerThread) -> None:
    answer = default_server.ask(b"GET /stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
    assert b"transfer-encoding: chunked\r\n" in answer
    answer = default_server.ask(b"GET /stream HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"connection: close\r\n\r\nonetwothree")
    assert b"transfer-encoding" not in answer


def test_head_request_gets_no_body(default_server: ServerThread) -> None:
    answer = default_server.ask(b"HEAD /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("path", [b"fail", b"silent", b"injected"])
def test_application_failure_before_the_response_gives_500_without_the_cause(
    default_server: ServerThread, path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL, "gateway.downstream"):
        answer = default_server.ask(b"GET /" + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
    assert b"secret" not in answer
    assert b"cookie" not in answer


def test_application_failure_in_mid_stream_leaves_the_stream_unterminated(default_server: ServerThread) -> None:
    answer = default_server.ask(b"GET /fail_late HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.endswith(b"5\r\nbegun\r\n")


def test_100_continue_is_sent_only_if_the_application_reads_the_body(default_server: ServerThread) -> None:
    expect = b"HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with default_server.connect(b"POST /echo " + expect) as client:
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"ab")
        assert read_response(client)[2] == b"ab"
    with default_server.connect(b"POST /unauthorized " + expect) as client:
        assert read_response(client)[0] == 401
        assert client.recv(1) == b""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("waits", [False, True])
async def test_application_that_starts_at_once_leaves_no_task_behind(fails: bool, waits: bool) -> None:
    owner, cycle = begun(False, True, True, b"{}", whole=True)
    tasks: set[asyncio.Task[None]] = set()
    goes_on = asyncio.Event()

    async def application(*_: Any) -> None:
        if waits:
            await goes_on.wait()
        if fails:
            raise RuntimeError("on purpose")
        cycle.answer(200, b"", b"whole")

    cycle.start_at_once(asyncio.get_running_loop(), application, tasks)
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(tasks) == waits
    goes_on.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert tasks == set()
    assert owner.events == ["close_after_flush" if fails else "answered"]
    assert owner.sent.startswith(b"HTTP/1.1 500 " if fails else b"HTTP/1.1 200 ")
