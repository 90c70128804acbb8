"""The order in which those who wait come to their turn: keys by turns, behind a key its persons by turns, then by arrival. Pure: no clock.

A `Line` is a ring of keys, a key is a ring of persons, a person is a file of requests. Whoever was served goes to the end of his ring, so
that a key with a thousand requests is served as often as a key with two. A key bears a stamp: when it came to the end of the ring it is in.
Stamps are drawn from one counter, so they compare across lines. Every step is O(1), also for one who leaves from the middle.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct


class Claim(Struct, frozen=True, gc=False):
    """Whose request it is and what it asks of the line."""

    key: str = ""
    person: str = ""
    """Whom a trusted program names behind its key."""
    is_batch: bool = False
    timeout: float | None = None
    """Seconds from now in which the client wants the whole answer."""


class Claimant(Protocol):
    """What stands in a line."""

    claim: Claim


T = TypeVar("T", bound=Claimant)


class _Turn(Generic[T]):
    """A key's place in the ring, and who waits behind it."""

    __slots__ = ("count", "persons", "stamp")

    def __init__(self, stamp: int) -> None:
        self.stamp = stamp
        self.count = 0
        self.persons: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()


class FairQueue(Generic[T]):
    """Those who wait for the same slots with the same priority."""

    __slots__ = ("_turns", "count")

    def __init__(self) -> None:
        self.count = 0
        self._turns: OrderedDict[str, _Turn[T]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Line {self.count} of {len(self._turns)} keys>"

    def add(self, waiter: T, stamp: int) -> None:
        """To the end; `stamp` is for a key of whom nobody waits yet."""
        key, person = waiter.claim.key, waiter.claim.person
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _Turn(stamp)
        requests = turn.persons.get(person)
        if requests is None:
            requests = turn.persons[person] = OrderedDict()
        requests[waiter] = None
        turn.count += 1
        self.count += 1

    def head(self) -> tuple[int, T]:
        """Whose turn it is, with the stamp of its key. There has to be one."""
        turn = next(iter(self._turns.values()))
        return turn.stamp, next(iter(next(iter(turn.persons.values()))))

    def remove(self, waiter: T) -> None:
        """It leaves, or its turn has come: then `passed_on` is to be called besides."""
        key, person = waiter.claim.key, waiter.claim.person
        turn = self._turns[key]
        requests = turn.persons[person]
        del requests[waiter]
        self.count -= 1
        turn.count -= 1
        if not requests:
            del turn.persons[person]
            if not turn.count:
                del self._turns[key]

    def served(self, claim: Claim, stamp: int) -> None:
        """One of this key was served, here or in another line: it goes to the end of the ring, and so does the person in the key's."""
        turn = self._turns.get(claim.key)
        if turn is not None:
            turn.stamp = stamp
            self._turns.move_to_end(claim.key)
            if claim.person in turn.persons:
                turn.persons.move_to_end(claim.person)

    def count_ahead_of_new(self, key: str) -> int:
        """How many are served before one more of `key` would be, if nobody else came."""
        turn = self._turns.get(key)
        mine = 0 if turn is None else turn.count
        others = len(self._turns) - (turn is not None)
        return min(self.count, mine + others * (mine + 1))

    def in_order(self) -> Iterator[T]:
        """All, in the order in which they would be served if nobody else came. O(n)."""
        return _by_turns(
            [_by_turns([iter(requests) for requests in turn.persons.values()]) for turn in self._turns.values()]
        )


def _by_turns(sources: Iterable[Iterator[T]]) -> Iterator[T]:
    left = list(sources)
    while left:
        still = []
        for source in left:
            for item in source:
                yield item
                still.append(source)
                break
        left = still
