"""Text completions through the gateway, on real sockets with both engines' stand-ins."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from gateway.relay.choices import chats_of
from gateway.simulate.options import Fault
from tests.dialects.test_openai_completions import parsed
from tests.fakes.fault_backend import MODEL
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, until
from tests.fakes.running_gateway import running as gateway_running
from tests.fakes.stand_ins import stand_in
from tests.relay.serving import KINDS, PATIENT, Kind, in_front_of, options

pytestmark = pytest.mark.uvloop

WORDS = ["Once", " upon", " a", " time"]
OTHER: dict[str, str] = {"ollama": "vllm", "vllm": "ollama"}


@asynccontextmanager
async def client_of(gateway: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False) as client:
        yield client


async def ask(gateway: Running, **body: Any) -> httpx2.Response:
    async with client_of(gateway) as client:
        return await client.post("/v1/completions", json={"model": "standard", "prompt": "Tell", **body})


def events(answer: httpx2.Response) -> list[Any]:
    """Return the events of a stream, the last one as text if it is `[DONE]`."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def text_of(stream: list[Any], index: int = 0) -> str:
    choices = [choice for event in stream if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def asked(server: simulate.Running) -> list[dict[str, Any]]:
    """Return what the engine was asked to generate."""
    return [request for request in server.engine.requests if request["path"] in ("/v1/completions", "/api/generate")]


@pytest.mark.parametrize("kind", KINDS)
async def test_prompt_reaches_the_engine_without_a_template(kind: Kind) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say(WORDS)
        answer = await ask(gateway, prompt="def fib(n):", temperature=0, stop=["\n\n"], user="me")
        body = answer.json()
        assert answer.status_code == 200
        choice = {"index": 0, "text": "".join(WORDS), "logprobs": None, "finish_reason": "stop"}
        assert body["choices"] == [choice]
        assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
        assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "standard", "cmpl-")
        assert body["usage"]["completion_tokens"] == len(WORDS)
        (request,) = asked(server)
        sent = request["body"]
        assert sent["prompt"] == "def fib(n):"
        if kind == "ollama":
            assert (request["path"], sent["raw"], sent["options"]["num_predict"]) == ("/api/generate", True, 16)
            assert not {"system", "template", "messages"} & set(sent)
        else:
            assert (request["path"], sent["max_tokens"], sent["temperature"]) == ("/v1/completions", 16, 0)
            assert not {"messages", "chat_template_kwargs", "user"} & set(sent)


@pytest.mark.parametrize("kind", KINDS)
async def test_answer_without_a_token_limit_has_16_tokens(kind: Kind) -> None:
    async with in_front_of(options(kind, answer_tokens=40)) as (gateway, _):
        body = (await ask(gateway)).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 16
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("usage", [False, True])
async def test_stream_has_the_text_one_finish_and_the_usage_if_asked(kind: Kind, usage: bool) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say([*WORDS, " \u2028", "é"])
        stream = events(await ask(gateway, stream=True, stream_options={"include_usage": usage}))
        assert text_of(stream) == "".join(WORDS) + " \u2028é"
        *chunks, done = stream
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"text_completion"}
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert [finish for finish in finishes if finish] == ["stop"]
        totals = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        assert totals == ([6] if usage else [])
        assert all(("usage" in chunk) is usage for chunk in chunks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_text_goes_as_it_is_even_if_it_looks_like_thoughts(kind: Kind, stream: bool) -> None:
    words = ["<think>", "no", "</think>", " yes", "<tool_call>", "{}"]
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say(words)
        answer = await ask(gateway, stream=stream)
        text = text_of(events(answer)) if stream else answer.json()["choices"][0]["text"]
        assert text == "".join(words)


async def test_model_that_can_think_is_told_not_to_split_the_text() -> None:
    thinking = simulate.Options("ollama", (simulate.Model(MODEL, thinking=True),))
    async with in_front_of(thinking) as (gateway, server):
        server.engine.say(WORDS)
        assert (await ask(gateway)).json()["choices"][0]["text"] == "".join(WORDS)
        assert asked(server)[0]["body"]["think"] is False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_list_of_prompts_is_answered_in_order_each_with_its_ticket(kind: Kind, stream: bool) -> None:
    async with in_front_of(options(kind), max_concurrency=2, model_concurrency=2, **PATIENT) as (gateway, server):
        prompts = ["one", "two", "three"]
        answer = await ask(gateway, prompt=prompts, n=2, stream=stream, stream_options={"include_usage": True})
        assert answer.status_code == 200
        if stream:
            found = {index: text_of(events(answer), index) for index in range(6)}
            usage = next(event["usage"] for event in events(answer) if event != "[DONE]" and event["usage"])
        else:
            body = answer.json()
            usage = body["usage"]
            assert [choice["index"] for choice in body["choices"]] == list(range(6))
            found = {choice["index"]: choice["text"] for choice in body["choices"]}
        for index, prompt in enumerate(prompts):
            assert prompt in found[2 * index]
            assert prompt in found[2 * index + 1]
        assert sorted(request["body"]["prompt"] for request in asked(server)) == sorted(prompts * 2)
        single = [(await ask(gateway, prompt=prompt)).json()["usage"]["prompt_tokens"] for prompt in prompts]
        assert usage["prompt_tokens"] == sum(single)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        first, *others = gateway.exchanges()
        assert len(others) == len(single), "one record for all choices of a request"
        assert first["usage"]["completion_tokens"] == usage["completion_tokens"]


def test_each_choice_of_a_prompt_has_its_own_seed() -> None:
    chats = chats_of(parsed(prompt=["a", "b"], n=2, seed=5))
    assert [(chat.messages[0].text, chat.seed, chat.n) for chat in chats] == [
        ("a", 5, None),
        ("a", 6, None),
        ("b", 5, None),
        ("b", 6, None),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_logprobs_have_the_older_form(kind: Kind, stream: bool) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say(WORDS)
        answer = await ask(gateway, logprobs=2, stream=stream)
        if stream:
            choices = [choice for event in events(answer)[:-1] for choice in event["choices"] if choice["logprobs"]]
            parts = [choice["logprobs"] for choice in choices]
        else:
            parts = [answer.json()["choices"][0]["logprobs"]]
        assert {tuple(part) for part in parts} == {("text_offset", "token_logprobs", "tokens", "top_logprobs")}
        assert [token for part in parts for token in part["tokens"]] == WORDS
        assert [offset for part in parts for offset in part["text_offset"]] == [0, 4, 9, 11]
        assert [value for part in parts for value in part["token_logprobs"]] == [-0.5] * 4
        alternatives = [entry for part in parts for entry in part["top_logprobs"]]
        assert all(len(entry) == 2 and entry[token] == -0.5 for token, entry in zip(WORDS, alternatives, strict=True))


@pytest.mark.parametrize("kind", KINDS)
async def test_logprobs_without_alternatives_have_the_chosen_token(kind: Kind) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say(WORDS)
        logprobs = (await ask(gateway, logprobs=0)).json()["choices"][0]["logprobs"]
        assert logprobs["top_logprobs"] == [{token: -0.5} for token in WORDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_echo_puts_each_prompt_before_its_answer(kind: Kind, stream: bool) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.say(WORDS)
        answer = await ask(gateway, prompt="P: ", echo=True, stream=stream)
        text = text_of(events(answer)) if stream else answer.json()["choices"][0]["text"]
        assert text == "P: " + "".join(WORDS)
        both = (await ask(gateway, prompt=["a ", "b "], echo=True)).json()["choices"]
        assert [choice["text"][:2] for choice in both] == ["a ", "b "]
        assert not any("echo" in request["body"] for request in asked(server))


@pytest.mark.parametrize("kind", KINDS)
async def test_prompt_that_does_not_fit_is_refused_by_name(kind: Kind) -> None:
    small = simulate.Options(kind, (simulate.Model(MODEL, context_length=1024),))
    async with in_front_of(small) as (gateway, _):
        for prompt in ("word " * 2000, "word " * 20_000):
            answer = await ask(gateway, prompt=prompt)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
            assert error["message"].startswith("This model's maximum context length is 1024 tokens. The prompt ")


@pytest.mark.parametrize("kind", KINDS)
async def test_token_limit_beyond_the_context_means_the_rest_of_it(kind: Kind) -> None:
    small = simulate.Options(kind, (simulate.Model(MODEL, context_length=256),), answer_tokens=20)
    async with in_front_of(small) as (gateway, _):
        for limit in (250, 100_000):
            answer = await ask(gateway, prompt="word " * 20, max_tokens=limit)
            assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("kind", KINDS)
async def test_error_in_mid_stream_ends_it_without_done(kind: Kind) -> None:
    async with in_front_of(options(kind)) as (gateway, server):
        server.engine.inject(Fault("error", after=2))
        stream = events(await ask(gateway, stream=True))
        assert text_of(stream[:-1])
        assert stream[-1]["error"]["code"] == "upstream_error"
        assert [record["status"] for record in gateway.exchanges()] == [502]
        server.engine.inject(Fault("truncate", after=2))
        assert events(await ask(gateway, stream=True))[-1]["error"]["code"] == "upstream_error"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_client_that_leaves_ends_the_generation(kind: Kind, stream: bool) -> None:
    slow = options(kind, tokens_per_second=20, answer_tokens=2000)
    async with in_front_of(slow, **PATIENT) as (gateway, server), client_of(gateway) as client:
        body = {"model": "standard", "prompt": ["a", "b"], "max_tokens": 2000, "stream": stream}
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        engine = server.engine
        await until(lambda: engine.running > 0 and engine.running + engine.waiting + gateway.waiting == 2)
        there = engine.running + engine.waiting
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: engine.running + engine.waiting == 0 and engine.cancelled == there)
        await until(gateway.is_idle)
        assert {record["status"] for record in gateway.exchanges()} == {499}


@pytest.mark.parametrize("kind", KINDS)
async def test_stream_is_kept_alive_by_events_with_an_empty_text(kind: Kind) -> None:
    top = {"commit_after": 0.05, "heartbeat": 0.05, "waiting_note": True}
    async with in_front_of(options(kind, time_to_first_token=0.4), top=top, **PATIENT) as (gateway, server):
        server.engine.say(WORDS)
        stream = events(await ask(gateway, stream=True))
        choices = [choice for event in stream[:-1] for choice in event["choices"]]
        silent = [choice for choice in choices if not choice["text"] and not choice["finish_reason"]]
        assert len(silent) >= 2
        assert silent[0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
        assert text_of(stream) == "".join(WORDS)


@asynccontextmanager
async def on_both(kind: str, first: simulate.Options, second: simulate.Options, **limits: Any) -> AsyncIterator[Any]:
    """Serve a tier on `first`, of `kind`, with the other kind's `second` as its fallback."""
    async with stand_in(first) as one, stand_in(second) as two:
        document = {
            "llm_backend": kind,
            "backends": {
                server.engine.options.kind: {
                    "kind": server.engine.options.kind,
                    "servers": [{"base_url": server.base_url, "models": [MODEL]}],
                    **TIMES,
                    **limits,
                }
                for server in (one, two)
            },
            "tiers": {"standard": {"models": {kind: MODEL, OTHER[kind]: MODEL}, "fallback": True}},
            "state_file": "",
        }
        async with gateway_running(config.build(document)) as gateway:
            yield gateway, one, two


@pytest.mark.parametrize("kind", KINDS)
async def test_fallback_answers_when_the_first_engine_fails(kind: Kind) -> None:
    other = OTHER[kind]
    async with on_both(kind, options(kind), options(other)) as (gateway, one, two):  # type: ignore[arg-type]
        one.engine.inject(Fault("status", status=500))
        two.engine.say(WORDS)
        answer = await ask(gateway)
        assert answer.json()["choices"][0]["text"] == "".join(WORDS)
        assert answer.headers["x-gateway-backend"] == other


@pytest.mark.parametrize("kind", KINDS)
async def test_queued_prompts_move_with_the_switch(kind: Kind) -> None:
    other = OTHER[kind]
    slow = options(kind, tokens_per_second=20, answer_tokens=2000)
    one_slot = {**PATIENT, "max_concurrency": 1, "model_concurrency": 1}
    async with on_both(kind, slow, options(other), **one_slot) as (gateway, one, two), client_of(gateway) as client:  # type: ignore[arg-type]
        running = asyncio.create_task(
            client.post("/v1/completions", json={"model": "standard", "prompt": "long", "max_tokens": 2000})
        )
        await until(lambda: one.engine.running == 1)
        queued = asyncio.create_task(ask(gateway, prompt=["a", "b", "c"]))
        await until(lambda: gateway.waiting == 3)
        report = (await client.put("/ops/rollout", json={"backend": other})).json()
        assert report["moved"] == 3
        answer = await queued
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]
        assert len(asked(two)) == 3
        assert {request["path"] for request in asked(two)} == (
            {"/v1/completions"} if other == "vllm" else {"/api/generate"}
        )
        running.cancel()
        await asyncio.wait([running])
        await until(gateway.is_idle)


@pytest.mark.parametrize("kind", KINDS)
async def test_requests_are_counted_under_their_own_label(kind: Kind) -> None:
    async with in_front_of(options(kind)) as (gateway, _):
        await ask(gateway)
        await ask(gateway, prompt=[1, 2])
        count = gateway.metric("gateway_requests_total", endpoint="completions", outcome="ok", backend=kind)
        refused = gateway.metric("gateway_requests_total", endpoint="completions", outcome="client_error")
        assert (count, refused) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_openai_client_reads_plain_answers_streams_and_lists(kind: Kind) -> None:
    async with in_front_of(options(kind)) as (gateway, server), gateway.openai() as client:
        server.engine.say(WORDS)
        plain = await client.completions.create(model="standard", prompt="x")
        assert plain.choices[0].text == "".join(WORDS)
        server.engine.say(WORDS)
        stream = await client.completions.create(model="standard", prompt="x", stream=True, logprobs=1)
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == "".join(WORDS)
        many = await client.completions.create(model="standard", prompt=["x", "y"])
        assert [choice.index for choice in many.choices] == [0, 1]
