"""Every path of a gateway with keys, without one: nothing answers that should not.

Covers: gateway/api/paths.py
"""

import httpx2
import pytest
from fastapi.routing import APIRoute

from tests.api.both_engines import ADMIN, KEY, serving

pytestmark = pytest.mark.uvloop

PUBLIC = {
    "/", "/healthz", "/health", "/ping", "/readyz", "/api/version", "/openapi.json", "/docs",
    "/ops", "/ops/", "/ops/console/{name}", "/ops/uplot/{name}",
}  # fmt: skip
"""Paths that answer without a key. None of them says anything about models, requests or keys.

The console's page and its files are public; it sends the key with its calls.
"""

FILLED = {"{name:path}": "standard", "{digest:path}": "sha256:0"}


def path_of(route: APIRoute) -> str:
    path = route.path
    for placeholder, value in FILLED.items():
        path = path.replace(placeholder, value)
    return path


async def test_every_path_needs_a_key_unless_it_is_public() -> None:
    async with serving(api_keys=[KEY], admin_key=ADMIN) as (gateway, client):
        application = gateway.gateway._rest
        routes = [route for route in application.routes if isinstance(route, APIRoute)]
        calls = {(method, path_of(route)) for route in routes for method in route.methods or ()}
        calls |= {("POST", path) for path in gateway.gateway._endpoints}
        assert len(calls) > 40
        opened = set()
        for method, path in sorted(calls):
            statuses = {await status(client, method, path, key) for key in (None, "wrong-key")}
            if statuses - {401, 403}:
                opened.add(path)
        assert opened <= PUBLIC


async def status(client: httpx2.AsyncClient, method: str, path: str, key: str | None) -> int:
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    answer = await client.request(method, path, headers=headers, content=b"{}" if method != "GET" else b"")
    return answer.status_code
