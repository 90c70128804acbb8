"""Fair queue: round robin over keys, then over the persons of a key, then by arrival.

Pure: no clock.

A `FairQueue` is a ring of keys. Each key has a ring of persons, and each person has a list of
requests in the order of arrival. A key or person that was served goes to the end of its ring, so a
key with a thousand requests is served as often as a key with two. Each key carries a stamp, which
records when it went to the end of the ring. All stamps come from one counter, so they can be
compared across queues. Adding, serving and removing are O(1), even from the middle of the queue.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct


class Claim(Struct, frozen=True, gc=False):
    """Owner, priority and deadline of a request."""

    key: str = ""
    person: str = ""
    """Person that a trusted program names behind its key."""
    is_batch: bool = False
    timeout: float | None = None
    """Seconds from now within which the client wants the whole answer."""


class Claimant(Protocol):
    """Item of a fair queue."""

    claim: Claim


T = TypeVar("T", bound=Claimant)


class _KeyQueue(Generic[T]):
    """A key's entry in the ring, with its requests by person."""

    __slots__ = ("count", "persons", "stamp")

    def __init__(self, stamp: int) -> None:
        self.stamp = stamp
        self.count = 0
        self.persons: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()


class FairQueue(Generic[T]):
    """Queue of the requests that wait for the same slots with the same priority."""

    __slots__ = ("_keys", "count")

    def __init__(self) -> None:
        self.count = 0
        self._keys: OrderedDict[str, _KeyQueue[T]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<FairQueue {self.count} of {len(self._keys)} keys>"

    def add(self, item: T, stamp: int) -> None:
        """Append a request. `stamp` is used if its key has no requests in the queue yet."""
        key, person = item.claim.key, item.claim.person
        entry = self._keys.get(key)
        if entry is None:
            entry = self._keys[key] = _KeyQueue(stamp)
        requests = entry.persons.get(person)
        if requests is None:
            requests = entry.persons[person] = OrderedDict()
        requests[item] = None
        entry.count += 1
        self.count += 1

    def add_first(self, item: T) -> None:
        """Insert a request before all others. The next turn is its key's, in any queue."""
        key, person = item.claim.key, item.claim.person
        self.add(item, 0)
        entry = self._keys[key]
        entry.stamp = 0
        entry.persons[person].move_to_end(item, last=False)
        entry.persons.move_to_end(person, last=False)
        self._keys.move_to_end(key, last=False)

    def head(self) -> tuple[int, T]:
        """Return the next request and the stamp of its key. The queue must not be empty."""
        entry = next(iter(self._keys.values()))
        return entry.stamp, next(iter(next(iter(entry.persons.values()))))

    def remove(self, item: T) -> None:
        """Remove a request that left or is being served. In the latter case, call `served` too."""
        key, person = item.claim.key, item.claim.person
        entry = self._keys[key]
        requests = entry.persons[person]
        del requests[item]
        self.count -= 1
        entry.count -= 1
        if not requests:
            del entry.persons[person]
            if not entry.count:
                del self._keys[key]

    def served(self, claim: Claim, stamp: int) -> None:
        """Move the key of `claim` to the end of the ring, and the person to the end of the key's.

        Call it when a request with this claim was served, from this queue or another one.
        """
        entry = self._keys.get(claim.key)
        if entry is not None:
            entry.stamp = stamp
            self._keys.move_to_end(claim.key)
            if claim.person in entry.persons:
                entry.persons.move_to_end(claim.person)

    def count_ahead_of_new(self, key: str) -> int:
        """Return how many requests are served before a new one of `key`, if no others arrive."""
        entry = self._keys.get(key)
        mine = 0 if entry is None else entry.count
        others = len(self._keys) - (entry is not None)
        return min(self.count, mine + others * (mine + 1))

    def in_order(self) -> Iterator[T]:
        """Iterate over all requests in the order of service, if no others arrive. O(n)."""
        return _round_robin(
            [_round_robin([iter(requests) for requests in entry.persons.values()]) for entry in self._keys.values()]
        )


def _round_robin(sources: Iterable[Iterator[T]]) -> Iterator[T]:
    """Yield one item of each source in turn, until all sources are exhausted."""
    remaining = list(sources)
    while remaining:
        unfinished = []
        for source in remaining:
            for item in source:
                yield item
                unfinished.append(source)
                break
        remaining = unfinished
