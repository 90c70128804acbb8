"""The data endpoints by path: each client API is reachable, at all of its paths, and described."""

import inspect

import pytest

from gateway.api import paths
from gateway.api.operator_chat import PATH as OPERATOR_CHAT_PATH
from tests.api.both_engines import ADMIN, bearer, serving

pytestmark = pytest.mark.uvloop

LISTS = [value for name, value in inspect.getmembers(paths) if name.endswith("_PATHS") and name != "ALIVE_PATHS"]
SINGLE = [value for name, value in inspect.getmembers(paths) if name.startswith("OLLAMA_")]


async def test_all_paths_of_a_client_api_lead_to_the_same_endpoint() -> None:
    async with serving() as (running, _):
        endpoints = running.gateway._endpoints
        assert set(endpoints) == {*(path for each in LISTS for path in each), *SINGLE, OPERATOR_CHAT_PATH}
        assert [{id(endpoints[path]) for path in each} for each in LISTS] == [
            {id(endpoints[each[0]])} for each in LISTS
        ]
        assert len({id(endpoint) for endpoint in endpoints.values()}) == len(LISTS) + len(SINGLE) + 1


async def test_every_client_api_is_described() -> None:
    async with serving(admin_key=ADMIN) as (_, client):
        described = (await client.get("/openapi.json", headers=bearer(ADMIN))).json()["paths"]
        assert [path for path in (*(each[0] for each in LISTS), *SINGLE) if "post" not in described.get(path, {})] == []
