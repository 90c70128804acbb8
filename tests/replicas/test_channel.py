"""Messages that replicas send each other, and that may be lost."""

from contextlib import AsyncExitStack

import pytest

from gateway.replicas.channel import MOST_PENDING, Channel
from gateway.replicas.link import RedisLink
from tests.fakes.redis import redis_server
from tests.fakes.running_gateway import until


@pytest.mark.usefixtures("patient_links")
async def test_message_reaches_all_and_without_redis_it_is_dropped() -> None:
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_server())
        links = [RedisLink(server.url) for _ in range(2)]
        channels = [Channel(link, "test") for link in links]
        heard: list[list[bytes]] = [[], []]
        for channel, messages in zip(channels, heard, strict=True):
            channel.listen(messages.append)
        channels[0].send(b"too early")
        for link in links:
            await stack.enter_async_context(link)
        await until(lambda: all(link.is_up for link in links))
        channels[0].send(b"\x00hello\xff")
        await until(lambda: heard == [[b"\x00hello\xff"]] * 2)
        for _ in range(2 * MOST_PENDING):
            channels[0].send(b"many")
        assert len(channels[0]._pending) == MOST_PENDING
        server.kill()
        await until(lambda: not links[0].is_up)
        channels[0].send(b"lost")
        for channel in channels:
            await channel.__aexit__()
        assert not channels[0]._pending
