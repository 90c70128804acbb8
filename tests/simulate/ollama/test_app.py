"""Ollama stand-in beyond the recordings: prompts, slots, loads, keep_alive, disconnects.

Covers: gateway/simulate/ollama/catalog.py
Covers: gateway/simulate/ollama/generation.py
"""

import asyncio
import json
from typing import Any

import pytest

from gateway.simulate import Fault, Model, Options, Running, digest, running
from tests.golden import png_base64
from tests.simulate.endpoints import client, sent, until, user

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
SLOW = {"model": "llama", "messages": user("Say 100000 words"), "stream": True, "options": {"num_predict": -1}}


async def chat(server: Running, model: str, text: str, **more: Any) -> dict[str, Any]:
    async with client(server) as http:
        response = await http.post("/api/chat", json={"model": model, "messages": user(text), "stream": False, **more})
    found: dict[str, Any] = response.json()
    return {"status": response.status_code, **found}


async def test_reply_begins_with_the_prompt_digest_and_the_number_of_images() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        messages = [{"role": "user", "content": "What is it?", "images": [png_base64(), png_base64()]}]
        body = (await http.post("/api/chat", json={"model": "qwen3-vl", "messages": messages, "stream": False})).json()
    assert body["message"]["content"].startswith(f"{digest('What is it?')} saw 2 images and 1 turns: What is it?")
    assert (body["done_reason"], body["eval_count"]) == ("stop", 32)


async def test_v1_makes_each_content_part_a_turn() -> None:
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64()}"}},
    ]
    async with running(Options("ollama")) as server, client(server) as http:
        body = {"model": "qwen3-vl", "messages": [{"role": "user", "content": parts}]}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"].startswith(f"{digest('What?')} saw 1 images and 2 turns")


async def test_developer_message_never_reaches_qwen3_vl() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        messages = [{"role": "developer", "content": "Be brief."}, *user("Hello")]
        body = (await http.post("/api/chat", json={"model": "qwen3-vl", "messages": messages, "stream": False})).json()
    assert body["message"]["content"].startswith(digest("Hello"))


@pytest.mark.parametrize(("model", "at_once"), [("llama", 3), ("qwen3-vl", 1)])
async def test_text_model_runs_num_parallel_requests_and_vision_family_runs_one(model: str, at_once: int) -> None:
    async with running(Options("ollama", parallel=3)) as server:
        server.engine.inject(Fault("stall", times=0))
        requests = [asyncio.create_task(chat(server, model, "Hello")) for _ in range(5)]
        await until(lambda: server.engine.running == at_once and server.engine.waiting == 5 - at_once)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await until(lambda: server.engine.state() == {"running": 0, "waiting": 0, "served": 0, "cancelled": 5})


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_client_that_leaves_frees_its_slot_immediately(stream: bool) -> None:
    async with running(Options("ollama", tokens_per_second=20)) as server:
        async with sent(server, "/api/chat", {**SLOW, "stream": stream}):
            await until(lambda: server.engine.generation_tokens > 1)
            assert server.engine.running == 1
        await until(lambda: server.engine.running == 0)
        assert server.engine.cancelled == 1
        answer = await chat(server, "llama", "Hello", options={"num_predict": 2})
        assert answer["status"] == 200


async def test_client_that_leaves_during_a_load_aborts_it() -> None:
    async with running(Options("ollama", load_seconds=60)) as server, client(server) as http:
        async with sent(server, "/api/chat", SLOW):
            await until(lambda: server.engine.waiting == 1)
        await until(lambda: server.engine.cancelled == 1)
        assert (await http.get("/api/ps")).json() == {"models": []}


@pytest.mark.virtual_time(only=True)
async def test_requests_beyond_max_queue_are_refused_during_a_load() -> None:
    async with running(Options("ollama", load_seconds=0.2, max_queue=3, parallel=4)) as server:
        answers = await asyncio.gather(*(chat(server, "llama", "Hello", options={"num_predict": 1}) for _ in range(20)))
    assert sorted(answer["status"] for answer in answers) == [200] * 4 + [503] * 16
    refused = next(answer for answer in answers if answer["status"] == 503)
    assert refused["error"] == "server busy, please try again.  maximum pending requests exceeded"


async def test_loaded_model_has_an_unbounded_queue() -> None:
    async with running(Options("ollama", max_queue=3)) as server:
        await chat(server, "llama", "Hello")
        answers = await asyncio.gather(*(chat(server, "llama", "Hello") for _ in range(20)))
    assert [answer["status"] for answer in answers] == [200] * 20


@pytest.mark.virtual_time(only=True)
async def test_different_num_ctx_reloads_the_model() -> None:
    async with running(Options("ollama", load_seconds=0.1)) as server:
        loads = [
            (await chat(server, "llama", "Hi", options={"num_ctx": size}))["load_duration"]
            for size in (4096, 4096, 2048, 2048)
        ]
    assert [load > 50e6 for load in loads] == [True, False, True, False]


async def test_keep_alive_minus_one_persists_and_zero_unloads() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        await chat(server, "llama", "Hi", keep_alive=-1)
        await http.post("/v1/chat/completions", json={"model": "llama", "messages": user("Hi")})
        (runner,) = (await http.get("/api/ps")).json()["models"]
        assert runner["expires_at"].startswith("2319-")
        await http.post("/api/generate", json={"model": "llama", "keep_alive": 0})
        assert (await http.get("/api/ps")).json() == {"models": []}


async def test_repetitive_reply_ends_without_done() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        plain = await chat(server, "llama", "Repeat yes")
        assert (plain["done"], plain["message"]["content"]) == (False, " yes" * 31)
        response = await http.post("/api/chat", json={"model": "llama", "messages": user("Repeat yes")})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert len(lines) == 31
    assert not any(line["done"] for line in lines)


async def test_repeat_word_and_repeat_limit_are_configurable() -> None:
    async with running(Options("ollama", repeat_word="stutter", repeat_limit=3)) as server:
        assert (await chat(server, "llama", "Stutter yes"))["message"]["content"] == " yes" * 4
        assert (await chat(server, "llama", "Repeat yes"))["done"] is True
    async with running(Options("ollama", repeat_limit=0)) as server:
        assert (await chat(server, "llama", "Repeat yes", options={"num_predict": 90}))["message"][
            "content"
        ] == " yes" * 90


async def test_question_with_a_word_of_a_tool_name_calls_the_tool_and_its_result_is_answered_with_text() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        asked = user("What is the weather?")
        call = (await chat(server, "qwen3-vl", asked[0]["content"], tools=[TOOL]))["message"]
        (made,) = call["tool_calls"]
        assert made["function"]["name"] == "get_weather"
        assert set(made["function"]["arguments"]) == {"city"}
        messages = [*asked, call, {"role": "tool", "content": "sunny"}]
        body = {"model": "qwen3-vl", "messages": messages, "tools": [TOOL], "stream": False}
        assert "tool_calls" not in (await http.post("/api/chat", json=body)).json()["message"]


async def test_format_makes_the_reply_an_instance_of_the_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 7}, "tags": {"type": "array", "items": {"enum": ["a"]}}},
    }
    async with running(Options("ollama")) as server:
        answer = await chat(server, "qwen3-vl", "Hello", format=schema)
    assert json.loads(answer["message"]["content"]) == {"n": 7, "tags": ["a"]}


async def test_thinking_model_thinks_unless_think_is_false() -> None:
    async with running(Options("ollama")) as server:
        with_thought = await chat(server, "qwen3:8b", "Hello")
        without = await chat(server, "qwen3:8b", "Hello", think=False)
    assert with_thought["message"]["thinking"] == "Let me think about it."
    assert "thinking" not in without["message"]
    assert with_thought["message"]["content"] == without["message"]["content"]


async def test_leaking_model_has_its_reasoning_in_the_content() -> None:
    async with running(Options("ollama", models=(Model.parse("m,leaks"),))) as server:
        message = (await chat(server, "m", "Hello"))["message"]
    assert message["content"].startswith("<think>Let me think about it.</think>")
    assert "thinking" not in message


async def test_image_to_a_text_model_is_refused_by_0_33_and_ignored_by_0_24() -> None:
    messages = [{"role": "user", "content": "What?", "images": [png_base64()]}]
    answers = {}
    for generation in ("0.33", "0.24"):
        async with running(Options("ollama", generation=generation)) as server, client(server) as http:
            answers[generation] = await http.post(
                "/api/chat", json={"model": "llama", "messages": messages, "stream": False}
            )
    assert answers["0.33"].status_code == 400
    assert json.loads(answers["0.33"].json()["error"])["error"]["message"].startswith("Multimodal data provided")
    assert answers["0.24"].json()["message"]["content"].startswith(digest("What?"))


async def test_non_text_content_is_refused_with_the_message_of_go() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        response = await http.post("/api/chat", json={"model": "llama", "messages": messages})
    assert response.json() == {
        "error": "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string"
    }


async def test_reply_takes_the_configured_time() -> None:
    loop = asyncio.get_running_loop()
    async with running(Options("ollama", tokens_per_second=100, time_to_first_token=0.1)) as server:
        began = loop.time()
        await chat(server, "llama", "Hello", options={"num_predict": 11})
        assert 0.19 < loop.time() - began < 1
