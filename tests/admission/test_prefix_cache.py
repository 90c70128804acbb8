"""Estimate of a server's prefix cache: what was sent, without what was used longest ago."""

import pytest

from gateway.admission.prefix_cache import CHARACTERS_PER_TOKEN, MAX_KNOWN, PrefixCache
from gateway.chat.prompt_blocks import PromptBlocks


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
