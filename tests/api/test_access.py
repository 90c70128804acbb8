"""Every path of a gateway with keys, without one: nothing answers that should not.

Covers: gateway/api/paths.py
"""

import asyncio
from contextlib import suppress

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


async def test_other_spelling_of_a_path_needs_the_same_key() -> None:
    """The gateway reads some of them as the path that is meant; it must not skip the key then."""
    async with serving(api_keys=[KEY], admin_key=ADMIN) as (gateway, _):
        assert await raw_status(gateway.port, "GET", "/healthz") == 200
        for path in ("/v1/chat/completions", "/v1/models", "/api/tags", "/ops/status", "/metrics"):
            first, _, rest = path[1:].partition("/")
            spellings = [path, f"{path}/", f"/{path}", f"/{first}//{rest}", f"/{first}%2f{rest}", f"/healthz/..{path}"]
            for spelling in [*spellings, f"/healthz/%2e%2e{path}", f"{path};/healthz", f"{path}%00", path.upper()]:
                for method in ("GET", "POST"):
                    for target in (spelling, f"{spelling}?path=/healthz", f"http://localhost{spelling}"):
                        assert await raw_status(gateway.port, method, target) in (400, 401, 404, 405), target
        for host in ("a/../healthz?x=", "healthz", "127.0.0.1/healthz#", "localhost:80/healthz"):
            assert await raw_status(gateway.port, "GET", "/ops/status", host) in (400, 401), host


async def raw_status(port: int, method: str, target: str, host: str = "localhost") -> int:
    """Return the status of a request whose target no client library has normalised."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        return int((await reader.read()).split()[1])
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def status(client: httpx2.AsyncClient, method: str, path: str, key: str | None) -> int:
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    answer = await client.request(method, path, headers=headers, content=b"{}" if method != "GET" else b"")
    return answer.status_code
