"""Bytes of request bodies, their limit, and what one key may hold of it."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.body_memory import SMALL, BodyMemory, HeldBody, memory_of, shares, weight
from gateway.dialects.openai_chat_request import decode
from gateway.errors import QueueFull

ACTIONS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["grow", "resize", "count", "release"]), st.integers(0, 60)),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS, st.booleans())
def test_sums_are_right_whatever_happens_and_nothing_is_left_at_the_end(
    actions: list[tuple[int, str, int]], shared: bool
) -> None:
    memory = BodyMemory(100, is_shared=shared)
    bodies = [HeldBody(memory, key) for key in "aabbcc"]
    for index, action, size in actions:
        body, before = bodies[index], memory.used
        others = sum(other.size for other in bodies if other.key == body.key and other is not body)
        try:
            if action == "grow":
                body.grow(size)
            elif action == "resize":
                body.resize(size)
            elif action == "count":
                body.resize(size, may_refuse=False)
            else:
                body.release()
        except QueueFull:
            assert memory.used == before
        else:
            if action == "grow":
                assert memory.used <= 100
                assert not shared or not others or others + body.size <= 50
        assert memory.used == sum(body.size for body in bodies)
    for body in bodies * 2:
        body.release()
    assert memory.used == 0
    assert not memory._by_key


def test_limit_is_exact() -> None:
    memory = BodyMemory(100)
    body = HeldBody(memory, "a")
    body.grow(100)
    with pytest.raises(QueueFull) as raised:
        body.grow(1)
    assert raised.value.retry_after in (4, 5, 6)
    assert body.size == 100
    body.check(0)


def test_a_body_that_shrinks_is_not_refused() -> None:
    memory = BodyMemory(100)
    body = HeldBody(memory, "a")
    body.grow(100)
    memory.change(10, is_shared=False)
    body.resize(50)
    assert memory.used == 50


def test_one_of_several_keys_holds_at_most_half_unless_it_is_a_single_body() -> None:
    memory = BodyMemory(100, is_shared=True)
    one, two, other = HeldBody(memory, "a"), HeldBody(memory, "a"), HeldBody(memory, "b")
    one.grow(30)
    two.grow(20)
    with pytest.raises(QueueFull):
        two.grow(1)
    other.grow(50)
    one.release()
    two.resize(50)
    other.resize(0)
    two.grow(50)  # it is alone


def test_memory_is_tight_above_half_of_the_limit() -> None:
    memory = BodyMemory(100)
    body = HeldBody(memory, "a")
    body.grow(50)
    assert not memory.is_tight
    body.grow(1)
    assert memory.is_tight


def chat(text: str, **fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **fields}).encode()


@pytest.mark.parametrize(
    "body",
    [
        chat("x" * 300_000),
        chat("é" * 300_000),
        json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": "x" * 300_000 + "😀"}]}, ensure_ascii=False
        ).encode(),
        chat("x", tools=[{"type": "function", "function": {"name": "f", "parameters": {"x": [[]] * 20_000}}}]),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1000}] * 300}).encode(),
    ],
    ids=["text", "latin", "emoji", "schema", "messages"],
)
def test_weight_is_the_memory_of_the_parsed_form(body: bytes) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        parsed = decode(body, len(body))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert memory_of(parsed) == pytest.approx(taken, rel=0.2)
    assert weight(len(body), parsed) == max(len(body), memory_of(parsed))


def test_small_body_counts_with_its_size() -> None:
    assert weight(SMALL, object()) == SMALL


@pytest.mark.parametrize("size", [0, 60])
def test_shared_body_counts_once_until_no_share_waits(size: int) -> None:
    """The choices of one request: each waits, gets a slot, and may have to wait again."""
    memory = BodyMemory(100)
    held = HeldBody(memory, "a")
    held.grow(size)
    first, second = shares(held, 2)
    for share in (first, second):
        share.resize(70)
        assert memory.used == 70
    first.release()
    first.release()
    assert memory.used == 70
    first.resize(80, may_refuse=False)
    second.release()
    assert memory.used == 80
    first.release()
    assert (memory.used, held.size) == (0, 0)
    held.release()
    assert memory.used == 0


def test_shared_body_without_room_is_refused() -> None:
    memory = BodyMemory(100)
    first, second = shares(HeldBody(memory, "a"), 2)
    with pytest.raises(QueueFull):
        first.resize(101)
    first.release()
    second.resize(100)
    second.release()
    assert memory.used == 0
