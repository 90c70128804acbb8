"""Three gateways that share the roll-out through a real Redis: reached, cut off, hung, stopped and back."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.replicas import link
from gateway.replicas.link import RedisLink, key
from gateway.rollout import sharing
from gateway.sharing.redis_sharing import RedisSharing
from tests.fakes.exchanges import exchange, failed
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.redis import RedisServer, Way, redis_server, way_to
from tests.fakes.running_gateway import Running, running, until

PATIENCE = 20.0
"""Seconds for what has to happen at all."""
DOCUMENT_KEY = key("rollout")
SLOTS = 12
"""Requests that run at a backend at once, from all gateways."""


class Replica:
    """One gateway with its way to Redis, and a client of its operator."""

    def __init__(self, gateway: Running, way: Way, link: RedisLink, client: httpx2.AsyncClient) -> None:
        self.gateway = gateway
        self.way = way
        self.link = link
        self._client = client

    @property
    def name(self) -> str:
        sharing = self.gateway.gateway._rollout_sharing
        assert sharing is not None
        return sharing.replica

    @property
    def standard(self) -> str:
        return self.assignment("standard")

    def assignment(self, tier: str) -> str:
        return str(self.gateway.gateway.rollout.tiers[tier].assignment)

    @property
    def is_shared(self) -> bool | None:
        return self.gateway.gateway._operations.controller.is_shared

    async def order(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._client.request(method, path, json={} if body is None else body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def switch(self, backend: str, **more: Any) -> Any:
        return await self.order("PUT", "/ops/rollout", {"backend": backend, **more})

    async def rollback(self) -> Any:
        return await self.order("POST", "/ops/rollback")

    async def history(self) -> list[Any]:
        answer = await self._client.get("/ops/rollout")
        history: list[Any] = answer.json()["history"]
        return history

    def cut_off(self) -> None:
        self.way.cut()

    async def join(self) -> None:
        self.way.heal()
        await until(lambda: self.link.is_up, PATIENCE)


class Cluster:
    """Two backends, a redis-server, and the replicas that were started."""

    def __init__(self, server: RedisServer, ollama: FaultBackend, vllm: FaultBackend, stack: AsyncExitStack) -> None:
        self.server = server
        self.ollama = ollama
        self.vllm = vllm
        self.replicas: list[Replica] = []
        self._stack = stack

    async def start(self, **changes: Any) -> Replica:
        way = await self._stack.enter_async_context(way_to(self.server))
        replica = await self._stack.enter_async_context(self._replica(way, changes))
        self.replicas.append(replica)
        return replica

    @asynccontextmanager
    async def _replica(self, way: Way, changes: dict[str, Any]) -> AsyncIterator[Replica]:
        async with (
            running(self.settings(redis_url=way.url, **changes), shares_loop=True) as gateway,
            httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, timeout=PATIENCE) as client,
        ):
            sharing = gateway.gateway._sharing
            assert isinstance(sharing, RedisSharing)
            link = sharing.link
            yield Replica(gateway, way, link, client)

    def settings(self, **changes: Any) -> config.Settings:
        backends = {
            kind: {
                "kind": kind,
                "base_url": backend.base_url,
                "max_concurrency": SLOTS,
                "model_concurrency": SLOTS,
                "probe_interval": 60,
            }
            for kind, backend in (("ollama", self.ollama), ("vllm", self.vllm))
        }
        models = {"ollama": MODEL, "vllm": MODEL}
        document: dict[str, Any] = {
            "llm_backend": "ollama",
            "backends": backends,
            "tiers": {"standard": {"models": models}, "pro": {"models": models}},
            "log_format": "json",
            "state_file": "",
        }
        return config.build(document | changes)

    def are_all_on(self, assignment: str) -> bool:
        return all(replica.standard == assignment for replica in self.replicas)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each replica wait for Redis: a busy machine must not look like a Redis that hangs."""
    for module, name in ((sharing, "SHARE_SECONDS"), (sharing, "START_SECONDS"), (link, "CALL_SECONDS")):
        monkeypatch.setattr(module, name, PATIENCE)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_server())
        ollama = await stack.enter_async_context(FaultBackend("ollama"))
        vllm = await stack.enter_async_context(FaultBackend("vllm"))
        yield Cluster(server, ollama, vllm, stack)


@pytest.fixture
async def three(cluster: Cluster) -> Cluster:
    for _ in range(3):
        await cluster.start()
    return cluster


@pytest.mark.usefixtures("patient")
async def test_change_on_any_replica_reaches_all(
    three: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharing, "POLL_SECONDS", 3600.0)  # so that only wake-ups can do it
    for replica in three.replicas:
        replica.gateway.gateway._rollout_sharing._wake.set()  # type: ignore[union-attr]
    seconds = []
    for number in range(20):
        replica, backend = three.replicas[number % 3], ("vllm", "ollama")[number % 2]
        began = time.perf_counter()
        answer = await replica.switch(backend)
        assert answer["shared"] is True
        await until(lambda: three.are_all_on(backend), PATIENCE)  # noqa: B023
        seconds.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"\na change reaches all: median {1000 * median(seconds):.1f} ms, at most {1000 * max(seconds):.1f} ms")
    histories = [await replica.history() for replica in three.replicas]
    assert histories[0] == histories[1] == histories[2]
    assert [change["replica"] for change in histories[0][:3]] == [three.replicas[at % 3].name for at in (19, 18, 17)]


@pytest.mark.usefixtures("patient")
async def test_canary_rollback_and_undo_reach_all(three: Cluster) -> None:
    a, b, c = three.replicas
    await a.order("PUT", "/ops/rollout", {"canary": {"backend": "vllm", "percent": 25}})
    await until(lambda: three.are_all_on("ollama with 25 % on vllm"), PATIENCE)
    await b.rollback()
    await until(lambda: three.are_all_on("ollama"), PATIENCE)
    await c.order("POST", "/ops/undo")
    await until(lambda: three.are_all_on("ollama with 25 % on vllm"), PATIENCE)


@pytest.mark.usefixtures("patient")
async def test_queued_requests_migrate_on_every_replica(three: Cluster) -> None:
    three.ollama.mode = "silent"
    async with AsyncExitStack() as stack:
        gateways = [replica.gateway for replica in three.replicas]
        for gateway in gateways * (SLOTS + 1):
            await stack.enter_async_context(gateway.sent({"model": "standard"}))
        sent = 3 * (SLOTS + 1)
        await until(lambda: sum(gateway.running + gateway.waiting for gateway in gateways) == sent, PATIENCE)
        await until(lambda: sum(gateway.running for gateway in gateways) == SLOTS, PATIENCE)
        waiting = [gateway.waiting for gateway in gateways]
        assert all(waiting)
        answer = await three.replicas[0].switch("vllm")
        assert answer["moved"] == waiting[0]
        await until(lambda: not any(gateway.waiting for gateway in gateways), PATIENCE)
        await until(lambda: len(three.vllm.requests) == sum(waiting), PATIENCE)


async def test_cut_off_replica_rolls_back_at_once_and_its_newer_order_counts_afterwards(three: Cluster) -> None:
    a, b, c = three.replicas
    await a.switch("vllm")
    await until(lambda: three.are_all_on("vllm"), PATIENCE)
    c.cut_off()
    answer = await c.rollback()
    assert (answer["shared"], c.standard) == (False, "ollama")
    assert (a.standard, b.standard) == ("vllm", "vllm")
    await until(lambda: not c.link.is_up, PATIENCE)
    assert c.is_shared is False
    await c.join()
    await until(lambda: three.are_all_on("ollama"), PATIENCE)
    assert (await a.history())[0]["replica"] == c.name


async def test_older_order_of_a_cut_off_replica_yields_to_a_newer_one(three: Cluster) -> None:
    a, b, c = three.replicas
    c.cut_off()
    await c.switch("vllm")
    await c.switch("ollama", canary={"backend": "vllm", "percent": 50})
    answer = await a.switch("vllm", tier="standard")
    assert answer["shared"] is True
    await c.join()
    await until(lambda: three.are_all_on("vllm"), PATIENCE)
    on_pro = "ollama with 50 % on vllm"  # where nothing was ordered since
    await until(lambda: all(replica.assignment("pro") == on_pro for replica in three.replicas), PATIENCE)
    assert await b.history() == await c.history()


async def test_rollback_while_redis_hangs_answers_within_a_second(three: Cluster) -> None:
    a = three.replicas[0]
    await a.switch("vllm")
    await until(lambda: three.are_all_on("vllm"), PATIENCE)
    three.server.pause()
    try:
        began = time.perf_counter()
        answers = await asyncio.gather(*(replica.rollback() for replica in three.replicas))
        seconds = time.perf_counter() - began
    finally:
        three.server.resume()
    assert [answer["shared"] for answer in answers] == [False] * 3
    assert three.are_all_on("ollama")
    assert seconds < 3  # half a second, on a machine that does nothing else
    await until(lambda: all(replica.is_shared for replica in three.replicas), PATIENCE)
    assert three.are_all_on("ollama")


async def test_redis_stopped_and_back_empty_is_filled_by_the_replicas(three: Cluster) -> None:
    a, b, _ = three.replicas
    await a.switch("vllm")
    await until(lambda: three.are_all_on("vllm"), PATIENCE)
    three.server.kill()
    await until(lambda: not any(replica.link.is_up for replica in three.replicas), PATIENCE)
    for replica in three.replicas:
        assert (await replica.rollback())["shared"] is False
    await b.switch("vllm", tier="pro")
    three.server.start()
    await until(lambda: all(replica.is_shared for replica in three.replicas), PATIENCE)
    await until(lambda: len({str(replica.gateway.gateway.rollout) for replica in three.replicas}) == 1, PATIENCE)
    assert three.are_all_on("ollama")
    assert a.assignment("pro") == "vllm"
    newcomer = await three.start()
    assert str(newcomer.gateway.gateway.rollout) == str(a.gateway.gateway.rollout)


@pytest.mark.usefixtures("patient")
async def test_flushall_and_garbage_do_not_move_anything(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.05)
    a, b, _ = three.replicas
    for backend in ("vllm", "ollama", "vllm"):
        await a.switch(backend)
    client = three.server.client
    for command in (
        ("FLUSHALL",),
        ("SET", DOCUMENT_KEY, "garbage"),
        ("HSET", DOCUMENT_KEY, "version", "3", "content", "garbage"),
        ("HSET", DOCUMENT_KEY, "version", "many", "content", b"\xff\x00"),
    ):
        client.execute_command(*command)  # type: ignore[no-untyped-call]
        async with asyncio.timeout(PATIENCE):
            while client.eval(READ, 1, DOCUMENT_KEY) is None:
                await asyncio.sleep(0.01)
        assert three.are_all_on("vllm")
    assert (await b.rollback())["shared"] is True
    await until(lambda: three.are_all_on("ollama"), PATIENCE)


READ = """
local found = redis.pcall('HGET', KEYS[1], 'content')
return type(found) == 'string' and string.find(found, '"llm_gateway_rollout":1', 1, true) or false
"""
"""Script that returns a number if the key has a document, else nothing."""


@pytest.mark.usefixtures("patient")
async def test_only_one_guards_rollback_is_in_the_history(cluster: Cluster) -> None:
    guard = {"min_samples": 5, "rules": ["errors"], "grace": 0}
    for _ in range(3):
        await cluster.start(guard=guard)
    a = cluster.replicas[0]
    await a.order("PUT", "/ops/rollout", {"canary": {"backend": "vllm", "percent": 50}, "tier": "standard"})
    await until(lambda: cluster.are_all_on("ollama with 50 % on vllm"), PATIENCE)
    guards = [replica.gateway.gateway._operations._guard for replica in cluster.replicas]
    for guard_of in guards:  # all of them see the same failures, before any hears of the others
        assert guard_of is not None
        for _ in range(200):
            guard_of.observe([failed("vllm", duration=0.0), exchange("ollama", duration=0.0)])
    await until(lambda: cluster.are_all_on("ollama"), PATIENCE)
    await until(lambda: all(replica.is_shared for replica in cluster.replicas), PATIENCE)
    for replica in cluster.replicas:
        assert [change["cause"] for change in await replica.history()] == ["guard", "operator"]


@pytest.mark.usefixtures("patient")
async def test_variable_yields_to_the_others_at_a_start(cluster: Cluster, tmp_path: Path) -> None:
    a = await cluster.start(state_file=str(tmp_path / "a.json"))
    await a.switch("vllm")
    late = await cluster.start(llm_backend="ollama", state_file=str(tmp_path / "b.json"))
    assert late.standard == "vllm"
    pod = await cluster.start(llm_backend="vllm")
    await pod.rollback()
    await until(lambda: cluster.are_all_on("ollama"), PATIENCE)
    assert pod.standard == "ollama"


async def test_start_without_redis_takes_a_second_and_joins_later(cluster: Cluster) -> None:
    cluster.server.kill()
    a = await cluster.start()
    assert (await a.switch("vllm"))["shared"] is False
    cluster.server.start()
    b = await cluster.start()
    await until(lambda: b.standard == "vllm", PATIENCE)
