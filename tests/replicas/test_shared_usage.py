"""Usage of all replicas: one answer, also for replicas that are down and a Redis that has lost its data."""

import threading
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.replicas import shared_usage
from gateway.replicas.link import RedisLink, key
from gateway.replicas.shared_usage import SharedUsage
from gateway.telemetry.exchange import Attribution
from gateway.usage.recorder import UsageRecorder
from tests.fakes.exchanges import exchange
from tests.fakes.redis import RedisServer, redis_server
from tests.fakes.running_gateway import until

NOW = 1_796_040_000.0
DAY, TODAY = 86_400, "2026-11-30"
PATIENCE = 20.0

pytestmark = pytest.mark.usefixtures("patient_links")


class Replica:
    def __init__(self, file: Path, server: RedisServer) -> None:
        self.now = NOW
        self.link = RedisLink(server.url)
        self.usage = UsageRecorder(file, 400, lambda: self.now)
        self.shared = self.usage.others = SharedUsage(self.link, self.usage, 400)

    def serve(self, count: int, name: str = "web", person: str = "") -> None:
        self.usage.observe([(exchange(key=name), Attribution(person, 0) if person else None)] * count)

    async def counted(self, *by: str, since: str | None = None) -> tuple[dict[tuple[str, ...], int], bool]:
        rows, is_complete = await self.usage.rows_of_all(by, since, None)
        return {tuple(row[name] for name in by): row["requests"] for row in rows}, is_complete


class Cluster:
    def __init__(self, server: RedisServer, folder: Path, stack: AsyncExitStack) -> None:
        self.server = server
        self._folder = folder
        self._stack = stack

    async def start(self, file: str) -> Replica:
        replica = Replica(self._folder / file, self.server)
        await self._stack.enter_async_context(replica.link)
        await until(lambda: replica.link.is_up, PATIENCE)
        self._stack.push_async_callback(replica.usage.close)
        return replica


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(stack.enter_context(redis_server()), tmp_path, stack)


async def test_every_replica_tells_the_sums_of_all(cluster: Cluster) -> None:
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    a.serve(2, "ops")
    b.serve(4, person="ada")
    for replica in (a, b):
        await replica.shared._send()
    expected = {("web",): 7, ("ops",): 2}
    assert await a.counted("key") == await b.counted("key") == (expected, True)
    assert (await a.counted("key", "person"))[0] == {("web", "none"): 3, ("web", "ada"): 4, ("ops", "none"): 2}
    assert (await a.counted())[0] == {(): 9}
    a.serve(1)  # its own are always there
    assert (await a.counted("key"))[0] == {("web",): 8, ("ops",): 2}


async def test_replica_that_is_down_still_counts_and_is_not_counted_twice_when_it_is_back(cluster: Cluster) -> None:
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    b.serve(1)
    await a.shared._send()
    await a.usage.close()
    assert (await b.counted("key"))[0] == {("web",): 4}
    again = await cluster.start("a.db")
    again.serve(2)
    await again.shared._send()
    assert (await b.counted("key"))[0] == {("web",): 6}
    assert (await again.counted("key"))[0] == {("web",): 5}  # b has not sent yet
    await b.shared._send()
    assert (await again.counted("key"))[0] == {("web",): 6}


async def test_what_was_recorded_right_before_a_kill_is_sent_at_the_next_start(cluster: Cluster) -> None:
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    await a.shared._send()
    a.serve(2)
    await a.usage.close()  # in the file, and not sent
    again = await cluster.start("a.db")
    again.now += DAY
    await again.shared._send()
    assert (await b.counted("day"))[0] == {(TODAY,): 5}


async def test_days_are_chosen(cluster: Cluster) -> None:
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    a.now += DAY
    a.serve(2)
    await a.shared._send()
    assert (await b.counted("key", since="2026-12-01"))[0] == {("web",): 2}
    assert (await b.counted("key"))[0] == {("web",): 5}


async def test_redis_that_lost_its_data_is_filled_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_usage, "CHECK_SECONDS", 0.0)
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    a.now += DAY
    a.serve(2)
    await a.shared._send()
    cluster.server.client.flushall()
    await a.shared._send()
    assert (await b.counted("key"))[0] == {("web",): 5}


async def test_without_redis_the_answer_has_its_own_usage_and_says_so(cluster: Cluster) -> None:
    a = await cluster.start("a.db")
    a.serve(3)
    cluster.server.kill()
    await until(lambda: not a.link.is_up, PATIENCE)
    assert await a.counted("key") == ({("web",): 3}, False)
    await a.shared._send()
    cluster.server.start()
    await until(lambda: a.link.is_up, PATIENCE)
    b = await cluster.start("b.db")
    await a.shared._send()
    assert await b.counted("key") == ({("web",): 3}, True)


async def test_garbage_in_redis_is_left_out(cluster: Cluster) -> None:
    a = await cluster.start("a.db")
    a.serve(3)
    await a.shared._send()
    client = cluster.server.client
    for number, content in enumerate((b"garbage", b"", shared_usage._packed([{"key": "x"}]), shared_usage._packed([]))):
        client.hset(key(f"usage:{TODAY}"), f"other-{number}", content)
    assert await a.counted("key") == ({("web",): 3}, True)
    client.set(key("usage:days"), "garbage")
    assert await a.counted("key") == ({("web",): 3}, False)


async def test_nothing_is_sent_as_long_as_nothing_changes(cluster: Cluster) -> None:
    a = await cluster.start("a.db")
    a.serve(1)
    await a.shared._send()
    client = cluster.server.client
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    for _ in range(5):
        await a.shared._send()
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before


async def test_loop_sends_what_changes(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_usage, "SEND_SECONDS", 0.01)
    a = await cluster.start("a.db")
    a.shared.start()
    a.serve(1)
    await until(lambda: bool(cluster.server.client.exists(key(f"usage:{TODAY}"))), PATIENCE)
    a.serve(1)
    await a.shared.close()
    b = await cluster.start("b.db")
    assert (await b.counted("key"))[0] == {("web",): 2}


async def test_rows_are_packed_and_read_outside_of_the_loop(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50,000 rows of a day, either held the loop for 0.3 s, the first one every two seconds."""
    threads: list[int] = []
    for name in ("_packed", "_unpacked"):
        monkeypatch.setattr(shared_usage, name, noting_thread(getattr(shared_usage, name), threads))
    a, b = await cluster.start("a.db"), await cluster.start("b.db")
    a.serve(3)
    await a.shared._send()
    assert (await b.counted("key"))[0] == {("web",): 3}
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def noting_thread(function: Callable[[Any], Any], threads: list[int]) -> Callable[[Any], Any]:
    def noting(argument: Any) -> Any:
        threads.append(threading.get_ident())
        return function(argument)

    return noting


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_rows_are_the_same_after_the_way_through_redis(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_usage, "ROWS_AT_ONCE", 2)
    rows = [
        {"person": f'}},{{"{number}\u4f60"],', "seconds": number / 3, "requests": number} for number in range(count)
    ]
    assert shared_usage._unpacked(shared_usage._packed(rows)) == rows


@pytest.mark.parametrize("text", ["", "[", "[]]", "[1", "[1,", '[{"a":1}]x', "{}", "[" * 10_000])
def test_what_no_replica_has_written_is_left_out(text: str) -> None:
    assert shared_usage._unpacked(zlib.compress(text.encode())) == []


def test_many_rows_are_sent_less_often() -> None:
    assert [shared_usage._pause_after(rows) for rows in (0, 10_000, 50_000)] == [2.0, 2.0, 10.0]
