"""Slots that replicas share: never more than the limit, none left over, and each replica gets its turn.

Covers: gateway/admission/hub_limits.py
Covers: gateway/replicas/slot_pool.py
"""

import random
from contextlib import suppress

import pytest

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import QueueEntry
from gateway.errors import QueueFull
from tests.fakes.admission import Server, limits
from tests.fakes.slot_sharing import Sharing


class Request(QueueEntry):
    """Queue entry of one of the replicas."""

    __slots__ = ("replica",)

    replica: int


def arrive(sharing: Sharing, replica: int, model: str = "m", lane: str = "text") -> Request:
    admission = sharing.members[replica].admission
    request = Request(admission.queue(model, lane), Claim())
    request.replica = replica
    admission.enter(request)
    return request


def leave(sharing: Sharing, request: Request) -> None:
    request.is_served = True
    sharing.members[request.replica].admission.leave(request)


def running(requests: list[Request]) -> int:
    return sum(request.placement is not None for request in requests)


def test_slots_that_others_do_not_use_move_to_the_replica_that_needs_them() -> None:
    """The whole limit serves one replica if its requests are all that there are."""
    sharing = Sharing(3, limits(slots=8, model=8))
    requests = [arrive(sharing, 1) for _ in range(10)]
    sharing.settle()
    assert running(requests) == 8
    for request in requests:
        leave(sharing, request)
    others = [arrive(sharing, 2) for _ in range(10)]
    sharing.settle()
    assert running(others) == 8


def test_replicas_without_enough_slots_for_all_of_them_take_turns() -> None:
    sharing = Sharing(3, limits(slots=1, model=1, max_queue=100))
    requests = [arrive(sharing, number) for number in (1, 2, 3) for _ in range(10)]
    served: list[int] = []
    for _ in range(len(requests)):
        sharing.settle()
        (request,) = [request for request in requests if request.placement is not None]
        leave(sharing, request)
        requests.remove(request)
        served.append(request.replica)
    for end in range(1, len(served) + 1):
        counts = [served[:end].count(number) for number in (1, 2, 3)]
        assert max(counts) - min(counts) <= 2


def test_replicas_that_all_have_requests_waiting_serve_equal_parts_without_messages() -> None:
    sharing = Sharing(2, limits(slots=8, model=8, max_queue=1000))
    requests = [arrive(sharing, number) for number in (1, 2) for _ in range(200)]
    sharing.settle()
    before = sharing.messages
    for _ in range(10):
        for request in [request for request in requests if request.placement is not None]:
            leave(sharing, request)
            requests.remove(request)
        sharing.settle()
        in_flight = [request.replica for request in requests if request.placement is not None]
        assert sorted(in_flight) == [1] * 4 + [2] * 4
    assert sharing.messages - before < 10


def test_a_replica_that_waits_for_one_slot_keeps_no_other_from_those_that_could_use_it() -> None:
    """Text requests of replica 2 run although replica 1 waits for the only slot for images."""
    sharing = Sharing(2, limits(slots=2, model=2, vision=1, max_queue=100))
    first = arrive(sharing, 2, lane="vision")
    sharing.settle()
    waiting = arrive(sharing, 1, lane="vision")
    sharing.settle()
    text = arrive(sharing, 2)
    sharing.settle()
    assert running([first, text]) == 2
    assert waiting.placement is None
    leave(sharing, first)
    sharing.settle()
    assert waiting.placement is not None


def test_a_limit_that_is_lowered_on_one_replica_is_lowered_for_all() -> None:
    sharing = Sharing(2, limits(slots=8, model=8))
    requests = [arrive(sharing, number) for number in (1, 2) for _ in range(4)]
    sharing.settle()
    sharing.members[1].admission.change(limits(slots=3, model=8))
    sharing.settle()
    for request in requests:
        leave(sharing, request)
    more = [arrive(sharing, 2) for _ in range(8)]
    sharing.settle()
    assert running(more) == 3
    sharing.members[1].admission.change(limits(slots=8, model=8))
    sharing.settle()
    assert running(more) == 8


def test_slots_of_a_replica_that_died_come_back_when_it_is_forgotten() -> None:
    sharing = Sharing(2, limits(slots=4, model=4))
    lost = [arrive(sharing, 1) for _ in range(4)]
    sharing.settle()
    requests = [arrive(sharing, 2) for _ in range(4)]
    sharing.settle()
    assert running(lost) + running(requests) == 4
    sharing.members[1].inbox.clear()
    sharing.members[1].outbox.clear()
    sharing.pool.leave(1)
    before = running(requests)
    sharing.settle()
    assert running(requests) == before
    sharing.tell(sharing.pool.forget(1))
    sharing.settle()
    assert running(requests) == 4


@pytest.mark.parametrize("seed", range(6))
def test_no_limit_is_exceeded_and_no_request_starves_whatever_comes_in_which_order(seed: int) -> None:
    """Requests of two models and two lanes come and go on three replicas while messages are on the way."""
    choose = random.Random(seed)
    total = {"all": choose.randint(1, 5), "lane vision": choose.randint(1, 2), "model": choose.randint(1, 4)}
    sharing = Sharing(
        3,
        limits(slots=total["all"], model=total["model"], vision=total["lane vision"], max_queue=1000),
        seed,
        servers=choose.randint(1, 2),
    )
    requests: list[Request] = []

    def check() -> None:
        for name in {name for member in sharing.members.values() for name in member.limits._by_name}:
            counts = sum(member.limits.limit(name).count for member in sharing.members.values())
            held = sum(member.limits.limit(name).limit for member in sharing.members.values())
            assert counts <= held <= max(total["all"], total["model"], total["lane vision"])
            assert held <= sharing.pool.held(name) <= sharing.pool.total(name)

    for _ in range(400):
        step = choose.random()
        if step < 0.3:
            with suppress(QueueFull):
                requests.append(
                    arrive(sharing, choose.randint(1, 3), choose.choice("mn"), choose.choice(["text", "vision"]))
                )
        elif step < 0.55 and (flying := [request for request in requests if request.placement is not None]):
            request = choose.choice(flying)
            leave(sharing, request)
            requests.remove(request)
        else:
            sharing.clock.pass_time(0)
            sharing.deliver_one()
        check()
    while requests:
        sharing.settle()
        check()
        flying = [request for request in requests if request.placement is not None]
        assert flying, sharing.pool
        leave(sharing, flying[0])
        requests.remove(flying[0])


def test_limits_of_a_server_that_was_dropped_are_forgotten_and_are_back_with_it() -> None:
    """As often as the addresses of a host name change."""
    sharing = Sharing(2, limits(slots=6, model=4), servers=2)
    for _ in range(3):
        requests = [arrive(sharing, number) for number in (1, 2) for _ in range(8)]
        sharing.settle()
        assert running(requests) == 8
        for request in requests:
            leave(sharing, request)
        sharing.settle()
        for number, member in sharing.members.items():
            gone = member.admission._servers[1]
            member.admission.drop([gone])
            sharing.settle()
            assert sum(name.startswith("backend server 1") for name in member.limits._by_name) == 0
            held_by_other = any(name.startswith("backend server 1") for name in sharing.pool._held)
            assert held_by_other == (number == 1)
        assert {name.split()[2] for name in sharing.pool._held} == {"0"}
        for member in sharing.members.values():
            server = Server("m")
            server.place = "server 1"
            member.admission.add([server])
        sharing.settle()


def test_limit_of_a_dropped_backend_is_forgotten_with_its_last_request() -> None:
    sharing = Sharing(2, limits(slots=4, model=4))
    one = sharing.members[1]
    request = arrive(sharing, 1)
    sharing.settle()
    one.limits.detach(one.admission)
    sharing.settle()
    assert [limit.limit for limit in one.limits._by_name.values()] == [1] * len(one.limits._by_name)
    others = [arrive(sharing, 2) for _ in range(4)]
    sharing.settle()
    assert running(others) == 3  # one slot is in use at the replica that has dropped the backend
    leave(sharing, request)
    sharing.settle()
    assert running(others) == 4
    assert not one.limits._by_name
