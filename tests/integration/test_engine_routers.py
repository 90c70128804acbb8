"""Routers of engines behind the gateway: what their answers and errors become.

The answers have the form of vLLM's production-stack 0.1.12, of llm-d-router 0.10 with Envoy, and of
Ray Serve LLM. The settings are those of `docs/operations/engine-routers.md`.

Covers: gateway/engines/error_mapping.py
"""

import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import config
from tests.fakes.engine_router import EngineRouter, Response
from tests.fakes.fault_backend import MODEL as SPARE_MODEL
from tests.fakes.fault_backend import TEXT as SPARE_TEXT
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.running_gateway import Reply, Running, running, until

pytestmark = pytest.mark.uvloop

PAGE = Path(__file__).parents[2] / "docs" / "operations" / "engine-routers.md"
NAMES = ("production-stack", "llm-d", "Ray Serve LLM", "data parallel", "data parallel, external")
ROUTERS = ("production-stack", "llm-d", "Ray Serve LLM")
WORDS = ("Hel", "lo", " there")
Answers = Callable[[], Response]


def examples() -> dict[str, str]:
    """Return the settings in the page, by the comment in their first line."""
    blocks = re.findall(r"```yaml\n# (.*)\n((?:.*\n)*?)```", PAGE.read_text())
    return dict(blocks)


def model_of(name: str) -> str:
    document = yaml.safe_load(examples()[name])
    return str(document["tiers"]["standard"]["models"][document["llm_backend"]])


def events(model: str) -> list[bytes]:
    """Return the events of a vLLM's stream."""

    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        document = {"id": "c", "object": "chat.completion.chunk", "model": model, "choices": [choice]}
        return b"data: %b\n\n" % json.dumps(document).encode()

    return [event({"role": "assistant", "content": ""}), *(event({"content": word}) for word in WORDS),
            event({}, "stop"), b"data: [DONE]\n\n"]  # fmt: skip


def stream(model: str) -> Response:
    """Return a stream that the router has cut into pieces without regard to the events."""
    data = b"".join(events(model))
    pieces = [data[start : start + 37] for start in range(0, len(data), 37)]
    return Response(200, media_type="text/event-stream; charset=utf-8", pieces=pieces)


def broken(model: str) -> Response:
    return Response(200, media_type="text/event-stream", pieces=events(model)[:3], is_broken=True)


def text(status: int, words: str, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, words.encode(), "text/plain", named)


def listed(name: str, model: str) -> Response:
    """Return the list of models as the router gives it."""
    card: dict[str, Any] = {"id": model, "object": "model", "created": 1, "owned_by": "vllm", "root": model}
    if name == "llm-d":  # a pod's own
        card |= {"max_model_len": 32768}
    elif name == "Ray Serve LLM":
        metadata = {"model_id": model, "input_modality": "text", "max_request_context_length": None}
        card = {"id": model, "object": "model", "owned_by": "organization-owner", "permission": [],
                "metadata": metadata}  # fmt: skip
    return Response.of(200, {"object": "list", "data": [card]})


def health(name: str) -> Response:
    if name == "Ray Serve LLM":
        return Response.of(404, {"detail": "Not Found"})
    return Response.of(200, {"status": "healthy"}) if name == "production-stack" else Response(200)


class Setup:
    """A router as the stand-in, and the gateway with the settings of the page and with a spare backend."""

    def __init__(self, name: str, router: EngineRouter, spare: FaultBackend, gateway: Running) -> None:
        self.name = name
        self.router = router
        self.spare = spare
        self.gateway = gateway

    def answer(self, response: Response) -> None:
        """Let the router answer each chat with `response`."""
        probes = self.router.handler
        self.router.handler = lambda method, path, body: (
            response if path.endswith("/completions") else probes(method, path, body)
        )

    async def ask(self, *, model: str = "standard", is_streamed: bool = False) -> Reply:
        return await self.gateway.ask({"model": model, "stream": is_streamed})


@asynccontextmanager
async def serving(name: str, **more: Response) -> AsyncIterator[Setup]:
    """Run the gateway in front of a router. `more` has other answers to `health` and `models`."""
    model = model_of(name)

    def handler(method: str, path: str, body: Any) -> Response:
        if path == "/health":
            return more.get("health") or health(name)
        if path == "/v1/models":
            return more.get("models") or listed(name, model)
        assert (method, path) == ("POST", "/v1/chat/completions"), path
        assert body["model"] == model
        return stream(model) if body.get("stream") else plain(model)

    async with EngineRouter(handler) as router, FaultBackend("vllm") as spare:
        document = yaml.safe_load(examples()[name])
        backend = document["llm_backend"]
        document["backends"][backend] |= {"base_url": router.base_url, "probe_interval": 0.1}
        document["backends"]["spare"] = {"kind": "vllm", "base_url": spare.base_url}
        models = {backend: model, "spare": SPARE_MODEL}
        document["tiers"]["safe"] = {"models": models, "fallback": "spare"}
        document |= {"state_file": "", "log_format": "json"}
        async with running(config.build(document)) as gateway:
            yield Setup(name, router, spare, gateway)


def plain(model: str) -> Response:
    message = {"role": "assistant", "content": "".join(WORDS)}
    return Response.of(
        200,
        {"id": "c", "object": "chat.completion", "model": model,
         "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}},
    )  # fmt: skip


# The page


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_page_are_accepted_without_a_warning(name: str, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(examples()[name])
    settings = config.load(file, {"GATEWAY_API_KEYS": "0123456789abcdef0123456789abcdef"})
    assert settings.warnings == ()
    backend = settings.backends[settings.llm_backend]
    assert backend.kind == "vllm"
    (replicas, at_once) = re.findall(r"max_concurrency: (\d+).*?# (.*)", examples()[name])[0]
    numbers = [int(number) for number in re.findall(r"(?<![\d-])\d+(?=,|\b)", at_once)]
    expected = 1
    for number in numbers:
        expected *= number
    assert int(replicas) == backend.limits.max_concurrency == (expected if numbers else 128)


def test_page_has_no_other_settings() -> None:
    assert set(examples()) == set(NAMES)


# What all of them do alike


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
async def test_answers_come_through_however_the_router_cuts_them(name: str, is_streamed: bool) -> None:
    async with serving(name) as setup:
        reply = await setup.ask(is_streamed=is_streamed)
        assert (reply.status, reply.text) == (200, "".join(WORDS))
        assert not is_streamed or reply.events[-1] == "[DONE]"


@pytest.mark.parametrize("name", ROUTERS)
async def test_router_is_asked_for_nothing_but_health_models_and_answers(name: str) -> None:
    async with serving(name) as setup:
        await setup.ask()
        (backend,) = [item for item in setup.gateway.gateway._backends.values() if item.name != "spare"]
        assert backend.admission.affinity is None
        assert set(setup.router.requests) == {
            ("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")
        }  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
async def test_stream_that_the_router_breaks_off_ends_with_an_error_event(name: str) -> None:
    async with serving(name) as setup:
        setup.answer(broken(model_of(name)))
        reply = await setup.ask(is_streamed=True)
        assert reply.status == 200
        assert reply.events[-1]["error"]["code"] == "upstream_error"
        assert reply.text == "".join(WORDS[:2])


DROPPED = "x_llm_d_request_dropped_reason"
RAY_404 = (
    'Message: Got request for model "x". Could not find base model with ID "x". (Request ID: 5), Internal exception: …'
)
ERRORS: list[tuple[str, Response, int, str, bool]] = [
    # Router, its answer, status and code of the client, and whether the fallback serves instead.
    ("production-stack", Response.of(404, {"error": "Model 'x' not found. Available models can be listed at …"}),
     404, "model_not_found", True),
    ("production-stack", Response.of(503, {"error": "Model 'x' is temporarily unavailable. Please try again later."}),
     503, "backend_unavailable", True),
    ("production-stack", text(500, "Internal Server Error"), 502, "upstream_error", True),
    ("production-stack", Response.of(400, {"error": "Invalid request: missing 'model' in request body."}),
     400, "invalid_value", False),
    ("production-stack", Response.of(400, {"error": {"message": "This model's maximum context length is 2048 tokens. "
     "However, you requested 9000 tokens.", "type": "BadRequestError", "param": None, "code": 400}}),
     400, "context_length_exceeded", False),
    ("llm-d", text(429, "inference error: ResourceExhausted - request rejected: queue at capacity",
     **{DROPPED: "rejected-saturated"}), 503, "backend_unavailable", True),
    ("llm-d", text(429, "inference error: ResourceExhausted - request timed out in queue: TTL expired",
     **{DROPPED: "rejected-ttl-expired"}), 503, "backend_unavailable", True),
    ("llm-d", text(503, "inference error: ServiceUnavailable - no endpoints available: rejected",
     **{DROPPED: "rejected-no-endpoints"}), 503, "backend_unavailable", True),
    ("llm-d", text(503, "no healthy upstream"), 503, "backend_unavailable", True),
    ("llm-d", text(504, "upstream request timeout"), 502, "upstream_error", True),
    ("llm-d", text(400, "inference error: BadRequest - model not found in request body"), 400, "invalid_value", False),
    ("llm-d", text(404, ""), 404, "model_not_found", True),
    ("Ray Serve LLM", Response.of(404, {"error": {"message": RAY_404, "type": "HTTPException", "param": None,
     "code": 404}}), 404, "model_not_found", True),
    ("Ray Serve LLM", Response.of(408, {"error": {"message": "Message: Request server side timeout (Request ID: 5), …",
     "type": "OpenAIHTTPException", "param": None, "code": 408}}), 502, "upstream_error", False),
    ("Ray Serve LLM", Response.of(500, {"error": {"message": "Message: Internal Server Error (Request ID: 5), …",
     "type": "InternalServerError", "param": None, "code": 500}}), 502, "upstream_error", True),
    ("Ray Serve LLM", text(503, "Request dropped due to backpressure (num_queued_requests=8, max_queued_requests=8)."),
     503, "backend_unavailable", True),
    ("Ray Serve LLM", Response.of(400, {"error": {"message": "Invalid request format: Input should be a valid list at "
     "('body', 'messages')", "type": "list_type", "param": "x", "code": "invalid_parameter"}}),
     400, "invalid_value", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "response", "status", "code", "falls_back", "is_streamed"),
    [(*case, index % 2 == 1) for index, case in enumerate(ERRORS)],
    ids=[f"{name}-{response.status}-{index}" for index, (name, response, *_) in enumerate(ERRORS)],
)
async def test_error_of_a_router_becomes_the_documented_one_or_goes_to_the_fallback(
    name: str, response: Response, status: int, code: str, falls_back: bool, is_streamed: bool
) -> None:
    async with serving(name) as setup:
        setup.answer(response)
        reply = await setup.ask(is_streamed=is_streamed)
        assert reply.error is not None
        assert (reply.status, reply.error["code"]) == (status, code)
        assert ("retry-after" in reply.headers) == (status == 503)
        assert not any("llm-d" in header or "dropped" in header for header in reply.headers)
        assert "inference error" not in reply.error["message"]
        assert "Request ID" not in reply.error["message"]
    async with serving(name) as setup:
        setup.answer(response)
        reply = await setup.ask(model="safe", is_streamed=is_streamed)
        if falls_back:
            assert (reply.status, reply.text, reply.headers["x-gateway-backend"]) == (200, SPARE_TEXT, "spare")
        else:
            assert (reply.status, len(setup.spare.requests)) == (status, 0)


async def test_retry_after_of_a_router_is_kept_and_pauses_the_backend() -> None:
    async with serving("Ray Serve LLM") as setup:
        setup.answer(text(429, "Request dropped due to backpressure.", retry_after="7"))
        reply = await setup.ask()
        assert (reply.status, reply.headers["retry-after"]) == (503, "7")
        (backend,) = [item for item in setup.gateway.gateway._backends.values() if item.name != "spare"]
        assert backend.servers[0].circuit.is_paused
        assert not backend.servers[0].circuit.is_open


# No engine is ready


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("production-stack", {"models": Response.of(200, {"object": "list", "data": []})}, "model_not_found"),
        ("production-stack", {"health": Response.of(503, {"status": "Service discovery module is down."})},
         "backend_unavailable"),
        ("llm-d", {"health": text(503, "no healthy upstream"), "models": text(503, "no healthy upstream")},
         "backend_unavailable"),
        ("llm-d", {"health": text(500, "inference error: Internal - no pods available in datastore")},
         "backend_unavailable"),
    ],
    ids=["stack without engines", "stack that is sick", "pool without pods", "picker without pods"],
)  # fmt: skip
async def test_router_without_a_ready_engine_gets_no_requests(name: str, more: dict[str, Response], code: str) -> None:
    async with serving(name, **more) as setup:
        reply = await setup.ask()
        assert reply.error is not None
        assert (reply.status, reply.error["code"]) == (404 if code == "model_not_found" else 503, code)
        assert (await setup.ask(model="safe")).headers["x-gateway-backend"] == "spare"
        assert not [path for method, path in setup.router.requests if method == "POST"]
        assert setup.gateway.gateway._operations.readiness()[1]["unserved_tiers"] == ["standard", "safe"]


async def test_engine_that_becomes_ready_is_found_by_the_next_probe() -> None:
    empty = Response.of(200, {"object": "list", "data": []})
    async with serving("production-stack", models=empty) as setup:
        assert (await setup.ask()).status == 404
        model = model_of("production-stack")
        empty.body = listed("production-stack", model).body
        await until(lambda: not setup.gateway.gateway._operations.readiness()[1]["unserved_tiers"])
        assert (await setup.ask()).text == "".join(WORDS)


async def test_ray_without_an_application_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    missing = text(404, "Path '/v1/models' not found. Ping http://.../-/routes for available routes.")
    async with serving("Ray Serve LLM", models=missing) as setup:
        setup.answer(missing)
        assert any("something answers there, but not a server of kind vllm" in line for line in caplog.messages)
        assert (await setup.ask(model="safe")).headers["x-gateway-backend"] == "spare"


# What only one of them does


async def test_error_event_before_done_ends_rays_stream_without_done() -> None:
    model = model_of("Ray Serve LLM")
    error = {"error": {"message": "Message: Internal Server Error", "type": "InternalServerError", "code": 500}}
    async with serving("Ray Serve LLM") as setup:
        pieces = [*events(model)[:3], b"data: %b\n\n" % json.dumps(error).encode(), b"data: [DONE]\n\n"]
        setup.answer(Response(200, media_type="text/event-stream", pieces=pieces))
        reply = await setup.ask(is_streamed=True)
        assert reply.events[-1]["error"]["code"] == "upstream_error"
        assert "[DONE]" not in reply.events


async def test_rays_error_500_opens_no_circuit_while_it_answers_its_probes() -> None:
    async with serving("Ray Serve LLM") as setup:
        setup.answer(Response.of(500, {"error": {"message": "Internal Server Error", "code": 500}}))
        for _ in range(4):
            assert (await setup.ask()).status in (502, 503)
        (backend,) = [item for item in setup.gateway.gateway._backends.values() if item.name != "spare"]
        await until(lambda: backend.servers[0].circuit.state != "suspect")
        assert not backend.servers[0].circuit.is_open


async def test_llm_d_gets_the_objective_of_the_settings() -> None:
    async with serving("llm-d") as setup:
        (backend,) = [item for item in setup.gateway.gateway._backends.values() if item.name != "spare"]
        assert ("x-llm-d-inference-objective", "gateway") in backend.headers()
        assert backend.context_length(model_of("llm-d")) == 32768
        assert (await setup.ask()).status == 200
