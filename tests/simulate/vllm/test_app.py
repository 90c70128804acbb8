"""vLLM stand-in beyond the recordings: choices, tool calls, the queue, metrics, disconnects.

Covers: gateway/simulate/vllm/metrics.py
"""

import asyncio
import json
from typing import Any

import pytest

from gateway.simulate import Fault, Model, Options, Running, digest, running
from tests.golden import events, picture
from tests.simulate.endpoints import client, sent, until, user

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
CHAT = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


async def chat(server: Running, text: str, **more: Any) -> dict[str, Any]:
    async with client(server) as http:
        response = await http.post(CHAT, json={"model": MODEL, "messages": user(text), **more})
    found: dict[str, Any] = response.json()
    return {"status": response.status_code, **found}


async def test_reply_begins_with_the_prompt_digest_and_the_number_of_images() -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
    async with running(Options("vllm")) as server, client(server) as http:
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
        (choice,) = (await http.post(CHAT, json={"model": MODEL, "messages": messages})).json()["choices"]
    assert choice["message"]["content"].startswith(f"{digest('What is it?')} saw 1 images and 1 turns: What is it?")
    assert choice["finish_reason"] == "stop"


async def test_all_choices_are_streamed_concurrently() -> None:
    async with running(Options("vllm")) as server, client(server) as http:
        body = {"model": MODEL, "messages": user("Hello"), "n": 2, "temperature": 1, "stream": True, "max_tokens": 9}
        response = await http.post(CHAT, json=body)
    found = [event for event in events(response.text) if event != "[DONE]"]
    texts = [
        "".join(c["delta"].get("content", "") for e in found for c in e["choices"] if c["index"] == i) for i in (0, 1)
    ]
    assert texts[0] != texts[1]
    assert sum(choice["finish_reason"] == "length" for event in found for choice in event["choices"]) == 2


async def test_ignore_eos_makes_the_length_exact() -> None:
    async with running(Options("vllm")) as server:
        answer = await chat(server, "Hello", ignore_eos=True, max_tokens=200)
    assert answer["usage"]["completion_tokens"] == 200


@pytest.mark.parametrize(
    ("choice", "finish"),
    [
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ],
    ids=["auto", "required", "named"],
)
async def test_streamed_tool_call_equals_the_plain_one(choice: Any, finish: str) -> None:
    more = {"tools": [TOOL], "tool_choice": choice}
    async with running(Options("vllm")) as server, client(server) as http:
        plain = (await chat(server, "The weather?", **more))["choices"][0]
        response = await http.post(
            CHAT, json={"model": MODEL, "messages": user("The weather?"), "stream": True, **more}
        )
    deltas = [choice["delta"] for event in events(response.text) if event != "[DONE]" for choice in event["choices"]]
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    (call,) = plain["message"]["tool_calls"]
    assert plain["finish_reason"] == finish
    assert functions[0] == {"name": "get_weather"} == {"name": call["function"]["name"]}
    assert "".join(function["arguments"] for function in functions[1:]) == call["function"]["arguments"]
    assert set(json.loads(call["function"]["arguments"])) == {"city"}


async def test_tool_call_that_is_cut_off_stays_content() -> None:
    async with running(Options("vllm")) as server:
        answer = await chat(server, "The weather?", tools=[TOOL], tool_choice="required", max_tokens=3)
    (choice,) = answer["choices"]
    assert choice["message"]["content"].startswith("<tool_call>")
    assert choice["finish_reason"] == "length"


async def test_tool_call_that_is_cut_off_is_streamed_as_far_as_it_is_complete() -> None:
    async with running(Options("vllm")) as server, client(server) as http:
        body = {
            "model": MODEL,
            "messages": user("The weather?"),
            "stream": True,
            "tools": [TOOL],
            "tool_choice": "required",
        }
        ends = {}
        for tokens in (1, 3):
            found = events((await http.post(CHAT, json={**body, "max_tokens": tokens})).text)
            ends[tokens] = [choice for event in found if event != "[DONE]" for choice in event["choices"]]
    assert [choice["delta"] for choice in ends[1]] == [{"role": "assistant", "content": ""}, {}]
    assert all(choices[-1]["finish_reason"] == "length" for choices in ends.values())
    (begun, arguments) = (choice["delta"]["tool_calls"][0]["function"] for choice in ends[3][1:])
    assert begun == {"name": "get_weather"}
    assert arguments["arguments"].startswith("{")


@pytest.mark.parametrize(("strict", "kind"), [(True, dict), (False, list)], ids=["strict", "not strict"])
async def test_forced_call_follows_its_schema_only_if_strict(strict: bool, kind: type) -> None:
    tool = {"type": "function", "function": {**TOOL["function"], "strict": strict}}  # type: ignore[dict-item]
    async with running(Options("vllm", loose_calls=True)) as server:
        answer = await chat(server, "The weather?", tools=[tool], tool_choice="required")
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"]), kind)


async def test_usage_is_on_each_chunk_only_on_request() -> None:
    async with running(Options("vllm")) as server, client(server) as http:
        seen = {}
        for continuous in (False, True):
            asked = {"include_usage": True, "continuous_usage_stats": continuous}
            body = {"model": MODEL, "messages": user("Hello"), "stream": True, "max_tokens": 4, "stream_options": asked}
            found = [event for event in events((await http.post(CHAT, json=body)).text) if event != "[DONE]"]
            seen[continuous] = [event["usage"]["completion_tokens"] for event in found if "usage" in event]
    assert seen == {False: [4], True: [0, 1, 2, 3, 4, 4]}


async def test_reasoning_is_separated_and_can_be_disabled() -> None:
    async with running(Options("vllm", reasoning_parser=True)) as server:
        with_thought = (await chat(server, "Hello"))["choices"][0]["message"]
        without = (await chat(server, "Hello", chat_template_kwargs={"enable_thinking": False}))["choices"][0][
            "message"
        ]
    assert (with_thought["reasoning"], without["reasoning"]) == ("Let me think about it.", None)
    assert with_thought["content"] == without["content"]


@pytest.mark.parametrize(
    "off",
    [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}],
    ids=["reasoning_effort", "enable_thinking"],
)
async def test_thinking_model_without_a_parser_leaks_its_reasoning_unless_disabled(off: dict[str, Any]) -> None:
    async with running(Options("vllm", models=(Model(MODEL, thinking=True),))) as server:
        leaked = (await chat(server, "Hello"))["choices"][0]["message"]
        without = (await chat(server, "Hello", **off))["choices"][0]["message"]
    assert leaked["reasoning"] is None
    assert leaked["content"] == f"<think>Let me think about it.</think>{without['content']}"


async def test_response_headers_are_sent_before_the_request_runs() -> None:
    async with running(Options("vllm", max_num_seqs=1, faults=(Fault("stall"),))) as server:
        body = {"model": MODEL, "messages": user("Hello"), "stream": True}
        async with sent(server, CHAT, body) as first, sent(server, CHAT, body) as second:
            assert await first.readline() == await second.readline() == b"HTTP/1.1 200 OK\r\n"
            await until(lambda: (server.engine.running, server.engine.waiting) == (1, 1))


async def test_metrics_count_running_and_waiting_requests_until_their_clients_leave() -> None:
    async with running(Options("vllm", max_num_seqs=2, tokens_per_second=20)) as server, client(server) as http:
        body = {"model": MODEL, "messages": user("100000 words"), "stream": True}
        async with sent(server, CHAT, body), sent(server, CHAT, {**body, "stream": False}), sent(server, CHAT, body):
            await until(lambda: server.engine.waiting == 1 and server.engine.running == 2)
            text = (await http.get("/metrics")).text
            labels = f'engine="0",model_name="{MODEL}"'
            assert f"vllm:num_requests_running{{{labels}}} 2.0\n" in text
            assert f"vllm:num_requests_waiting{{{labels}}} 1.0\n" in text
        await until(lambda: server.engine.running == server.engine.waiting == 0)
        assert (await http.get("/simulate/state")).json() == {"running": 0, "waiting": 0, "served": 0, "cancelled": 3}


async def test_requests_beyond_max_num_seqs_are_queued_not_refused() -> None:
    async with running(Options("vllm", max_num_seqs=4)) as server:
        answers = await asyncio.gather(*(chat(server, f"Hello {i}") for i in range(20)))
    assert [answer["choices"][0]["message"]["content"][:8] for answer in answers] == [
        digest(f"Hello {i}") for i in range(20)
    ]


async def test_api_key_protects_only_v1() -> None:
    async with running(Options("vllm", api_key="secret")) as server, client(server) as http:
        refused = await http.get("/v1/models")
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        assert (await http.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200
        assert (await http.get("/health")).status_code == 200


async def test_alias_is_served_under_the_first_model_name() -> None:
    async with running(Options("vllm", models=(Model("first"), Model("alias")))) as server, client(server) as http:
        answer = await http.post(
            CHAT, json={"model": "alias", "messages": user("Hello")}, headers={"x-request-id": "mine"}
        )
        assert (answer.json()["model"], answer.json()["id"]) == ("first", "chatcmpl-mine")
        assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["first", "alias"]


async def test_prompt_longer_than_the_context_is_refused_with_its_token_count() -> None:
    async with running(Options("vllm", models=(Model(MODEL, context_length=100),))) as server:
        answer = await chat(server, "word " * 100)
    assert answer["status"] == 400
    assert answer["error"]["param"] == "input_tokens"
    assert "maximum context length is 100 tokens" in answer["error"]["message"]
