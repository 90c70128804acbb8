"""The operator's routes for the roll-out and the preflight."""

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
    backend: str
    percent: Percent


class RolloutBody(Struct, forbid_unknown_fields=True):
    """Where to put every tier that is not pinned, or `tier` alone. Without `backend` each stays where it is, beside its canary.

    One that is all on the canary's backend goes to the settings' `rollback_to` then.
    """

    backend: str | None = None
    canary: CanaryBody | None = None
    tier: str | None = None


class RollbackBody(Struct, forbid_unknown_fields=True):
    """What narrows a rollback."""

    tier: str | None = None
    to: str | None = None


class EmptyBody(Struct, forbid_unknown_fields=True):
    """No words are needed."""


BODIES: tuple[type[Struct], ...] = (RolloutBody, RollbackBody, EmptyBody)


def add_rollout(app: FastAPI, controller: RolloutController, operator: Callable[[Request], Awaitable[str]]) -> None:
    """The paths under `/ops` that steer; `operator` lets a request pass and says who it is."""
    rollout = controller.rollout
    by_operator = Depends(operator)

    @app.get(
        "/ops/rollout", dependencies=[by_operator], summary="The roll-out: who serves each tier, and what was changed"
    )
    async def state() -> dict[str, Any]:
        return controller.view()

    @app.put(
        "/ops/rollout", summary="Move every tier that is not pinned, or one", openapi_extra=_body_schema("Placement")
    )
    async def put(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _read_body(request, RolloutBody, required=True)
        canary = None if order.canary is None else Canary(order.canary.backend, order.canary.percent)
        return await controller.report(rollout.set(order.backend, canary, tier=order.tier, by=by))

    @app.post("/ops/rollback", summary="Everything wholly back; never refused", openapi_extra=_body_schema("Retreat"))
    async def rollback(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _read_body(request, RollbackBody)
        return await controller.report(rollout.rollback(tier=order.tier, to=order.to, by=by))

    @app.post("/ops/undo", summary="The state before the last change", openapi_extra=_body_schema("Nothing"))
    async def undo(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        await _read_body(request, EmptyBody)
        return await controller.report(rollout.undo(by=by))


def _body_schema(name: str) -> dict[str, Any]:
    return {
        "requestBody": {
            "required": name == "Placement",
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
        }
    }


async def _read_body(request: Request, kind: type[Body], *, required: bool = False) -> Body:
    """The request's body; one that is not required may be empty.

    Raises:
        UnsupportedMediaType, RequestTooLarge, InvalidJson, InvalidRequest
        ClientLeft: it did not come whole.
    """
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise RequestTooLarge(f"An order may have at most {MAX_BODY} bytes.")
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
    """msgspec's words, without what the client wrote."""
    reason, _, place = text.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    if reason.startswith("Object contains unknown field"):
        known = CanaryBody if param == "canary" else kind
        return InvalidRequest(f"Unknown key; expected: {', '.join(known.__struct_fields__) or 'none'}.", param=param)
    if reason.startswith("Object missing required field `"):
        param = f"{param}.{reason.split('`')[1]}"
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    return InvalidRequest(f"Invalid value for '{param}'. {reason}.", param=param)


def add_preflight(app: FastAPI, preflight: Preflight, operator: Callable[[Request], Awaitable[str]]) -> None:
    """The path under `/ops`; `operator` lets a request pass."""

    @app.post(
        "/ops/preflight",
        dependencies=[Depends(operator)],
        summary="What a switch to a backend would break; tries it with a few tokens",
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
