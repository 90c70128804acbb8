"""The operator's calls that move the roll-out: each change is logged, counted and kept; `rollout.py` decides."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from gateway.config import Settings
from gateway.rollout.state import Change, Rollout, RolloutResult
from gateway.state_file import StateFile
from gateway.telemetry.metrics import Metrics

SECTION = "rollout"
"""Of the state file."""
PERSIST_SECONDS = 1.0
"""How long an answer waits for a disk. The change is in force already."""


_log = logging.getLogger("gateway.rollout")


class RolloutController:
    """Keeps the roll-out's changes: in the log, in the metrics, in the state file."""

    def __init__(
        self,
        rollout: Rollout,
        state: StateFile,
        metrics: Metrics,
        rollback_to: str,
        migrate: Callable[[Change], int] = lambda change: 0,
    ) -> None:
        self.rollout = rollout
        self._state = state
        self._metrics = metrics
        self._rollback_to = rollback_to
        self._moved = 0
        """Of the last change."""
        self._migrate = migrate
        """Moves queued requests after a change; returns how many moved."""
        rollout.listeners.append(self._persist)
        kept = state.get(SECTION)
        if kept is not None:
            restored = rollout.restore(kept)
            for note in restored.notes:
                _log.warning("%s", note)
            if restored.is_over:  # or the variable's old value would bring it back
                state.put(SECTION, rollout.to_persist())

    def _persist(self, change: Change) -> None:
        by = f" by {change.by}" if change.by else ""
        why = f"; {change.why}" if change.why else ""
        _log.log(
            logging.WARNING if why else logging.INFO, "roll-out changed (%s%s): %s%s", change.cause, by, change, why
        )
        for tier, move in change.tiers.items():
            self._metrics.switches.labels(tier, *move.ends, change.cause).inc()
        self._state.put(SECTION, self.rollout.to_persist())
        self._moved = self._migrate(change)

    def reload(self, settings: Settings) -> None:
        """Go on with other settings; what an operator has set stays as far as they let it."""
        self._rollback_to = settings.rollback_to
        self.rollout.reload(settings)
        if self._state.get(SECTION) is not None:  # with the tiers and the LLM_BACKEND of now
            self._state.put(SECTION, self.rollout.to_persist())

    async def report(self, outcome: RolloutResult) -> dict[str, Any]:
        """The answer to an order: the state, whether anything changed, how many in line moved, and whether it outlives a restart."""
        moved = 0 if outcome.change is None else self._moved
        state = self.view()  # before others may give orders
        persisted = False
        with suppress(TimeoutError):
            async with asyncio.timeout(PERSIST_SECONDS):
                persisted = await self._state.persisted()
        return {
            "changed": outcome.change is not None,
            "persisted": persisted,
            "moved": moved,
            "unmoved": outcome.unmoved,
            **state,
        }

    def view(self) -> dict[str, Any]:
        """Body of `GET /ops/rollout`. The history begins with the last change."""
        tiers = {name: self.view_tier(name) for name in self.rollout.tiers}
        return {"rollback_to": self._rollback_to, "tiers": tiers, "history": self.history()}

    def view_tier(self, name: str) -> dict[str, Any]:
        """One tier; `share` is counted since its position last changed, null without a canary."""
        tier_route = self.rollout.tiers[name]
        view: dict[str, Any] = {
            **msgspec.to_builtins(tier_route.assignment),
            "pinned": tier_route.is_pinned,
            "share": None,
        }
        if tier_route.canary is not None:
            percent = round(100 * tier_route.canary_requests / tier_route.requests, 2) if tier_route.requests else None
            view["share"] = {
                "requests": tier_route.requests,
                "canary_requests": tier_route.canary_requests,
                "percent": percent,
            }
        return view

    def history(self) -> Any:
        return msgspec.to_builtins(list(reversed(self.rollout.history)))
