"""The operator's calls that move the roll-out: each change is logged, counted and kept; `rollout.py` decides."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Depends, FastAPI, Request
from msgspec import Struct
from starlette.requests import ClientDisconnect

from gateway.config import Settings
from gateway.errors import ClientLeft, InvalidJson, InvalidRequest, RequestTooLarge
from gateway.metrics import Metrics
from gateway.parsing import check_json
from gateway.rollout import Canary, Change, Outcome, Percent, Rollout
from gateway.state import State

SECTION = "rollout"
"""Of the state file."""
PERSIST_SECONDS = 1.0
"""How long an answer waits for a disk. The change is in force already."""
MAX_BODY = 64 * 1024

Order = TypeVar("Order", bound=Struct)

_log = logging.getLogger("gateway.rollout")


class CanaryOrder(Struct, forbid_unknown_fields=True):
    backend: str
    percent: Percent


class Placement(Struct, forbid_unknown_fields=True):
    """Where to put every tier that is not pinned, or `tier` alone. Without `backend` each stays where it is, beside its canary.

    One that is all on the canary's backend goes to the settings' `rollback_to` then.
    """

    backend: str | None = None
    canary: CanaryOrder | None = None
    tier: str | None = None


class Retreat(Struct, forbid_unknown_fields=True):
    """What narrows a rollback."""

    tier: str | None = None
    to: str | None = None


class Nothing(Struct, forbid_unknown_fields=True):
    """No words are needed."""


BODIES: tuple[type[Struct], ...] = (Placement, Retreat, Nothing)


class Steering:
    """Keeps the roll-out's changes: in the log, in the metrics, in the state file."""

    def __init__(self, rollout: Rollout, state: State, metrics: Metrics, rollback_to: str) -> None:
        self.rollout = rollout
        self._state = state
        self._metrics = metrics
        self._rollback_to = rollback_to
        self._moved = 0
        """Of the last change."""
        self.move: Callable[[Change], int] = lambda change: 0
        """Lets those who wait follow a change; how many did."""
        rollout.listeners.append(self._keep)
        kept = state.get(SECTION)
        if kept is not None:
            restored = rollout.restore(kept)
            for note in restored.notes:
                _log.warning("%s", note)
            if restored.is_over:  # or the variable's old value would bring it back
                state.put(SECTION, rollout.kept())

    def _keep(self, change: Change) -> None:
        by = f" by {change.by}" if change.by else ""
        why = f"; {change.why}" if change.why else ""
        _log.log(logging.WARNING if why else logging.INFO, "roll-out changed (%s%s): %s%s", change.cause, by, change, why)
        for tier, move in change.tiers.items():
            self._metrics.switches.labels(tier, *move.ends, change.cause).inc()
        self._state.put(SECTION, self.rollout.kept())
        self._moved = self.move(change)

    def reload(self, settings: Settings) -> None:
        """Go on with other settings; what an operator has set stays as far as they let it."""
        self._rollback_to = settings.rollback_to
        self.rollout.reload(settings)
        if self._state.get(SECTION) is not None:  # with the tiers and the LLM_BACKEND of now
            self._state.put(SECTION, self.rollout.kept())

    async def report(self, outcome: Outcome) -> dict[str, Any]:
        """The answer to an order: the state, whether anything changed, how many in line moved, and whether it outlives a restart."""
        moved = 0 if outcome.change is None else self._moved
        state = self.view()  # before others may give orders
        persisted = False
        with suppress(TimeoutError):
            async with asyncio.timeout(PERSIST_SECONDS):
                persisted = await self._state.persisted()
        return {"changed": outcome.change is not None, "persisted": persisted, "moved": moved, "unmoved": outcome.unmoved, **state}

    def view(self) -> dict[str, Any]:
        """Body of `GET /ops/rollout`. The history begins with the last change."""
        tiers = {name: self.view_tier(name) for name in self.rollout.lines}
        return {"rollback_to": self._rollback_to, "tiers": tiers, "history": self.history()}

    def view_tier(self, name: str) -> dict[str, Any]:
        """One tier; `share` is counted since its position last changed, null without a canary."""
        line = self.rollout.lines[name]
        view: dict[str, Any] = {**msgspec.to_builtins(line.position), "pinned": line.is_pinned, "share": None}
        if line.canary is not None:
            percent = round(100 * line.canary_requests / line.requests, 2) if line.requests else None
            view["share"] = {"requests": line.requests, "canary_requests": line.canary_requests, "percent": percent}
        return view

    def history(self) -> Any:
        return msgspec.to_builtins(list(reversed(self.rollout.history)))


def add_rollout(app: FastAPI, steering: Steering, operator: Callable[[Request], Awaitable[str]]) -> None:
    """The paths under `/ops` that steer; `operator` lets a request pass and says who it is."""
    rollout = steering.rollout
    by_operator = Depends(operator)

    @app.get("/ops/rollout", dependencies=[by_operator], summary="The roll-out: who serves each tier, and what was changed")
    async def state() -> dict[str, Any]:
        return steering.view()

    @app.put("/ops/rollout", summary="Move every tier that is not pinned, or one", openapi_extra=_body("Placement"))
    async def put(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _order(request, Placement, required=True)
        canary = None if order.canary is None else Canary(order.canary.backend, order.canary.percent)
        return await steering.report(rollout.set(order.backend, canary, tier=order.tier, by=by))

    @app.post("/ops/rollback", summary="Everything wholly back; never refused", openapi_extra=_body("Retreat"))
    async def rollback(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        order = await _order(request, Retreat)
        return await steering.report(rollout.rollback(tier=order.tier, to=order.to, by=by))

    @app.post("/ops/undo", summary="The state before the last change", openapi_extra=_body("Nothing"))
    async def undo(request: Request, by: Annotated[str, by_operator]) -> dict[str, Any]:
        await _order(request, Nothing)
        return await steering.report(rollout.undo(by=by))


def _body(name: str) -> dict[str, Any]:
    return {"requestBody": {"required": name == "Placement", "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}}


async def _order(request: Request, kind: type[Order], *, required: bool = False) -> Order:
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
    check_json(dict(request.scope["headers"]))
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson("The body is not valid JSON.") from None


def _explained(text: str, kind: type[Struct]) -> InvalidRequest:
    """msgspec's words, without what the client wrote."""
    reason, _, place = text.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    if reason.startswith("Object contains unknown field"):
        known = CanaryOrder if param == "canary" else kind
        return InvalidRequest(f"Unknown key; expected: {', '.join(known.__struct_fields__) or 'none'}.", param=param)
    if reason.startswith("Object missing required field `"):
        param = f"{param}.{reason.split('`')[1]}"
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    return InvalidRequest(f"Invalid value for '{param}'. {reason}.", param=param)
