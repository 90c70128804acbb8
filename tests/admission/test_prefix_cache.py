"""Estimate of a server's prefix cache: what was sent, without what was used longest ago."""

from collections.abc import Callable
from itertools import count

import pytest

from gateway.admission.prefix_cache import (
    CHARACTERS_PER_TOKEN,
    LEAST_CHARACTERS_PER_TOKEN,
    MAX_KNOWN,
    MOST_CHARACTERS_PER_TOKEN,
    PrefixCache,
)
from gateway.chat.message import Message
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat
from tests.fakes.processor_time import assert_at_most


def prompt(*hashes: int, size: int = 400) -> PromptBlocks:
    ends = [size * number for number in range(1, len(hashes) + 1)]
    return PromptBlocks(list(hashes), ends, 0, 0, is_continued=False)


def test_as_many_blocks_are_known_as_were_sent_before() -> None:
    cache = PrefixCache()
    cache.add(prompt(1, 2, 3))
    assert [cache.known_blocks(prompt(*blocks)) for blocks in ([1, 2, 3, 4], [1, 2, 5], [6, 7], [1])] == [3, 2, 0, 1]


def test_prompt_used_longest_ago_is_forgotten_first_and_from_its_end() -> None:
    cache = PrefixCache(tokens=500)  # 5 blocks
    cache.add(prompt(1, 2, 3))
    cache.add(prompt(11, 12))
    cache.add(prompt(1))
    cache.add(prompt(21, 22))
    assert [cache.known_blocks(prompt(*blocks)) for blocks in ([1, 2, 3], [11, 12], [21, 22])] == [1, 2, 2]


@pytest.mark.parametrize(("tokens", "known"), [(0, 0), (100, 1), (299, 2), (300, 3)])
def test_smaller_cache_holds_the_beginning(tokens: int, known: int) -> None:
    cache = PrefixCache()
    cache.add(prompt(1, 2, 3))
    cache.resize(tokens)
    assert cache.known_blocks(prompt(1, 2, 3)) == known


def test_nothing_is_known_of_a_server_that_restarted() -> None:
    cache = PrefixCache(tokens=300)
    cache.add(prompt(1, 2, 3))
    cache.clear()
    assert cache.known_blocks(prompt(1, 2, 3)) == 0
    cache.add(prompt(4, 5, 6))
    assert cache.known_blocks(prompt(4, 5, 6)) == 3


@pytest.mark.parametrize(("characters", "known"), [(0, 3), (400, 2), (800, 1), (1200, 0)])
def test_end_that_was_not_computed_is_forgotten(characters: int, known: int) -> None:
    cache = PrefixCache(tokens=300)
    cache.add(prompt(1, 2, 3))
    cache.forget_end(prompt(1, 2, 3), characters)
    assert cache.known_blocks(prompt(1, 2, 3)) == known
    cache.add(prompt(1, 2, 3))
    assert cache.known_blocks(prompt(1, 2, 3)) == 3


def test_memory_is_bounded_even_if_blocks_are_tiny() -> None:
    cache = PrefixCache(tokens=10**9)
    cache.add(prompt(*range(MAX_KNOWN + 10), size=1))
    assert cache.known_blocks(prompt(*range(MAX_KNOWN + 10), size=1)) == MAX_KNOWN


def test_block_sent_twice_takes_its_room_once() -> None:
    cache = PrefixCache(tokens=400 // CHARACTERS_PER_TOKEN * 2)
    for _ in range(5):
        cache.add(prompt(1, 2))
    assert cache.known_blocks(prompt(1, 2)) == 2


def test_capacity_follows_the_tokens_that_the_server_counts() -> None:
    """Korean text has far fewer characters in a token than English."""
    cache = PrefixCache(tokens=1000)
    assert cache.capacity == 1000 * CHARACTERS_PER_TOKEN
    for _ in range(100):
        cache.learn(1500, 1000)
    assert cache.capacity == pytest.approx(1500, rel=0.01)
    cache.resize(2000)
    assert cache.capacity == pytest.approx(3000, rel=0.01)
    for _ in range(300):
        cache.learn(4000, 1000)
    assert cache.capacity == pytest.approx(8000, rel=0.01)


def test_a_few_short_prompts_change_the_capacity_little() -> None:
    """Their tokens are those of the chat template."""
    cache = PrefixCache(tokens=1000)
    for _ in range(5):
        cache.learn(10, 20)
    assert cache.capacity > 0.85 * 1000 * CHARACTERS_PER_TOKEN


@pytest.mark.parametrize(("characters", "ratio"), [(1, LEAST_CHARACTERS_PER_TOKEN), (10**9, MOST_CHARACTERS_PER_TOKEN)])
def test_absurd_counts_bound_the_capacity(characters: int, ratio: float) -> None:
    cache = PrefixCache(tokens=1000)
    for _ in range(500):
        cache.learn(characters, 1000)
    assert cache.capacity == 1000 * ratio


def test_prompt_that_no_longer_fits_is_forgotten_with_the_next_one() -> None:
    cache = PrefixCache(tokens=300)
    cache.add(prompt(1, 2, 3))
    for _ in range(200):
        cache.learn(2000, 1000)
    cache.add(prompt(11))
    assert [cache.known_blocks(prompt(*blocks)) for blocks in ([1, 2, 3], [11])] == [0, 1]


def turns(name: str, count: int, *more: Message) -> PromptBlocks:
    """Return the prompt of the turn `count` of a conversation, counted from 0. A turn has 500 characters."""
    messages = [Message("user", name + "q" * 499)]
    for number in range(count):
        messages += [Message("assistant", "a" * 100), Message("user", f"{number:03}" + "q" * 397)]
    found = prompt_blocks(Chat(model="m", messages=[*messages, *more]), "m")
    assert found is not None
    return found


def test_conversations_that_grow_are_not_known_beyond_the_capacity() -> None:
    """Each turn has blocks that later turns do not have. Their characters are still in the cache."""
    cache = PrefixCache(tokens=12_500)  # 50,000 characters: 100 turns
    for length in range(60):
        prompts = [turns(name, length) for name in "xyz"]
        for each in prompts:
            cache.add(each)
        known = [cache.known_blocks(each) == len(each.hashes) for each in prompts]
        assert known[2]
        assert sum(known) * prompts[0].size <= cache.capacity
        assert all(known) or 3 * prompts[0].size > 0.9 * cache.capacity


def test_prompts_that_branch_take_their_common_room_once() -> None:
    cache = PrefixCache(tokens=12_500)
    cache.add(turns("x", 60))
    before = cache._size
    for number in range(100):
        cache.add(turns("x", 60, Message("assistant", "a"), Message("user", f"{number:03}")))
    assert cache._size == before + 100 * 4


def test_end_that_was_not_computed_gives_back_what_it_took_over() -> None:
    cache = PrefixCache()
    for length in range(30):
        cache.add(turns("x", length))
    before = cache._size
    failed = turns("x", 30)
    cache.add(failed)
    assert cache._size == before + 500
    cache.forget_end(failed, 500)
    assert cache._size == before == sum(cache._known.values())
    assert cache.known_blocks(turns("x", 30)) == len(failed.hashes) - 1
    assert cache._known[failed.hashes[-2]] > 500


def test_forgetting_costs_as_little_with_many_known_blocks() -> None:
    """A list of all of them was made each time: 1.2 ms for each new prompt, once 90,000 blocks filled the cache."""

    def full(blocks: int) -> Callable[[], None]:
        cache, numbers = PrefixCache(tokens=blocks * 100), count()

        def add() -> None:
            for _ in range(100):
                cache.add(prompt(*(hash((next(numbers), place)) for place in range(10))))

        for _ in range(blocks // 1000 + 1):
            add()
        assert len(cache._known) == blocks
        return add

    assert_at_most(5, full(90_000), yardstick=full(1000))
