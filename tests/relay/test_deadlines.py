"""The deadlines of one exchange, and what keeps its client's connection alive, on real sockets."""

import asyncio

import pytest

from tests.fakes.fault_backend import TEXT
from tests.fakes.running_gateway import PATIENCE, until
from tests.relay.serving import (
    KINDS,
    PATIENT,
    Kind,
    code,
    in_front_of,
    options,
    serving,
    with_header,
)

pytestmark = pytest.mark.uvloop


# Keep-alive of plain answers


@pytest.mark.parametrize("kind", KINDS)
async def test_plain_answer_is_kept_alive_with_blanks_before_the_clients_read_timeout(kind: Kind) -> None:
    async with in_front_of(options(kind, time_to_first_token=1.1), top={"heartbeat": 0.05}, **PATIENT) as (
        gateway,
        server,
    ):
        server.engine.say(["Good", " day"])
        async with with_header(gateway, {}, "x-stainless-read-timeout: 1") as raw, asyncio.timeout(PATIENCE):
            reply = await raw.reply()
        assert reply.body.startswith(b"  ")
        assert reply.text == "Good day"
        assert reply.headers["content-type"] == "application/json"


async def test_error_after_the_first_blank_is_in_the_body() -> None:
    limits = PATIENT | {"first_token_timeout": 1}
    async with serving("ollama", "silent", top={"heartbeat": 0.05}, **limits) as (gateway, _):
        async with with_header(gateway, {}, "x-stainless-read-timeout: 1") as raw, asyncio.timeout(PATIENCE):
            reply = await raw.reply()
        assert reply.body.startswith(b" ")
        assert (reply.status, code(reply)) == (200, "upstream_timeout")


@pytest.mark.parametrize("value", ["600", "soon", "-1", "nan", "inf", "1e99", ""])
async def test_read_timeout_header_never_rejects_a_request(value: str) -> None:
    async with (
        serving("vllm") as (gateway, _),
        with_header(gateway, {}, f"x-stainless-read-timeout: {value}") as raw,
        asyncio.timeout(PATIENCE),
    ):
        assert (await raw.reply()).text == TEXT


async def test_queued_plain_answer_is_kept_alive() -> None:
    top = {"heartbeat": 0.05}
    async with serving("vllm", "silent", top=top, **PATIENT, max_concurrency=1) as (gateway, backend), gateway.sent({}):
        await until(lambda: len(backend.requests) == 1)
        async with with_header(gateway, {}, "X-Stainless-Read-Timeout: 1") as waiting:
            status, headers = await asyncio.wait_for(waiting.head(), PATIENCE)
            assert (status, headers["content-type"], gateway.waiting) == (200, "application/json", 1)
            assert int(headers["x-gateway-queue-ms"]) >= 700
            assert b" " in await asyncio.wait_for(waiting.reader.read(64), PATIENCE)


# Deadlines


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_silent_backend_is_a_504_that_clients_must_not_retry(kind: Kind, stream: bool) -> None:
    async with serving(kind, "silent", total_timeout=0.4) as (gateway, backend):
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, code(reply), reply.headers["x-should-retry"]) == (504, "upstream_timeout", "false")
        assert len(backend.requests) == 1
        await until(gateway.is_idle)
        assert gateway.metric("gateway_requests_total", outcome="timeout") == 1
        assert gateway.metric("gateway_upstream_errors_total", reason="upstream_timeout") == 1


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "limits", "phase"),
    [("stall", {"idle_timeout": 0.5}, "no next token"), ("drip", {"total_timeout": 2}, "no end")],
)
async def test_deadline_after_the_first_byte_is_an_error_event(
    kind: Kind, mode: str, limits: dict[str, float], phase: str
) -> None:
    async with serving(kind, mode, **limits) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_timeout")
        assert reply.error is not None
        assert phase in reply.error["message"]
        assert reply.text.startswith(TEXT)
        assert "[DONE]" not in reply.events


@pytest.mark.virtual_time(only=True)
async def test_plain_answer_that_stalls_on_ollama_is_a_504() -> None:
    async with serving("ollama", "stall", idle_timeout=0.5) as (gateway, _):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (504, "upstream_timeout")


async def test_request_past_its_clients_deadline_is_a_504_and_frees_its_slot() -> None:
    async with (
        serving("ollama", "silent", **PATIENT) as (gateway, _),
        with_header(gateway, {}, "X-Gateway-Timeout: 0.2") as raw,
    ):
        reply = await asyncio.wait_for(raw.reply(), PATIENCE)
        assert (reply.status, code(reply), reply.headers["x-should-retry"]) == (504, "upstream_timeout", "false")
        await until(lambda: gateway.running == 0)


async def test_queued_request_past_its_clients_deadline_is_a_503() -> None:
    async with serving("ollama", "silent", **PATIENT, model_concurrency=1) as (gateway, backend), gateway.sent({}):
        await until(lambda: len(backend.requests) == 1)
        async with with_header(gateway, {}, "X-Gateway-Timeout: 0.1") as raw:
            reply = await asyncio.wait_for(raw.reply(), PATIENCE)
        assert (reply.status, code(reply)) == (503, "queue_timeout")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert gateway.waiting == 0


@pytest.mark.parametrize(
    "header", ["X-Gateway-Timeout: soon", "X-Gateway-Timeout: 0", "X-Gateway-Timeout: nan", "X-Gateway-Priority: high"]
)
async def test_invalid_request_header_is_a_400(header: str) -> None:
    async with serving("ollama") as (gateway, backend), with_header(gateway, {}, header) as raw:
        reply = await asyncio.wait_for(raw.reply(), PATIENCE)
        assert (reply.status, code(reply), reply.error["param"] if reply.error else None) == (
            400,
            "invalid_value",
            header.partition(":")[0].lower(),
        )
        assert not backend.requests


@pytest.mark.parametrize(
    ("mode", "phase", "limit"),
    [("silent", "waiting", "first_token_timeout"), ("stall", "streaming", "idle_timeout")],
    ids=["before the first token", "between tokens"],
)
async def test_client_that_does_not_read_stops_the_clock_of_the_backend(mode: str, phase: str, limit: str) -> None:
    """The total timeout still counts: otherwise such a client could hold a slot for ever."""
    limits = {"first_token_timeout": 100, "idle_timeout": 100, "total_timeout": 1000} | {limit: 50}
    async with serving("vllm", mode, **limits) as (gateway, _), gateway.sent({"stream": True}) as raw:
        await until(lambda: [relay._meter.phase for relay in gateway.live] == [phase])
        (relay,) = gateway.live
        relay._client.pause()
        relay.check_deadlines(relay._meter.sent + 999)
        assert relay._deadline() == (relay._meter.sent + 1000, "no end")
        relay._client.resume()
        assert relay._deadline()[0] == relay._meter.last_piece + 50
        relay.check_deadlines(relay._meter.last_piece + 51)
        async with asyncio.timeout(PATIENCE):
            assert code(await raw.reply()) == "upstream_timeout"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_client_that_does_not_read_is_not_sent_what_keeps_it_alive(stream: bool) -> None:
    """Keep-alives that it does not read would add up in memory."""
    async with serving("vllm", "silent", **PATIENT) as (gateway, _), gateway.sent({"stream": stream}):
        await until(lambda: [relay._meter.phase for relay in gateway.live] == ["waiting"])
        (relay,) = gateway.live
        relay._client.pause()
        relay._send_keepalive()
        assert not relay._client.started
        relay._client.resume()
        relay._send_keepalive()
        assert relay._client.started
