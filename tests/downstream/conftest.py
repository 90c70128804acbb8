"""Servers that the tests of the HTTP server share."""

from collections.abc import Iterator

import pytest

from gateway.downstream.limits import ServerLimits
from tests.downstream.server_thread import ServerThread, serving

LOOPS = ["asyncio", "uvloop"]


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(loop: str) -> Iterator[ServerThread]:
    """Return a server with short timeouts."""
    with serving(loop) as server:
        yield server


@pytest.fixture(scope="module", params=LOOPS)
def default_server(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    """Return a server with the limits of production, shared by the tests of a module."""
    with serving(request.param, ServerLimits()) as server:
        yield server
