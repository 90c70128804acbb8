"""Requests to several vLLM servers: a conversation stays on one, and the metrics count it.

Covers: gateway/relay/chat.py
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest

from gateway import config, simulate
from tests.fakes.running_gateway import Running, running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

MODEL = "Qwen/A"
VLLM = simulate.Options("vllm", (simulate.Model(MODEL, context_length=8192),))


def settings(*urls: str) -> config.Settings:
    return config.build(
        {
            "llm_backend": "vllm",
            "backends": {"vllm": {"servers": list(urls)}},
            "tiers": {"standard": {"models": {"vllm": MODEL}}},
            "state_file": "",
        }
    )


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[Running, simulate.Running]]:
    """Run a gateway before two servers, and return the first of them too.

    Their ports, which are random, would otherwise choose the server of each conversation: once in 32
    runs, the same one for all six.
    """
    async with stand_in(VLLM) as one, stand_in(VLLM) as two, running(settings(one.base_url, two.base_url)) as gateway:
        for number, server in enumerate(gateway.gateway._backends["vllm"].servers):
            server.prefixes.seed = number
        yield gateway, one


async def ask(gateway: Running, messages: list[dict[str, Any]]) -> None:
    async with gateway.openai() as client:
        answer = await client.chat.completions.create(model="standard", messages=messages, max_tokens=8)  # type: ignore[arg-type]
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})


async def test_capacity_of_a_prefix_cache_is_learned_from_the_answers() -> None:
    """The stand-in counts three tokens for four characters of Korean, at four bytes each."""
    async with two_servers() as (gateway, _):
        servers = gateway.gateway._backends["vllm"].servers
        before = [server.prefixes.capacity for server in servers]
        for number in range(12):
            await ask(gateway, [{"role": "user", "content": f"{number} " + "한국어" * 300}])
        after = [server.prefixes.capacity for server in servers]
    assert all(now < 0.9 * then for then, now in zip(before, after, strict=True))


async def test_capacity_is_not_learned_from_a_prompt_of_which_the_size_is_remembered() -> None:
    """A client sends a prompt that is too long, and then the same one with a shorter answer in the middle."""

    def turns(answer: str) -> list[dict[str, Any]]:
        texts = ["question " * 40, answer, "next", "short", "last"]
        return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]

    async with two_servers() as (gateway, _):
        servers = gateway.gateway._backends["vllm"].servers
        before = [server.prefixes.capacity for server in servers]
        with pytest.raises(openai.BadRequestError):
            await ask(gateway, turns("long " * 20_000))
        await ask(gateway, turns("short"))
        assert [server.prefixes.capacity for server in servers] == before


async def test_turns_of_conversations_stay_on_their_servers() -> None:
    async with two_servers() as (gateway, one):
        conversations: list[list[dict[str, Any]]] = [[] for _ in range(6)]
        sides: list[set[int]] = [set() for _ in conversations]
        for turn in range(4):
            for number, messages in enumerate(conversations):
                before = one.engine.served
                messages.append({"role": "user", "content": f"{number}, {turn}: " + "question " * 300})
                await ask(gateway, messages)
                sides[number].add(one.engine.served - before)
        assert sorted(map(len, sides)) == [1] * 6
        assert len(set.union(*sides)) == 2
        async with httpx2.AsyncClient(base_url=gateway.base_url, verify=False) as client:
            metrics = (await client.get("/metrics")).text
        counts = dict(re.findall(r'gateway_affinity_total{backend="vllm",outcome="(\w+)"} (\S+)', metrics))
        assert counts == {"kept": "18.0", "moved": "0.0", "new": "6.0"}
