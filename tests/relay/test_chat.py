"""One exchange carried out: admitted, forwarded, streamed back, and ended in the right words whatever happens; on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest

from gateway import config, simulate
from gateway.admission.scheduler import WaitEstimate
from gateway.errors import UpstreamError
from gateway.relay.chat import waiting_note
from gateway.upstream.failures import check_headers
from tests.fakes.fault_backend import CANARY, MODEL, TEXT, FaultBackend
from tests.fakes.pictures import picture_url
from tests.fakes.running_gateway import PATIENCE, PROMPT, TIMES, Raw, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

Kind = Literal["ollama", "vllm"]
KINDS = ["ollama", "vllm"]
IMAGE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": picture_url()}}],
    }
]
PATIENT: dict[str, Any] = {"first_token_timeout": 60, "idle_timeout": 60, "total_timeout": 60}
EMPTY_DELTA = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}


def settings(kind: Kind, urls: list[str], top: dict[str, Any], limits: dict[str, Any]) -> config.Settings:
    servers = [{"base_url": url, "models": [MODEL]} for url in urls]
    return config.build(
        {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "servers": servers, **TIMES, **limits}},
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "state_file": "",
            **top,
        }
    )


@asynccontextmanager
async def serving(
    kind: Kind, mode: str = "healthy", *, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, FaultBackend]]:
    async with (
        FaultBackend(kind, mode) as backend,
        running(settings(kind, [backend.base_url], top or {}, limits)) as gateway,
    ):
        yield gateway, backend


@asynccontextmanager
async def in_front_of(
    options: simulate.Options, *, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, simulate.Running]]:
    async with (
        stand_in(options) as server,
        running(settings(options.kind, [server.base_url], top or {}, limits)) as gateway,
    ):
        yield gateway, server


def options(kind: Kind, **more: Any) -> simulate.Options:
    return simulate.Options(kind, (simulate.Model(MODEL, vision=True),), **more)


def code(reply: Reply) -> str | None:
    return None if reply.error is None else reply.error["code"]


@asynccontextmanager
async def with_header(gateway: Running, body: dict[str, Any], header: str) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    data = json.dumps({"model": "standard", "messages": PROMPT, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n{header}\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


# The shape of an answer


@pytest.mark.parametrize("kind", KINDS)
async def test_stream_is_the_same_whichever_backend_serves(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert reply.text == TEXT
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        *chunks, done = reply.events
        assert done == "[DONE]"
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["stop"]
        assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("kind", KINDS)
async def test_usage_comes_last_where_it_was_asked_for(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        *_, usage, done = (await gateway.ask({"stream": True, "stream_options": {"include_usage": True}})).events
        assert (usage["choices"], usage["usage"], done) == (
            [],
            {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
            "[DONE]",
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_plain_answer_has_text_finish_and_usage(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        reply = await gateway.ask()
        body = json.loads(reply.body)
        assert (reply.text, body["choices"][0]["finish_reason"], body["usage"]["total_tokens"]) == (TEXT, "stop", 12)
        assert (body["object"], body["model"]) == ("chat.completion", "standard")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [{"max_tokens": 9}, {}, {"stream": True}], ids=["short", "plain", "stream"])
async def test_answer_that_says_nothing_is_told_from_one_that_does(kind: Kind, body: dict[str, Any]) -> None:
    async with serving(kind) as (gateway, backend):
        for mode in ("healthy", "wordless"):
            backend.script.append(mode)
            assert (await gateway.ask(body)).status == 200
        await until(gateway.is_idle)
        told = [line for line in gateway.exchanges() if line["event"] == "exchange"]
        assert [(line["outcome"], line["empty"], line["chosen"]) for line in told] == [
            ("ok", False, kind),
            ("ok", True, kind),
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_exchange_is_counted(kind: Kind, stream: bool) -> None:
    async with serving(kind) as (gateway, _):
        await gateway.ask({"stream": stream})
        await until(gateway.is_idle)
        route = {"tier": "standard", "backend": kind}
        assert gateway.metric("gateway_requests_total", endpoint="chat", outcome="ok", **route) == 1
        assert gateway.metric("gateway_tokens_total", type="completion", **route) == 5
        assert gateway.metric("gateway_overhead_seconds_count") == 1
        seen = stream or kind == "ollama"  # pieces are seen as they come
        assert gateway.metric("gateway_time_to_first_token_seconds_count", **route) == seen
        line = gateway.exchanges()[-1]
        assert (line["outcome"], line["status"], line["stream"], line["attempts"]) == ("ok", 200, stream, 1)


# Silence


@pytest.mark.parametrize("kind", KINDS)
async def test_silent_stream_begins_and_beats_and_then_has_the_real_answer(kind: Kind) -> None:
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with in_front_of(options(kind, time_to_first_token=0.8), top=top, **PATIENT) as (gateway, server):
        server.engine.say(["Good", " day"])
        reply = await gateway.ask({"stream": True})
        *chunks, done = reply.events
        first, *rest = [chunk["choices"][0] for chunk in chunks]
        beats = [choice for choice in rest if choice == EMPTY_DELTA]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert len(beats) >= 3
        assert rest[: len(beats)] == beats
        assert (reply.text, done) == ("Good day", "[DONE]")
        assert sum("role" in choice["delta"] for choice in (first, *rest)) == 1


async def test_stream_that_began_before_the_backend_spoke_ends_with_its_error() -> None:
    async with serving("vllm", "silent", top={"commit_after": 0.05, "heartbeat": 0.05}) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_timeout")
        assert "[DONE]" not in reply.events


async def test_stream_that_waits_in_line_begins_too() -> None:
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with (
        serving("vllm", "silent", top=top, max_concurrency=1, **PATIENT) as (gateway, _),
        gateway.sent({"stream": True}),
    ):
        await until(lambda: gateway.running == 1)
        async with gateway.sent({"stream": True}) as waiting, asyncio.timeout(PATIENCE):
            status, headers = await waiting.head()
            assert (status, gateway.waiting, headers["x-gateway-attempts"]) == (200, 1, "0")
            await waiting.reader.readuntil(b'"delta":{}')


async def test_quick_stream_has_no_beat() -> None:
    async with serving("vllm", top={"commit_after": 0.5, "heartbeat": 0.05}) as (gateway, _):
        assert all(event["choices"][0] != EMPTY_DELTA for event in (await gateway.ask({"stream": True})).events[:-1])


@pytest.mark.parametrize("kind", KINDS)
async def test_plain_answer_is_kept_alive_by_blanks_for_who_would_give_up(kind: Kind) -> None:
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
async def test_header_of_the_read_timeout_is_never_a_reason_to_refuse(value: str) -> None:
    async with (
        serving("vllm") as (gateway, _),
        with_header(gateway, {}, f"x-stainless-read-timeout: {value}") as raw,
        asyncio.timeout(PATIENCE),
    ):
        assert (await raw.reply()).text == TEXT


# Plain answers that may be long


@pytest.mark.parametrize(("max_tokens", "streamed"), [(None, True), (1025, True), (1024, False)])
async def test_plain_answer_that_may_be_long_is_asked_for_as_a_stream(max_tokens: int | None, streamed: bool) -> None:
    async with serving("vllm") as (gateway, backend):
        reply = await gateway.ask({"max_tokens": max_tokens})
        assert (reply.status, reply.is_stream, reply.text) == (200, False, TEXT)
        assert (b'"stream":true' in backend.requests[-1]) is streamed


def test_server_that_answers_a_wish_for_a_stream_plainly_is_taken_at_its_word() -> None:
    class Response:
        fields: ClassVar = {b"content-type": b"application/json"}

    response: Any = Response()
    assert check_headers(response, b"text/event-stream", takes_plain=True) is False
    with pytest.raises(UpstreamError):
        check_headers(response, b"text/event-stream", takes_plain=False)


# Deadlines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_backend_that_never_speaks_is_504_that_is_not_to_be_tried_again(kind: Kind, stream: bool) -> None:
    async with serving(kind, "silent", total_timeout=0.4) as (gateway, backend):
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, code(reply), reply.headers["x-should-retry"]) == (504, "upstream_timeout", "false")
        assert len(backend.requests) == 1
        await until(gateway.is_idle)
        assert gateway.metric("gateway_requests_total", outcome="timeout") == 1
        assert gateway.metric("gateway_upstream_errors_total", reason="upstream_timeout") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "phase"), [("stall", "no next piece"), ("drip", "no end")])
async def test_deadline_after_the_first_byte_is_an_event_at_the_end(kind: Kind, mode: str, phase: str) -> None:
    async with serving(kind, mode, total_timeout=0.6) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_timeout")
        assert reply.error is not None
        assert phase in reply.error["message"]
        assert reply.text.startswith(TEXT)
        assert "[DONE]" not in reply.events


async def test_plain_answer_of_ollama_that_stalls_is_504() -> None:
    async with serving("ollama", "stall") as (gateway, _):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (504, "upstream_timeout")


# Refusals of the backend


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_prompt_that_is_too_long_is_the_same_error_whichever_backend_serves(kind: Kind, stream: bool) -> None:
    async with in_front_of(options(kind), **PATIENT) as (gateway, _):
        reply = await gateway.ask({"stream": stream, "messages": [{"role": "user", "content": "word " * 9000}]})
        assert (reply.status, code(reply)) == (400, "context_length_exceeded")
        assert gateway.metric("gateway_requests_total", tier="standard", outcome="client_error") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "expected"), [(500, (502, "upstream_error")), (503, (503, "backend_unavailable"))])
async def test_status_of_the_backend_becomes_ours(kind: Kind, status: int, expected: tuple[int, str]) -> None:
    async with in_front_of(options(kind, faults=(simulate.Fault("status", status=status, times=0),)), **PATIENT) as (
        gateway,
        _,
    ):
        for stream in (False, True):
            reply = await gateway.ask({"stream": stream})
            assert (reply.status, code(reply)) == expected
            assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["die", "error", "truncate"])
async def test_stream_that_breaks_ends_with_one_error_and_no_done(kind: Kind, fault: Any) -> None:
    async with in_front_of(options(kind, faults=(simulate.Fault(fault, after=3),)), **PATIENT) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_error")
        assert reply.text
        assert sum("error" in event for event in reply.events) == 1
        assert (await gateway.ask({"stream": True})).events[-1] == "[DONE]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["html", "garbage", "invalid_json", "redirect", "error_then_done"])
async def test_nothing_of_a_broken_answer_comes_through(kind: Kind, mode: str) -> None:
    async with serving(kind, mode) as (gateway, backend):
        for stream in (False, True):
            reply = await gateway.ask({"stream": stream})
            assert code(reply) is not None
            assert CANARY.encode() not in reply.body
            assert str(backend.port).encode() not in reply.body


async def test_line_that_is_no_event_is_counted() -> None:
    async with serving("ollama", "malformed") as (gateway, _):
        assert (await gateway.ask({"stream": True})).text == TEXT
        await until(gateway.is_idle)
        assert gateway.metric("gateway_upstream_errors_total", reason="malformed") > 0


# One dialect

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "get_time")
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def message_of(reply: Reply) -> tuple[dict[str, Any], str]:
    """A whole answer's message and finish reason, or what a stream's deltas make; ids of calls left out."""
    if not reply.is_stream:
        choice = json.loads(reply.body)["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        return {key: choice["message"].get(key) or "" for key in ("content", "reasoning", "reasoning_content")} | {
            "calls": calls
        }, choice["finish_reason"]
    choices = [event["choices"][0] for event in reply.events if event != "[DONE]"]
    message: dict[str, Any] = {
        key: "".join(one["delta"].get(key) or "" for one in choices)
        for key in ("content", "reasoning", "reasoning_content")
    }
    calls = [call for one in choices for call in one["delta"].get("tool_calls", ())]
    names = [call["function"]["name"] for call in calls if "id" in call]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    return message | {"calls": [{"name": name, "arguments": arguments} for name in names]}, choices[-1]["finish_reason"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("tools", "choice", "finish"),
    [(TOOLS, NAMED, "stop"), (TOOLS[:1], "required", "tool_calls")],
    ids=["named", "required"],
)
async def test_forced_call_is_one_whichever_backend_serves(
    kind: Kind, stream: bool, tools: Any, choice: Any, finish: str
) -> None:
    async with serving(kind, "forced") as (gateway, _):
        message, found = message_of(await gateway.ask({"stream": stream, "tools": tools, "tool_choice": choice}))
        (call,) = message["calls"]
        assert (call["name"], json.loads(call["arguments"]), message["content"], found) == (
            "get_weather",
            {"city": "Oslo"},
            "",
            finish,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_thought_is_told_apart_whichever_backend_serves(kind: Kind, stream: bool) -> None:
    async with serving(kind, "thinks") as (gateway, _):
        message, finish = message_of(await gateway.ask({"stream": stream}))
        assert (message["content"], message["reasoning"], message["reasoning_content"], finish) == (
            "Hello",
            "why",
            "why",
            "stop",
        )


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_limit_that_a_vllm_finds_too_large_is_left_to_it(stream: bool) -> None:
    async with serving("vllm") as (gateway, backend):
        backend.script.append("too_long")
        reply = await gateway.ask({"stream": stream, "max_tokens": 9000})
        assert (reply.status, reply.text) == (200, TEXT)
        bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in backend.requests]
        assert [body.get("max_tokens") for body in bodies] == [9000, None]


async def test_prompt_that_is_too_long_without_a_limit_too_is_the_clients_error() -> None:
    async with serving("vllm", "too_long") as (gateway, backend):
        reply = await gateway.ask({"max_tokens": 9000})
        assert (reply.status, code(reply), len(backend.requests)) == (400, "context_length_exceeded", 2)
        assert reply.error is not None
        assert "4096" in reply.error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_wish_to_think_is_dropped_where_the_model_turns_out_unable(stream: bool) -> None:
    async with serving("ollama") as (gateway, backend):
        backend.script.append("cannot_think")
        reply = await gateway.ask({"stream": stream, "reasoning_effort": "high"})
        assert (reply.status, reply.text) == (200, TEXT)
        assert [b'"think":"high"' in request for request in backend.requests] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
async def test_hopeless_length_is_refused_before_any_backend_sees_it(kind: Kind) -> None:
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


async def test_schema_that_is_too_complex_is_refused_while_others_are_queued() -> None:
    schema = {"enum": [f"n{number:03}" for number in range(700)], "anyOf": [{"minLength": 1}] * 1200}
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    async with serving("ollama", "silent", max_concurrency=1, **PATIENT) as (gateway, backend):
        first = asyncio.create_task(gateway.ask({"messages": PROMPT}))
        await until(lambda: len(backend.requests) == 1)
        reply = await asyncio.wait_for(gateway.ask({"messages": PROMPT, "response_format": asked}), PATIENCE)
        assert (reply.status, code(reply), len(backend.requests)) == (400, "invalid_value", 1)
        assert reply.error is not None
        assert "too complex" in reply.error["message"]
        assert reply.headers["x-gateway-attempts"] == "0"
        first.cancel()
        await asyncio.wait([first])


@pytest.mark.parametrize("kind", KINDS)
async def test_large_schemas_are_served(kind: Kind) -> None:
    """They are checked and rendered in steps."""
    properties = {f"property_{number}": {"type": "string", "enum": ["a", "b"]} for number in range(300)}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    tools = [{"type": "function", "function": {"name": f"f{number}", "parameters": schema}} for number in range(4)]
    async with serving(kind) as (gateway, backend):
        reply = await gateway.ask({"messages": PROMPT, "tools": tools, "tool_choice": "required"})
        assert reply.status == 200
        assert b'"property_299"' in backend.requests[-1]


async def test_image_for_a_model_without_eyes_is_refused_before_the_backend_sees_it() -> None:
    async with (
        FaultBackend("ollama", capabilities=("completion",)) as backend,
        running(settings("ollama", [backend.base_url], {}, {})) as gateway,
    ):
        reply = await gateway.ask({"messages": IMAGE})
        assert (reply.status, code(reply), backend.requests) == (400, "unsupported_parameter", [])


async def test_answer_that_is_held_back_beats_meanwhile() -> None:
    """One of several forced functions is known only when its text is whole."""
    body = {"stream": True, "tools": TOOLS, "tool_choice": "required"}
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with (
        serving("ollama", "slow", top=top, **PATIENT) as (gateway, _),
        gateway.sent(body) as raw,
        asyncio.timeout(PATIENCE),
    ):
        await raw.head()
        for _ in range(3):
            seen = await raw.reader.readuntil(b'"delta":{}')
            assert b"word" not in seen


# The line


async def test_full_queue_and_long_wait_are_503_with_a_time_to_come_back() -> None:
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


async def test_images_go_to_ollama_one_at_a_time_while_texts_pass() -> None:
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


async def test_images_go_to_vllm_all_at_once() -> None:
    async with serving("vllm", "silent", **PATIENT) as (gateway, backend), AsyncExitStack() as clients:
        for _ in range(5):
            await clients.enter_async_context(gateway.sent({"messages": IMAGE}))
        await until(lambda: len(backend.requests) == 5)
        assert gateway.waiting == 0


# Several servers


@asynccontextmanager
async def servers(
    *modes: str, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, FaultBackend, FaultBackend]]:
    """Two servers behind one backend."""
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(FaultBackend("vllm", mode)) for mode in modes]
        gateway = running(settings("vllm", [one.base_url, two.base_url], top or {}, limits))
        yield await stack.enter_async_context(gateway), one, two


async def test_least_busy_server_is_taken_first() -> None:
    async with servers("silent", "silent", **PATIENT) as (gateway, one, two), AsyncExitStack() as clients:
        for _ in range(6):
            await clients.enter_async_context(gateway.sent({}))
        await until(lambda: len(one.requests) == len(two.requests) == 3)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_server_that_refuses_connections_is_passed_over(stream: bool) -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one._server.close()
        reply = await gateway.ask({"stream": stream})
        assert (reply.text, reply.headers["x-gateway-attempts"]) == (TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (0, 1)
        assert gateway.metric("gateway_retries_total", backend="vllm", reason="connect") == 1
        await until(gateway.is_idle)
        assert gateway.exchanges()[-1]["attempts"] == 2


@pytest.mark.parametrize("mode", ["close", "rst"])
async def test_server_that_hangs_up_before_a_byte_is_passed_over(mode: str) -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = mode
        reply = await gateway.ask()
        assert (reply.text, reply.headers["x-gateway-attempts"]) == (TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (1, 1)


async def test_two_tries_are_the_most() -> None:
    async with servers("close", "close") as (gateway, one, two):
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "2")
        assert len(one.requests) + len(two.requests) == 2


async def test_answer_that_began_is_not_asked_for_again() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "truncated"
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "1")
        assert not two.requests


async def test_silent_stream_that_began_may_still_move_to_the_other_server() -> None:
    """The role chunk is ours: failing over stays possible until the backend's first piece."""
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


async def test_stream_of_which_only_the_head_came_goes_to_the_other_server() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "head_alone"
        reply = await gateway.ask({"stream": True})
        assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, "2")
        assert (len(one.requests), len(two.requests)) == (1, 1)
        assert gateway.metric("gateway_retries_total", backend="vllm", reason="truncated") == 1
        await until(gateway.is_idle)


async def test_stream_of_which_something_came_is_not_asked_for_again() -> None:
    async with servers("healthy", "healthy") as (gateway, one, two):
        one.mode = "role_alone"
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "1")
        assert not two.requests


# The end


async def test_gateway_that_stops_tells_everyone() -> None:
    """A stream that began gets an event, who waits in line a 503."""
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


# The waiting line


async def test_stream_that_waits_is_told_its_place_where_that_is_wanted() -> None:
    top = {"waiting_note": True, "commit_after": 0.05, "heartbeat": 0.05}
    async with serving("ollama", "silent", top=top, **PATIENT) as (gateway, backend), gateway.sent({"messages": IMAGE}):
        await until(lambda: len(backend.requests) == 1)
        async with gateway.sent({"messages": IMAGE, "stream": True}) as waiting:
            await waiting.head()
            read = b""
            while read.count(b"place 1") < 4:  # under two names in each note
                read += await asyncio.wait_for(waiting.reader.read(4096), PATIENCE)
            assert read.count(b'"role":"assistant"') == 1
            assert b'"reasoning":"Waiting in line: place 1.\\n"' in read


def test_note_tells_the_time_in_whole_words() -> None:
    assert waiting_note(WaitEstimate(2, 51.0, is_loading=True)) == "The model is being loaded.\n"
    notes = [waiting_note(WaitEstimate(2, seconds)) for seconds in (None, 0.2, 51.0, 255.0)]
    assert notes == [
        "Waiting in line: place 2.\n",
        "Waiting in line: place 2, about 1 s.\n",
        "Waiting in line: place 2, about 51 s.\n",
        "Waiting in line: place 2, about 5 min.\n",
    ]


async def test_plain_answer_is_kept_alive_in_line() -> None:
    top = {"heartbeat": 0.05}
    async with serving("vllm", "silent", top=top, **PATIENT, max_concurrency=1) as (gateway, backend), gateway.sent({}):
        await until(lambda: len(backend.requests) == 1)
        async with with_header(gateway, {}, "X-Stainless-Read-Timeout: 1") as waiting:
            status, headers = await asyncio.wait_for(waiting.head(), PATIENCE)
            assert (status, headers["content-type"], gateway.waiting) == (200, "application/json", 1)
            assert int(headers["x-gateway-queue-ms"]) >= 700
            assert b" " in await asyncio.wait_for(waiting.reader.read(64), PATIENCE)


async def test_request_past_its_clients_deadline_ends_with_504_and_frees_its_slot() -> None:
    async with (
        serving("ollama", "silent", **PATIENT) as (gateway, _),
        with_header(gateway, {}, "X-Gateway-Timeout: 0.2") as raw,
    ):
        reply = await asyncio.wait_for(raw.reply(), PATIENCE)
        assert (reply.status, code(reply), reply.headers["x-should-retry"]) == (504, "upstream_timeout", "false")
        await until(lambda: gateway.running == 0)


async def test_one_who_waits_past_the_clients_deadline_gets_503() -> None:
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
async def test_wish_that_means_nothing_is_refused(header: str) -> None:
    async with serving("ollama") as (gateway, backend), with_header(gateway, {}, header) as raw:
        reply = await asyncio.wait_for(raw.reply(), PATIENCE)
        assert (reply.status, code(reply), reply.error["param"] if reply.error else None) == (
            400,
            "invalid_value",
            header.partition(":")[0].lower(),
        )
        assert not backend.requests


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


async def test_persons_behind_one_key_take_turns() -> None:
    top = {"user_header": "X-Person"}
    async with (
        serving("ollama", "silent", top=top, **PATIENT, model_concurrency=1) as (gateway, backend),
        AsyncExitStack() as clients,
    ):
        order = [await clients.enter_async_context(with_header(gateway, {}, "X-Person: ann"))]
        await until(lambda: len(backend.requests) == 1)
        for number, person in enumerate(("ann", "ann", "bob"), 1):
            content = [{"role": "user", "content": f"{person}{number}"}]
            order.append(
                await clients.enter_async_context(with_header(gateway, {"messages": content}, f"X-Person: {person}"))
            )
            await until(lambda: gateway.waiting == number)  # noqa: B023  # looked at before it changes
        order[0].leave()
        await until(lambda: len(backend.requests) == 2)
        order[1].leave()
        await until(lambda: len(backend.requests) == 3)
        assert [b"ann1" in backend.requests[1], b"bob3" in backend.requests[2]] == [True, True]


async def test_own_limits_of_a_tier_hold() -> None:
    top = {"tiers": {"standard": {"models": {"vllm": MODEL}, "limits": {"vllm": {"concurrency": 1, "max_queue": 0}}}}}
    async with serving("vllm", "silent", top=top, **PATIENT) as (gateway, backend), gateway.sent({}):
        await until(lambda: len(backend.requests) == 1)
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (503, "queue_full")


@pytest.mark.parametrize(("parallel", "learned"), [(3, 3), (1, 1)])
async def test_what_an_ollama_does_at_once_is_learned_and_shown(parallel: int, learned: int) -> None:
    slow = options("ollama", parallel=parallel, tokens_per_second=20, answer_tokens=16)
    slow = replace(slow, models=(simulate.Model(MODEL),))
    async with in_front_of(slow, **PATIENT) as (gateway, _):
        replies = await asyncio.gather(*(gateway.ask() for _ in range(4)))
        assert [reply.status for reply in replies] == [200] * 4
        status = gateway.gateway._operations.status()["backends"]["ollama"]
        assert status["servers"][0]["model_slots"] == {MODEL: {"running": 0, "limit": learned, "learned": True}}


@pytest.mark.parametrize("stream", [True, False])
async def test_fault_of_our_own_is_told_and_logged_without_its_words(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The words of an exception may be the client's."""

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
