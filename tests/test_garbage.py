"""Garbage collections that stay short: what makes them long is frozen, and nothing else is."""

import gc
from collections.abc import Generator

import pytest

from gateway.garbage import LONG_SECONDS, ShortCollections, short_collections


@pytest.fixture
def unfrozen() -> Generator[None, None, None]:
    yield
    gc.unfreeze()


def frozen_after(*collections: tuple[int, float]) -> list[int]:
    """Return the numbers of the collections, of a generation and a duration each, whose rest was frozen."""
    now, number, frozen = 0.0, 0, list[int]()
    short = ShortCollections(lambda: now, lambda: frozen.append(number))
    for generation, seconds in collections:
        short("start", {"generation": generation})
        now += seconds
        short("stop", {"generation": generation})
        now += 1.0
        number += 1
    return frozen


def test_what_a_long_full_collection_leaves_is_frozen() -> None:
    long, brief = LONG_SECONDS * 1.5, LONG_SECONDS / 2
    assert frozen_after((2, brief), (2, long), (1, long), (0, long), (2, brief), (2, long)) == [1, 5]


@pytest.mark.usefixtures("unfrozen")
def test_objects_that_make_collections_long_are_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.garbage.LONG_SECONDS", 0.0)
    with short_collections():
        before = gc.get_freeze_count()
        kept = [[number] for number in range(10_000)]
        gc.collect()
        assert gc.get_freeze_count() >= before + len(kept)
        assert len(gc.get_objects()) < len(kept)
    assert not [each for each in gc.callbacks if isinstance(each, ShortCollections)]


@pytest.mark.usefixtures("unfrozen")
def test_what_is_frozen_is_freed_when_nothing_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.garbage.LONG_SECONDS", 0.0)
    with short_collections():
        kept = [[number] for number in range(10_000)]
        gc.collect()
        frozen = gc.get_freeze_count()
        kept.clear()
        assert gc.get_freeze_count() <= frozen - 10_000
