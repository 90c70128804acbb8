"""Three gateways whose keys have one limit for all, with a real Redis."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from gateway.replicas import key_limits
from gateway.replicas.key_limits import SharedKeyLimits
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.redis import redis_server
from tests.fakes.running_gateway import until
from tests.integration.test_replicas_rollout import PATIENCE, Cluster, Replica

KEY = "web-key"


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(key_limits, "WAIT_SECONDS", PATIENCE)  # a busy machine must not look like a Redis that hangs
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_server())
        ollama = await stack.enter_async_context(FaultBackend("ollama"))
        vllm = await stack.enter_async_context(FaultBackend("vllm"))
        yield Cluster(server, ollama, vllm, stack)


def keys_file(folder: Path, **limits: Any) -> str:
    """Write a file with one key. JSON is YAML."""
    file = folder / "keys.yaml"
    entry = {"name": "web", "sha256": sha256(KEY.encode()).hexdigest(), **limits}
    file.write_text(json.dumps({"keys": [entry]}))
    return str(file)


async def ask(replica: Replica) -> tuple[int, dict[str, str]]:
    """Send a request; return the status and the headers."""
    async with replica.gateway.sent({"model": "standard", "max_tokens": 5}, f"Authorization: Bearer {KEY}") as raw:
        reply = await raw.reply()
        return reply.status, reply.headers


async def test_key_has_one_limit_for_all_gateways(cluster: Cluster, tmp_path: Path) -> None:
    file = keys_file(tmp_path, requests_per_minute=20, tokens_per_day=100_000)
    for number in range(3):
        await cluster.start(keys_file=file, state_file=str(tmp_path / f"{number}.json"), admin_key="operator")
    await until(lambda: all(replica.link.is_up for replica in cluster.replicas), PATIENCE)
    statuses: list[int] = []
    remaining: list[int] = []
    for number in range(30):
        status, headers = await ask(cluster.replicas[number % 3])
        statuses.append(status)
        remaining.append(int(headers["x-ratelimit-remaining-requests"]))
        assert headers["x-ratelimit-limit-requests"] == "20"
    assert statuses.count(200) <= 20
    assert statuses.count(200) >= 15  # the rest is in blocks of others for half a second at most
    assert set(statuses) == {200, 429}
    assert remaining[0] >= 17
    assert min(remaining) <= 3


async def test_requests_go_on_when_redis_is_gone_and_limits_hold(cluster: Cluster, tmp_path: Path) -> None:
    file = keys_file(tmp_path, requests_per_minute=30)
    for _ in range(3):
        await cluster.start(keys_file=file, admin_key="operator")
    for replica in cluster.replicas:
        (limits,) = (part for part in replica.gateway.gateway._sharing._parts if isinstance(part, SharedKeyLimits))
        await until(lambda: limits.replicas == 3, PATIENCE)  # noqa: B023
    cluster.server.kill()
    await until(lambda: not any(replica.link.is_up for replica in cluster.replicas), PATIENCE)
    for replica in cluster.replicas:
        answers = await asyncio.gather(*(ask(replica) for _ in range(15)))
        assert sorted(status for status, _ in answers) == [200] * 10 + [429] * 5
