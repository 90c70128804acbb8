"""Client that the tests of models, operations and routes share."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.api.both_engines import serving


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """Return a client of a gateway in front of both engines."""
    async with serving() as (_, client):
        yield client
