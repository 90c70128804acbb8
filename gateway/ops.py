"""What is not hot, on FastAPI: the lists of models, health, metrics, the operator's part, and the API's own description."""

from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException

from gateway import __version__
from gateway.auth import Keys
from gateway.backends.backend import Backend
from gateway.config import Settings, Tier
from gateway.errors import GatewayError, MethodNotAllowed, ModelNotFound, NotFound
from gateway.guard import Guard
from gateway.health import Health
from gateway.metrics import Metrics
from gateway.page import add_bodies, add_hot_paths, api_page
from gateway.preflight import Preflight, add_preflight
from gateway.rollout_guard import RolloutGuard
from gateway.routing import Routing
from gateway.slots import LearnedBound
from gateway.steering import BODIES, Steering, add_rollout

CREATED = 1_767_225_600
"""Unix time: the `created` of every model, the same at each start and on each replica."""


SHOWN_LIMITS = (
    "max_concurrency", "model_concurrency", "vision_concurrency", "max_queue", "vision_max_queue", "queue_timeout", "vision_queue_timeout",
)  # fmt: skip


class Operations:
    """Answers about the gateway itself. `is_ready` is False while it starts or drains."""

    def __init__(
        self,
        settings: Settings,
        backends: dict[str, Backend],
        routing: Routing,
        steering: Steering,
        health: Health,
        metrics: Metrics,
        guard: RolloutGuard | None,
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._routing = routing
        self.steering = steering
        self._health = health
        self._metrics = metrics
        self._guard = guard
        self.is_stopping = False
        self.last_reload: dict[str, Any] | None = None
        """What came of the last time that the settings were reread."""

    def change(self, settings: Settings, routing: Routing) -> None:
        """Tell about other settings from now on."""
        self._settings = settings
        self._routing = routing

    def tell_reload(self, outcome: dict[str, Any]) -> None:
        self.last_reload = outcome

    # Models

    def models(self) -> dict[str, Any]:
        data = [self._entry(public.name, public.tier.models) for public in self._routing.public_models()]
        data += [self._entry(name, {item.backend: item.model}) for name, item in self._settings.embeddings.items()]
        return {"object": "list", "data": data}

    def model(self, name: str) -> dict[str, Any]:
        """Raises `ModelNotFound`."""
        for entry in self.models()["data"]:
            if entry["id"].lower() == name.lower():
                return dict(entry)
        raise ModelNotFound("This model does not exist here. GET /v1/models lists those that do.", param="model")

    def _entry(self, name: str, models: dict[str, str]) -> dict[str, Any]:
        """`models` is the model's name on each of its backends."""
        entry: dict[str, Any] = {"id": name, "object": "model", "created": CREATED, "owned_by": "gateway"}
        known = [self._backends[backend].context_length(model) for backend, model in models.items()]
        lengths = [length for length in known if length is not None]
        if lengths:  # the smaller side's, so that a switch breaks nobody
            entry["context_length"] = entry["max_model_len"] = min(lengths)
        return entry

    # Health

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/readyz`."""
        if self.is_stopping or not self._health.has_asked_all:
            return 503, {"status": "draining" if self.is_stopping else "starting", "unserved_tiers": []}
        unserved = [tier.name for tier in self._settings.tiers.values() if not self._is_served(tier.name)]
        return 200, {"status": "ready", "unserved_tiers": unserved}

    def _is_served(self, tier_name: str) -> bool:
        tier = self._settings.tiers[tier_name]
        backend = self._active_backend(tier_name)
        return any(server.is_well and server.serves(tier.models[backend]) for server in self._backends[backend].servers)

    def _active_backend(self, tier_name: str) -> str:
        return self.steering.rollout.lines[tier_name].position.backend

    def status(self) -> dict[str, Any]:
        """Body of `/ops/status`."""
        return {
            "version": __version__,
            "ready": self.readiness()[1],
            "backends": {backend.name: self._backend_status(backend) for backend in self._backends.values()},
            "tiers": {tier.name: self._tier_status(tier) for tier in self._settings.tiers.values()},
            "rollout": {"rollback_to": self._settings.rollback_to, "history": self.steering.history()},
            "reload": self.last_reload,
        }

    def _tier_status(self, tier: Tier) -> dict[str, Any]:
        view = self.steering.view_tier(tier.name)
        return {
            "active_backend": view["backend"],
            "canary": view["canary"],
            "share": view["share"],
            "pinned": view["pinned"],
            "guard": None if self._guard is None else self._guard.view(tier.name),
            "models": tier.models,
            "latency": {backend: self._latency(tier.name, backend) for backend in tier.models},
        }

    def _latency(self, tier: str, backend: str) -> dict[str, Any]:
        """Seconds, guessed from the histograms' buckets, since the start; null without samples."""
        series = {"time_to_first_token": self._metrics.time_to_first_token, "duration": self._metrics.duration}
        return {
            name: {f"p{share}": _rounded(histograms.quantile((tier, backend), share / 100)) for share in (50, 99)}
            for name, histograms in series.items()
        }

    def _backend_status(self, backend: Backend) -> dict[str, Any]:
        admission = backend.admission
        limits = backend.settings.limits
        return {
            "kind": backend.kind,
            "up": backend.is_up,
            "running": {lane: admission.running(lane) for lane in admission.lanes},
            "waiting": {lane: admission.waiting(lane) for lane in admission.lanes},
            "limits": {name: getattr(limits, name) for name in SHOWN_LIMITS},
            "servers": [
                {
                    "name": server.name,
                    "up": server.up,
                    "circuit": server.circuit.state,
                    "paused": server.circuit.is_paused,
                    "running": server.load,
                    "connections": server.pool.open_connections,
                    "models": None if server.discovered is None else sorted(server.discovered),
                    "loads": None if server.loads is None else {name: state.word for name, state in server.loads.states.items()},
                    "model_slots": {
                        model: {"running": bound.count, "limit": bound.limit, "learned": isinstance(bound, LearnedBound) and not bound.is_held}
                        for model, bound in server.models.items()
                    },
                }
                for server in backend.servers
            ],
        }

    # Metrics

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Prometheus text or OpenMetrics, as `accept` asks, and its content type."""
        metrics = self._metrics
        for gauge in (metrics.running, metrics.waiting, metrics.backend_up, metrics.circuit_state, metrics.active_backend):
            gauge.clear()  # what is gone from the settings
        for backend in self._health.backends:
            for lane in backend.admission.lanes:  # a name may have two: one that runs out, and its successor
                metrics.running.labels(backend.name, lane).inc(backend.admission.running(lane))
                metrics.waiting.labels(backend.name, lane).inc(backend.admission.waiting(lane))
            metrics.backend_up.labels(backend.name).set(backend.is_up)
            metrics.circuit_state.labels(backend.name).set(backend.circuit_level)
        for tier in self._settings.tiers.values():
            for name in tier.models:
                metrics.active_backend.labels(tier.name, name).set(name == self._active_backend(tier.name))
        encode, content_type = choose_encoder(accept)
        return encode(metrics.registry), content_type


def build(operations: Operations, preflight: Preflight, keys: Keys, admin: Guard, metrics_guard: Guard) -> FastAPI:
    """The application of everything but the hot paths."""

    def client(request: Request) -> None:
        keys.identify(request.scope["headers"])

    async def operator(request: Request) -> str:
        return admin.check(request.client.host if request.client else None, request.scope["headers"])

    def scraper(request: Request) -> None:
        metrics_guard.check(request.client.host if request.client else None, request.scope["headers"])

    app = _bare_app()
    for prefix in ("/v1", ""):
        in_schema = prefix == "/v1"

        @app.get(f"{prefix}/models", dependencies=[Depends(client)], include_in_schema=in_schema, summary="Tiers, aliases and embedding models")
        async def models() -> dict[str, Any]:
            return operations.models()

        @app.get(f"{prefix}/models/{{name:path}}", dependencies=[Depends(client)], include_in_schema=in_schema, summary="One of them")
        async def model(name: str) -> dict[str, Any]:
            return operations.model(name)

    _add_probes(app, operations)
    _add_metrics(app, operations, [Depends(scraper)])

    @app.get("/ops/status", dependencies=[Depends(operator)], summary="Backends, tiers and what runs")
    async def status() -> dict[str, Any]:
        return operations.status()

    add_rollout(app, operations.steering, operator)
    add_preflight(app, preflight, operator)
    _add_description(app)
    return app


def build_metrics_port(operations: Operations) -> FastAPI:
    """The application of `GATEWAY_METRICS_PORT`: unguarded."""
    app = _bare_app()
    _add_probes(app, operations)
    _add_metrics(app, operations, [])
    return app


def _bare_app() -> FastAPI:
    app = FastAPI(
        title="LLM gateway", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, telemetry={"logs": False}
    )

    @app.exception_handler(GatewayError)
    async def gateway_error(request: Request, error: GatewayError) -> Response:
        headers = {name.decode(): value.decode() for name, value in error.answer_headers()}
        return Response(error.envelope(), error.status, headers, "application/json")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return await gateway_error(request, MethodNotAllowed(_allowed(app, request.url.path) or (error.headers or {}).get("Allow", "GET")))
        return await gateway_error(request, NotFound("There is nothing at this path. The API is described at /docs."))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return await gateway_error(request, GatewayError("The gateway failed to answer."))

    return app


def _allowed(app: FastAPI, path: str) -> str:
    """All methods of a path: Starlette names those of its first route only."""
    methods = {method for route in app.routes if isinstance(route, APIRoute) and route.path == path for method in route.methods or ()}
    return ", ".join(sorted(methods - {"HEAD"}))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _add_probes(app: FastAPI, operations: Operations) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="200 while the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="503 while starting or draining; names tiers that cannot be served now")
    async def readyz() -> JSONResponse:
        status, body = operations.readiness()
        return JSONResponse(body, status)


def _add_metrics(app: FastAPI, operations: Operations, guards: list[Any]) -> None:
    @app.get("/metrics", dependencies=guards, summary="Prometheus text or OpenMetrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        body, content_type = operations.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


def _add_description(app: FastAPI) -> None:
    described: dict[str, Any] = {}

    def describe() -> dict[str, Any]:
        if not described:
            described.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            add_hot_paths(described)
            add_bodies(described, BODIES)
        return described

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return describe()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(describe()))
