"""Routes of the operator for the roll-out and the preflight check."""

from collections.abc import Awaitable, Callable
from math import inf
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Request
from msgspec import Struct
from starlette.requests import ClientDisconnect

from gateway.dialects.json_body import check_media_type
from gateway.errors import ClientLeft, InvalidJson, InvalidRequest, RequestTooLarge
from gateway.rollout.assignment import Canary, Percent
from gateway.rollout.controller import RolloutController
from gateway.rollout.preflight.check import LEAST, LONGEST, SECONDS, Preflight

MAX_BODY = 64 * 1024

Body = TypeVar("Body", bound=Struct)


class CanaryBody(Struct, forbid_unknown_fields=True):
    """Canary in the body of `PUT /ops/rollout`."""

    backend: str
    percent: Percent


class RolloutBody(Struct, forbid_unknown_fields=True):
    """Body of `PUT /ops/rollout`: the backend of all tiers that are not pinned, or of one `tier`.

    Without `backend`, each tier stays on its backend and gets the canary beside it. A tier that is
    entirely on the canary's backend then moves to the backend in the setting `rollback_to`.
    """

    backend: str | None = None
    canary: CanaryBody | None = None
    tier: str | None = None


class RollbackBody(Struct, forbid_unknown_fields=True):
    """Body of `POST /ops/rollback`: a single tier to roll back, another backend to roll back to."""

    tier: str | None = None
    to: str | None = None


class EmptyBody(Struct, forbid_unknown_fields=True):
    """Body of requests without parameters."""


BODIES: tuple[type[Struct], ...] = (RolloutBody, RollbackBody, EmptyBody)


def add_rollout(app: FastAPI, controller: RolloutController, operator: Callable[[Request], Awaitable[str]]) -> None:
    """Add the `/ops` paths that change the roll-out.

    `operator` authorises a request and returns the id of its key.
    """
    rollout = controller.rollout
    by_operator = Depends(operator)

    @app.get(
        "/ops/rollout",
        dependencies=[by_operator],
        summary="Show the roll-out: the backend of each tier, and the history of changes",
    )
    async def state() -> dict[str, Any]:
        return controller.view()

    @app.put(
        "/ops/rollout",
        summary="Move all tiers that are not pinned, or one tier, to a backend",
        openapi_extra=_body_schema(RolloutBody, required=True),
    )
    async def put(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _read_body(request, RolloutBody, required=True)
        canary = None if order.canary is None else Canary(order.canary.backend, order.canary.percent)
        return await controller.report(rollout.set(order.backend, canary, tier=order.tier, by=by))

    @app.post(
        "/ops/rollback",
        summary="Roll back all tiers that are not pinned, and end their canaries; never refused",
        openapi_extra=_body_schema(RollbackBody),
    )
    async def rollback(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _read_body(request, RollbackBody)
        return await controller.report(rollout.rollback(tier=order.tier, to=order.to, by=by))

    @app.post("/ops/undo", summary="Undo the last change of the roll-out", openapi_extra=_body_schema(EmptyBody))
    async def undo(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        await _read_body(request, EmptyBody)
        return await controller.report(rollout.undo(by=by))


def _body_schema(kind: type[Struct], *, required: bool = False) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


async def _read_body(request: Request, kind: type[Body], *, required: bool = False) -> Body:
    """Read and decode the request body; it may be empty unless it is `required`.

    Raises:
        UnsupportedMediaType: The body is not sent as uncompressed JSON.
        RequestTooLarge: The body has more than `MAX_BODY` bytes.
        InvalidJson: The body is not a JSON object.
        InvalidRequest: A field is unknown, missing or invalid.
        ClientLeft: The client disconnected before the body was complete.
    """
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise RequestTooLarge(f"The request body may have at most {MAX_BODY} bytes.")
    except ClientDisconnect:
        raise ClientLeft from None
    if not body and not required:
        return kind()
    check_media_type(dict(request.scope["headers"]))
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson("The body is not valid JSON.") from None


def _validation_error(text: str, kind: type[Struct]) -> InvalidRequest:
    """Return msgspec's error without the text that the client sent."""
    reason, _, place = text.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    if reason.startswith("Object contains unknown field"):
        known = CanaryBody if param == "canary" else kind
        return InvalidRequest(f"Unknown field; expected: {', '.join(known.__struct_fields__) or 'none'}.", param=param)
    if reason.startswith("Object missing required field `"):
        param = f"{param}.{reason.split('`')[1]}"
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    return InvalidRequest(f"Invalid value for '{param}'. {reason}.", param=param)


def add_preflight(app: FastAPI, preflight: Preflight, operator: Callable[[Request], Awaitable[str]]) -> None:
    """Add `/ops/preflight`; `operator` authorises a request."""

    @app.post(
        "/ops/preflight",
        dependencies=[Depends(operator)],
        summary="Check what a switch to a backend would break; generates a few tokens there",
    )
    async def check(
        request: Request, backend: str | None = None, tier: str | None = None, seconds: str | None = None
    ) -> dict[str, Any]:
        longest = _seconds(seconds)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await preflight.unless(gone(), preflight.check(backend, tier, longest))


def _seconds(text: str | None) -> float:
    try:
        seconds = SECONDS if text is None else float(text)
    except ValueError:
        seconds = inf
    if not LEAST <= seconds <= LONGEST:
        raise InvalidRequest(f"'seconds' must be a number from {LEAST:g} to {LONGEST:g}.", param="seconds")
    return seconds
