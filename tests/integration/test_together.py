"""All features at once: loads, roll-outs, reloads, the guard, preflight checks, dying servers,
leaving clients.
"""

import asyncio
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from tests.fakes.running_gateway import PATIENCE, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

MODELS = (
    simulate.Model("a", vision=True, size=4),
    simulate.Model("b", size=4),
    simulate.Model("e", embedding=8, size=1),
)
ROUNDS = 40
ORDERS: tuple[tuple[str, str, Any], ...] = (
    ("PUT", "/ops/rollout", {"backend": "vllm"}),
    ("PUT", "/ops/rollout", {"backend": "ollama"}),
    ("PUT", "/ops/rollout", {"backend": "vllm", "canary": {"backend": "ollama", "percent": 40}}),
    ("POST", "/ops/rollback", None),
    ("POST", "/ops/undo", None),
)


def settings(ollama: str, vllm: str) -> config.Settings:
    """Return settings with few slots, so requests are always queued."""
    backends = {
        "ollama": {"base_url": ollama, "model_concurrency": 2, "swap_after": 0.2, "probe_interval": 0.3},
        "vllm": {"base_url": vllm, "max_concurrency": 3, "probe_interval": 0.3},
    }
    tiers = {
        "one": {"models": {"ollama": "a", "vllm": "m"}, "fallback": True},
        "two": {"models": {"ollama": "b", "vllm": "m"}},
        "three": {"models": {"ollama": "a", "vllm": "m"}, "limits": {"ollama": {"concurrency": 1}}},
    }
    others = {
        "guard": {},
        "rollback_cutoff": 1,
        "embeddings": {"e": {"backend": "ollama", "model": "e"}},
        "state_file": "",
    }
    return config.build({"llm_backend": "vllm", "backends": backends, "tiers": tiers, **others})


async def chat(gateway: Running, random: Random, number: int) -> Reply | None:
    """Send one request; return None if the client left before the response was complete."""
    body = {"model": f"{random.choice(['one', 'two', 'three'])}", "stream": random.random() < 0.6, "max_tokens": 20}
    async with (
        asyncio.timeout(2 * PATIENCE),
        gateway.sent({**body, "messages": [{"role": "user", "content": f"repeat la {number}"}]}) as raw,
    ):
        if random.random() < 0.3:
            await asyncio.sleep(random.expovariate(3))
            return None
        return await raw.reply()


@pytest.mark.timeout(120)
async def test_all_features_at_once_lose_no_request_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.destinations.CHECK_SECONDS", 0.05)
    random = Random(11)
    async with AsyncExitStack() as stack:
        ollama = simulate.Options("ollama", MODELS, load_seconds=0.2, max_loaded=1, parallel=4, tokens_per_second=300)
        vllm = simulate.Options("vllm", (simulate.Model("m", vision=True),), tokens_per_second=100)
        servers = [
            [(await stack.enter_async_context(stand_in(options))).base_url for _ in range(2)]
            for options in (ollama, vllm)
        ]
        dying = await stack.enter_async_context(AsyncExitStack())
        servers[1].append((await dying.enter_async_context(stand_in(vllm))).base_url)
        gateway = await stack.enter_async_context(running(settings(servers[0][0], servers[1][2])))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=4 * PATIENCE, trust_env=False, verify=False)
        await stack.enter_async_context(client)
        chats, others = [], []
        for number in range(ROUNDS):
            chats += [asyncio.create_task(chat(gateway, random, 9 * number + other)) for other in range(4)]
            others.append(asyncio.create_task(client.post("/v1/embeddings", json={"model": "e", "input": "Hello"})))
            if number % 4 == 3:
                method, path, order = random.choice(ORDERS)
                others.append(asyncio.create_task(client.request(method, path, json=order)))
            if number % 10 == 9:
                changed = settings(random.choice(servers[0]), random.choice(servers[1][:2]))
                others.append(asyncio.create_task(gateway.gateway.reload.run(lambda changed=changed: changed, "file")))
            if number % 20 == 15:
                others.append(asyncio.create_task(client.post("/ops/preflight?seconds=2")))
            if number == 8:
                await dying.aclose()
            await asyncio.sleep(0.05)
        replies = [reply for reply in await asyncio.gather(*chats) if reply is not None]
        for reply in replies:
            assert reply.error is None or reply.error["code"] in ("upstream_error", "backend_unavailable"), reply.error
            assert reply.error is not None or reply.text
        assert len([reply for reply in replies if reply.error is None]) > len(replies) / 2
        answers = [answer for answer in await asyncio.gather(*others) if answer is not None]
        assert {answer.status_code for answer in answers} <= {200, 409, 502, 503}
        await until(gateway.is_idle)
        await until(lambda: not gateway.gateway._reconfiguration._destinations.past)
        assert len(gateway.exchanges()) == gateway.metric("gateway_requests_total") == len(chats) + ROUNDS
