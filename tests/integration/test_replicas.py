"""Three gateways that share one backend's limits through a real Redis, while Redis or the way to it fails.

Covers: gateway/replicas/limit_sharing.py
Covers: gateway/sharing/redis_sharing.py
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import SecretStr

from gateway import config
from gateway.replicas import leases
from gateway.replicas.link import key
from tests.e2e.gateway import Gateway as GatewayProcess
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.redis import RedisServer, redis_server, way_to
from tests.fakes.running_gateway import Reply, Running, running, settings_for, until

pytestmark = pytest.mark.uvloop

LIMIT = 6
LONG = ("queue_timeout", "first_token_timeout", "idle_timeout", "total_timeout", "vision_queue_timeout")
PATIENCE = 20.0
"""Seconds after which something that takes five is a failure."""
IMAGE: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": png_data_url()}}]}]
}


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        skip_recovery(server)
        yield server


def skip_recovery(server: RedisServer) -> None:
    """Make the server look as if replicas had used it before, so that the first one need not wait for others."""
    server.client.hset(key("replicas"), "#recovery", "1")


def settings(url: str, *backends: FaultBackend, **limits: float) -> config.Settings:
    limits = {"max_concurrency": LIMIT, **dict.fromkeys(LONG, 60), **limits}
    return settings_for(*backends, **limits).model_copy(update={"redis_url": SecretStr(url)})


@asynccontextmanager
async def replicas(*several: config.Settings) -> AsyncIterator[list[Running]]:
    """Serve gateways with these settings, and wait until each sees all."""
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(running(one, shares_loop=True)) for one in several]
        await until(lambda: all(sharing(gateway) == len(gateways) for gateway in gateways))
        yield gateways


def sharing(gateway: Running) -> int:
    return int(gateway.metric("gateway_replicas"))


def status(gateway: Running) -> dict[str, Any]:
    found = gateway.gateway._operations.status()["replicas"]
    assert isinstance(found, dict)
    return found


def share(gateway: Running, limit: str = "slots") -> int:
    return next(int(entry["share"]) for entry in status(gateway)["limits"] if entry["name"].endswith(limit))


class Load:
    """Clients in a closed loop at each gateway while the block runs; every answer must be a success."""

    def __init__(self, *gateways: Running, clients: int = 3, body: dict[str, Any] | None = None) -> None:
        self._gateways = gateways
        self._clients = clients
        self._body = body
        self.served = dict.fromkeys(gateways, 0)
        self._is_ended = False

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._ask(gateway)) for gateway in self._gateways for _ in range(self._clients)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_ended = True
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._tasks)

    async def _ask(self, gateway: Running) -> None:
        while not self._is_ended:
            async with gateway.sent(self._body) as raw:
                reply = await raw.reply()
            assert reply.status == 200, reply.body
            self.served[gateway] += 1

    async def until_served(self, number: int, *gateways: Running) -> None:
        """Wait until each gateway has served `number` more requests."""
        wanted = {gateway: self.served[gateway] + number for gateway in gateways or self._gateways}
        await until(lambda: all(self.served[gateway] >= least for gateway, least in wanted.items()), PATIENCE)


async def test_the_backend_never_gets_more_than_the_limit_and_an_idle_replica_holds_nothing_back(
    redis: RedisServer,
) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend)] * 3) as gateways,
    ):
        async with Load(*gateways, clients=8) as load:
            await load.until_served(20)
        assert backend.most_at_once == LIMIT
        backend.most_at_once = 0
        async with Load(gateways[0], clients=2 * LIMIT) as load:
            await load.until_served(20)
        assert backend.most_at_once == LIMIT


async def test_a_redis_that_is_killed_costs_no_request_and_no_slot_too_many(redis: RedisServer) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend)] * 3) as gateways,
        Load(*gateways) as load,
    ):
        await load.until_served(10)
        redis.kill()
        await until(lambda: all(sharing(gateway) == 1 for gateway in gateways), PATIENCE)
        await until(lambda: [share(gateway) for gateway in gateways] == [LIMIT // 3] * 3, PATIENCE)
        assert not any(status(gateway)["up"] for gateway in gateways)
        await load.until_served(10)
        redis.start()
        await until(lambda: all(sharing(gateway) == 3 for gateway in gateways), PATIENCE)
        await load.until_served(10)
        assert backend.most_at_once <= LIMIT


async def test_a_redis_that_hangs_or_forgets_everything_costs_no_request_and_no_slot_too_many(
    redis: RedisServer,
) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend)] * 3) as gateways,
        Load(*gateways) as load,
    ):
        await load.until_served(10)
        redis.pause()
        await until(lambda: not any(status(gateway)["up"] for gateway in gateways), PATIENCE)
        await load.until_served(10)
        redis.resume()
        await until(lambda: all(sharing(gateway) == 3 for gateway in gateways), PATIENCE)
        for _ in range(3):
            redis.client.flushall()
            redis.client.script_flush()
            await load.until_served(10)
        assert backend.most_at_once <= LIMIT


async def test_a_replica_that_is_cut_off_goes_on_with_its_share_and_comes_back(redis: RedisServer) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        way_to(redis) as way,
        replicas(settings(redis.url, backend), settings(redis.url, backend), settings(way.url, backend)) as gateways,
    ):
        *linked, cut_off = gateways
        async with Load(*gateways) as load:
            way.cut()
            await until(lambda: sharing(cut_off) == 1, PATIENCE)
            assert backend.most_at_once <= LIMIT
            await until(lambda: all(sharing(gateway) == 2 for gateway in linked), PATIENCE)
            await until(lambda: share(cut_off) == LIMIT // 3, PATIENCE)
            await load.until_served(10)
            assert backend.most_at_once <= LIMIT + LIMIT // 3
            way.heal()
            await until(lambda: all(sharing(gateway) == 3 for gateway in gateways), PATIENCE)
            await load.until_served(10)
            backend.most_at_once = 0
            await load.until_served(10)
        assert backend.most_at_once <= LIMIT


async def test_one_slot_of_the_vision_lane_serves_the_images_of_all_replicas_in_turn(redis: RedisServer) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend, vision_concurrency=1)] * 3) as gateways,
    ):
        async with Load(*gateways, clients=3, body=IMAGE) as load:
            await load.until_served(10)
        assert backend.most_at_once == 1
        assert max(load.served.values()) <= 2 * min(load.served.values())
        async with Load(gateways[0], clients=1, body=IMAGE), Load(*gateways[1:]) as load:
            await load.until_served(10)
        assert 1 < backend.most_at_once <= LIMIT


async def test_without_redis_and_with_fewer_slots_than_replicas_the_replicas_take_turns(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that begins at the end of a turn is over before the next one, even on a machine that stands still."""
    monkeypatch.setattr(leases, "SLICE_SECONDS", 2.5)
    monkeypatch.setattr(leases, "GUARD_SECONDS", 1.5)
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend, vision_concurrency=1)] * 2) as gateways,
    ):
        redis.kill()
        await until(lambda: all(sharing(gateway) == 1 for gateway in gateways), PATIENCE)
        async with Load(*gateways, clients=1, body=IMAGE) as load:
            await load.until_served(1)
        assert backend.most_at_once == 1


async def test_a_limit_that_differs_is_the_smallest_on_all_and_is_reported_once(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(settings(redis.url, backend), settings(redis.url, backend, max_concurrency=2)) as gateways,
    ):
        async with Load(*gateways) as load:
            await load.until_served(20)
        assert backend.most_at_once == 2
        reports = [record.getMessage() for record in caplog.records if "smallest" in record.getMessage()]
        assert len(reports) == len(set(reports))
        limit = f"vllm {backend.base_url} slots"
        assert f"limits: {limit} is {LIMIT} here and 2 on another replica; the smallest counts" in reports


async def test_requests_are_not_refused_for_slots_that_another_replica_only_has_to_give_back(
    redis: RedisServer,
) -> None:
    async with (
        FaultBackend("vllm", "leisurely") as backend,
        replicas(*[settings(redis.url, backend, max_queue=0)] * 2) as gateways,
    ):
        first, second = gateways
        await until(lambda: share(first) == share(second) == LIMIT // 2)
        replies: list[Reply] = await asyncio.gather(*(first.ask() for _ in range(LIMIT)))
        assert [reply.status for reply in replies] == [200] * LIMIT


async def test_status_shows_the_replicas_and_no_password(redis: RedisServer) -> None:
    redis.client.config_set("requirepass", "hunter2-not-for-status")
    redis.client.connection_pool.disconnect()
    async with (
        FaultBackend("vllm") as backend,
        replicas(settings(f"{redis.url}?password=hunter2-not-for-status", backend)) as (gateway,),
    ):
        await until(lambda: bool(status(gateway)["up"]))
        found = status(gateway)
        assert (found["up"], found["sharing"], found["replicas"], found["reason"]) == (True, 1, 1, None)
        assert f"vllm {backend.base_url} slots" in {limit["name"] for limit in found["limits"]}
        assert "hunter2" not in repr(found)
        up = f'gateway_redis_up{{redis="{found["redis"]}"}}'
        assert f"{up} 1.0\n" in await metrics(gateway)
        redis.kill()
        await until(lambda: not status(gateway)["up"], PATIENCE)
        assert f"{up} 0.0\n" in await metrics(gateway)
        assert "hunter2" not in await metrics(gateway)


async def metrics(gateway: Running) -> str:
    text, _ = await gateway.gateway._operations.exposition("text/plain")
    return text.decode()


async def test_a_gateway_that_starts_without_its_redis_divides_by_the_replicas_that_it_knew(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with FaultBackend("vllm", "leisurely") as backend:
        mine = settings(redis.url, backend).model_copy(update={"state_file": tmp_path / "state.json"})
        async with replicas(mine, *[settings(redis.url, backend)] * 2):
            pass
        redis.kill()
        async with running(mine, shares_loop=True) as gateway:
            await until(lambda: share(gateway) == LIMIT // 3, PATIENCE)
            assert (await gateway.ask()).status == 200
            assert (status(gateway)["up"], sharing(gateway)) == (False, 1)


async def test_a_gateway_that_starts_again_counts_the_replicas_that_it_knew(redis: RedisServer, tmp_path: Path) -> None:
    async with FaultBackend("vllm") as backend, replicas(settings(redis.url, backend)) as (other,):
        mine = settings(redis.url, backend).model_copy(update={"state_file": tmp_path / "state.json"})
        for _ in range(2):
            async with running(mine, shares_loop=True) as gateway:
                await until(lambda gateway=gateway: sharing(gateway) == sharing(other) == 2, PATIENCE)  # type: ignore[misc]


@asynccontextmanager
async def process(folder: Path, redis: RedisServer, backend: FaultBackend) -> AsyncIterator[GatewayProcess]:
    """Run a gateway in a process of its own, and wait until it is ready."""
    folder.mkdir()
    environment = {
        "LLM_BACKEND": "vllm",
        "VLLM_BASE_URL": backend.base_url,
        "VLLM_MODEL": MODEL,
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(LIMIT),
        "GATEWAY_REDIS_URL": redis.url,
        "GATEWAY__DRAIN_DELAY": "0",
        "GATEWAY__DRAIN_TIMEOUT": "1",
    }
    gateway = GatewayProcess(folder, environment)
    gateway.start()
    try:
        await asyncio.to_thread(gateway.wait_until_ready)
        yield gateway
    finally:
        await asyncio.to_thread(gateway.stop)


async def test_killed_and_stopped_replicas_give_their_slots_back(redis: RedisServer, tmp_path: Path) -> None:
    """One process is killed with requests in flight, another is told to stop; the third one gets all slots."""
    async with (
        FaultBackend("vllm", "slow") as backend,
        replicas(settings(redis.url, backend)) as (survivor,),
        process(tmp_path / "first", redis, backend) as first,
        process(tmp_path / "second", redis, backend) as second,
        first.async_openai() as to_first,
        second.async_openai() as to_second,
    ):
        await until(lambda: sharing(survivor) == 3, PATIENCE)
        message: Any = [{"role": "user", "content": "Hello?"}]
        for client in (to_first, to_second) * 2:
            await client.chat.completions.create(model="standard", messages=message, stream=True)
        assert len(backend.open_peers) == 4
        os.kill(first.pid, signal.SIGKILL)
        os.kill(second.pid, signal.SIGTERM)
        await until(lambda: share(survivor) == LIMIT, 10)
        assert sharing(survivor) == 1
