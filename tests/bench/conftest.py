"""Tests against `FakeClient` run in a time that no processor can delay: they have no sockets."""

import asyncio
import selectors
from collections.abc import Callable

import pytest

WITH_SOCKETS = "test_reported_systems.py"


class _Selector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


class ExactTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still but for the waits, which it skips."""

    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]] | None:
    """Return that loop for tests in virtual time, None for the others."""
    is_exact = item.get_closest_marker("virtual_time") and item.path.name != WITH_SOCKETS
    return {"exact time": ExactTimeLoop} if is_exact else None
