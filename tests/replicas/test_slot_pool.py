"""The pool of slots alone: shares, and what replicas are told."""

import random

from gateway.replicas.messages import Want
from gateway.replicas.slot_pool import SlotPool
from tests.fakes.processor_time import assert_at_most


def test_each_replica_gets_its_share_at_the_start_and_the_rest_stays_free() -> None:
    pool = SlotPool(3)
    assert [pool.set_totals(number, {"a": 11}).granted for number in (1, 2, 3)] == [
        {1: {"a": 3}},
        {2: {"a": 3}},
        {3: {"a": 3}},
    ]
    assert pool.free("a") == 2


def test_a_want_without_a_free_slot_has_the_others_keep_only_what_they_use() -> None:
    pool = SlotPool(2)
    pool.set_totals(1, {"a": 4})
    pool.set_totals(2, {"a": 4})
    assert pool.set_wants(1, [Want(1, [("a",)])]).keep == {1: {"a": 4}, 2: {"a": 0}}
    step = pool.give(2, {"a": 2})
    assert step.granted == {1: {"a": 1}}
    assert step.keep == {1: {"a": None}, 2: {"a": None}}


def test_free_slots_are_those_of_the_lowest_limit_that_nobody_holds_after_any_steps() -> None:
    choose, pool = random.Random(3), SlotPool(3)
    totals: dict[int, dict[str, int]] = {}
    for _ in range(2000):
        replica, name = choose.randint(1, 3), choose.choice("abc")
        match choose.choice(["totals", "wants", "wants", "give", "give", "leave"]):
            case "totals":
                totals[replica] = {each: choose.randint(1, 6) for each in "abc" if choose.random() < 0.8}
                pool.set_totals(replica, totals[replica])
            case "wants" if replica in totals:
                pool.set_wants(replica, [Want(choose.randint(0, 3), [("a", name), ("c",)])])
            case "give":
                held = pool._held.get(name, {}).get(replica, 0)
                pool.give(replica, {name: choose.randint(0, held)})
            case "leave" if choose.random() < 0.1:
                totals.pop(replica, None)
                pool.leave(replica)
                pool.forget(replica)
        for each in "abc":
            total = min((of_replica[each] for of_replica in totals.values() if each in of_replica), default=0)
            assert pool.total(each) == total
            assert pool.free(each) == total - sum(pool._held.get(each, {}).values())


def test_a_slot_that_goes_back_costs_a_few_looks_at_each_limit_of_each_replica_with_many_servers() -> None:
    """With 64 servers and 8 replicas that wait, each end of a request took the parent 7 ms."""
    pool = SlotPool(8)
    names: list[tuple[str, ...]] = [(f"model {number}", f"server {number}") for number in range(64)]
    totals = {name: 4 for way in names for name in way}
    for replica in range(8):
        pool.set_totals(replica, dict(totals))
    for _ in range(20):
        for replica in range(8):
            pool.set_wants(replica, [Want(8, names)])
    assert not any(pool.free(name) for name in totals)

    def give_one() -> None:
        holder = next(replica for replica, count in pool._held["model 0"].items() if count)
        step = pool.give(holder, {"model 0": 1, "server 0": 1})
        assert sum(map(len, step.granted.values())) == 2
        pool.set_wants(next(iter(step.granted)), [Want(8, names)])

    assert_at_most(10, give_one, yardstick=lambda: [pool.held(name) for name in totals for _ in range(8)])
