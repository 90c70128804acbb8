"""A replica's side of shared limits: what it tells, what it may use, and what it does alone.

Covers: gateway/admission/admitting.py
"""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit, LoadSample
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import AdmissionLimits, LaneLimits, LimitSource
from gateway.admission.queues import QueueEntry
from gateway.admission.scheduler import Admission
from gateway.admission.shared_limits import (
    TURNS,
    WANTED,
    Grant,
    SharedAdaptiveLimit,
    SharedLimit,
    SharedLimits,
    share_of,
)
from tests.fakes.admission import Clock, Server

MODEL = "m"
LANES = {"text": LaneLimits(None, 100, 60.0), "vision": LaneLimits(1, 100, 60.0)}


def granted(limit: int, part: int | None = None, contest: int = 0, total: int = 8, **others: int) -> Grant:
    return Grant(
        limit,
        limit if part is None else part,
        contest,
        total,
        others.get("version", 0),
        others.get("others", 0),
        bool(others.get("may_try", 0)),
    )


def shared(total: int = 8, grant: Grant | None = None) -> tuple[SharedLimit, list[int]]:
    """Return a limit, with a list that grows when it calls for a report."""
    calls: list[int] = []
    limit = SharedLimit("slots", total, lambda: calls.append(1))
    if grant is not None:
        limit.report()
        limit.apply(grant)
    return limit, calls


# Without Redis


def test_limits_that_are_not_shared_are_plain_ones() -> None:
    source = LimitSource()
    assert type(source.fixed("place", "slots", 3)) is ConcurrencyLimit
    assert type(source.adaptive("place", "model/m", 3, False)) is AdaptiveLimit
    server = Server(MODEL)
    Admission([server], AdmissionLimits(4, 2, LANES), Clock(), lambda seconds, callback: None).queue(MODEL, "vision")
    assert {type(limit) for limit in (server.slots, *server.models.values(), *server.lanes.values())} == {
        ConcurrencyLimit
    }


# Leases


def test_nothing_may_run_before_the_first_answer() -> None:
    limit, _ = shared(8)
    assert (limit.limit, limit.total, limit.is_full) == (0, 8, True)


def test_a_lease_is_what_admission_may_use_and_the_total_stays_known() -> None:
    limit, _ = shared(8, granted(3, total=6))
    assert (limit.limit, limit.total, limit.is_full) == (3, 6, False)


def test_a_report_asks_for_more_only_if_demand_has_grown_beyond_what_was_granted() -> None:
    limit, _ = shared(8, granted(2, part=4))
    limit.demand = 2
    assert not limit.is_due
    limit.demand = 3
    assert limit.is_due
    limit.report()
    limit.apply(granted(2, part=2, contest=WANTED))
    limit.demand = 9
    assert not limit.is_due, "it was told that more are not to be had, and is woken when they are"


def test_slots_are_given_back_at_once_only_while_others_wait() -> None:
    limit, calls = shared(8, granted(4))
    limit.count = 4
    limit.demand = 4
    limit.report()
    limit.apply(granted(4))
    limit.count = 1
    limit.demand = 1
    assert (calls, limit.is_due) == ([], False)
    limit.apply(granted(4, contest=WANTED))
    assert limit.is_due
    limit.count = 0
    assert calls == [1]


def test_the_end_of_a_request_beyond_the_lease_calls_for_a_report() -> None:
    limit, calls = shared(8, granted(2))
    limit.count = 2
    limit.apply(granted(1, contest=WANTED))
    calls.clear()
    limit.count = 1
    assert calls == [1]
    assert (limit.holds, limit.held, limit.is_due) == (1, 2, True)


def test_where_replicas_take_turns_the_beginning_of_a_request_is_reported() -> None:
    limit, calls = shared(1, granted(1, contest=TURNS, total=1))
    limit.count = limit.demand = 1
    assert calls == [1]
    assert limit.is_due
    limit.report()
    assert not limit.is_due


def test_a_lower_setting_counts_at_once_and_a_higher_one_with_the_next_answer() -> None:
    limit, _ = shared(8, granted(8))
    limit.change(5)
    assert (limit.limit, limit.total) == (5, 5)
    limit.change(9)
    assert (limit.limit, limit.configured) == (5, 9)


# Demand


class World:
    """A backend whose limits are shared."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limits = SharedLimits()
        self.server = Server(MODEL)
        self.server.place = "here"
        self.admission = Admission(
            [self.server],
            AdmissionLimits(4, 2, LANES),
            self.clock,
            self.clock.alarm,
            source=self.limits.source("vllm", lambda: None),
        )
        self.limits.attach(self.admission)
        self.admission.queue(MODEL, "vision")

    def enter(self, lane: str, number: int = 1) -> list[QueueEntry]:
        entries = [QueueEntry(self.admission.queue(MODEL, lane), Claim()) for _ in range(number)]
        for entry in entries:
            self.admission.enter(entry)
        return entries

    def __getitem__(self, name: str) -> SharedLimit:
        return self.limits.by_name[f"vllm here {name}"]

    def demand(self) -> tuple[int, int, int]:
        self.limits.measure()
        return self["slots"].demand, self["model/m"].demand, self["lane/vision"].demand

    def answer(self, contest: int = 0, **leases: int) -> None:
        for name, lease in leases.items():
            limit = self[{"slots": "slots", "model": "model/m", "vision": "lane/vision"}[name]]
            limit.report()
            limit.apply(granted(lease, contest=contest, total=limit.total))
        self.limits.refresh()


def test_queued_requests_are_demand_only_as_far_as_narrower_limits_have_room() -> None:
    world = World()
    world.enter("vision", 5)
    assert world.demand() == (1, 1, 5)
    world.enter("text", 5)
    assert world.demand() == (2, 6, 5)


def test_a_replica_that_waits_for_a_narrow_slot_keeps_no_wide_one_from_others() -> None:
    world = World()
    world.enter("vision", 5)
    world.answer(contest=TURNS, vision=0)
    assert world.demand() == (0, 0, 5)


def test_requests_run_as_soon_as_they_have_all_slots_that_they_need() -> None:
    world = World()
    first, second = world.enter("text", 2)
    assert first.placement is None
    world.answer(slots=1)
    assert first.placement is None
    world.answer(model=2)
    assert (first.placement is not None, second.placement is not None) == (True, False)
    world.answer(slots=2)
    assert second.placement is not None


def test_a_server_that_is_down_is_no_demand() -> None:
    world = World()
    world.enter("text", 3)
    world.server.up = False
    assert world.demand() == (0, 0, 0)


def test_what_queued_requests_need_is_told_as_soon_as_a_server_can_take_them() -> None:
    world = World()
    world.server.up = False
    world.enter("text")
    calls: list[tuple[int, int, int]] = []
    world.limits.on_change = lambda: calls.append(world.demand())
    world.server.up = True
    world.admission.refresh()
    assert calls == [(1, 1, 0)]


def test_a_limit_that_nothing_needs_any_more_is_dropped_and_one_of_the_same_name_is_the_same() -> None:
    world = World()
    assert world.limits.source("vllm", lambda: None).fixed("here", "slots", 3) is world["slots"]
    assert world.limits.take_unused() == []
    world.admission.forget([])
    assert world.limits.take_unused() == ["vllm here model/m"]
    world.limits.detach(world.admission)
    assert "vllm here slots" in world.limits.take_unused()


# Alone


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 100))
def test_the_shares_of_all_replicas_add_up_to_the_limit(total: int, replicas: int, turn: int) -> None:
    shares = [share_of(total, replicas, place, turn) for place in range(replicas)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1


@given(st.integers(1, 5), st.integers(1, 12))
def test_with_fewer_slots_than_replicas_each_has_its_turn(total: int, replicas: int) -> None:
    for place in range(replicas):
        assert any(share_of(total, replicas, place, turn) for turn in range(math.ceil(replicas / total)))


def test_between_turns_nobody_has_a_slot() -> None:
    assert [share_of(1, 3, place, None) for place in range(3)] == [0, 0, 0]


def test_a_replica_that_is_alone_shrinks_at_once_and_grows_only_when_its_lease_has_ended() -> None:
    world = World()
    world.answer(slots=4, model=1)
    world["model/m"].total = 4
    world.limits.go_alone(2, 0, 0, may_grow=False)
    assert (world["slots"].limit, world["model/m"].limit) == (2, 1)
    world.limits.go_alone(2, 0, 0, may_grow=True)
    assert (world["slots"].limit, world["model/m"].limit) == (2, 2)


# Learned limits


class Learning:
    """An adaptive limit with requests that begin, stream and end."""

    def __init__(self, grant: Grant) -> None:
        self.learned: list[int] = []
        self.limit = SharedAdaptiveLimit("model/m", grant.total, False, lambda: None, lambda: self.learned.append(1))
        self.answer(grant)

    def answer(self, grant: Grant) -> bool:
        self.limit.report()
        return self.limit.apply(grant)

    def begin(self) -> Callable[[], None]:
        self.limit.count += 1
        sample = self.limit.began()
        self.limit.first_token(sample)
        return self.ending(sample)

    def ending(self, sample: LoadSample) -> Callable[[], None]:
        def end() -> None:
            self.limit.count -= 1
            self.limit.ended(sample, 0.0)

        return end

    @property
    def numbers(self) -> tuple[int, ...]:
        """Low, version, proposal and trial of the next report."""
        return self.limit.report()[6:]


def test_one_request_more_is_tried_only_when_redis_allows_it() -> None:
    world = Learning(granted(1, total=1))
    world.begin()
    assert not world.limit.may_try(0.0)
    world.answer(granted(1, total=1, may_try=1))
    assert world.limit.may_try(0.0)
    world.begin()
    assert not world.limit.may_try(0.0)
    assert world.numbers[3] == 1


@pytest.mark.parametrize(("others", "proposal"), [(0, 2), (1, 0)])
def test_more_answers_than_the_limit_prove_a_higher_one_only_if_no_other_replica_has_requests(
    others: int, proposal: int
) -> None:
    world = Learning(granted(1, total=1, others=others, may_try=1))
    world.begin()
    world.begin()
    world.limit.confirm()
    assert world.numbers[2] == proposal


def test_a_trial_that_ended_without_proof_is_reported_as_failed() -> None:
    world = Learning(granted(1, total=1, may_try=1))
    world.begin()
    world.begin()()
    assert world.numbers[3] == 2
    assert world.numbers[3] == 0


def test_the_lowest_number_of_streaming_answers_covers_at_least_one_whole_period() -> None:
    world = Learning(granted(3, total=3))
    end = world.begin()
    world.begin()
    assert world.numbers[0] == 0
    world.limit.begin_period()
    world.limit.begin_period()
    assert world.numbers[0] == 2
    end()
    world.begin()
    assert world.numbers[0] == 1


def test_a_replica_whose_lease_is_too_high_proposes_to_lower_the_limit_by_the_difference() -> None:
    world = Learning(granted(3, total=6))
    ends = [world.begin(), world.begin()]
    for _ in range(8):  # the engine runs two: the third begins to stream when one has ended
        world.limit.count += 1
        sample = world.limit.began()
        ends.pop(0)()
        world.limit.first_token(sample)
        ends.append(world.ending(sample))
    ends.pop(0)()
    assert world.numbers[2] == 5


def test_a_limit_that_another_replica_learned_is_taken_over_and_kept() -> None:
    world = Learning(granted(1, total=1))
    assert world.answer(granted(1, total=4, version=3))
    assert not world.answer(granted(2, total=4, version=3))
    assert (world.limit.total, world.numbers[1]) == (4, 3)
