"""A document in Redis: compare and set, wake-ups, and keys that are no document.

Covers: gateway/replicas/shared_document.py
Covers: gateway/replicas/names.py
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from gateway.replicas import link
from gateway.replicas.link import RedisLink, key
from gateway.replicas.redis_document import RedisDocument
from gateway.replicas.shared_document import MAX_BYTES, Snapshot, Unreachable
from tests.fakes.redis import RedisServer, redis_server
from tests.fakes.running_gateway import until

NAME = "test"

pytestmark = pytest.mark.usefixtures("patient_links")


class Reader:
    """One replica's document, and how often it was woken."""

    def __init__(self, url: str) -> None:
        self.link = RedisLink(url)
        self.document = RedisDocument(self.link, NAME)
        self.wakes = 0
        self.document.listen(self._count)

    def _count(self) -> None:
        self.wakes += 1


class Two:
    """Two replicas at one redis-server."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.readers = [Reader(server.url), Reader(server.url)]
        self.one, self.other = (reader.document for reader in self.readers)

    def run(self, *command: str | bytes | int) -> None:
        """Run a command of another program on the document's key, which `command` has as `*`."""
        self.server.client.execute_command(  # type: ignore[no-untyped-call]
            *[key(NAME) if part == "*" else part for part in command]
        )


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    async with AsyncExitStack() as stack:
        made = Two(stack.enter_context(redis_server()))
        for reader in made.readers:
            await stack.enter_async_context(reader.link)
        await until(lambda: made.one.is_up and made.other.is_up)
        yield made


async def test_write_is_refused_if_someone_wrote_in_between_and_wakes_all_otherwise(two: Two) -> None:
    assert await two.one.read() == Snapshot(0, b"")
    wakes = [reader.wakes for reader in two.readers]
    assert await two.one.write(b"first", 0)
    assert not await two.other.write(b"lost", 0)
    version, content = await two.other.read()
    assert content == b"first"
    assert await two.other.write(b"\x00second\xff", version)
    assert (await two.one.read()).content == b"\x00second\xff"
    assert (await two.one.read()).version > version
    await until(lambda: [reader.wakes for reader in two.readers] >= [before + 2 for before in wakes])


async def test_versions_go_on_rising_after_the_data_was_lost(two: Two) -> None:
    await two.one.write(b"first", 0)
    version = (await two.one.read()).version
    two.run("FLUSHALL")
    assert await two.one.read() == Snapshot(0, b"")
    assert not await two.one.write(b"from before", version)
    assert await two.one.write(b"again", 0)
    assert (await two.one.read()).version >= version


@pytest.mark.parametrize(
    "command",
    [
        ("SET", "*", "text"),
        ("RPUSH", "*", "a", "b"),
        ("HSET", "*", "content", "without a version"),
        ("HSET", "*", "version", "many", "content", "x"),
        ("HSET", "*", "version", "1.5", "content", "x"),
        ("HSET", "*", "version", "9" * 30, "content", "x"),
        ("HSET", "*", "version", "-1", "content", "x"),
    ],
    ids=[
        "string",
        "list",
        "no-version",
        "version-a-word",
        "version-a-fraction",
        "version-too-long",
        "version-negative",
    ],
)
async def test_key_that_is_no_document_counts_as_none_and_is_replaced(two: Two, command: tuple[str, ...]) -> None:
    two.run(*command)
    assert await two.one.read() == Snapshot(0, b"")
    assert await two.one.write(b"document", 0)
    assert (await two.other.read()).content == b"document"


async def test_document_that_is_too_large_is_read_as_empty(two: Two) -> None:
    two.run("HSET", "*", "version", "5", "content", b"x" * (MAX_BYTES + 1))
    assert await two.one.read() == Snapshot(5, b"")
    assert await two.one.write(b"small", 5)


async def test_time_is_that_of_the_server(two: Two) -> None:
    behind = RedisDocument(two.readers[0].link, NAME, wall=lambda: 1000.0)
    assert behind.now() == 1000.0
    await behind.read()
    assert abs(behind.now() - time.time()) < 5


async def test_replicas_have_different_names(two: Two) -> None:
    assert two.one.replica != two.other.replica


async def test_without_redis_it_is_unreachable_and_the_way_back_wakes(two: Two) -> None:
    await two.one.write(b"first", 0)
    two.server.kill()
    await until(lambda: not two.one.is_up)
    for call in (two.one.read(), two.one.write(b"second", 0)):
        with pytest.raises(Unreachable):
            await call
    wakes = two.readers[0].wakes
    two.server.start()
    await until(lambda: two.readers[0].wakes > wakes)
    assert await two.one.read() == Snapshot(0, b"")  # this server keeps nothing


async def test_call_to_a_server_that_hangs_ends(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CALL_SECONDS", 1.0)
    two.server.pause()
    try:
        async with asyncio.timeout(10):
            with pytest.raises(Unreachable):
                await two.one.read()
    finally:
        two.server.resume()
    await until(lambda: two.one.is_up)
