"""Responses to clients when a backend fails, through a complete gateway on real sockets.

The case numbers are those of the project's list of backend faults: 5 to 11, 17 to 23, 25 to 36.
"""

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from gateway.upstream import connection
from tests.fakes.fault_backend import CANARY, ODD_TEXT, TEXT, TINY_CHUNKS, FaultBackend, Kind
from tests.fakes.images import png_data_url
from tests.fakes.processor_time import processor_seconds
from tests.fakes.running_gateway import PROMPT, Reply, Running, running, settings_for, until
from tests.fakes.virtual_time import within

pytestmark = pytest.mark.uvloop

TIMEOUTS = {"first_token_timeout": 1, "idle_timeout": 1, "total_timeout": 3}
"""Longer than the pauses in which a busy machine serves nobody: the pieces before have to arrive."""
TIMED = {"silent", "informational_flood", "stall", "drip"}
"""Modes that end by a timeout of the gateway."""
CLOSED_WITHIN = 0.1
"""Seconds from the end of a response until the backend sees its connection closed."""
LIMIT_TOLERANCE = 0.5
LAG = 2
"""Bound of the processor time until another request is served, in multiples of that of decoding as many events."""
LAG_RUNS = 10
"""Attempts to find a moment in which the machine is not busy with other work."""
BOMB_MEMORY = 1024 * 1024
"""Bytes that a gzip bomb of 50 MB may cost."""


@pytest.fixture(params=["ollama", "vllm"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[FaultBackend]:
    kind: Kind = request.param
    async with FaultBackend(kind) as backend:
        yield backend


@pytest.fixture
async def gateway(backend: FaultBackend, request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    """A gateway that is patient unless the test waits for one of its timeouts."""
    is_timed = request.node.callspec.params.get("mode") in TIMED
    async with running(settings_for(backend, **(TIMEOUTS if is_timed else {}))) as gateway:
        yield gateway


@pytest.fixture(params=[True, False], ids=["stream", "plain"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def now() -> float:
    return asyncio.get_running_loop().time()


async def check_closed(backend: FaultBackend, connection: int = 0) -> None:
    """Check that the backend sees the end of this connection in time."""
    begun = now()
    peer = backend.peers[connection]
    await until(lambda: peer.closed_at is not None)
    assert peer.closed_at is not None
    assert peer.closed_at - begun <= within(CLOSED_WITHIN)


async def check_recovered(gateway: Running, backend: FaultBackend, stream: bool) -> None:
    """Check that slots and gauges are back at zero, and that the next request is served."""
    await until(gateway.is_idle)
    gauges = {name: gateway.metric(name) for name in ("gateway_requests_running", "gateway_requests_waiting")}
    assert set(gauges.values()) == {0}
    backend.mode = "healthy"
    reply = await gateway.ask({"stream": stream})
    assert (reply.status, reply.text, reply.error) == (200, TEXT, None)
    await until(gateway.is_idle)


def check_neutral(reply: Reply, backend: FaultBackend) -> None:
    """Check that the client sees neither the backend's text nor its address."""
    assert CANARY not in reply.body.decode() + json.dumps(reply.headers)
    assert not reply.names_port(backend.port)


def deadline(backend: FaultBackend, stream: bool, phase: str) -> float:
    """Return the seconds until the gateway gives up a silent backend.

    A short plain answer of a vLLM must arrive within the time to first token.
    """
    return TIMEOUTS[phase if stream or backend.kind == "ollama" else "first_token_timeout"]


# Before the first byte

BROKEN_RESPONSES = [
    pytest.param("close", "closed", id="5-closes-without-a-reply"),
    pytest.param("rst", "reset", id="6-resets-without-a-reply"),
    pytest.param("garbage", "protocol", id="8-garbage-for-a-status-line"),
    pytest.param("big_header", "protocol", id="9-header-of-a-megabyte"),
    pytest.param("many_headers", "protocol", id="9-twenty-thousand-headers"),
    pytest.param("truncated", "truncated", id="18-shorter-than-its-length"),
]


@pytest.mark.virtual_time
@pytest.mark.parametrize(("mode", "reason"), BROKEN_RESPONSES)
async def test_broken_response_is_a_502_and_closes_the_connection(
    gateway: Running, backend: FaultBackend, stream: bool, mode: str, reason: str
) -> None:
    backend.mode = mode
    reply = await gateway.ask({"stream": stream})
    await check_closed(backend)
    assert (reply.status, reply.is_stream, reply.error and reply.error["code"]) == (502, False, "upstream_error")
    check_neutral(reply, backend)
    assert len(backend.requests) == 1
    assert gateway.metric("gateway_upstream_errors_total", reason=reason) == 1
    assert gateway.metric("gateway_requests_total", outcome="upstream_error") == 1
    await check_recovered(gateway, backend, stream)


INVALID_RESPONSES = [
    pytest.param("redirect", id="11-redirect"),
    pytest.param("html", id="17-html"),
    pytest.param("invalid_json", id="19-invalid-json"),
    pytest.param("bomb", id="20-gzip-bomb"),
]


@pytest.mark.parametrize("mode", INVALID_RESPONSES)
async def test_invalid_response_is_a_502(gateway: Running, backend: FaultBackend, stream: bool, mode: str) -> None:
    backend.mode = mode
    reply = await gateway.ask({"stream": stream})
    assert (reply.status, reply.is_stream, reply.error and reply.error["code"]) == (502, False, "upstream_error")
    check_neutral(reply, backend)
    assert len(backend.requests) == 1  # a redirect is not followed
    assert gateway.metric("gateway_upstream_errors_total") >= 1
    await check_recovered(gateway, backend, stream)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    "mode", [pytest.param("silent", id="7-never-replies"), pytest.param("informational_flood", id="10-flood-of-102")]
)
async def test_missing_first_token_is_a_504_at_its_timeout(
    gateway: Running, backend: FaultBackend, stream: bool, mode: str
) -> None:
    backend.mode = mode
    begun = now()
    reply = await gateway.ask({"stream": stream})
    took = now() - begun
    await check_closed(backend)
    limit = deadline(backend, stream, "first_token_timeout")
    assert limit <= took <= within(limit + LIMIT_TOLERANCE)
    assert (reply.status, reply.error and reply.error["code"], reply.headers["x-should-retry"]) == (
        504,
        "upstream_timeout",
        "false",
    )
    assert len(backend.requests) == 1
    assert gateway.metric("gateway_requests_total", outcome="timeout") == 1
    await check_recovered(gateway, backend, stream)


@pytest.mark.parametrize(("mode", "reason"), [("close", "closed"), ("rst", "reset")])
async def test_server_that_closes_before_the_first_byte_fails_over_once(
    backend: FaultBackend, stream: bool, mode: str, reason: str
) -> None:
    """Cases 5 and 6, with another server available."""
    async with FaultBackend(backend.kind) as other, running(settings_for(backend, other)) as gateway:
        backend.mode = mode
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, "2")
        assert (len(backend.requests), len(other.requests)) == (1, 1)
        assert gateway.metric("gateway_retries_total", reason=reason) == 1
        await until(gateway.is_idle)


@pytest.mark.parametrize("mode", ["close", "rst"])
async def test_failover_tries_at_most_two_servers(backend: FaultBackend, stream: bool, mode: str) -> None:
    kind = backend.kind
    async with (
        FaultBackend(kind, mode) as second,
        FaultBackend(kind, mode) as third,
        running(settings_for(backend, second, third)) as gateway,
    ):
        backend.mode = mode
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, reply.error and reply.error["code"], reply.headers["x-gateway-attempts"]) == (
            502,
            "upstream_error",
            "2",
        )
        assert [len(server.requests) for server in (backend, second, third)] == [1, 1, 0]
        await until(gateway.is_idle)


async def test_gzip_bomb_is_not_decompressed(gateway: Running, backend: FaultBackend, stream: bool) -> None:
    """Case 20."""
    backend.mode = "bomb"
    await gateway.ask({"stream": stream})
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        reply = await gateway.ask({"stream": stream})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reply.status == 502
    assert peak - before <= BOMB_MEMORY
    assert b"accept-encoding: identity" in backend.requests[0].lower()


async def test_plain_answer_above_32_mib_is_a_502_and_not_read_further(gateway: Running, backend: FaultBackend) -> None:
    """Case 21."""
    backend.mode = "huge"
    reply = await gateway.ask()
    await check_closed(backend)
    assert (reply.status, reply.error and reply.error["code"]) == (502, "upstream_error")
    assert gateway.metric("gateway_upstream_errors_total", reason="too_large") == 1
    await check_recovered(gateway, backend, False)


@pytest.mark.parametrize("mode", ["surplus", "late_surplus"])
async def test_bytes_after_a_response_never_reach_the_next_request(
    gateway: Running, backend: FaultBackend, stream: bool, mode: str
) -> None:
    """Case 22."""
    backend.script.append(mode)
    first = await gateway.ask({"stream": stream})
    assert (first.status, first.text, first.error) == (200, TEXT, None)
    if mode == "surplus":
        await check_closed(backend)
    else:
        await until(lambda: not backend.open_peers)
    second = await gateway.ask({"stream": stream})
    assert (second.status, second.text, second.error) == (200, TEXT, None)
    assert len(backend.peers) == 2
    await check_recovered(gateway, backend, stream)


async def test_connection_closed_as_a_request_arrives_is_retried_invisibly(
    gateway: Running, backend: FaultBackend, stream: bool
) -> None:
    """Case 23: the backend closes an idle connection just as a request arrives on it."""
    backend.mode = "stale"
    replies = [await gateway.ask({"stream": stream}) for _ in range(2)]
    assert [(reply.status, reply.text) for reply in replies] == [(200, TEXT)] * 2
    assert (len(backend.requests), len(backend.peers)) == (3, 2)
    assert gateway.metric("gateway_retries_total", reason="stale") == 1
    assert gateway.metric("gateway_upstream_errors_total") == 0
    await check_recovered(gateway, backend, stream)


async def test_request_on_a_kept_connection_of_a_dying_server_fails_over(backend: FaultBackend, stream: bool) -> None:
    """Cases 6 and 23: the apparently stale connection belongs to a dead server."""
    async with FaultBackend(backend.kind) as other, running(settings_for(backend, other)) as gateway:
        assert (await gateway.ask({"stream": stream})).status == 200
        assert len(backend.requests) == 1
        backend.mode = "silent"
        async with gateway.sent({"stream": stream}) as raw:
            await until(lambda: len(backend.requests) == 2)
            assert len(backend.peers) == 1
            backend.die()
            reply = await raw.reply()
        assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, "2")
        assert (len(backend.requests), len(other.requests)) == (2, 1)
        assert [gateway.metric("gateway_retries_total", reason=reason) for reason in ("stale", "connect")] == [1, 1]
        await until(gateway.is_idle)


@pytest.mark.parametrize("mode", ["close", "rst", "head_alone", "breaks"])
async def test_request_that_fails_on_a_kept_and_a_new_connection_goes_to_another_server(
    backend: FaultBackend, stream: bool, mode: str
) -> None:
    """A dying process closes its kept connections and resets a new one; no byte of an answer has come."""
    if mode == "head_alone" and backend.kind == "vllm" and not stream:
        pytest.skip("a plain answer of a vLLM has no head of its own")
    async with FaultBackend(backend.kind) as other, running(settings_for(backend, other)) as gateway:
        backend.script.append("stale")
        assert (await gateway.ask({"stream": stream})).status == 200
        backend.script += ["stale", mode]
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, "2")
        assert (len(backend.requests), len(other.requests)) == (3, 1)
        assert gateway.metric("gateway_retries_total", reason="stale") == 1
        await until(gateway.is_idle)


async def test_request_on_a_kept_connection_tries_at_most_two_servers(backend: FaultBackend, stream: bool) -> None:
    kind = backend.kind
    async with (
        FaultBackend(kind, "rst") as second,
        FaultBackend(kind) as third,
        running(settings_for(backend, second, third)) as gateway,
    ):
        assert (await gateway.ask({"stream": stream})).status == 200
        backend.mode = "silent"
        async with gateway.sent({"stream": stream}) as raw:
            await until(lambda: len(backend.requests) == 2)
            backend.die()
            reply = await raw.reply()
        assert (reply.status, reply.error and reply.error["code"]) == (502, "upstream_error")
        assert [len(server.requests) for server in (backend, second, third)] == [2, 1, 0]
        await until(gateway.is_idle)


# In the middle of a stream

BROKEN_STREAMS = [
    pytest.param("killed", "upstream_error", id="25-killed"),
    pytest.param("cut", "upstream_error", id="26-end-of-connection-for-an-end"),
    pytest.param("bad_chunk", "upstream_error", id="27-bad-chunk-size"),
    pytest.param("stall", "upstream_timeout", id="28-stalls"),
    pytest.param("drip", "upstream_timeout", id="29-drips-for-ever"),
    pytest.param("malformed", "upstream_error", id="30-event-that-cannot-be-read"),
    pytest.param("long_line", "upstream_error", id="31-line-of-20-megabytes"),
    pytest.param("error_then_done", "upstream_error", id="33-error-event"),
]


@pytest.mark.virtual_time
@pytest.mark.parametrize(("mode", "code"), BROKEN_STREAMS)
async def test_broken_stream_keeps_its_pieces_and_ends_with_one_error(
    gateway: Running, backend: FaultBackend, mode: str, code: str
) -> None:
    backend.mode = mode
    begun = now()
    reply = await gateway.ask({"stream": True})
    took = now() - begun
    await check_closed(backend)
    assert (reply.status, reply.is_stream) == (200, True)
    assert reply.text.startswith(TEXT)
    assert [event for event in reply.events if "error" in event] == reply.events[-1:]
    assert reply.error is not None
    assert (reply.error["code"], reply.error["type"]) == (code, "server_error")
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert "[DONE]" not in reply.events
    check_neutral(reply, backend)
    assert len(backend.requests) == 1  # not retried: the client has already received a part
    if mode == "stall":
        assert TIMEOUTS["idle_timeout"] <= took <= within(TIMEOUTS["idle_timeout"] + LIMIT_TOLERANCE)
    if mode == "drip":
        assert TIMEOUTS["total_timeout"] <= took <= within(TIMEOUTS["total_timeout"] + LIMIT_TOLERANCE)
    outcome = "timeout" if code == "upstream_timeout" else "upstream_error"
    assert gateway.metric("gateway_requests_total", outcome=outcome) == 1
    assert gateway.metric("gateway_upstream_errors_total") == 1
    assert [line["status"] for line in gateway.exchanges()] == [504 if outcome == "timeout" else 502]
    await check_recovered(gateway, backend, True)


@pytest.mark.parametrize(("mode", "code"), BROKEN_STREAMS)
async def test_broken_plain_answer_is_an_error_status(
    gateway: Running, backend: FaultBackend, mode: str, code: str
) -> None:
    if backend.kind == "vllm" and mode in ("malformed", "long_line", "error_then_done"):
        pytest.skip("a plain answer of a vLLM has no lines and no events")
    backend.mode = mode
    reply = await gateway.ask()
    await check_closed(backend)
    assert (reply.status, reply.error and reply.error["code"]) == (504 if code == "upstream_timeout" else 502, code)
    check_neutral(reply, backend)
    await check_recovered(gateway, backend, False)


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize(("mode", "code"), BROKEN_STREAMS[:5])
async def test_openai_python_raises_for_a_broken_stream(
    gateway: Running, backend: FaultBackend, mode: str, code: str
) -> None:
    """Cases 25 to 29: the client library raises after it has delivered the pieces received."""
    backend.mode = mode
    text = ""
    async with gateway.openai() as client:
        answer: Any = await client.chat.completions.create(model="standard", messages=PROMPT, stream=True)  # type: ignore[arg-type]
        with pytest.raises(openai.APIError) as raised:  # noqa: PT012  # the text before the error counts
            async for chunk in answer:
                text += chunk.choices[0].delta.content or ""
    assert raised.value.code == code
    assert text.startswith(TEXT)


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize(("mode", "code"), BROKEN_STREAMS[:5])
async def test_openai_python_raises_for_a_broken_plain_answer(
    gateway: Running, backend: FaultBackend, mode: str, code: str
) -> None:
    backend.mode = mode
    async with gateway.openai() as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="standard", messages=PROMPT)  # type: ignore[arg-type]
    assert (raised.value.status_code, raised.value.code) == (504 if code == "upstream_timeout" else 502, code)


async def test_text_does_not_depend_on_how_its_bytes_arrive(
    gateway: Running, backend: FaultBackend, stream: bool
) -> None:
    """Case 32: line separators within JSON, characters split across packets."""
    backend.mode = "odd_text"
    reply = await gateway.ask({"stream": stream})
    assert (reply.status, reply.text, reply.error) == (200, ODD_TEXT, None)
    assert set("\u2028\u2029\x85").isdisjoint(reply.body.decode())
    await check_recovered(gateway, backend, stream)


async def test_nothing_after_the_end_of_the_stream_reaches_the_client(gateway: Running, backend: FaultBackend) -> None:
    """Case 34: the backend sends more data after the end."""
    backend.mode = "done_then_more"
    reply = await gateway.ask({"stream": True})
    await check_closed(backend)
    assert (reply.text, reply.error, reply.events[-1], reply.events.count("[DONE]")) == (TEXT, None, "[DONE]", 1)
    check_neutral(reply, backend)
    await check_recovered(gateway, backend, True)


@pytest.mark.virtual_time
async def test_answer_ends_at_the_end_of_the_stream_even_if_the_connection_stays_open(
    gateway: Running, backend: FaultBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 34: the backend keeps the connection open."""
    monkeypatch.setattr(connection, "DRAIN_SECONDS", 0.2)
    backend.mode = "done_then_open"
    begun = now()
    reply = await gateway.ask({"stream": True})
    assert now() - begun <= within(LIMIT_TOLERANCE)
    assert (reply.text, reply.error, reply.events[-1]) == (TEXT, None, "[DONE]")
    assert gateway.running == 0
    await until(lambda: not backend.open_peers, patience=within(connection.DRAIN_SECONDS + CLOSED_WITHIN))
    await check_recovered(gateway, backend, True)


async def test_ten_thousand_chunks_at_once_do_not_delay_other_requests(backend: FaultBackend, stream: bool) -> None:
    """Case 35. The minimum of several runs counts, because other work on the machine only adds to
    it.
    """
    if backend.kind == "vllm" and not stream:
        pytest.skip("a plain answer of a vLLM has no chunks of tokens")
    worst: list[float] = []
    event = backend.event("x").strip().removeprefix(b"data: ")
    async with running(settings_for(backend, total_timeout=60, idle_timeout=60, first_token_timeout=60)) as gateway:
        backend.mode = "tiny_chunks"
        while len(worst) < LAG_RUNS and min(worst, default=LAG + 1) > LAG:
            gaps: list[float] = []
            unit = processor_seconds(lambda: [json.loads(event) for _ in range(TINY_CHUNKS)])
            pinging = asyncio.create_task(ping(gateway, gaps))
            async with gateway.sent({"stream": stream}) as raw:
                body = bytearray()  # parsed only afterwards: parsing would delay the pings too
                while not (body.endswith(b"0\r\n\r\n") if stream else body.endswith(b"}")):
                    assert not raw.reader.at_eof()
                    body += await raw.reader.read(2**18)
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
            assert (body.count(b'"content":"x"') if stream else body.count(b"x" * TINY_CHUNKS)) == (
                TINY_CHUNKS if stream else 1
            )
            worst.append(max(gaps) / unit)
    assert min(worst) <= LAG


async def ping(gateway: Running, gaps: list[float]) -> None:
    """Send small requests one after the other; append the processor time of this thread until the answer to `gaps`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        while True:
            begun = time.thread_time()
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            await reader.readexactly(length)
            gaps.append(time.thread_time() - begun)
    finally:
        writer.close()


@pytest.mark.parametrize("mode", ["early_413", "early_400", "early_close"])
async def test_early_response_is_forwarded_immediately(
    gateway: Running, backend: FaultBackend, stream: bool, mode: str
) -> None:
    """Case 36: the backend refuses a request of some megabytes before it has read all of it."""
    backend.mode = mode
    image = png_data_url(1400, is_noise=True)
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "?"},
        {"type": "image_url", "image_url": {"url": image}},
    ]
    begun = now()
    reply = await gateway.ask({"stream": stream, "messages": [{"role": "user", "content": content}]})
    assert now() - begun <= within(2)
    assert (reply.status, reply.error and reply.error["type"]) == (
        413 if mode == "early_413" else 400,
        "invalid_request_error",
    )
    check_neutral(reply, backend)
    assert len(backend.requests[0]) < len(image)
    await until(lambda: not backend.open_peers)
    await check_recovered(gateway, backend, stream)
