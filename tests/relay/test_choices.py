"""Several choices to one chat, on real sockets."""

import asyncio
import json

import pytest

from gateway.chat.answer import CachedUsage, Usage
from gateway.relay.choices import _total, chats_of
from tests.fakes.chats import chat
from tests.fakes.fault_backend import CANARY, TEXT, WORDS
from tests.fakes.running_gateway import PATIENCE, Reply, Running, until
from tests.relay.serving import KINDS, PATIENT, Kind, code, in_front_of, options, serving

pytestmark = pytest.mark.uvloop


def texts(reply: Reply) -> dict[int, str]:
    """Return the content of each choice by its index."""
    if not reply.is_stream:
        return {choice["index"]: choice["message"]["content"] for choice in json.loads(reply.body)["choices"]}
    found: dict[int, str] = {}
    for event in reply.events:
        for choice in event["choices"] if isinstance(event, dict) and "choices" in event else ():
            found[choice["index"]] = found.get(choice["index"], "") + choice["delta"].get("content", "")
    return found


async def is_idle(gateway: Running) -> None:
    await until(gateway.is_idle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 8])
async def test_plain_answer_has_all_choices_and_one_usage(kind: Kind, count: int) -> None:
    async with serving(kind) as (gateway, backend):
        reply = await gateway.ask({"n": count, "max_tokens": 100})
        assert (reply.status, texts(reply)) == (200, dict.fromkeys(range(count), TEXT))
        body = json.loads(reply.body)
        assert [choice["finish_reason"] for choice in body["choices"]] == ["stop"] * count
        usage = {"prompt_tokens": 7, "completion_tokens": len(WORDS) * count}
        assert body["usage"] == usage | {"total_tokens": 7 + len(WORDS) * count}
        assert reply.headers["x-gateway-backend"] == kind
        assert len(backend.requests) == count
        assert not any(b'"n":' in request for request in backend.requests)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("usage", [False, True])
async def test_stream_interleaves_the_choices_by_index(kind: Kind, usage: bool) -> None:
    async with serving(kind) as (gateway, _):
        reply = await gateway.ask({"n": 3, "stream": True, "stream_options": {"include_usage": usage}})
        assert texts(reply) == dict.fromkeys(range(3), TEXT)
        *events, last = reply.events
        assert last == "[DONE]"
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
        for index in range(3):
            choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
        totals = [event["usage"] for event in events if event.get("usage")]
        tokens = {"prompt_tokens": 7, "completion_tokens": 3 * len(WORDS), "total_tokens": 7 + 3 * len(WORDS)}
        assert totals == ([tokens] if usage else [])
        assert all(("usage" in event) is usage for event in events)


@pytest.mark.parametrize("kind", KINDS)
async def test_each_choice_has_its_own_ticket(kind: Kind) -> None:
    async with serving(kind, max_concurrency=2, **PATIENT) as (gateway, backend):
        assert texts(await gateway.ask({"n": 5})) == dict.fromkeys(range(5), TEXT)
        assert backend.most_at_once <= 2
        assert len(backend.requests) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_exchange_with_several_choices_is_one_request_with_the_tokens_of_all(kind: Kind, stream: bool) -> None:
    async with serving(kind, **PATIENT) as (gateway, _):
        await gateway.ask({"n": 3, "stream": stream})
        await is_idle(gateway)
        (record,) = gateway.exchanges()
        assert (record["status"], record["outcome"], record["stream"], record["attempts"]) == (200, "ok", stream, 3)
        route = {"tier": "standard", "backend": kind}
        assert gateway.metric("gateway_requests_total", endpoint="chat", outcome="ok", **route) == 1
        assert gateway.metric("gateway_tokens_total", type="prompt", **route) == 7
        assert gateway.metric("gateway_tokens_total", type="completion", **route) == 3 * len(WORDS)
        assert gateway.metric("gateway_request_duration_seconds_count", **route) == 1


async def test_choice_that_fails_is_what_is_recorded_of_the_exchange() -> None:
    async with serving("vllm", **PATIENT) as (gateway, backend):
        backend.script += ["cut", "slow"]
        await gateway.ask({"n": 2, "stream": True})
        await is_idle(gateway)
        (record,) = gateway.exchanges()
        assert (record["outcome"], record["code"]) == ("upstream_error", "upstream_error")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_leaves_ends_every_choice(kind: Kind, stream: bool) -> None:
    async with serving(kind, "slow", max_concurrency=2, **PATIENT) as (gateway, backend):
        async with gateway.sent({"n": 4, "stream": stream}):
            await until(lambda: len(backend.open_peers) + gateway.waiting == 4)
        await is_idle(gateway)
        await until(lambda: not backend.open_peers)
        assert [record["status"] for record in gateway.exchanges()] == [499]
        assert len(backend.requests) <= 2


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_error_of_one_choice_is_the_error_of_the_answer(stream: bool) -> None:
    async with serving("vllm", "slow", **PATIENT) as (gateway, backend):
        backend.script += ["silent", "silent"]
        asked = asyncio.create_task(gateway.ask({"n": 3, "stream": stream, "max_tokens": 5}))
        await until(lambda: len(backend.requests) == 3)
        gateway.gateway.cut_off()
        reply = await asyncio.wait_for(asked, PATIENCE)
        assert reply.error is not None
        assert reply.error["code"] == "shutting_down"
        assert b"[DONE]" not in reply.body
        await is_idle(gateway)


async def test_refusal_of_one_choice_is_answered_once() -> None:
    async with serving("vllm", "silent", max_concurrency=1, max_queue=1, **PATIENT) as (gateway, backend):
        reply = await gateway.ask({"n": 4})
        assert (reply.status, code(reply)) == (503, "queue_full")
        assert "retry-after" in reply.headers
        await is_idle(gateway)
        assert len(backend.requests) <= 1
        for body in ({"n": 2, "messages": []}, {"n": 9}, {"n": 0}):
            assert (await gateway.ask(body)).status == 400


@pytest.mark.parametrize("kind", KINDS)
async def test_choice_that_fails_in_mid_stream_ends_all_with_one_error(kind: Kind) -> None:
    async with serving(kind, **PATIENT) as (gateway, backend):
        backend.script += ["cut", "slow"]
        reply = await gateway.ask({"n": 2, "stream": True})
        assert reply.status == 200
        errors = [event for event in reply.events if isinstance(event, dict) and "error" in event]
        assert [error["error"]["code"] for error in errors] == ["upstream_error"]
        assert reply.events[-1] == errors[0]
        assert CANARY not in reply.body.decode()
        await is_idle(gateway)
        await until(lambda: not backend.open_peers)


async def test_plain_answer_is_kept_alive_while_choices_are_made() -> None:
    async with in_front_of(options("ollama", time_to_first_token=1.1), top={"heartbeat": 0.05}, **PATIENT) as (
        gateway,
        server,
    ):
        server.engine.say(["Good", " day"])
        server.engine.say(["Bye"])
        async with gateway.sent({"n": 2}, "x-stainless-read-timeout: 1") as raw, asyncio.timeout(PATIENCE):
            reply = await raw.reply()
        assert reply.body.startswith(b"  ")
        assert sorted(texts(reply).values()) == ["Bye", "Good day"]


async def test_plain_answer_that_was_kept_alive_ends_with_one_error() -> None:
    async with serving("ollama", "silent", top={"heartbeat": 0.05}, **PATIENT) as (gateway, _):
        async with gateway.sent({"n": 2}, "x-stainless-read-timeout: 1") as raw, asyncio.timeout(PATIENCE):
            head = await raw.reader.readuntil(b"\r\n\r\n")
            gateway.gateway.cut_off()
            rest = await raw.reader.readuntil(b"0\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert rest.count(b"shutting_down") == 1
        await is_idle(gateway)


def test_choices_with_a_seed_differ_and_can_be_repeated() -> None:
    assert [one.seed for one in chats_of(chat(n=3, seed=5))] == [5, 6, 7]
    assert [one.seed for one in chats_of(chat(n=2, seed=2**63 - 1))] == [2**63 - 1, -(2**63)]
    assert [(one.seed, one.n) for one in chats_of(chat(n=2))] == [(None, None)] * 2


def test_cached_tokens_of_several_choices_are_those_that_were_there_before() -> None:
    one, other = chat(), chat()
    usages = [CachedUsage(10, 1, 4), CachedUsage(10, 2, 8), None, CachedUsage(20, 3, 16)]
    assert _total([one, one, one, other], usages) == CachedUsage(30, 6, 20)
    assert _total([one, other], [Usage(10, 1), None]) == Usage(10, 1)
