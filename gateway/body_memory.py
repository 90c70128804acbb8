"""Memory of request bodies: of those that are being read, and of requests that wait. Pure.

A body counts with the bytes that have arrived, not with those that are announced: a client that
announces much and sends little takes no room from others. Once parsed it counts with the memory
that its parsed form takes, if that is more.
"""

import random
from sys import getsizeof

from msgspec import Struct

from gateway.errors import QueueFull

RETRY_AFTER = 4, 6
"""Range of `Retry-After` in seconds: the 5 of a queue without samples, with a random spread."""
SMALL = 16 * 1024
"""Bodies up to this size (bytes) count with their size, since measuring them costs more than they hold."""


class BodyMemory:
    """Bytes of request bodies in memory, and the limit on them.

    If `is_shared`, a key may hold at most half of the limit, unless it holds nothing else: a single
    body may use all that is free.
    """

    __slots__ = ("_by_key", "_is_shared", "_limit", "used")

    def __init__(self, limit: int, *, is_shared: bool = False) -> None:
        self.used = 0
        self._by_key: dict[str, int] = {}
        self.change(limit, is_shared=is_shared)

    def __repr__(self) -> str:
        return f"<BodyMemory {self.used} of {self._limit} bytes>"

    def change(self, limit: int, *, is_shared: bool) -> None:
        """Apply another limit. What is already in memory stays, even if it is more."""
        self._limit = limit
        self._is_shared = is_shared

    @property
    def is_tight(self) -> bool:
        """True if more than half of the limit is used."""
        return self.used > self._limit // 2

    def check(self, key: str, held: int, more: int) -> None:
        """Check that a request of `key`, which holds `held` bytes, may hold `more`.

        Raises:
            QueueFull: There is no room for them.
        """
        if self.used + more <= self._limit:
            of_key = self._by_key.get(key, 0)
            if not self._is_shared or of_key <= held or of_key + more <= self._limit // 2:
                return
        raise QueueFull(
            "The gateway has no memory left for another request body. Try again later.",
            retry_after=random.randint(*RETRY_AFTER),
        )

    def count(self, key: str, more: int) -> None:
        """Count `more` bytes of `key`; a negative number takes them away."""
        self.used += more
        left = self._by_key.get(key, 0) + more
        if left:
            self._by_key[key] = left
        else:
            self._by_key.pop(key, None)


class HeldBody(Struct, gc=False):
    """The bytes that one request holds in a `BodyMemory`. Its owner has to release them at the end."""

    memory: BodyMemory
    key: str = ""
    size: int = 0

    def check(self, more: int) -> None:
        """Check that the request may hold `more` bytes.

        Raises:
            QueueFull: There is no room for them.
        """
        self.memory.check(self.key, self.size, more)

    def grow(self, more: int) -> None:
        """Hold `more` bytes.

        Raises:
            QueueFull: There is no room for them.
        """
        self.check(more)
        self._count(more)

    def resize(self, size: int, *, may_refuse: bool = True) -> None:
        """Hold `size` bytes in all. Without `may_refuse` they are counted even if there is no room.

        Raises:
            QueueFull: There is no room for them.
        """
        if may_refuse and size > self.size:
            self.check(size - self.size)
        self._count(size - self.size)

    def release(self) -> None:
        """Hold nothing any longer. It may be called again."""
        if self.size:
            self._count(-self.size)

    def _count(self, more: int) -> None:
        self.size += more
        self.memory.count(self.key, more)


class BodyShare(HeldBody, gc=False):
    """One share of a body that several requests hold together: `whole` counts its bytes once.

    The memory is released when no request waits for a slot any more.
    """

    whole: "HeldBody | None" = None
    waiting: list[int] = []
    """Number of the shares that hold the body, which all of them have in common."""

    def resize(self, size: int, *, may_refuse: bool = True) -> None:
        assert self.whole is not None
        self.whole.resize(max(size, self.whole.size), may_refuse=may_refuse)
        if not self.size:
            self.waiting[0] += 1
        self.size = size

    def release(self) -> None:
        assert self.whole is not None
        if self.size:
            self.size = 0
            self.waiting[0] -= 1
            if not self.waiting[0]:
                self.whole.release()


def shares(held: HeldBody, count: int) -> list[BodyShare]:
    """Return `count` shares of a body. Each holds it until it is released."""
    waiting = [count if held.size else 0]
    return [BodyShare(held.memory, held.key, held.size, held, waiting) for _ in range(count)]


def weight(size: int, parsed: object) -> int:
    """Return the bytes that a request takes in memory, from the size of its body and its parsed form.

    A text with one character outside of the Basic Multilingual Plane takes four bytes for each
    character, and a JSON Schema many times its size.
    """
    return size if size <= SMALL else max(size, memory_of(parsed))


def memory_of(value: object) -> int:
    """Return the bytes that `value` takes, with all structs, lists, dicts and texts in it."""
    total = 0
    left = [value]
    while left:
        item = left.pop()
        if item is None:
            continue
        total += getsizeof(item)
        if isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, Struct):
            left += [getattr(item, name) for name in item.__struct_fields__]
    return total
