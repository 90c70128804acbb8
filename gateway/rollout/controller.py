"""The roll-out controller: logs, counts, persists and shares each change that `state.py` decides."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from gateway.config import Settings
from gateway.rollout.assignment import Change, RolloutResult
from gateway.rollout.sharing import RolloutSharing
from gateway.rollout.state import Rollout
from gateway.state_file import StateFile
from gateway.telemetry.metrics import Metrics

SECTION = "rollout"
"""Section of the state file."""
PERSIST_SECONDS = 1.0
"""Longest time that an answer waits for the disk. The change is already in force."""

_log = logging.getLogger(__name__)


class RolloutController:
    """Logs, counts and persists the changes of the roll-out, and migrates queued requests.

    `migrate` moves queued requests after a change and returns how many moved. `sharing` exchanges the
    roll-out with other replicas, if there are any. `gpu` returns the state of the GPU that the engines
    share, None if they share none.
    """

    def __init__(
        self,
        rollout: Rollout,
        state: StateFile,
        metrics: Metrics,
        rollback_to: str,
        migrate: Callable[[Change], int] = lambda change: 0,
        sharing: RolloutSharing | None = None,
        gpu: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self.rollout = rollout
        self.sharing = sharing
        self._state = state
        self._metrics = metrics
        self._rollback_to = rollback_to
        self._moved = 0
        """Requests that moved with the last change."""
        self._migrate = migrate
        self.gpu = gpu
        rollout.listeners.append(self._follow)
        if sharing is not None:
            sharing.on_state = self._persist
        kept = state.get(SECTION)
        if kept is not None:
            restored = rollout.restore(kept)
            for note in restored.notes:
                _log.warning("%s", note)
            if restored.is_over:  # otherwise the variable's old value would bring it back
                state.put(SECTION, rollout.to_persist())

    def _follow(self, change: Change) -> None:
        is_own = self.sharing is None or change.replica in ("", self.sharing.replica)
        by = f" by {change.by}" if change.by else ""
        where = "" if is_own else f" on replica {change.replica}"
        why = f"; {change.why}" if change.why else ""
        _log.log(
            logging.WARNING if why and is_own else logging.INFO,
            "roll-out changed (%s%s%s): %s%s",
            change.cause,
            by,
            where,
            change,
            why,
        )
        if is_own:  # the sum over the replicas is the number of changes
            for tier, move in change.tiers.items():
                self._metrics.switches.labels(tier, *move.ends, change.cause).inc()
        self._persist()
        self._moved = self._migrate(change)

    def _persist(self) -> None:
        self._state.put(SECTION, self.rollout.to_persist())

    def reload(self, settings: Settings) -> None:
        """Put other settings in force. What an operator has set stays as far as they allow."""
        self._rollback_to = settings.rollback_to
        self.rollout.reload(settings)
        if self._state.get(SECTION) is not None:  # with the current tiers and LLM_BACKEND
            self._state.put(SECTION, self.rollout.to_persist())

    async def report(self, outcome: RolloutResult) -> dict[str, Any]:
        """Return the answer to an order.

        It has the state, whether anything changed, how many queued requests moved, whether the change
        survives a restart, and whether the other replicas have been told.
        """
        moved = 0 if outcome.change is None else self._moved
        state = self.view()  # before another order may change it
        persisted, shared = await asyncio.gather(self._persisted(), self._shared())
        return {
            "changed": outcome.change is not None,
            "persisted": persisted,
            "moved": moved,
            "unmoved": outcome.unmoved,
            **state,
            "shared": shared,
        }

    async def _persisted(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(PERSIST_SECONDS):
                return await self._state.persisted()
        return False

    async def _shared(self) -> bool | None:
        return None if self.sharing is None else await self.sharing.shared()

    def view(self) -> dict[str, Any]:
        """Return the body of `GET /ops/rollout`. The history begins with the last change."""
        tiers = {name: self.view_tier(name) for name in self.rollout.tiers}
        return {
            "rollback_to": self._rollback_to,
            "shared": self.is_shared,
            "tiers": tiers,
            "history": self.history(),
            "gpu": self.gpu(),
        }

    @property
    def is_shared(self) -> bool | None:
        """True if the other replicas have been told of every change; None without replicas."""
        return None if self.sharing is None else self.sharing.is_in_sync

    def view_tier(self, name: str) -> dict[str, Any]:
        """Return one tier. `share` counts since the last change; it is null without a canary."""
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
