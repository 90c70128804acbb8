"""Merging the roll-outs of replicas: the same result in whichever sequence, and the newest order counts."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.rollout.assignment import Assignment, Canary, Change, Move
from gateway.rollout.shared_state import (
    LOG,
    OtherFormat,
    OthersRegister,
    Register,
    SharedState,
    decode,
    encode,
    merge,
    visible,
)

OLLAMA, VLLM = Assignment("ollama"), Assignment("vllm")

numbers = st.integers(1, 6)
replicas = st.sampled_from(["a", "b", "c"])
tiers = st.sampled_from(["standard", "pro", "mini"])
assignments = st.sampled_from([OLLAMA, VLLM, Assignment("ollama", Canary("vllm", 10)), Assignment("cloud")])
registers = st.builds(Register, numbers, replicas, assignments)
others = st.builds(OthersRegister, numbers, replicas, st.sampled_from([None, "vllm"]), is_void=st.booleans())
moves = st.dictionaries(tiers, st.builds(Move, assignments, assignments), min_size=1)
changes = st.builds(Change, st.just("t"), st.just(""), st.just("operator"), moves, replica=replicas, number=numbers)
states = st.builds(
    lambda tiers, others, log: merge(SharedState(), SharedState(tiers, others, log)),
    st.dictionaries(tiers, registers),
    st.none() | others,
    st.lists(changes, max_size=4),
)


@settings(max_examples=40)
@given(states, states, states)
def test_merging_does_not_depend_on_sequence_grouping_or_repetition(
    one: SharedState, two: SharedState, three: SharedState
) -> None:
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    assert merge(one, one) == one
    assert merge(one, SharedState()) == one


@settings(max_examples=40)
@given(st.lists(states, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_replicas_that_merge_at_random_through_one_document_agree_and_stop(
    replicas: list[SharedState], chance: random.Random
) -> None:
    document = SharedState()
    for _ in range(3):
        for at in chance.sample(range(len(replicas)), len(replicas)):
            replicas[at] = document = merge(replicas[at], document)
    assert all(state == document for state in replicas)
    assert decode(encode(document)) == document


def test_newer_order_counts_for_each_tier_alone() -> None:
    one = SharedState({"standard": Register(5, "a", VLLM), "pro": Register(5, "a", VLLM)})
    two = SharedState({"standard": Register(6, "b", OLLAMA), "pro": Register(4, "b", OLLAMA)})
    assert {name: item.assignment for name, item in merge(one, two).tiers.items()} == {"standard": OLLAMA, "pro": VLLM}


def test_tiers_that_only_one_replica_has_join_the_order() -> None:
    order = change(5, "a", standard=(OLLAMA, VLLM))
    same = change(5, "a", extra=(OLLAMA, VLLM))
    (joined,) = merge(SharedState(log=[order]), SharedState(log=[same])).log
    assert set(joined.tiers) == {"standard", "extra"}


def test_log_keeps_the_newest_orders() -> None:
    log = [change(number, "a", standard=(OLLAMA, VLLM)) for number in range(1, LOG + 21)]
    kept = merge(SharedState(log=log[:60]), SharedState(log=log[40:])).log
    assert [item.number for item in kept] == list(range(21, LOG + 21))


def test_history_chains_orders_that_did_not_know_of_each_other() -> None:
    log = [
        change(1, "a", standard=(OLLAMA, VLLM)),
        change(2, "b", standard=(OLLAMA, OLLAMA)),
        change(3, "a", standard=(VLLM, OLLAMA)),
    ]
    assert [(item.number, item.tiers["standard"]) for item in visible(log)] == [
        (1, Move(OLLAMA, VLLM)),
        (2, Move(VLLM, OLLAMA)),
    ]


def test_history_leaves_out_what_had_no_effect() -> None:
    assert visible([change(1, "a", standard=(OLLAMA, OLLAMA))]) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no JSON",
        b"\xff\x00",
        b"[]",
        b"{}",
        b'{"llm_gateway_rollout":"1","state":{}}',
        b'{"llm_gateway_rollout":1}',
        b'{"llm_gateway_rollout":1,"state":[]}',
        b'{"llm_gateway_rollout":1,"state":{"tiers":{"standard":{"number":0,"replica":"a","assignment":{"backend":"x"}}}}}',
        b'{"llm_gateway_rollout":1,"state":{"tiers":{"standard":{"number":9007199254740993,"replica":"a","assignment":{"backend":"x"}}}}}',
        b'{"llm_gateway_rollout":1,"state":{"log":[{"at":"t","by":"","cause":"operator","tiers":{}}]}}',
        b"[" * 100_000,
    ],
)
def test_garbage_is_no_state(content: bytes) -> None:
    assert decode(content) is None


def test_state_of_another_format_is_told_apart() -> None:
    with pytest.raises(OtherFormat):
        decode(b'{"llm_gateway_rollout":2,"state":"?"}')


def change(number: int, replica: str, **moves: Any) -> Change:
    pairs = {tier: Move(before, after) for tier, (before, after) in moves.items()}
    return Change("t", "", "operator", pairs, replica=replica, number=number)
