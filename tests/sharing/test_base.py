"""What a gateway shares is begun in one order and ended in the other."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from gateway.sharing.base import Sharing


class Parts:
    """Parts that note when they are entered and left."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @asynccontextmanager
    async def part(self, name: str, *, fails: bool = False) -> AsyncIterator[None]:
        if fails:
            raise OSError(name)
        self.notes.append(f"enter {name}")
        try:
            yield
        finally:
            self.notes.append(f"leave {name}")


def sharing(*parts: AbstractAsyncContextManager[None]) -> Sharing:
    shared = Sharing()
    for part in parts:
        shared.add(part)
    return shared


async def test_parts_end_in_the_opposite_order() -> None:
    parts = Parts()
    async with sharing(parts.part("link"), parts.part("leases")):
        assert parts.notes == ["enter link", "enter leases"]
    assert parts.notes[2:] == ["leave leases", "leave link"]


async def test_a_part_that_cannot_begin_ends_those_before_it() -> None:
    parts = Parts()
    with pytest.raises(OSError, match="leases"):
        async with sharing(parts.part("link"), parts.part("leases", fails=True)):
            raise AssertionError("it must not begin")
    assert parts.notes == ["enter link", "leave link"]


async def test_a_gateway_alone_shares_nothing() -> None:
    async with Sharing() as alone:
        assert (alone.limits, alone.document, alone.view()) == (None, None, None)
        assert alone.share_hints({}, lambda: 0.0) is None
