"""Replicas choose among servers as one: they tell each other what they have in flight, and where prompts went.

Covers: gateway/sharing/affinity_sharing.py
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from msgspec import Struct
from pydantic import SecretStr

from gateway import config
from gateway.replicas.hub import Hub
from gateway.replicas.member import HubMember
from gateway.replicas.messages import Channel, Hello
from gateway.state_file import StateFile
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.redis import redis_server
from tests.fakes.running_gateway import Running, running, until

PATIENCE = 20.0
SYSTEM = "You are a helpful assistant. " * 100


def settings(*servers: FaultBackend, redis: str | None = None) -> config.Settings:
    document: dict[str, Any] = {
        "llm_backend": "vllm",
        "backends": {"vllm": {"servers": [server.base_url for server in servers]}},
        "tiers": {"standard": {"models": {"vllm": MODEL}}},
        "state_file": "",
    }
    return config.build(document).model_copy(update={"redis_url": None if redis is None else SecretStr(redis)})


def body(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}], "stream": True}


def elsewhere(gateway: Running) -> list[float]:
    return [server.prefixes.elsewhere for server in gateway.gateway._backends["vllm"].servers]


def marks(gateway: Running) -> list[int]:
    """Return how many prompts, or beginnings of prompts, are known of each server."""
    return [len(server.prefixes._known) for server in gateway.gateway._backends["vllm"].servers]


def in_flight(gateway: Running) -> list[bool]:
    return [server.slots.count > 0 for server in gateway.gateway._backends["vllm"].servers]


async def check_that_they_choose_as_one(one: Running, other: Running) -> None:
    """One replica has a request in flight; the other one hears of it, and of the system message that it has."""
    async with one.sent(body("first")) as raw:
        assert (await raw.head())[0] == 200
        await until(lambda: any(elsewhere(other)), PATIENCE)
        assert [load > 0 for load in elsewhere(other)] == in_flight(one)
        await until(lambda: [known > 0 for known in marks(other)] == in_flight(one), PATIENCE)
        assert not any(elsewhere(one))
    await until(lambda: not any(elsewhere(other)), PATIENCE)


async def test_replicas_that_share_a_redis_choose_as_one_and_alone_without_it() -> None:
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(redis_server())
        servers = [await stack.enter_async_context(FaultBackend("vllm", "slow")) for _ in range(2)]
        shared = settings(*servers, redis=redis.url)
        one, other = [await stack.enter_async_context(running(shared, shares_loop=True)) for _ in range(2)]
        await until(lambda: one.metric("gateway_replicas") == other.metric("gateway_replicas") == 2, PATIENCE)
        await check_that_they_choose_as_one(one, other)

        async with one.sent(body("second")) as raw:
            assert (await raw.head())[0] == 200
            await until(lambda: any(elsewhere(other)), PATIENCE)
            redis.kill()
            await until(lambda: not any(elsewhere(other)), PATIENCE)
            async with other.sent(body("third")) as further:
                assert (await further.head())[0] == 200
            redis.start()
            await until(lambda: any(elsewhere(other)), PATIENCE)


class Member:
    """A replica at the hub's end."""

    is_open = True

    def __init__(self, hub: Hub, number: int) -> None:
        self.number = number
        self.name = f"replica {number}"
        self.channel = Channel(lambda content: hub.receive(self, content), lambda: hub.leave(self))

    def send(self, message: Struct) -> None:
        self.channel.send(message)


@asynccontextmanager
async def joined(hub: Hub, number: int) -> AsyncIterator[HubMember]:
    """Connect a replica to the hub."""
    loop = asyncio.get_running_loop()
    here, there = socket.socketpair()
    member, seen = HubMember(), Member(hub, number)
    await loop.create_unix_connection(lambda: seen.channel, sock=here)
    await loop.create_unix_connection(lambda: member.channel, sock=there)
    hub.join(seen, Hello(number, seen.name, 2, b"", None, {}))
    await member.greeting()
    try:
        yield member
    finally:
        member.channel.close()
        await until(lambda: seen not in hub.members, PATIENCE)


async def test_replicas_of_one_machine_choose_as_one() -> None:
    async with AsyncExitStack() as stack:
        hub = Hub(2, StateFile(None))
        servers = [await stack.enter_async_context(FaultBackend("vllm", "slow")) for _ in range(2)]
        gateways = []
        for number in (1, 2):
            member = await stack.enter_async_context(joined(hub, number))
            gateways.append(
                await stack.enter_async_context(running(settings(*servers), shares_loop=True, member=member))
            )
            member.start()
        await check_that_they_choose_as_one(*gateways)
        await check_that_they_choose_as_one(*reversed(gateways))
