"""How `operations.lua` divides slots, in a real redis-server whose clock the tests set.

Covers: gateway/replicas/leases.py
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, Self

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway.admission.shared_limits import TURNS, WANTED, Grant, SharedAdaptiveLimit, SharedLimit
from gateway.replicas.leases import GRANT_LENGTH
from tests.fakes.redis import RedisServer, redis_server

SECOND = 1000
RECOVERY = 2500
"""Milliseconds in which nobody gets more, after the data were lost."""
TTL = 5000
HOUR = 3_600_000
CLOCK = "local time = redis.call('TIME')\n  return time[1] * 1000 + math.floor(time[2] / 1000)"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


class World:
    """Redis with a clock of its own, and the replicas that share limits through it."""

    def __init__(self, server: RedisServer, **totals: int) -> None:
        self.client = server.client
        self.client.flushall()
        script = files("gateway.replicas").joinpath("operations.lua").read_text()
        assert CLOCK in script
        self._run = self.client.register_script(script.replace(CLOCK, "return tonumber(redis.call('GET', 'clock'))"))
        self.totals = totals
        self.replicas: list[Replica] = []
        self.woken: list[tuple[str, list[str]]] = []
        self.clock = 10 * HOUR
        self._subscription = self.client.pubsub()
        self._subscription.psubscribe("wake *")
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._subscription.close()

    @property
    def clock(self) -> int:
        return self._clock

    @clock.setter
    def clock(self, value: int) -> None:
        self._clock = value
        self.client.set("clock", value)

    def join(self, **totals: int) -> "Replica":
        self._number += 1
        replica = Replica(self, f"replica{self._number:02}", totals or self.totals)
        self.replicas.append(replica)
        return replica

    def lose_data(self) -> None:
        self.client.flushall()
        self.clock = self._clock

    def call(self, operation: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return self._run(keys=keys, args=[operation, *arguments])

    def wakes(self) -> set[str]:
        """Return the replicas that were woken since the last call."""
        found = set()
        while (message := self._subscription.get_message(timeout=0.002)) is not None:
            if message["type"] == "pmessage":
                found.add(message["channel"].decode().removeprefix("wake "))
        return found

    def beat(self, milliseconds: int = SECOND) -> None:
        """Let time pass, then have all replicas report, and again as far as slots can move."""
        self.clock += milliseconds
        for _ in range(3):
            for replica in self.replicas:
                replica.report()

    def settle(self) -> None:
        """Have all replicas report until slots have moved, including the end of a recovery."""
        for _ in range(6):
            self.beat()

    def running(self, name: str) -> int:
        return sum(replica.limits[name].count for replica in self.replicas)


class Replica:
    """A replica's side: limits whose requests the test begins and ends."""

    def __init__(self, world: World, name: str, totals: dict[str, int]) -> None:
        self.world, self.name = world, name
        self.limits: dict[str, SharedLimit] = {
            limit: SharedAdaptiveLimit(limit, total, False, lambda: None, lambda: None)
            if limit.startswith("adaptive")
            else SharedLimit(limit, total, lambda: None)
            for limit, total in totals.items()
        }
        self.waiting = dict.fromkeys(totals, 0)
        self.sequence = 0
        self.is_leaving = False
        self.reported_at = -HOUR
        self.heads: list[int] = []

    def report(self, *names: str, is_lost: bool = False, has_answer: bool = True) -> None:
        """Report on limits, on all by default. The report or its answer may be lost."""
        limits = [self.limits[name] for name in names or self.limits]
        self.sequence += 1
        arguments: list[Any] = [self.name, self.sequence, int(self.is_leaving), "wake "]
        for limit in limits:
            limit.demand = limit.count + self.waiting[limit.name]
            arguments.extend(limit.report())
        if is_lost:
            return
        keys = ["members", *(limit.name for limit in limits)]
        answer = self.world.call("report", keys, arguments)
        self.reported_at = self.world.clock
        if not has_answer:
            return
        self.heads = answer[:4]
        for number, limit in enumerate(limits):
            limit.apply(Grant(*answer[4 + number * GRANT_LENGTH : 4 + (number + 1) * GRANT_LENGTH]))

    def begin(self, name: str) -> bool:
        limit = self.limits[name]
        if limit.is_full:
            return False
        limit.count += 1
        self.waiting[name] = max(0, self.waiting[name] - 1)
        return True

    def fill(self, name: str) -> int:
        """Begin requests until the lease is used up. Return their number."""
        number = 0
        while self.begin(name):
            number += 1
        return number

    def end(self, name: str) -> None:
        if self.limits[name].count:
            self.limits[name].count -= 1

    def crash(self) -> None:
        self.world.replicas.remove(self)

    def leave(self) -> None:
        self.world.replicas.remove(self)
        self.world.call("release", ["members", *self.limits], [self.name, "wake ", 1])


def shared(server: RedisServer, number: int, **totals: int) -> World:
    """Return a world in which replicas share limits, after the first recovery."""
    world = World(server, **totals)
    for _ in range(number):
        world.join()
    world.settle()
    return world


def leases(world: World, name: str) -> list[int]:
    return [replica.limits[name].limit for replica in world.replicas]


# Division


def test_idle_replicas_hold_equal_parts(server: RedisServer) -> None:
    with shared(server, 3, slots=8) as world:
        assert sorted(leases(world, "slots")) == [2, 3, 3]


def test_a_single_replica_has_the_whole_limit(server: RedisServer) -> None:
    with shared(server, 1, slots=8) as world:
        assert leases(world, "slots") == [8]
        assert world.replicas[0].heads[1:] == [1, 0, 0]


def test_a_busy_replica_gets_what_the_idle_ones_do_not_need(server: RedisServer) -> None:
    with shared(server, 3, slots=9) as world:
        first = world.replicas[0]
        first.waiting["slots"] = 100
        first.fill("slots")
        world.settle()
        assert leases(world, "slots") == [9, 0, 0]


def test_busy_replicas_share_equally_whatever_their_queues(server: RedisServer) -> None:
    with shared(server, 3, slots=9) as world:
        for replica, waiting in zip(world.replicas, (1000, 10, 2), strict=True):
            replica.waiting["slots"] = waiting
        world.settle()
        assert leases(world, "slots") in ([4, 3, 2], [3, 4, 2])


def test_a_lowered_lease_is_free_only_when_its_requests_have_ended(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        first.waiting["slots"] = 10
        world.settle()
        assert first.fill("slots") == 4
        second.waiting["slots"] = 10
        world.settle()
        assert (first.limits["slots"].limit, second.limits["slots"].limit) == (2, 0)
        first.end("slots")
        first.report()
        second.report()
        assert second.limits["slots"].limit == 1
        first.end("slots")
        first.end("slots")
        first.report()
        second.report()
        assert second.limits["slots"].limit == 2


def test_one_slot_goes_to_the_replica_that_waited_longest(server: RedisServer) -> None:
    with shared(server, 3, lane=1) as world:
        order: list[str] = []
        for replica in world.replicas:
            replica.waiting["lane"] = 4
        for _ in range(100):
            world.clock += 20
            for replica in world.replicas:
                replica.end("lane")
                replica.report()
                if replica.waiting["lane"] and replica.begin("lane"):
                    order.append(replica.name)
                    assert world.running("lane") == 1
                replica.report()
        assert len(order) == 12
        assert all(set(order[start : start + 3]) == {"replica01", "replica02", "replica03"} for start in range(0, 9, 3))


def test_replicas_with_other_settings_share_the_smallest_limit(server: RedisServer) -> None:
    with World(server) as world:
        first, second = world.join(slots=8), world.join(slots=4)
        world.settle()
        assert leases(world, "slots") == [2, 2]
        assert first.limits["slots"].total == 4
        second.leave()
        world.settle()
        assert first.limits["slots"].limit == 8


# Waking


def test_a_replica_that_waits_wakes_the_one_that_holds_too_much(server: RedisServer) -> None:
    with shared(server, 2, slots=2) as world:
        first, second = world.replicas
        first.waiting["slots"] = 2
        world.settle()
        first.fill("slots")
        first.report()
        world.wakes()
        second.waiting["slots"] = 1
        second.report()
        assert world.wakes() == {first.name}
        first.report()
        assert (first.limits["slots"].limit, first.limits["slots"].contest) == (1, WANTED)
        second.report()
        assert world.wakes() == set()  # the other one knows already
        first.end("slots")
        first.report()
        assert world.wakes() == {second.name}
        second.report()
        assert second.limits["slots"].limit == 1


def test_a_replica_is_told_when_others_take_turns(server: RedisServer) -> None:
    with shared(server, 2, lane=1) as world:
        first, second = world.replicas
        first.waiting["lane"] = second.waiting["lane"] = 3
        world.settle()
        assert {replica.limits["lane"].contest for replica in world.replicas if not replica.limits["lane"].limit} <= {
            0,
            TURNS,
        }
        assert any(replica.limits["lane"].contest == TURNS for replica in world.replicas)


# Loss


def test_a_replica_that_crashed_loses_its_slots_after_the_time_to_live(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        second.fill("slots")
        first.waiting["slots"] = 10
        second.crash()
        for _ in range(TTL // SECOND):
            world.beat()
            assert first.limits["slots"].limit == 2
        world.beat()
        assert first.limits["slots"].limit == 4


def test_a_replica_that_leaves_gives_its_slots_back_at_once(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        first.waiting["slots"] = 10
        first.report()
        world.wakes()
        second.leave()
        assert world.wakes() == {first.name}
        first.report()
        assert first.limits["slots"].limit == 4
        assert first.heads[1] == 1


def test_a_replica_that_is_leaving_holds_no_spare_slots(server: RedisServer) -> None:
    with shared(server, 2, slots=8) as world:
        first, second = world.replicas
        second.is_leaving = True
        second.begin("slots")
        world.settle()
        assert leases(world, "slots") == [7, 1]
        assert first.heads[1] == 1


def test_after_a_loss_of_data_everyone_keeps_what_it_holds_and_nobody_gets_more_at_first(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        first.waiting["slots"] = 10
        world.settle()
        assert first.fill("slots") == 4
        world.lose_data()
        second.waiting["slots"] = 10
        second.report()
        assert second.limits["slots"].limit == 0
        assert 0 < second.heads[3] <= RECOVERY
        first.report()
        assert first.limits["slots"].limit == 4
        newcomer = world.join()
        newcomer.waiting["slots"] = 1
        newcomer.report()
        assert newcomer.limits["slots"].limit == 0
        world.settle()
        assert (
            sum(max(limit.count, limit.limit) for limit in (replica.limits["slots"] for replica in world.replicas)) == 4
        )


def test_a_late_report_does_not_undo_a_newer_one(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        first.waiting["slots"] = 4
        late = [first.name, first.sequence, 0, "wake ", *first.limits["slots"].report()]
        world.settle()
        assert first.fill("slots") == 4
        first.report()
        assert world.call("report", ["members", "slots"], late) == []
        second.waiting["slots"] = 4
        second.report()
        assert second.limits["slots"].limit == 0


def test_a_replica_that_was_cut_off_keeps_only_what_runs(server: RedisServer) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        second.begin("slots")
        world.replicas.remove(second)
        first.waiting["slots"] = 10
        for _ in range(7):
            world.beat()
        assert first.fill("slots") == 4
        world.replicas.append(second)
        second.report()
        assert second.limits["slots"].limit <= 1
        assert not second.begin("slots")
        first.waiting["slots"] = 0
        for _ in range(3):
            first.end("slots")
        world.settle()
        assert sum(leases(world, "slots")) == 4


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_a_clock_that_jumps_takes_no_slot_away_and_gives_none_twice(server: RedisServer, jump: int) -> None:
    with shared(server, 2, slots=4) as world:
        first, second = world.replicas
        first.fill("slots")
        second.fill("slots")
        world.clock += jump
        first.waiting["slots"] = 10
        first.report()
        assert (first.limits["slots"].limit, first.fill("slots")) == (2, 0)
        second.report()
        world.settle()
        assert world.running("slots") == 4
        second.crash()
        for _ in range(7):
            world.beat()
        assert first.limits["slots"].limit == 4


# Learned limits


def adaptive(world: World, place: int) -> SharedAdaptiveLimit:
    limit = world.replicas[place].limits["adaptive"]
    assert isinstance(limit, SharedAdaptiveLimit)
    return limit


def streaming(world: World, place: int, number: int) -> None:
    """Have a replica begin requests that stream at once, within its lease or on trial."""
    limit = adaptive(world, place)
    for _ in range(number):
        assert not limit.is_full or limit.may_try(0.0)
        limit.count += 1
        limit.first_token(limit.began())


def beat_with_periods(world: World) -> None:
    for replica in world.replicas:
        limit = replica.limits["adaptive"]
        assert isinstance(limit, SharedAdaptiveLimit)
        limit.begin_period()
    world.beat(SECOND - 100)


def test_one_replica_at_a_time_may_try_one_request_more_and_only_while_all_slots_are_in_use(
    server: RedisServer,
) -> None:
    with shared(server, 2, adaptive=2) as world:
        for replica in world.replicas:
            replica.waiting["adaptive"] = 3
        world.beat()
        assert [adaptive(world, place).may_try_one_more for place in (0, 1)] == [False, False]
        streaming(world, 0, 1)
        streaming(world, 1, 1)
        world.beat()
        assert sorted(adaptive(world, place).may_try_one_more for place in (0, 1)) == [False, True]


def test_answers_that_streamed_on_all_replicas_for_the_same_second_raise_the_limit_of_all(server: RedisServer) -> None:
    with shared(server, 2, adaptive=2) as world:
        for replica in world.replicas:
            replica.waiting["adaptive"] = 3
        world.beat()
        streaming(world, 0, 1)
        streaming(world, 1, 1)
        world.beat()
        streaming(world, next(place for place in (0, 1) if adaptive(world, place).may_try_one_more), 1)
        for _ in range(3):
            beat_with_periods(world)
        assert [adaptive(world, place).total for place in (0, 1)] == [3, 3]
        assert sum(adaptive(world, place).holds for place in (0, 1)) == 3


def test_after_a_trial_that_failed_nobody_tries_for_a_minute(server: RedisServer) -> None:
    with shared(server, 1, adaptive=1) as world:
        world.replicas[0].waiting["adaptive"] = 3
        streaming(world, 0, 1)
        world.beat()
        limit = adaptive(world, 0)
        assert limit.may_try(0.0)
        limit.count += 1
        sample = limit.began()
        world.beat()
        limit.count -= 1
        limit.ended(sample, 0.0)
        for _ in range(59):
            world.beat()
            assert not limit.may_try(0.0)
        world.beat()
        world.beat()
        assert limit.may_try(0.0)
        assert limit.total == 1


def test_a_newcomer_takes_over_what_was_learned_and_the_latest_change_counts(server: RedisServer) -> None:
    with shared(server, 1, adaptive=4) as world:
        limit = adaptive(world, 0)
        limit.proposal = 3
        world.beat()
        assert limit.total == 3
        newcomer = world.join(adaptive=1)
        world.settle()
        assert newcomer.limits["adaptive"].total == 3
        world.lose_data()
        world.settle()
        assert [replica.limits["adaptive"].total for replica in world.replicas] == [3, 3]


# The invariant

ACTIONS = (
    "begin",
    "end",
    "report",
    "lose report",
    "lose answer",
    "join",
    "crash",
    "leave",
    "beat",
    "lose data",
    "jump",
)

steps = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 7), st.sampled_from(("slots", "lane")), st.integers(1, 6)),
    max_size=60,
)


@given(steps)
@example([("report", 0, "slots", 1), ("crash", 0, "slots", 1), ("jump", 0, "slots", 1)])
@hypothesis_settings(max_examples=25)
def test_no_sequence_of_events_exceeds_a_limit(server: RedisServer, steps: list[tuple[str, int, str, int]]) -> None:
    totals = {"slots": 5, "lane": 1}
    with World(server, **totals) as world:
        for _ in range(3):
            world.join()
        for action, number, name, amount in steps:
            _do(world, action, number, name, amount)
            for limit, total in totals.items():
                assert world.running(limit) <= total, (action, number)
        # Whatever happened: a replica that needs slots gets all that the others do not use.
        for replica in world.replicas:
            replica.waiting = dict.fromkeys(totals, 0)
            for limit in totals:
                while replica.limits[limit].count:
                    replica.end(limit)
        last = world.replicas[-1] if world.replicas else world.join()
        last.waiting = dict.fromkeys(totals, 100)
        for _ in range(10):
            world.beat()
        assert {limit: last.limits[limit].limit for limit in totals} == totals


def _do(world: World, action: str, number: int, name: str, amount: int) -> None:
    if action == "join" or not world.replicas:
        if len(world.replicas) < 5:
            world.join()
        return
    replica = world.replicas[number % len(world.replicas)]
    acts: dict[str, Callable[[], object]] = {
        "begin": lambda: [replica.begin(name) for _ in range(amount)],
        "end": lambda: [replica.end(name) for _ in range(amount)],
        "report": replica.report,
        "lose report": lambda: replica.report(is_lost=True),
        "lose answer": lambda: replica.report(has_answer=False),
        "crash": replica.crash,
        "leave": lambda: [replica.end(limit) for limit in replica.limits for _ in range(9)] and replica.leave(),
        "beat": lambda: world.beat(150 * amount),
        "lose data": world.lose_data,
        "jump": lambda: setattr(world, "clock", world.clock + (HOUR if amount > 3 else -HOUR)),
    }
    if action != "crash":
        replica.waiting[name] = amount
    acts[action]()
    if action == "jump":  # within a second of it, everyone reports
        world.beat(0)
