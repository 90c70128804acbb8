"""A server that one gateway found dead is out at the others, which had no request for it, and back with them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.fakes.fault_backend import FaultBackend
from tests.fakes.redis import redis_server
from tests.fakes.running_gateway import until
from tests.integration.test_replicas_rollout import PATIENCE, Cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_server())
        ollama = await stack.enter_async_context(FaultBackend("ollama"))
        vllm = await stack.enter_async_context(FaultBackend("vllm"))
        yield Cluster(server, ollama, vllm, stack)


async def test_dead_server_is_out_and_back_everywhere_long_before_the_next_probe(cluster: Cluster) -> None:
    for _ in range(3):
        await cluster.start()  # with a probe every 60 seconds
    await until(lambda: all(replica.link.is_up for replica in cluster.replicas), PATIENCE)
    servers = [replica.gateway.gateway._backends["ollama"].servers[0] for replica in cluster.replicas]
    cluster.ollama.die()
    servers[0].circuit.mark_suspect("connect")
    await until(lambda: all(server.circuit.state == "open" for server in servers), PATIENCE)
    await cluster.ollama.revive()
    servers[2].doubted.set()
    await until(lambda: servers[2].circuit.state != "open", PATIENCE)
    while servers[2].circuit.state != "closed":
        async with cluster.replicas[2].gateway.sent({"model": "standard"}) as raw:
            assert (await raw.reply()).status == 200
    await until(lambda: all(server.circuit.state != "open" for server in servers), PATIENCE)
