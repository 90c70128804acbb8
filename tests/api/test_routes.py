"""Routes outside the data path on real sockets: keys, the OpenAPI document, errors and CORS."""

from io import BytesIO
from typing import Any

import httpx2
import jsonschema
import pytest

from gateway import config
from gateway.api.routes import build_metrics_port
from gateway.app import Gateway
from gateway.telemetry.log import ExchangeLog
from tests.api.both_engines import ADMIN, KEY, SCRAPER, bearer, document, error_of, serving

pytestmark = pytest.mark.uvloop


async def test_answers_that_grow_are_not_walked_by_the_encoder_of_fastapi(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at each value: 70 ms in one step for the status of 128 servers and 50 tiers."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("fastapi.routing.serialize_response", refuse)
    for path in ("/ops/status", "/v1/models", "/metrics"):
        assert (await client.get(path)).status_code == 200


# Keys


async def test_models_require_a_key_if_keys_are_configured() -> None:
    async with serving(api_keys=[KEY]) as (_, client):
        for path in ("/v1/models", "/models", "/v1/models/gpt-4o"):
            assert error_of(await client.get(path)) == (401, "invalid_api_key")
            assert (await client.get(path, headers=bearer(KEY))).status_code == 200
        for path in ("/healthz", "/health", "/ping", "/readyz"):
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
        {"authorization": "Bearer guess", "x-forwarded-host": "x"},
    ],
    ids=["foreign origin", "null origin", "foreign host", "x-forwarded-for", "forwarded", "via", "guessed key"],
)
@pytest.mark.parametrize("path", ["/ops/status", "/metrics"])
async def test_without_an_admin_key_only_local_programs_have_access(
    client: httpx2.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    assert (await client.get(path)).status_code == 200
    assert error_of(await client.get(path, headers=headers)) == (403, "forbidden")


async def test_status_and_metrics_require_the_admin_key() -> None:
    async with serving(admin_key=ADMIN, api_keys=[KEY]) as (_, client):
        for path in ("/ops/status", "/metrics"):
            for headers in ({}, bearer(KEY), bearer("wrong"), {"authorization": "Bearer"}):
                assert error_of(await client.get(path, headers=headers)) == (401, "invalid_api_key")
            assert (
                await client.get(path, headers=bearer(ADMIN) | {"host": "gateway.example", "via": "proxy"})
            ).status_code == 200
        assert error_of(await client.get("/v1/models", headers=bearer(ADMIN))) == (401, "invalid_api_key")


async def test_metrics_key_grants_access_to_the_metrics_only() -> None:
    async with serving(admin_key=ADMIN, metrics_key=SCRAPER) as (_, client):
        assert (await client.get("/metrics", headers=bearer(SCRAPER))).status_code == 200
        assert (await client.get("/metrics", headers=bearer(ADMIN))).status_code == 200
        assert error_of(await client.get("/ops/status", headers=bearer(SCRAPER))) == (401, "invalid_api_key")


async def test_metrics_port_needs_no_key_and_serves_nothing_else() -> None:
    gateway = Gateway(config.build(document(admin_key=ADMIN)), ExchangeLog(True, BytesIO()))
    app = build_metrics_port(gateway._operations)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://metrics") as client:
        assert (await client.get("/metrics")).status_code == 200
        for path in ("/healthz", "/health", "/ping"):
            assert (await client.get(path)).json() == {"status": "ok"}
        assert (await client.get("/readyz")).status_code == 503
        for path in ("/ops/status", "/v1/models", "/docs"):
            assert error_of(await client.get(path)) == (404, "not_found")


# OpenAPI document


async def test_openapi_document_has_the_data_paths_and_accepts_a_real_request(client: httpx2.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    assert described["openapi"].startswith("3.1")
    assert {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
        "/health",
        "/ping",
        "/readyz",
        "/metrics",
        "/ops/status",
    } <= set(described["paths"])
    operation = described["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "415", "502", "503", "504", "508"} <= set(operation["responses"])
    schema = {
        **operation["requestBody"]["content"]["application/json"]["schema"],
        "components": described["components"],
    }
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    validator.validate(
        {"model": "standard", "messages": [{"role": "user", "content": parts}], "stream": True, "temperature": 0.5}
    )
    for wrong in ({"model": "m"}, {"model": "m", "messages": []}, {"model": "m", "messages": [{"role": "robot"}]}):
        assert not validator.is_valid(wrong)
    for reference in _references(described):
        assert reference.rpartition("/")[2] in described["components"]["schemas"]
    error = {**described["components"]["schemas"]["Error"]}
    jsonschema.validate((await client.get("/nowhere")).json(), error)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        here = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return here + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []


async def test_docs_page_has_no_external_assets(client: httpx2.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    for external in ("<script", "src=", "<link", "@import", "url(", "http://", "https://", "//"):
        assert external not in page.text


# Wrong paths and methods


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat", "/v1/score", "/ops/status/x", "/v2/models"])
async def test_unknown_path_is_404_in_the_error_format(client: httpx2.AsyncClient, path: str) -> None:
    assert error_of(await client.get(path)) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/gpt-4o", "GET"),
        ("POST", "/healthz", "GET"),
        ("POST", "/ping", "GET"),
        ("POST", "/metrics", "GET"),
        ("DELETE", "/ops/status", "GET"),
    ],
)
async def test_wrong_method_is_405_and_lists_the_allowed_ones(
    client: httpx2.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert error_of(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


# CORS


async def test_cors_preflight_needs_no_key() -> None:
    preflight = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    async with serving(api_keys=[KEY], cors_origins=["https://app.example"]) as (_, client):
        for path in ("/v1/chat/completions", "/v1/models"):
            answer = await client.options(path, headers=preflight)
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert answer.headers["access-control-allow-headers"] == "authorization"
            assert (
                await client.options(path, headers=preflight | {"origin": "https://evil.example"})
            ).status_code == 405


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/v1/chat/completions"])
async def test_allowed_origin_may_read_errors(path: str) -> None:
    async with serving(api_keys=[KEY], cors_origins=["https://app.example"]) as (_, client):
        answer = await client.get(path, headers={"origin": "https://app.example"})
        assert answer.status_code >= 400
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
