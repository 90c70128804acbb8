"""FastAPI application: health probes, models, metrics, `/ops` and the OpenAPI document."""

from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from gateway import __version__
from gateway.api.access import Access
from gateway.api.console import add_console
from gateway.api.error_forms import error_answer
from gateway.api.events import Events
from gateway.api.key_routes import ACCOUNT, add_keys
from gateway.api.model_catalog import Allows, allow_all
from gateway.api.named_keys import NamedKeys
from gateway.api.ollama_routes import add_ollama
from gateway.api.openapi import add_bodies, add_data_paths, api_page
from gateway.api.operations import Operations
from gateway.api.ops_schemas import add_ops
from gateway.api.paths import ALIVE_PATHS, CHAT_PATH, READY_PATH
from gateway.api.rollout_routes import BODIES, add_preflight, add_rollout
from gateway.api.usage_routes import add_usage
from gateway.errors import GatewayError, MethodNotAllowed, NotFound
from gateway.rollout.preflight.check import Preflight
from gateway.usage.recorder import UsageRecorder


def build(
    operations: Operations,
    events: Events,
    preflight: Preflight,
    access: Access,
    named_keys: NamedKeys | None,
    usage: UsageRecorder | None,
) -> FastAPI:
    """Build the application for everything but the data endpoints."""

    def client(request: Request) -> Allows:
        caller = access.keys.identify(request.scope["headers"], None, request.scope["server"])
        if caller.account is None:
            return allow_all
        request.scope["extensions"][ACCOUNT] = caller.account
        caller.account.check_expiry()
        return caller.account.allows

    async def operator(request: Request) -> str:
        return access.operator.check(request.client.host if request.client else None, request.scope["headers"])

    def scraper(request: Request) -> None:
        access.scraper.check(request.client.host if request.client else None, request.scope["headers"])

    app = _bare_app()
    for prefix in ("/v1", ""):
        in_schema = prefix == "/v1"

        @app.get(
            f"{prefix}/models",
            include_in_schema=in_schema,
            summary="List the tiers, aliases and embedding models",
            response_model=dict[str, Any],
        )
        async def models(allows: Annotated[Allows, Depends(client)]) -> Response:
            # A list of 1,000 discovered models would keep FastAPI's encoder busy.
            return Response(msgspec.json.encode(operations.catalog.models(allows)), media_type="application/json")

        @app.get(
            f"{prefix}/models/{{name:path}}",
            include_in_schema=in_schema,
            summary="Show one model",
        )
        async def model(name: str, allows: Annotated[Allows, Depends(client)]) -> dict[str, Any]:
            return operations.catalog.model(name, allows)

    add_ollama(app, operations.catalog, client)
    _add_probes(app, operations)
    _add_metrics(app, operations, [Depends(scraper)])

    @app.get(
        "/ops/status",
        dependencies=[Depends(operator)],
        summary="Show backends, tiers and requests in flight",
        response_model=dict[str, Any],
    )
    async def status(tier: str | None = None) -> Response:
        return Response(msgspec.json.encode(await operations.status_with_series(tier)), media_type="application/json")

    add_console(app, operations, events, operator)
    add_rollout(app, operations.controller, operator)
    add_preflight(app, preflight, operator)
    add_keys(app, named_keys, operator)
    add_usage(app, usage, operator)
    _add_description(app)
    return app


def build_metrics_port(operations: Operations) -> FastAPI:
    """Build the application of `GATEWAY_METRICS_PORT`, which needs no key."""
    app = _bare_app()
    _add_probes(app, operations)
    _add_metrics(app, operations, [])
    return app


def _bare_app() -> FastAPI:
    app = FastAPI(
        title="LLM gateway",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"logs": False},
    )

    @app.exception_handler(GatewayError)
    async def gateway_error(request: Request, error: GatewayError) -> Response:
        headers, body = error_answer(request.url.path, error)
        return Response(body, error.status, {name.decode(): value.decode() for name, value in headers})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            return await gateway_error(
                request, MethodNotAllowed(_allowed(app, request.url.path) or (error.headers or {}).get("Allow", "GET"))
            )
        return await gateway_error(
            request, NotFound("There is no endpoint at this path. See /docs for a description of the API.")
        )

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return await gateway_error(request, GatewayError("The gateway failed to answer."))

    return app


def _allowed(app: FastAPI, path: str) -> str:
    """Return all methods of a path: Starlette reports only those of its first route."""
    methods = {
        method
        for route in app.routes
        if isinstance(route, APIRoute) and route.path == path
        for method in route.methods or ()
    }
    return ", ".join(sorted(methods - {"HEAD"}))


def _add_probes(app: FastAPI, operations: Operations) -> None:
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    for path in ALIVE_PATHS:
        app.head(path, include_in_schema=False)(alive)
        app.get(path, summary="Liveness: 200 while the process runs")(alive)

    @app.head(READY_PATH, include_in_schema=False)
    @app.get(READY_PATH, summary="Readiness: 503 while starting or draining; lists tiers that cannot be served")
    async def readyz() -> JSONResponse:
        status, body = operations.readiness()
        return JSONResponse(body, status)


def _add_metrics(app: FastAPI, operations: Operations, guards: list[Any]) -> None:
    @app.get(
        "/metrics",
        dependencies=guards,
        summary="Show metrics as Prometheus text or OpenMetrics",
        response_class=Response,
    )
    async def metrics(request: Request) -> Response:
        body, content_type = await operations.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


def _add_description(app: FastAPI) -> None:
    described: dict[str, Any] = {}

    def describe() -> dict[str, Any]:
        if not described:
            described.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            add_data_paths(described)
            add_bodies(described, BODIES)
            add_ops(described, described["paths"][CHAT_PATH]["post"])
        return described

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return describe()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(describe()))
