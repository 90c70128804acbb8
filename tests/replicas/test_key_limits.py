"""Limits of keys that replicas share through Redis: never exceeded, used up to the last, and without Redis divided."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.dialects.json_body import completed
from gateway.errors import BudgetSpent, ConcurrencyExceeded, RateLimited
from gateway.keys.account import Account
from gateway.keys.accounts import Accounts
from gateway.keys.hold import Hold
from gateway.keys.policy import TOKENS_PER_DAY, Limits
from gateway.replicas import key_limits, shared_allowance
from gateway.replicas.key_limits import SharedKeyLimits
from gateway.replicas.key_quotas import KeyQuotas
from gateway.replicas.link import RedisLink, key
from tests.fakes.redis import RedisServer, Way, redis_server, way_to
from tests.fakes.running_gateway import until
from tests.keys.fakes import Clocks, accounts, policy

PATIENCE = 20.0


class Replica:
    """The keys of one replica. Its clock stands still unless a test moves it."""

    def __init__(self, name: str, way: Way, clocks: Clocks, *, predecessor: str = "", replicas: int = 1, **fields: Any):
        self.way = way
        self.clocks = clocks
        self.link = RedisLink(way.url)
        self.accounts: Accounts = accounts(clocks, [policy("web", **fields)])
        self.limits = SharedKeyLimits(
            self.link,
            self.accounts,
            name,
            predecessor=predecessor,
            replicas=replicas,
            clock=clocks.clock,
            wall=clocks.wall,
        )

    @property
    def web(self) -> Account:
        found = self.accounts.named("web")
        assert found is not None
        return found

    async def request(self, tokens: int = 0, person: str = "") -> Hold | None:
        """Admit a request, or return None if a limit refuses it."""
        hold = None
        try:
            await self.limits.make_room(self.web, person, 1, 0)
            hold = self.web.begin(person)
            if tokens:
                await self.limits.make_room(self.web, person, 0, tokens)
                hold.reserve("standard", 0, tokens)
        except RateLimited:
            if hold is not None:
                hold.end()
            return None
        return hold

    async def burst(self, count: int, **request: Any) -> int:
        """Send requests one after another; return how many were admitted."""
        return sum([await self.request(**request) is not None for _ in range(count)])


class Cluster:
    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self.clocks = Clocks()
        self._stack = stack
        self.replicas: list[Replica] = []

    async def start(self, name: str, *, clocks: Clocks | None = None, **given: Any) -> Replica:
        way = await self._stack.enter_async_context(way_to(self.server))
        replica = Replica(name, way, clocks or self.clocks, **given)
        await self._stack.enter_async_context(replica.link)
        replica.limits.start()
        self._stack.push_async_callback(replica.limits.close)
        self.replicas.append(replica)
        return replica

    async def three(self, **given: Any) -> list[Replica]:
        made = [await self.start(name, **given) for name in "abc"]
        await until(lambda: all(replica.link.is_up for replica in made), PATIENCE)
        for _ in range(2):  # each has to know of the others
            self.clocks.passed += key_limits.REPEAT_SECONDS
            for replica in made:
                await replica.limits._report_now()
        return made


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(key_limits, "WAIT_SECONDS", PATIENCE)  # a busy machine must not look like a Redis that hangs
    async with AsyncExitStack() as stack:
        yield Cluster(stack.enter_context(redis_server()), stack)


async def test_limit_of_requests_is_for_all_replicas_together_and_used_up(cluster: Cluster) -> None:
    replicas = await cluster.three(requests_per_minute=30)
    admitted = await asyncio.gather(*(replica.burst(20) for replica in replicas))
    assert sum(admitted) <= 30
    for _ in range(10):  # what a replica holds and does not use comes back
        for replica in replicas:
            await replica.limits._report_now()
            replica.clocks.passed += 0.2
            admitted.append(await replica.burst(3))
    assert sum(admitted) == 30


async def test_one_busy_replica_gets_the_whole_limit(cluster: Cluster) -> None:
    replicas = await cluster.three(requests_per_minute=100)
    assert await replicas[1].burst(110) == 100


async def test_quotas_come_back_when_the_minute_is_over(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(requests_per_minute=10)
    assert await a.burst(12) == 10
    assert await b.burst(2) == 0
    cluster.clocks.passed += 61
    await a.limits._report_now()
    assert await b.burst(12) == 10


async def test_most_requests_do_not_wait_for_redis(cluster: Cluster) -> None:
    a, _, _ = await cluster.three(requests_per_minute=10_000)
    calls = 0
    call = a.link.call

    async def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return await call(*arguments)

    a.link.call = counted  # type: ignore[method-assign, assignment]
    assert await a.burst(2000) == 2000
    assert calls < 100


async def test_tokens_of_a_minute_and_of_a_day_are_for_all_together(cluster: Cluster) -> None:
    replicas = await cluster.three(tokens_per_minute=1000, tokens_per_day=1500)
    admitted = await asyncio.gather(*(replica.burst(8, tokens=100) for replica in replicas))
    assert sum(admitted) <= 10
    cluster.clocks.passed += 61
    for replica in replicas:
        await replica.limits._report_now()
    later = [await replica.burst(8, tokens=100) for replica in replicas]
    assert sum(admitted) + sum(later) <= 15 + 2  # each replica may serve the request that uses the last tokens
    hold = replicas[0].web.begin()
    with pytest.raises(BudgetSpent):
        hold.reserve("standard", 0, 100)


async def test_concurrency_is_for_all_together_and_freed_at_the_end(cluster: Cluster) -> None:
    a, b, c = await cluster.three(concurrency=3)
    holds = [await a.request(), await b.request(), await b.request()]
    assert all(holds)
    await c.limits.make_room(c.web, "", 1, 0)
    with pytest.raises(ConcurrencyExceeded):
        c.web.begin()
    assert holds[0] is not None
    holds[0].end()
    await a.limits._report_now()
    c.clocks.passed += 0.2
    assert await c.request() is not None


async def test_persons_have_their_limits_over_all_replicas(cluster: Cluster) -> None:
    replicas = await cluster.three(per_person=Limits(requests_per_minute=4))
    for person, most in (("ann@example.org", 4), ("ben@example.org", 4)):
        assert sum([await replica.burst(3, person=person) for replica in replicas]) == most
    assert "example" not in str(cluster.server.client.keys("*"))  # Redis does not learn who asks


async def test_request_larger_than_the_limit_is_admitted_when_nothing_is_used(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(tokens_per_minute=100)
    assert await a.request(tokens=500) is not None
    assert await b.request(tokens=1) is None


async def test_refused_requests_ask_redis_rarely(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(requests_per_minute=5)
    assert await b.burst(5) == 5
    calls = 0
    call = a.link.call

    async def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return await call(*arguments)

    a.link.call = counted  # type: ignore[method-assign, assignment]
    assert await a.burst(500) == 0
    assert calls <= 3


async def test_without_redis_each_replica_goes_on_with_its_share(cluster: Cluster) -> None:
    replicas = await cluster.three(requests_per_minute=30, concurrency=1000)
    cluster.server.kill()
    await until(lambda: not any(replica.link.is_up for replica in replicas), PATIENCE)
    assert [await replica.burst(20) for replica in replicas] == [10, 10, 10]
    cluster.server.start()
    await until(lambda: all(replica.link.is_up for replica in replicas), PATIENCE)
    for replica in replicas:
        await replica.limits._report_now()
    assert [await replica.burst(2) for replica in replicas] == [0, 0, 0]  # what was used alone counts afterwards
    cluster.clocks.passed += 61
    for replica in replicas:
        await replica.limits._report_now()
    assert await replicas[0].burst(31) == 30


async def test_without_redis_the_rest_of_the_day_is_divided(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(tokens_per_day=900)
    assert await a.burst(3, tokens=100) == 3
    await a.limits._report_now()
    await b.request(tokens=1)
    cluster.server.kill()
    await until(lambda: not b.link.is_up, PATIENCE)
    assert await b.burst(10, tokens=50) == 4  # (900 - 300) / 3 = 200


async def test_request_does_not_wait_long_for_a_redis_that_hangs(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = await cluster.three(requests_per_minute=30)
    monkeypatch.setattr(key_limits, "WAIT_SECONDS", 0.05)
    cluster.server.pause()
    try:
        async with asyncio.timeout(PATIENCE):
            assert await a.burst(12) == 10
    finally:
        cluster.server.resume()


async def test_replica_that_is_gone_keeps_only_what_it_has_used(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = await cluster.three(requests_per_minute=1000)
    assert await a.burst(100) == 100
    name = key("limit:requests:web")
    held, used, heard = cluster.server.client.hget(name, "a").split()  # type: ignore[union-attr]
    assert int(held) >= int(used)
    a.limits._active.clear()  # it reports no more
    a.way.cut()
    cluster.server.client.hset(name, "a", f"900 {int(used)} {int(heard) - 6000}")
    assert await b.burst(1000) == 1000 - int(used)
    cluster.server.client.hset(name, "a", f"900 {int(used)} {int(heard) - 62_000}")
    cluster.clocks.passed += 0.2
    assert await b.burst(1000) == int(used)


async def test_restarted_replica_does_not_count_its_day_twice(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(tokens_per_day=1000)
    assert await a.burst(4, tokens=100) == 4
    await a.limits.close()
    saved = completed(a.accounts.saved_steps())
    again = await cluster.start("a2", tokens_per_day=1000, predecessor="a")
    again.accounts.restore(saved)
    await until(lambda: again.link.is_up, PATIENCE)
    await again.request(tokens=1)
    assert again.web.view()["used"][TOKENS_PER_DAY] == 401
    await again.limits._report_now()
    await b.request(tokens=1)
    assert b.web.view()["used"][TOKENS_PER_DAY] == 402


async def test_garbage_in_redis_is_ignored_or_costs_only_this_limit(cluster: Cluster) -> None:
    a, _, _ = await cluster.three(requests_per_minute=10)
    cluster.server.client.hset(key("limit:requests:web"), mapping={"x": "garbage", "y": "1 2", "z": "-5 -5 -5"})
    assert await a.burst(12) == 10


async def test_lost_data_is_reported_again(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(requests_per_minute=10)
    assert await a.burst(8) == 8
    cluster.server.client.flushall()
    cluster.clocks.passed += key_limits.REPEAT_SECONDS
    await a.limits._report_now()
    assert await b.burst(5) == 2


async def test_idle_keys_are_forgotten(cluster: Cluster) -> None:
    a, _, _ = await cluster.three(requests_per_minute=10)
    hold = await a.request()
    assert hold is not None
    hold.end()
    cluster.clocks.passed += 62
    async with asyncio.timeout(PATIENCE):  # on a busy machine, the link may be down for a moment
        while a.limits._active:
            await a.limits._report_now()
            await asyncio.sleep(0.01)
    assert not cluster.server.client.exists(key("limit:requests:web"))


async def test_close_gives_back_what_is_not_used(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(requests_per_minute=1000)
    await a.burst(100)
    await a.limits.close()
    assert await b.burst(1000) == 900


async def test_persons_who_ask_for_nothing_cost_nothing(cluster: Cluster) -> None:
    a = await cluster.start("a", per_person=Limits(tokens_per_day=10_000))
    await until(lambda: a.link.is_up, PATIENCE)
    for number in range(50):
        hold = await a.request(tokens=10, person=f"person-{number}")
        assert hold is not None
        hold.end()
    for _ in range(4):
        await a.limits._report_now()
    assert not a.limits._active  # what they used today stays counted in Redis
    b = await cluster.start("b", per_person=Limits(tokens_per_day=10_000))
    await until(lambda: b.link.is_up, PATIENCE)
    await b.request(tokens=10, person="person-7")
    assert b.web.persons["person-7"].day_others == 0  # nothing was generated, so what was reserved came back


async def test_limit_that_is_removed_while_redis_is_asked_stays_removed(cluster: Cluster) -> None:
    a, _, _ = await cluster.three(concurrency=5, tokens_per_day=500)
    assert await a.request(tokens=10) is not None
    call = a.link.call

    async def changed(*arguments: Any) -> Any:
        answer = await call(*arguments)
        a.accounts.change([policy("web", requests_per_minute=5)], lambda name: name)
        return answer

    a.link.call = changed  # type: ignore[method-assign, assignment]
    a.clocks.passed += key_limits.REPEAT_SECONDS
    await a.limits._report_now()
    a.link.call = call  # type: ignore[method-assign]
    assert await a.burst(7, tokens=1_000_000) == 5
    assert a.web.view()["used"]["concurrency"] == 6


async def test_day_that_ends_while_redis_is_asked_begins_without_the_old_quota(cluster: Cluster) -> None:
    a, b, _ = await cluster.three(tokens_per_day=1000)
    assert await b.burst(5, tokens=100) == 5
    assert await a.request(tokens=100) is not None
    call = a.link.call

    async def late(*arguments: Any) -> Any:
        answer = await call(*arguments)
        a.clocks.passed += 86_400
        a.web.look_at_clock()
        return answer

    a.link.call = late  # type: ignore[method-assign, assignment]
    await a.limits._report_now()
    a.link.call = call  # type: ignore[method-assign]
    assert a.web.allowance.quota(TOKENS_PER_DAY) == 0
    assert await a.burst(12, tokens=100) == 10


async def test_bursts_far_below_the_limits_are_never_refused(cluster: Cluster) -> None:
    """Others may use what was told while a request waits for it: then it waits for the next answer."""
    a, b, _ = await cluster.three(requests_per_minute=10**6, tokens_per_minute=10**9, concurrency=1000)

    async def client(replica: Replica, number: int) -> int:
        refused = 0
        for step in range(6):
            hold = await replica.request(tokens=1 + (number * 37 + step * 11) % 500)
            if hold is None:
                refused += 1
            else:
                await asyncio.sleep(0)
                hold.end()
        return refused

    refused = await asyncio.gather(*(client(replica, number) for replica in (a, b) for number in range(40)))
    assert sum(refused) == 0


class _Quotas:
    """Link to the quotas of one replica alone, in this process."""

    replica, is_up = "a", True

    def __init__(self) -> None:
        self._quotas = KeyQuotas()

    def watch(self, on_up: Callable[[], None], on_down: Callable[[], None]) -> None:
        pass

    async def call(self, operation: str, keys: Sequence[str], arguments: Sequence[Any]) -> list[int]:
        return [1, *self._quotas.share(self.replica, keys[1:], arguments[2:])]


async def test_persons_who_have_nothing_to_report_are_looked_at_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 who had asked in the last minute were one step of 0.5 s, every three seconds."""
    monkeypatch.setattr(key_limits, "BATCH", 10)
    clocks = Clocks()
    keys = accounts(clocks, [policy("ui", per_person=Limits(requests_per_minute=9))])
    limits = SharedKeyLimits(_Quotas(), keys, "a", clock=clocks.clock, wall=clocks.wall)
    key = keys.named("ui")
    assert key is not None

    async def finish() -> int:
        """Look at all whose turn it is; return in how many rounds."""
        rounds = 1
        await limits._report_now()
        while limits._work or limits._urgent:
            await limits._report_now(is_turn=False)
            rounds += 1
        return rounds

    for number in range(100):
        await asyncio.gather(limits.make_room(key, f"person-{number}", 1, 0), limits._report_now())
        key.begin(f"person-{number}").end()
    while not limits._later or limits._soon:
        clocks.passed += key_limits.ROUND_SECONDS
        await finish()
    clocks.passed += shared_allowance.DECAY_SECONDS
    for module in (key_limits, shared_allowance):  # nothing has to be reported again
        monkeypatch.setattr(module, "REPEAT_SECONDS", 1000.0)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count_turns())
    rounds = await finish()
    assert turns + 1 >= rounds >= 100 // 10
    counting.cancel()
