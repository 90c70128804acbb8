"""One chat completion through the relay, on real sockets: the same whichever engine serves it."""

import asyncio
import json
from typing import Any, ClassVar

import httpx2
import pytest

from gateway import simulate
from gateway.admission.wait_estimates import WaitEstimate
from gateway.engines.ollama import Ollama
from gateway.engines.vllm import Vllm
from gateway.errors import UpstreamError
from gateway.relay.chat import waiting_note
from gateway.relay.turns import in_turns
from gateway.telemetry.exchange import Meter
from gateway.upstream.failures import check_headers
from tests.fakes.fault_backend import CANARY, MODEL, TEXT, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, PROMPT, Reply, running, until
from tests.relay.serving import EMPTY_DELTA, IMAGE, KINDS, PATIENT, Kind, code, in_front_of, options, serving, settings

pytestmark = pytest.mark.uvloop


# The shape of an answer


@pytest.mark.parametrize("kind", KINDS)
async def test_stream_has_the_same_shape_from_every_engine(kind: Kind) -> None:
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
async def test_usage_chunk_comes_last_when_requested(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        *_, usage, done = (await gateway.ask({"stream": True, "stream_options": {"include_usage": True}})).events
        assert (usage["choices"], usage["usage"], done) == (
            [],
            {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
            "[DONE]",
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_plain_answer_has_text_finish_reason_and_usage(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        reply = await gateway.ask()
        body = json.loads(reply.body)
        assert (reply.text, body["choices"][0]["finish_reason"], body["usage"]["total_tokens"]) == (TEXT, "stop", 12)
        assert (body["object"], body["model"]) == ("chat.completion", "standard")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [{"max_tokens": 9}, {}, {"stream": True}], ids=["short", "plain", "stream"])
async def test_empty_answer_is_recorded_as_empty(kind: Kind, body: dict[str, Any]) -> None:
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


# Keep-alive of streams


@pytest.mark.parametrize("kind", KINDS)
async def test_silent_stream_starts_with_keepalives_and_then_has_the_answer(kind: Kind) -> None:
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


@pytest.mark.virtual_time(only=True)
async def test_stream_committed_before_the_first_token_ends_with_the_backends_error() -> None:
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with serving("vllm", "silent", top=top, first_token_timeout=0.5) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_timeout")
        assert "[DONE]" not in reply.events


async def test_queued_stream_starts_and_is_kept_alive() -> None:
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


async def test_fast_stream_has_no_keepalive() -> None:
    async with serving("vllm", top={"commit_after": 0.5, "heartbeat": 0.05}) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert reply.text == TEXT
        assert all(event["choices"][0] != EMPTY_DELTA for event in reply.events[:-1])


async def test_withheld_answer_is_kept_alive() -> None:
    """Which of several functions was called is known only when its text is complete."""
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


# The waiting note


async def test_queued_stream_shows_its_position_with_waiting_note() -> None:
    top = {"waiting_note": True, "commit_after": 0.05, "heartbeat": 0.05}
    async with serving("ollama", "silent", top=top, **PATIENT) as (gateway, backend), gateway.sent({"messages": IMAGE}):
        await until(lambda: len(backend.requests) == 1)
        async with gateway.sent({"messages": IMAGE, "stream": True}) as waiting:
            await waiting.head()
            read = b""
            while read.count(b"position 1") < 4:  # each note has it under two names
                read += await asyncio.wait_for(waiting.reader.read(4096), PATIENCE)
            assert read.count(b'"role":"assistant"') == 1
            assert b'"reasoning":"Queued at position 1.\\n"' in read


def test_waiting_note_rounds_the_wait_up() -> None:
    assert waiting_note(WaitEstimate(2, 51.0, is_loading=True)) == "The model is loading.\n"
    notes = [waiting_note(WaitEstimate(2, seconds)) for seconds in (None, 0.2, 51.0, 255.0)]
    assert notes == [
        "Queued at position 2.\n",
        "Queued at position 2, about 1 s to wait.\n",
        "Queued at position 2, about 51 s to wait.\n",
        "Queued at position 2, about 5 min to wait.\n",
    ]


# Plain answers that may be long


@pytest.mark.parametrize(("max_tokens", "streamed"), [(None, True), (1025, True), (1024, False)])
async def test_plain_answer_that_may_be_long_is_requested_as_a_stream(max_tokens: int | None, streamed: bool) -> None:
    async with serving("vllm") as (gateway, backend):
        reply = await gateway.ask({"max_tokens": max_tokens})
        assert (reply.status, reply.is_stream, reply.text) == (200, False, TEXT)
        assert (b'"stream":true' in backend.requests[-1]) is streamed


def test_plain_answer_to_a_stream_request_is_accepted_only_for_a_plain_client() -> None:
    class Response:
        fields: ClassVar = {b"content-type": b"application/json"}

    response: Any = Response()
    assert check_headers(response, b"text/event-stream", takes_plain=True) is False
    with pytest.raises(UpstreamError):
        check_headers(response, b"text/event-stream", takes_plain=False)


# Refusals and failures of the backend


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_prompt_too_long_is_the_same_error_from_every_engine(kind: Kind, stream: bool) -> None:
    async with in_front_of(options(kind), **PATIENT) as (gateway, _):
        reply = await gateway.ask({"stream": stream, "messages": [{"role": "user", "content": "word " * 9000}]})
        assert (reply.status, code(reply)) == (400, "context_length_exceeded")
        assert gateway.metric("gateway_requests_total", tier="standard", outcome="client_error") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "expected"), [(500, (502, "upstream_error")), (503, (503, "backend_unavailable"))])
async def test_error_status_of_the_backend_is_mapped(kind: Kind, status: int, expected: tuple[int, str]) -> None:
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
async def test_broken_stream_ends_with_one_error_and_without_done(kind: Kind, fault: Any) -> None:
    async with in_front_of(options(kind, faults=(simulate.Fault(fault, after=3),)), **PATIENT) as (gateway, _):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_error")
        assert reply.text
        assert sum("error" in event for event in reply.events) == 1
        assert (await gateway.ask({"stream": True})).events[-1] == "[DONE]"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["html", "garbage", "invalid_json", "redirect", "error_then_done"])
async def test_content_of_a_malformed_answer_never_reaches_the_client(kind: Kind, mode: str) -> None:
    async with serving(kind, mode) as (gateway, backend):
        for stream in (False, True):
            reply = await gateway.ask({"stream": stream})
            assert code(reply) is not None
            assert CANARY.encode() not in reply.body
            assert not reply.names_port(backend.port)


@pytest.mark.parametrize("kind", KINDS)
async def test_line_that_cannot_be_read_fails_the_answer_and_is_counted(kind: Kind) -> None:
    async with serving(kind, "malformed") as (gateway, _):
        for stream in (False, True):
            assert code(await gateway.ask({"stream": stream})) == "upstream_error"
        await until(gateway.is_idle)
        assert gateway.metric("gateway_upstream_errors_total", reason="malformed") > 0


async def test_image_for_a_text_model_is_refused_without_asking_the_backend() -> None:
    async with (
        FaultBackend("ollama", capabilities=("completion",)) as backend,
        running(settings("ollama", [backend.base_url], {}, {})) as gateway,
    ):
        reply = await gateway.ask({"messages": IMAGE})
        assert (reply.status, code(reply), backend.requests) == (400, "unsupported_parameter", [])


# One shape for every engine

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "get_time")
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def message_of(reply: Reply) -> tuple[dict[str, Any], str]:
    """Return the message and finish reason of a plain answer or a stream, without call ids."""
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
async def test_forced_tool_call_is_the_same_from_every_engine(
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
@pytest.mark.parametrize(
    ("field", "reasoning", "reasoning_content"),
    [("reasoning", "why", ""), ("reasoning_content", "", "why"), ("both", "why", "why")],
)
async def test_tier_chooses_the_field_of_the_reasoning(
    kind: Kind, field: str, reasoning: str, reasoning_content: str
) -> None:
    tiers = {"standard": {"models": {kind: MODEL}, "reasoning_field": field}}
    async with serving(kind, "thinks", top={"tiers": tiers}) as (gateway, _):
        for stream in (False, True):
            message, _ = message_of(await gateway.ask({"stream": stream}))
            assert (message["reasoning"], message["reasoning_content"]) == (reasoning, reasoning_content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_reasoning_is_separated_from_content_for_every_engine(kind: Kind, stream: bool) -> None:
    async with serving(kind, "thinks") as (gateway, _):
        message, finish = message_of(await gateway.ask({"stream": stream}))
        assert (message["content"], message["reasoning"], message["reasoning_content"], finish) == (
            "Hello",
            "why",
            "",
            "stop",
        )


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_token_limit_that_vllm_rejects_is_dropped_and_retried(stream: bool) -> None:
    async with serving("vllm") as (gateway, backend):
        backend.script.append("too_long")
        reply = await gateway.ask({"stream": stream, "max_tokens": 9000})
        assert (reply.status, reply.text) == (200, TEXT)
        bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in backend.requests]
        assert [body.get("max_tokens") for body in bodies] == [9000, None]


async def test_prompt_too_long_even_without_a_token_limit_is_the_clients_error() -> None:
    async with serving("vllm", "too_long") as (gateway, backend):
        reply = await gateway.ask({"max_tokens": 9000})
        assert (reply.status, code(reply), len(backend.requests)) == (400, "context_length_exceeded", 2)
        assert reply.error is not None
        assert "4096" in reply.error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_reasoning_effort_is_dropped_if_the_model_cannot_think(stream: bool) -> None:
    async with serving("ollama") as (gateway, backend):
        backend.script.append("cannot_think")
        reply = await gateway.ask({"stream": stream, "reasoning_effort": "high"})
        assert (reply.status, reply.text) == (200, TEXT)
        assert [b'"think":"high"' in request for request in backend.requests] == [True, False]


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("limit", "mode"), [("MAX_TEXT", "healthy"), ("MAX_CALLS", "forced"), ("MAX_ANSWER", "healthy")]
)
async def test_assembled_answer_that_is_too_large_is_a_502(
    kind: Kind, limit: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of the same size is served: each of its pieces is rendered alone."""
    module = "relay.chat" if limit == "MAX_ANSWER" else "chat.answer"
    monkeypatch.setattr(f"gateway.{module}.{limit}", 0 if limit == "MAX_CALLS" else 10)
    asked = {"max_tokens": 2000, **({"tools": TOOLS, "tool_choice": NAMED} if mode == "forced" else {})}
    async with serving(kind, mode) as (gateway, _):
        reply = await gateway.ask(asked)
        assert (reply.status, code(reply)) == (502, "upstream_error")
        assert gateway.metric("gateway_upstream_errors_total", reason="too_large") == 1
        assert (await gateway.ask({**asked, "stream": True})).status == 200


async def test_plain_answer_that_is_too_large_to_parse_is_a_502(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.chat.MAX_PLAIN_ANSWER", 100)
    async with serving("vllm") as (gateway, _):
        assert (await gateway.ask({"max_tokens": 9})).status == 502
        assert gateway.metric("gateway_upstream_errors_total", reason="too_large") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 2000])
@pytest.mark.parametrize("count", [1, 3])
async def test_long_answer_is_rendered_in_steps(
    kind: Kind, length: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is plain or assembled, has one choice or several, and is the same."""
    body = {"logprobs": True, "top_logprobs": 2, "max_tokens": length, "n": count}

    def answered(reply: Reply) -> list[Any]:
        assert reply.status == 200
        return [choice | {"index": 0} for choice in json.loads(reply.body)["choices"]]

    turns: list[str] = []

    async def counted(steps: Any) -> Any:
        turns.append(steps.__name__)
        return await in_turns(steps)

    async with in_front_of(options(kind)) as (gateway, _):
        short = answered(await gateway.ask(body))
        for name in ("relay.chat.LONG_BODY", "relay.chat.LONG_LOGPROBS", "dialects.long_answers.LONG_LOGPROBS"):
            monkeypatch.setattr(f"gateway.{name}", 0)
        monkeypatch.setattr("gateway.dialects.long_answers.LOGPROBS_PER_SLICE", 4)
        for module in ("chat", "choices"):
            monkeypatch.setattr(f"gateway.relay.{module}.in_turns", counted)
        assert answered(await gateway.ask(body)) == short
    assert turns == ["answer_steps"] * count + ["choices_answer_steps"] * (count > 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_long_stream_is_ended_in_steps(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "standard", "input": "Hi", "stream": True, "include": ["message.output_text.logprobs"]}
    turns: list[str] = []

    async def counted(steps: Any) -> Any:
        turns.append(steps.__name__)
        return await in_turns(steps)

    end_upstream = Meter.end_upstream

    def ended(meter: Meter) -> None:
        turns.append("upstream ended")
        end_upstream(meter)

    monkeypatch.setattr("gateway.relay.chat.in_turns", counted)
    monkeypatch.setattr(Meter, "end_upstream", ended)
    async with (
        in_front_of(options(kind)) as (gateway, _),
        httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False) as client,
    ):

        async def shown() -> list[Any]:
            reply = await client.post("/v1/responses", json=body)
            assert reply.status_code == 200
            events = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: ")]
            return [[event["type"], event.get("text"), event.get("logprobs")] for event in events]

        short = await shown()
        assert (short[-1][0], turns) == ("response.completed", ["upstream ended"])
        turns.clear()
        monkeypatch.setattr("gateway.dialects.responses_stream.LONG_LOGPROBS", 0)
        monkeypatch.setattr("gateway.dialects.long_answers.STEP", 16)
        assert await shown() == short
    assert turns == ["upstream ended", "_end_steps"]


@pytest.mark.parametrize("kind", KINDS)
async def test_assembled_answer_with_too_many_logprobs_is_a_502(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"logprobs": True, "top_logprobs": 2, "max_tokens": 2000}
    async with in_front_of(options(kind)) as (gateway, _):
        answer = json.loads((await gateway.ask(body)).body)["choices"][0]["logprobs"]["content"]
        count = sum(1 + len(token["top_logprobs"]) for token in answer)
        for limit, status in ((count, 200), (count - 1, 502)):
            monkeypatch.setattr("gateway.chat.answer.MAX_LOGPROBS", limit)
            assert (await gateway.ask(body)).status == status


@pytest.mark.parametrize("kind", KINDS)
async def test_large_image_is_rendered_apart_from_its_request(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own step stays short, and the backend gets the image whole, in one body."""
    url = png_data_url(1000, is_noise=True)
    rendered: list[int] = []
    engine: Any = {"ollama": Ollama, "vllm": Vllm}[kind]
    render = engine.render

    def recorded(self: Any, *chat: Any, **others: Any) -> Any:
        body = render(self, *chat, **others)
        rendered.append(len(body))
        return body

    monkeypatch.setattr(engine, "render", recorded)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
    async with serving(kind) as (gateway, backend):
        for _ in range(2):  # on a new connection, and on the kept one
            reply = await gateway.ask({"messages": [{"role": "user", "content": content}]})
            assert reply.status == 200
        message = json.loads(backend.requests[-1].partition(b"\r\n\r\n")[2])["messages"][0]
    sent = message["images"][0] if kind == "ollama" else message["content"][0]["image_url"]["url"]
    assert url.endswith(sent)
    assert len(sent) > 3_000_000
    assert len(rendered) == 2
    assert max(rendered) < 1000
