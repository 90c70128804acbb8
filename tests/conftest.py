"""The event loops that tests run in."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop

ON_UVLOOP = {"test_api", "test_cancellation", "test_fallback", "test_faults", "test_ops", "test_ops_rollout", "test_relay"}
"""The whole gateway: in the loop that it runs in."""
ON_BOTH = {"test_wire"}
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.stem in ON_BOTH:
        return LOOPS
    name = "uvloop" if item.path.stem in ON_UVLOOP else "asyncio"
    return {name: LOOPS[name]}
