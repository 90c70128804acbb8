"""Paths, health, status and metrics on real sockets."""

from io import BytesIO

import httpx2
import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway import __version__, config
from gateway.app import Gateway
from gateway.telemetry.live import NOTHING
from gateway.telemetry.log import ExchangeLog
from tests.api.both_engines import KEY, OLLAMA_MODEL, VLLM_MODEL, document, error_of, serving
from tests.fakes.running_gateway import running

pytestmark = pytest.mark.uvloop


# Paths


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models//", "//v1///models/gpt-4o/", "/models/", "//healthz", "/docs/"]
)
async def test_repeated_and_trailing_slashes_are_ignored(client: httpx2.AsyncClient, path: str) -> None:
    plain = "/" + "/".join(filter(None, path.split("/")))
    found = await client.get(f"{client.base_url}".rstrip("/") + path)
    assert (found.status_code, found.content) == (200, (await client.get(plain)).content)


async def test_chat_is_served_at_a_path_with_more_slashes(client: httpx2.AsyncClient) -> None:
    for path in ("//v1/chat/completions", "/v1/chat/completions/", "//chat//completions"):
        url = f"{client.base_url}".rstrip("/") + path
        answer = await client.post(url, json={"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi"}]})
        assert (answer.status_code, answer.json()["object"]) == (200, "chat.completion")


# Health


async def test_root_says_that_it_runs_and_needs_no_key() -> None:
    """Ollama's clients ask it for this before anything else."""
    async with serving(api_keys=[KEY]) as (_, client):
        answer = await client.get("/")
        assert (answer.status_code, answer.text) == (200, "Ollama is running")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        head = await client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert error_of(await client.post("/", json={})) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/ping"])
async def test_health_check_does_not_ask_a_backend(client: httpx2.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert answer.headers["x-request-id"].startswith("req-")
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_readyz_lists_tiers_that_cannot_be_served(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "unserved_tiers": ["pinned"]})


async def test_draining_gateway_is_not_ready_but_still_serves() -> None:
    async with serving() as (gateway, client):
        gateway.gateway.begin_drain()
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        for path in ("/healthz", "/health", "/ping"):
            assert (await client.get(path)).status_code == 200
        assert (await gateway.ask({"model": "gpt-4o"})).status == 200


async def test_starting_gateway_is_not_ready() -> None:
    gateway = Gateway(config.build(document()), ExchangeLog(True, BytesIO()))
    status, body = gateway._operations.readiness()
    assert (status, body["status"]) == (503, "starting")


async def test_gateway_is_ready_although_its_backends_are_unreachable() -> None:
    async with (
        running(config.build(document())) as gateway,
        httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client,
    ):
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["unserved_tiers"]) == (200, ["team/Standard", "pinned"])


# Status and metrics


async def test_status_shows_backends_and_tiers(client: httpx2.AsyncClient) -> None:
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
            backend: {
                name: {"p50": None, "p99": None} for name in ("time_to_first_token", "inter_token_latency", "duration")
            }
            for backend in ("vllm", "ollama")
        },
        "live": dict.fromkeys(("vllm", "ollama"), msgspec.to_builtins(NOTHING)),
    }
    assert (status["tiers"]["pinned"]["active_backend"], status["tiers"]["pinned"]["pinned"]) == ("ollama", True)
    vllm = status["backends"]["vllm"]
    nothing = {"text": 0, "vision": 0, "embedding": 0}
    assert (vllm["kind"], vllm["up"], vllm["running"], vllm["waiting"]) == ("vllm", True, nothing, nothing)
    assert vllm["servers"][0]["models"] == [VLLM_MODEL]
    assert vllm["limits"]["max_concurrency"] == 128


async def test_metrics_are_served_as_text_and_as_openmetrics() -> None:
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
