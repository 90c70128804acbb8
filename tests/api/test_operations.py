"""What is not hot: models, health, metrics, the operator's status and the API's own description, on real sockets."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from io import BytesIO
from typing import Any

import httpx2
import jsonschema
import pytest
from openai import AsyncOpenAI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway import __version__, config, simulate
from gateway.api.routes import build_metrics_port
from gateway.app import Gateway
from gateway.telemetry.log import ExchangeLog
from tests.fakes.running_gateway import PATIENCE, Running, running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

KEY, ADMIN, SCRAPER = "client-key", "admin-key", "scraper-key"
VLLM_MODEL, OLLAMA_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl"


def document(vllm: str = "http://127.0.0.1:1", ollama: str = "http://127.0.0.1:1", **more: Any) -> dict[str, Any]:
    return {
        "llm_backend": "vllm",
        "backends": {"vllm": {"kind": "vllm", "base_url": vllm}, "ollama": {"kind": "ollama", "base_url": ollama}},
        "tiers": {
            "team/Standard": {
                "models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL},
                "aliases": ["gpt-4o", {"name": "hidden", "listed": False}],
            },
            "pinned": {"models": {"ollama": "nothing-there"}, "backend": "ollama"},
        },
        "embeddings": {"bge-m3": {"backend": "ollama", "model": "bge-m3"}},
        "state_file": "",
        **more,
    }


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    """A gateway in front of both stand-ins, and a client of it."""
    vllm = simulate.Options("vllm", (simulate.Model(VLLM_MODEL, context_length=32768),))
    ollama = simulate.Options("ollama", (simulate.Model(OLLAMA_MODEL, context_length=8192),))
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(stand_in(vllm)), await stack.enter_async_context(stand_in(ollama))
        gateway = await stack.enter_async_context(running(config.build(document(one.base_url, two.base_url, **more))))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield gateway, await stack.enter_async_context(client)


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with serving() as (_, client):
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, body["error"]["code"]


# Models


async def test_models_are_the_public_names_with_one_stable_time() -> None:
    async with serving() as (gateway, client):
        body = (await client.get("/v1/models")).json()
        assert [entry["id"] for entry in body["data"]] == ["team/Standard", "gpt-4o", "pinned", "bge-m3"]
        assert body["object"] == "list"
        assert len({(entry["object"], entry["created"]) for entry in body["data"]}) == 1
        assert (await client.get("/v1/models")).json() == body == (await client.get("/models")).json()
        async with AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="any", max_retries=0) as openai:
            assert [model.id async for model in openai.models.list()] == [entry["id"] for entry in body["data"]]
            assert (await openai.models.retrieve("gpt-4o")).id == "gpt-4o"


@pytest.mark.parametrize(
    "path", ["/v1/models/team/Standard", "/v1/models/team%2FStandard", "/models/TEAM/standard", "/v1/models/bge-m3"]
)
async def test_one_model_is_found_by_its_name(client: httpx2.AsyncClient, path: str) -> None:
    entry = (await client.get(path)).json()
    assert entry["id"] in ("team/Standard", "bge-m3")
    assert entry in (await client.get("/v1/models")).json()["data"]


async def test_context_is_the_smaller_sides(client: httpx2.AsyncClient) -> None:
    """So that a switch breaks nobody."""
    entry = (await client.get("/v1/models/gpt-4o")).json()
    assert (entry["context_length"], entry["max_model_len"]) == (8192, 8192)
    assert "context_length" not in (await client.get("/v1/models/pinned")).json()


@pytest.mark.parametrize("name", ["nope", "a/b", "", "%00", "x" * 300])
async def test_unknown_model_is_not_repeated(client: httpx2.AsyncClient, name: str) -> None:
    answer = await client.get(f"/v1/models/{name}")
    assert error_of(answer) == (404, "model_not_found")
    assert "nope" not in answer.text


async def test_models_need_a_key_where_there_are_keys() -> None:
    async with serving(api_keys=[KEY]) as (_, client):
        for path in ("/v1/models", "/models", "/v1/models/gpt-4o"):
            assert error_of(await client.get(path)) == (401, "invalid_api_key")
            assert (await client.get(path, headers=bearer(KEY))).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


# Health


async def test_life_is_told_without_asking_anybody(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert answer.headers["x-request-id"].startswith("req-")


async def test_gateway_is_ready_and_names_tiers_that_cannot_be_served(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "unserved_tiers": ["pinned"]})


async def test_gateway_that_drains_is_not_ready_but_serves() -> None:
    async with serving() as (gateway, client):
        gateway.gateway.begin_drain()
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        assert (await client.get("/healthz")).status_code == 200
        assert (await gateway.ask({"model": "gpt-4o"})).status == 200


async def test_gateway_that_starts_is_not_ready() -> None:
    gateway = Gateway(config.build(document()), ExchangeLog(True, BytesIO()))
    status, body = gateway._operations.readiness()
    assert (status, body["status"]) == (503, "starting")


async def test_backend_that_is_away_leaves_the_gateway_ready() -> None:
    async with (
        running(config.build(document())) as gateway,
        httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client,
    ):
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["unserved_tiers"]) == (200, ["team/Standard", "pinned"])


# Status and its guard


async def test_status_tells_backends_and_tiers(client: httpx2.AsyncClient) -> None:
    status = (await client.get("/ops/status")).json()
    assert status["version"] == __version__
    assert status["ready"]["status"] == "ready"
    assert status["tiers"]["team/Standard"] == {
        "active_backend": "vllm",
        "canary": None,
        "share": None,
        "pinned": False,
        "guard": None,
        "models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL},
        "latency": {
            backend: {name: {"p50": None, "p99": None} for name in ("time_to_first_token", "duration")}
            for backend in ("vllm", "ollama")
        },
    }
    assert (status["tiers"]["pinned"]["active_backend"], status["tiers"]["pinned"]["pinned"]) == ("ollama", True)
    vllm = status["backends"]["vllm"]
    nothing = {"text": 0, "vision": 0, "embedding": 0}
    assert (vllm["kind"], vllm["up"], vllm["running"], vllm["waiting"]) == ("vllm", True, nothing, nothing)
    assert vllm["servers"][0]["models"] == [VLLM_MODEL]
    assert vllm["limits"]["max_concurrency"] == 128


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
)
@pytest.mark.parametrize("path", ["/ops/status", "/metrics"])
async def test_without_a_key_only_programs_on_this_machine_look_in(
    client: httpx2.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    assert (await client.get(path)).status_code == 200
    assert error_of(await client.get(path, headers=headers)) == (403, "forbidden")


async def test_admin_key_opens_both_and_nothing_else_does() -> None:
    async with serving(admin_key=ADMIN, api_keys=[KEY]) as (_, client):
        for path in ("/ops/status", "/metrics"):
            for headers in ({}, bearer(KEY), bearer("wrong"), {"authorization": "Bearer"}):
                assert error_of(await client.get(path, headers=headers)) == (401, "invalid_api_key")
            assert (
                await client.get(path, headers=bearer(ADMIN) | {"host": "gateway.example", "via": "proxy"})
            ).status_code == 200
        assert error_of(await client.get("/v1/models", headers=bearer(ADMIN))) == (401, "invalid_api_key")


async def test_scrapers_key_opens_the_metrics_alone() -> None:
    async with serving(admin_key=ADMIN, metrics_key=SCRAPER) as (_, client):
        assert (await client.get("/metrics", headers=bearer(SCRAPER))).status_code == 200
        assert (await client.get("/metrics", headers=bearer(ADMIN))).status_code == 200
        assert error_of(await client.get("/ops/status", headers=bearer(SCRAPER))) == (401, "invalid_api_key")


# Metrics


async def test_metrics_come_as_text_and_as_openmetrics() -> None:
    async with serving() as (gateway, client):
        assert (await gateway.ask({"model": "gpt-4o", "stream": True})).status == 200
        text = await client.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        assert "gateway_requests" in {family.name for family in parse_text(text.text)}
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        families = {family.name: family for family in parse_openmetrics(openmetrics.text)}
        up = {sample.labels["backend"]: sample.value for sample in families["gateway_backend_up"].samples}
        assert up == {"vllm": 1, "ollama": 1}
        active = {
            (sample.labels["tier"], sample.labels["backend"]): sample.value
            for sample in families["gateway_active_backend"].samples
        }
        assert active == {("team/Standard", "vllm"): 1, ("team/Standard", "ollama"): 0, ("pinned", "ollama"): 1}
        lanes = {
            (sample.labels["backend"], sample.labels["lane"]) for sample in families["gateway_requests_running"].samples
        }
        assert {(backend, lane) for backend in ("vllm", "ollama") for lane in ("text", "vision", "embedding")} == lanes


async def test_metrics_port_is_unguarded_and_serves_nothing_else() -> None:
    gateway = Gateway(config.build(document(admin_key=ADMIN)), ExchangeLog(True, BytesIO()))
    app = build_metrics_port(gateway._operations)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://metrics") as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        for path in ("/ops/status", "/v1/models", "/docs"):
            assert error_of(await client.get(path)) == (404, "not_found")


# Description


async def test_description_has_the_raw_paths_and_takes_a_real_request(client: httpx2.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()
    assert described["openapi"].startswith("3.1")
    assert {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/healthz",
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


async def test_docs_are_one_page_without_outside_assets(client: httpx2.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    for outside in ("<script", "src=", "<link", "@import", "url(", "http://", "https://", "//"):
        assert outside not in page.text


# Wrong paths and methods


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/v1", "/v1/chat", "/v1/completions", "/ops", "/ops/status/x", "/v2/models"]
)
async def test_unknown_path_is_404_in_our_shape(client: httpx2.AsyncClient, path: str) -> None:
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
        ("POST", "/metrics", "GET"),
        ("DELETE", "/ops/status", "GET"),
    ],
)
async def test_wrong_method_is_405_and_names_the_right_one(
    client: httpx2.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await client.request(method, path)
    assert error_of(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


# Browser programs


async def test_preflight_needs_no_key() -> None:
    asks = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    async with serving(api_keys=[KEY], cors_origins=["https://app.example"]) as (_, client):
        for path in ("/v1/chat/completions", "/v1/models"):
            answer = await client.options(path, headers=asks)
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert answer.headers["access-control-allow-headers"] == "authorization"
            assert (await client.options(path, headers=asks | {"origin": "https://evil.example"})).status_code == 405


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/v1/chat/completions"])
async def test_listed_origin_may_read_errors_too(path: str) -> None:
    async with serving(api_keys=[KEY], cors_origins=["https://app.example"]) as (_, client):
        answer = await client.get(path, headers={"origin": "https://app.example"})
        assert answer.status_code >= 400
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


async def test_clients_own_request_id_comes_back_if_it_is_sane(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/healthz", headers={"x-request-id": "abc-1.2:3_4"})).headers[
        "x-request-id"
    ] == "abc-1.2:3_4"
    for odd in ("a b", "x" * 129, "<script>", ""):
        assert (await client.get("/healthz", headers={"x-request-id": odd})).headers["x-request-id"].startswith("req-")
