"""The stand-ins' tests run in virtual time: their clients and servers share one event loop."""

import asyncio
from collections.abc import Callable

from tests.fakes.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"virtual time": VirtualTimeLoop}
