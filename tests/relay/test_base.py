"""One exchange on real sockets: crashes, queueing, retries, shutdown.

Covers: gateway/app.py
Covers: gateway/relay/requests.py
"""

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from gateway import simulate
from tests.fakes.fault_backend import CANARY, MODEL, TEXT, FaultBackend
from tests.fakes.running_gateway import PATIENCE, running, until
from tests.relay.serving import (
    IMAGE,
    KINDS,
    PATIENT,
    Kind,
    code,
    in_front_of,
    options,
    servers,
    serving,
    settings,
    with_header,
)

pytestmark = pytest.mark.uvloop


@pytest.mark.parametrize("stream", [True, False])
async def test_crash_is_logged_without_the_exceptions_message(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The message of an exception may quote the client."""

    def fail(*_: object) -> None:
        raise ValueError(CANARY)

    monkeypatch.setattr("gateway.chat.normalizer.Normalizer.normalize", fail)
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with serving("ollama") as (gateway, _):
        reply = await gateway.ask({"stream": stream, "tools": tools})
        body = reply.events[-1] if stream and reply.status == 200 else json.loads(reply.body)
        assert (body["error"]["type"], body["error"]["code"]) == ("server_error", None)
        assert (gateway.exchanges()[-1]["status"], gateway.exchanges()[-1]["outcome"]) == (500, "upstream_error")
        assert gateway.exchanges()[-1]["stream"] is stream
    assert "ValueError" in caplog.text
    assert CANARY not in caplog.text


# Queueing


async def test_full_queue_and_queue_timeout_are_503_with_retry_after() -> None:
    async with (
        serving("vllm", "silent", max_concurrency=1, max_queue=1, **PATIENT | {"queue_timeout": 0.5}) as (gateway, _),
        gateway.sent({}),
    ):
        await until(lambda: gateway.running == 1)
        async with gateway.sent({}) as waiting:
            await until(lambda: gateway.waiting == 1)
            refused = await gateway.ask({"stream": True})
            assert (refused.status, code(refused), refused.headers["x-gateway-attempts"]) == (503, "queue_full", "0")
            async with asyncio.timeout(PATIENCE):
                late = await waiting.reply()
            assert (late.status, code(late)) == (503, "queue_timeout")
            assert int(late.headers["x-gateway-queue-ms"]) >= 400
        assert int(refused.headers["retry-after"]) >= 1
        assert int(late.headers["retry-after"]) >= 1
        assert gateway.metric("gateway_rejected_total", backend="vllm", reason="queue_full") == 1
        assert gateway.metric("gateway_rejected_total", backend="vllm", reason="queue_timeout") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_text_that_is_certainly_too_long_is_refused_without_asking_a_backend(kind: Kind) -> None:
    async with (
        FaultBackend(kind, context_length=512) as backend,
        running(settings(kind, [backend.base_url], {}, {})) as gateway,
    ):
        reply = await gateway.ask({"messages": [{"role": "user", "content": "x" * 9000}]})
        assert (reply.status, code(reply), backend.requests) == (400, "context_length_exceeded", [])
        assert reply.error is not None
        assert "512" in reply.error["message"]
        assert "context_length_exceeded" in reply.error["message"]
        assert (await gateway.ask({"messages": [{"role": "user", "content": "x" * 8000}]})).status == 200


async def test_ollama_gets_one_image_at_a_time_while_texts_pass() -> None:
    async with (
        serving("ollama", "silent", model_concurrency=4, **PATIENT) as (gateway, backend),
        AsyncExitStack() as clients,
    ):
        for _ in range(2):
            await clients.enter_async_context(gateway.sent({"messages": IMAGE}))
        await until(lambda: gateway.waiting == 1)
        for _ in range(3):
            await clients.enter_async_context(gateway.sent({}))
        await until(lambda: gateway.running == 4)
        assert gateway.waiting == 1
        await until(lambda: len(backend.requests) == 4)
        assert sum(b'"images"' in request for request in backend.requests) == 1


async def test_vllm_gets_all_images_at_once() -> None:
    async with serving("vllm", "silent", **PATIENT) as (gateway, backend), AsyncExitStack() as clients:
        for _ in range(5):
            await clients.enter_async_context(gateway.sent({"messages": IMAGE}))
        await until(lambda: len(backend.requests) == 5)
        assert gateway.waiting == 0


@pytest.mark.parametrize("wish", ["header", "alias"])
async def test_batch_waits_behind_interactive(wish: str) -> None:
    top = {
        "tiers": {"standard": {"models": {"ollama": MODEL}, "aliases": [{"name": "background", "priority": "batch"}]}}
    }
    async with (
        serving("ollama", "silent", top=top, **PATIENT, model_concurrency=1) as (gateway, backend),
        AsyncExitStack() as clients,
    ):
        first = await clients.enter_async_context(gateway.sent({}))
        await until(lambda: len(backend.requests) == 1)
        body, header = ({}, "X-Gateway-Priority: batch") if wish == "header" else ({"model": "background"}, "X-Any: 1")
        content = [{"role": "user", "content": "batch"}]
        await clients.enter_async_context(with_header(gateway, {"messages": content, **body}, header))
        await until(lambda: gateway.waiting == 1)
        await clients.enter_async_context(gateway.sent({"messages": [{"role": "user", "content": "chat"}]}))
        await until(lambda: gateway.waiting == 2)
        first.leave()
        await until(lambda: len(backend.requests) == 2)
        assert b'"chat"' in backend.requests[1]


async def test_users_of_one_key_take_turns() -> None:
    top = {"user_header": "X-User"}
    async with (
        serving("ollama", "silent", top=top, **PATIENT, model_concurrency=1) as (gateway, backend),
        AsyncExitStack() as clients,
    ):
        order = [await clients.enter_async_context(with_header(gateway, {}, "X-User: ann"))]
        await until(lambda: len(backend.requests) == 1)
        for number, user in enumerate(("ann", "ann", "bob"), 1):
            content = [{"role": "user", "content": f"{user}{number}"}]
            order.append(
                await clients.enter_async_context(with_header(gateway, {"messages": content}, f"X-User: {user}"))
            )
            await until(lambda: gateway.waiting == number)  # noqa: B023  # awaited before it changes
        order[0].leave()
        await until(lambda: len(backend.requests) == 2)
        order[1].leave()
        await until(lambda: len(backend.requests) == 3)
        assert [b"ann1" in backend.requests[1], b"bob3" in backend.requests[2]] == [True, True]


async def test_limits_of_a_tier_override_the_backends() -> None:
    top = {"tiers": {"standard": {"models": {"vllm": MODEL}, "limits": {"vllm": {"concurrency": 1, "max_queue": 0}}}}}
    async with serving("vllm", "silent", top=top, **PATIENT) as (gateway, backend), gateway.sent({}):
        await until(lambda: len(backend.requests) == 1)
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (503, "queue_full")


@pytest.mark.parametrize(("parallel", "learned"), [(3, 3), (1, 1)])
async def test_parallelism_of_ollama_is_learned_and_shown(parallel: int, learned: int) -> None:
    slow = options("ollama", parallel=parallel, tokens_per_second=20, answer_tokens=16)
    slow = replace(slow, models=(simulate.Model(MODEL),))
    async with in_front_of(slow, **PATIENT) as (gateway, _):
        replies = await asyncio.gather(*(gateway.ask() for _ in range(4)))
        assert [reply.status for reply in replies] == [200] * 4
        status = gateway.gateway._operations.status()["backends"]["ollama"]
        assert status["servers"][0]["model_slots"] == {MODEL: {"running": 0, "limit": learned, "learned": True}}


# Several servers


async def test_least_busy_server_is_chosen_first() -> None:
    async with servers("silent", "silent", **PATIENT) as (gateway, one, two), AsyncExitStack() as clients:
        for _ in range(6):
            await clients.enter_async_context(gateway.sent({}))
        await until(lambda: len(one.requests) == len(two.requests) == 3)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_refused_connection_is_retried_on_the_other_server(stream: bool) -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one._server.close()
        reply = await gateway.ask({"stream": stream})
        assert (reply.text, reply.headers["x-gateway-attempts"]) == (TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (0, 1)
        assert gateway.metric("gateway_retries_total", backend="vllm", reason="connect") == 1
        await until(gateway.is_idle)
        assert gateway.exchanges()[-1]["attempts"] == 2


@pytest.mark.parametrize("mode", ["close", "rst"])
async def test_connection_closed_before_a_byte_is_retried_on_the_other_server(mode: str) -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = mode
        reply = await gateway.ask()
        assert (reply.text, reply.headers["x-gateway-attempts"]) == (TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_request_is_attempted_at_most_twice() -> None:
    async with servers("close", "close") as (gateway, one, two):
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "2")
        assert len(one.requests) + len(two.requests) == 2


async def test_answer_that_has_begun_is_not_retried() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "truncated"
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "1")
        assert not two.requests


async def test_committed_stream_without_a_token_can_still_fail_over() -> None:
    """The role chunk is the gateway's own: failover is possible until the backend's first piece."""
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with (
        servers("silent", "healthy", top=top, **PATIENT) as (gateway, one, two),
        gateway.sent({"stream": True}) as raw,
    ):
        async with asyncio.timeout(PATIENCE):
            status, _ = await raw.head()
            await raw.reader.readuntil(b'"delta":{}')
            for peer in one.open_peers:
                peer.reset()
            rest = await raw.reader.readuntil(b"[DONE]")
        assert status == 200
        assert b"Hello" in rest
        assert b"error" not in rest
        assert len(two.requests) == 1


async def test_stream_that_ends_after_its_head_is_retried_on_the_other_server() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "head_alone"
        reply = await gateway.ask({"stream": True})
        assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (1, 1)
        assert gateway.metric("gateway_retries_total", backend="vllm", reason="truncated") == 1
        await until(gateway.is_idle)


async def test_stream_that_ends_after_its_first_piece_is_not_retried() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "role_alone"
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "1")
        assert not two.requests


# Shutdown


async def test_shutdown_ends_streams_with_an_event_and_queued_requests_with_503() -> None:
    async with serving("vllm", "slow", max_concurrency=1, **PATIENT) as (gateway, _):
        async with gateway.sent({"stream": True}) as streaming, gateway.sent({"stream": True}) as waiting:
            await until(lambda: (gateway.running, gateway.waiting) == (1, 1))
            async with asyncio.timeout(PATIENCE):
                await streaming.reader.readuntil(b"word")
                gateway.gateway.begin_drain()
                await streaming.reader.readuntil(b"word")
                gateway.gateway.cut_off()
                rest = await streaming.reader.readuntil(b"0\r\n\r\n")
                refused = await waiting.reply()
        assert b'"code":"shutting_down"' in rest
        assert b"[DONE]" not in rest
        assert (refused.status, code(refused)) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        await until(gateway.is_idle)
