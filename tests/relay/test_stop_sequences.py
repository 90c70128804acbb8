"""The stop sequence that ended an answer has the same name, whichever engine serves.

Covers: gateway/relay/chat.py
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from gateway import simulate
from tests.fakes.running_gateway import PATIENCE, PROMPT, Running, until
from tests.relay.serving import KINDS, PATIENT, Kind, in_front_of, options

STOPS = ["never", "END", "\n\n"]


@pytest.fixture(params=KINDS)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Running, simulate.Running]]:
    kind: Kind = request.param
    async with in_front_of(replace(options(kind), tokens_per_second=1000.0), **PATIENT) as served:
        yield served


async def message(gateway: Running, **fields: Any) -> tuple[str, str, Any, int]:
    """Return the text, the stop reason, the stop sequence and the number of output tokens."""
    body = {"model": "standard", "messages": PROMPT, "max_tokens": 2000, **fields}
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, verify=False) as client:
        answer = await client.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        whole = answer.json()
        return (
            "".join(block["text"] for block in whole["content"]),
            whole["stop_reason"],
            whole["stop_sequence"],
            whole["usage"]["output_tokens"],
        )
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == {"type": "message_stop"}
    last = events[-2]
    return (
        "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta"),
        last["delta"]["stop_reason"],
        last["delta"]["stop_sequence"],
        last["usage"]["output_tokens"],
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_names_the_stop_sequence_that_ended_it(
    served: tuple[Running, simulate.Running], stream: bool
) -> None:
    gateway, server = served
    for tokens, expected in (
        (["one ", "two ", "E", "ND", " three"], ("one two ", "stop_sequence", "END", 4)),
        (["one", "\n", "\n", "two"], ("one", "stop_sequence", "\n\n", 3)),
        (["one ", "E", "N"], ("one EN", "end_turn", None, 3)),
    ):
        server.engine.say(tokens)
        assert await message(gateway, stop_sequences=STOPS, stream=stream) == expected
    assert gateway.exchanges()[-1]["outcome"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_stop_sequences_names_none(
    served: tuple[Running, simulate.Running], stream: bool
) -> None:
    gateway, server = served
    server.engine.say(["one ", "END"])
    assert await message(gateway, stream=stream) == ("one END", "end_turn", None, 2)
    server.engine.say(["a"] * 50)
    assert await message(gateway, stream=stream, max_tokens=5, stop_sequences=["b"]) == (
        "aaaaa", "max_tokens", None, 5,
    )  # fmt: skip


async def test_the_engine_ends_when_a_stop_sequence_is_found() -> None:
    """Ollama is asked without stop sequences: it would go on to write the whole answer."""
    async with in_front_of(replace(options("ollama"), tokens_per_second=100.0), **PATIENT) as (gateway, server):
        server.engine.say(["a", "END", *["b"] * 10_000])
        assert (await message(gateway, stop_sequences=STOPS, max_tokens=20_000))[:3] == ("a", "stop_sequence", "END")
        await until(lambda: server.engine.cancelled == 1 and server.engine.running == 0)
        server.engine.say(["c"])
        assert (await message(gateway, stop_sequences=STOPS))[:2] == ("c", "end_turn")


async def test_a_short_prompt_counts_a_token_where_the_gateway_ends_the_answer(
    served: tuple[Running, simulate.Running],
) -> None:
    """The count of an engine that is stopped never comes, and a prompt of no tokens is left out by Ollama's API."""
    gateway, server = served
    server.engine.say(["one ", "END", " two"])
    messages = [{"role": "user", "content": "Hi"}]
    options = {"stop": [*STOPS, "a1", "a2", "a3"]}  # more than a vLLM's API takes
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, verify=False) as client:
        answer = await client.post(
            "/api/chat", json={"model": "standard", "messages": messages, "options": options, "stream": False}
        )
    assert (answer.status_code, answer.json()["message"]["content"]) == (200, "one ")
    assert answer.json()["prompt_eval_count"] >= 1


async def test_a_chat_completion_leaves_the_search_to_the_engine() -> None:
    async with in_front_of(options("ollama"), **PATIENT) as (gateway, server):
        server.engine.say(["a", "END", "b"])
        reply = await gateway.ask({"stop": ["END"]})
        assert (reply.status, reply.text) == (200, "a")
        assert json.loads(reply.body)["usage"]["completion_tokens"] == 2
        assert server.engine.cancelled == 0


MANY = [*(f"never {number}" for number in range(14)), "END", "\n\n"]
"""More stop sequences than a vLLM takes."""


async def lines(gateway: Running, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "standard", "messages": PROMPT, "options": {"stop": MANY}, **fields}
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, verify=False) as client:
        answer = await client.post("/api/chat", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("stream", [False, True])
async def test_more_stop_sequences_than_the_engine_takes_are_followed(
    served: tuple[Running, simulate.Running], stream: bool
) -> None:
    gateway, server = served
    for tokens, text in (
        (["one ", *["two "] * 10, "E", "ND", " three"], "one " + "two " * 10),
        ([*["a"] * 10, "\n", "\n", "b"], "a" * 10),
        ([*["a"] * 10, "E", "N"], "a" * 10 + "EN"),
    ):
        server.engine.say(tokens)
        found = await lines(gateway, stream=stream)
        assert ("".join(line["message"]["content"] for line in found), found[-1]["done_reason"]) == (text, "stop")
        assert found[-1]["prompt_eval_count"] > 0
        server.engine.say(tokens)
        assert (await message(gateway, stop_sequences=MANY, stream=stream))[0] == text
