"""Long work in the event loop, in steps between which other requests get a turn."""

import asyncio
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

YIELD_BYTES = 256 * 1024
"""Bodies larger than this (bytes) yield to the event loop between steps."""


async def in_turns(steps: Generator[None, None, T]) -> T:
    """Do the work of `steps`, which yields after some milliseconds each, and return its result."""
    while True:
        await asyncio.sleep(0)
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
