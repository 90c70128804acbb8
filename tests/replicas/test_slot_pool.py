"""The pool of slots alone: shares, and what replicas are told."""

from gateway.replicas.messages import Want
from gateway.replicas.slot_pool import SlotPool


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
