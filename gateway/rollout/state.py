"""The state of the roll-out: the backend and the canary of each tier, and the history of changes.

Pure: no I/O; the clock is passed in.

Theory of operation. Each tier has one `Assignment`. A change gives some tiers new assignments, all
of them in one synchronous call, so every request sees either the old state or the new one. There
are three changes:

1. `set` moves every tier that is not pinned, or a single one. If one of the tiers cannot go there,
   none moves.
2. `rollback` moves every tier that it can and names the others. It is never refused.
3. `undo` restores the state before the last change. It is a change itself, so a second one reverts
   the first.

A change without effect leaves no trace. Pinned tiers never move.

With `exclusive`, only one engine fits on the GPU: no change but a rollback may leave tiers on two engines
there (`one_gpu.py`), and a rollback of one tier takes the others along. `reason_to_refuse` says why no
change is possible now.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.config import Settings, Tier
from gateway.errors import Conflict, InvalidRequest
from gateway.rollout.assignment import (
    BUCKETS,
    Assignment,
    Canary,
    Change,
    ChangeCause,
    ForAll,
    Move,
    PersistedRollout,
    Restored,
    RolloutResult,
    TierRoute,
    backends_of,
)
from gateway.rollout.one_gpu import ONE_ENGINE, gathered, reason_against

HISTORY = 50
"""Changes that the history keeps."""


class Rollout:
    """The state of all tiers.

    `tiers` has their routes by name. `listeners` are called with each change once it is in force.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._tier_names = {name.lower(): name for name in settings.tiers}
        self._backend_names = {name.lower(): name for name in settings.backends}
        self.tiers = {
            tier.name: TierRoute(tier, Assignment(tier.backend or settings.llm_backend))
            for tier in settings.tiers.values()
        }
        self.history: deque[Change] = deque(maxlen=HISTORY)
        self.listeners: list[Callable[[Change], None]] = []
        self.reason_to_refuse: Callable[[], str | None] = lambda: None
        """Returns why an order other than a rollback is refused now, or None."""

    def __repr__(self) -> str:
        return f"<Rollout {self}>"

    def __str__(self) -> str:
        """Return the backend that serves all unpinned tiers, or each tier with its own."""
        assignments = {
            str(self.tiers[tier.name].assignment) for tier in self._settings.tiers.values() if tier.backend is None
        }
        if len(assignments) == 1:
            return assignments.pop()
        return ", ".join(f"{name} on {tier_route.assignment}" for name, tier_route in self.tiers.items())

    def active_backend(self, tier: str) -> str:
        return self.tiers[tier].assignment.backend

    # Orders

    def set(
        self,
        backend: str | None = None,
        canary: Canary | None = None,
        *,
        tier: str | None = None,
        by: str = "",
        cause: ChangeCause = "operator",
    ) -> RolloutResult:
        """Assign all unpinned tiers, or `tier` alone, to `backend`, and replace their canaries.

        If `backend` is None, each tier stays on its backend. A tier that is wholly on the canary's
        backend already goes to `rollback_to` then, except for the canary's share.

        Raises:
            InvalidRequest: a name is unknown, or the canary is on `backend` itself.
            Conflict: a tier has no model there, or `tier` is pinned. Nothing has changed.
        """
        target = None if backend is None else self._backend(backend, "backend")
        if canary is not None:
            canary = Canary(self._backend(canary.backend, "canary.backend"), _checked_percent(canary.percent))
            if canary.backend == target:
                raise InvalidRequest("'canary.backend' must be different from 'backend'.", param="canary.backend")
        elif target is None:
            raise InvalidRequest("Missing required parameter: 'backend'.", param="backend")
        tiers = self._unpinned_tiers() if tier is None else [self._unpinned_tier(tier)]
        wanted = {item.name: Assignment(target or self._default_backend(item, canary), canary) for item in tiers}
        for item in tiers:
            self._check(item, wanted[item.name])
        self._check_gpu(wanted)
        for_all = ForAll(target, canary) if tier is None else None
        return RolloutResult(self._apply(wanted, by, cause, for_all))

    def rollback(
        self,
        *,
        tier: str | None = None,
        to: str | None = None,
        by: str = "",
        cause: ChangeCause = "operator",
        why: str = "",
    ) -> RolloutResult:
        """Assign all unpinned tiers, or `tier` alone, wholly to `to`; by default to `rollback_to`.

        A tier without a model there loses its canary and stays on its backend. If the backend is on a
        GPU with room for one engine, all unpinned tiers go there.

        Raises:
            InvalidRequest: a name is unknown.
        """
        target = self._settings.rollback_to if to is None else self._backend(to, "to")
        named = None if tier is None else self._tier(tier)
        wanted: dict[str, Assignment] = {}
        unmoved: dict[str, str] = {}
        if target in self._settings.on_gpu and (named is None or named.backend is None):
            named = None
        for item in self._unpinned_tiers() if named is None else [named]:
            if item.backend is not None:
                unmoved[item.name] = f"it is pinned to {item.backend}"
                continue
            if target not in item.models:
                unmoved[item.name] = f"it has no model on {target}"
            wanted[item.name] = Assignment(
                target if target in item.models else self.tiers[item.name].assignment.backend
            )
        for_all = ForAll(target, is_rollback=True) if tier is None else None
        return RolloutResult(self._apply(wanted, by, cause, for_all, is_rollback=True, why=why), unmoved)

    def undo(self, *, by: str = "", cause: ChangeCause = "operator") -> RolloutResult:
        """Restore the state before the last change.

        A tier stays where it is if the settings no longer allow its earlier assignment.

        Raises:
            Conflict: the engines on one GPU do not allow it. Nothing has changed.
        """
        if not self.history:
            return RolloutResult(None)
        wanted: dict[str, Assignment] = {}
        unmoved: dict[str, str] = {}
        for name, move in self.history[-1].tiers.items():
            if name in self.tiers:
                reason = self._reason_against(self._settings.tiers[name], move.before)
                if reason:
                    unmoved[name] = reason
                else:
                    wanted[name] = move.before
        self._check_gpu(wanted)
        return RolloutResult(self._apply(wanted, by, cause), unmoved)

    def take_back(self, change: Change, why: str) -> RolloutResult:
        """Restore the state before `change`, whose engine did not get the GPU. It is never refused."""
        wanted = {
            name: move.before
            for name, move in change.tiers.items()
            if name in self.tiers and self._reason_against(self._settings.tiers[name], move.before) is None
        }
        return RolloutResult(self._apply(wanted, "", "exclusive", why=why))

    def reload(self, settings: Settings) -> Change | None:
        """Put other settings in force. Tiers keep their assignments as far as the settings allow.

        If `LLM_BACKEND` has changed, it applies to all tiers that are not pinned, as at a start. A
        new tier begins where the settings say.
        """
        is_moved = settings.llm_backend != self._settings.llm_backend
        before, moves = dict(self.tiers), dict[str, Move]()
        self._settings = settings
        self._tier_names = {name.lower(): name for name in settings.tiers}
        self._backend_names = {name.lower(): name for name in settings.backends}
        self.tiers.clear()  # in place, since others hold this dict
        for tier in settings.tiers.values():
            here = Assignment(tier.backend or settings.llm_backend)
            old = before.get(tier.name)
            if tier.backend is None:
                here = self._after_reload(tier, None if old is None else old.assignment, here, is_moved)
            self.tiers[tier.name] = TierRoute(tier, here)
            if old is not None and old.assignment == here:
                self.tiers[tier.name].requests, self.tiers[tier.name].canary_requests = (
                    old.requests,
                    old.canary_requests,
                )
            elif old is not None:
                moves[tier.name] = Move(old.assignment, here)
        for name, assignment in self._gathered().items():
            moves[name] = Move(moves[name].before if name in moves else self.tiers[name].assignment, assignment)
            self.tiers[name].assign(assignment)
        return self._remember(moves, "", "reload") if moves else None

    def _after_reload(self, tier: Tier, old: Assignment | None, given: Assignment, is_moved: bool) -> Assignment:
        """Return the assignment of a tier that was on `old`, and that the settings put on `given`."""
        return given if old is None or is_moved else self._closest_allowed(tier, old, given)

    def _closest_allowed(self, tier: Tier, assignment: Assignment, otherwise: Assignment) -> Assignment:
        """Return as much of `assignment` as the settings allow: all of it, or only its backend."""
        for possible in (assignment, Assignment(assignment.backend)):
            if self._reason_against(tier, possible) is None:
                return possible
        return otherwise

    # Persistence

    def to_persist(self) -> Any:
        """Return the state for `restore`, as JSON types."""
        tiers = {tier.name: self.tiers[tier.name].assignment for tier in self._unpinned_tiers()}
        return msgspec.to_builtins(PersistedRollout(self._settings.llm_backend, tiers, list(self.history)))

    def restore(self, kept: Any) -> Restored:
        """Restore the state from before a restart, and note where it differs from the settings.

        The persisted state takes precedence unless `LLM_BACKEND` has changed since. Restoring is
        not a change, unless the variable moves tiers away from where an operator had put them.
        """
        try:
            found = msgspec.convert(kept, PersistedRollout)
        except msgspec.ValidationError:
            return Restored(["the roll-out in the state file is invalid; the settings apply"])
        self.history.extend(found.history)
        variable = self._settings.llm_backend
        if found.llm_backend != variable:
            return self._prefer_variable(found)
        notes = []
        for name, assignment in found.tiers.items():
            reason = (
                self._reason_against(self._settings.tiers[name], assignment)
                if name in self.tiers
                else "the tier no longer exists"
            )
            if reason is None:
                self.tiers[name].assign(assignment)
            else:
                notes.append(f"tier {name} was on {assignment}, but {reason}: the settings apply to it")
        for name, assignment in self._gathered().items():
            notes.append(f"tier {name} was on {self.tiers[name].assignment}, but {ONE_ENGINE}: it is on {assignment}")
            self.tiers[name].assign(assignment)
        if any(self.tiers[tier.name].assignment != Assignment(variable) for tier in self._unpinned_tiers()):
            when = f" at {self.history[-1].at}" if self.history else ""
            notes.insert(
                0,
                f"LLM_BACKEND is {variable}, but the roll-out that was set{when} takes precedence: {self}. "
                f"To leave it, run `gateway rollback` (moves to {self._settings.rollback_to}) or start with an "
                "empty GATEWAY_STATE_FILE. A changed LLM_BACKEND takes precedence at the next start",
            )
        return Restored(notes)

    def _prefer_variable(self, found: PersistedRollout) -> Restored:
        variable = self._settings.llm_backend
        moved = {
            name: Move(assignment, self.tiers[name].assignment)
            for name, assignment in found.tiers.items()
            if name in self.tiers
            and self._settings.tiers[name].backend is None
            and assignment != self.tiers[name].assignment
        }
        if moved:
            self._remember(moved, "", "start")
        note = (
            f"LLM_BACKEND is {variable} and was {found.llm_backend} when the roll-out was last set: the variable "
            f"takes precedence, and every tier that is not pinned is on {variable}"
        )
        note += " (`gateway undo` restores the roll-out that was set)" if moved else ""
        return Restored([note], is_over=True)

    # Changes

    def _apply(
        self,
        wanted: Mapping[str, Assignment],
        by: str,
        cause: ChangeCause,
        for_all: ForAll | None = None,
        *,
        is_rollback: bool = False,
        why: str = "",
    ) -> Change | None:
        """Assign tiers. Every order of an operator or the guard ends here; it never awaits.

        `for_all` is the order itself, if it is one for all tiers.
        """
        moves = {
            name: Move(self.tiers[name].assignment, assignment)
            for name, assignment in wanted.items()
            if self.tiers[name].assignment != assignment
        }
        if not moves:
            return None
        for name, move in moves.items():
            self.tiers[name].assign(move.after)
        return self._remember(moves, by, cause, is_rollback=is_rollback, why=why)

    def _remember(
        self, moves: dict[str, Move], by: str, cause: ChangeCause, *, is_rollback: bool = False, why: str = ""
    ) -> Change:
        change = Change(time_in_utc(self._clock()), by, cause, moves, is_rollback, why)
        self.history.append(change)
        self._tell(change)
        return change

    def _tell(self, change: Change) -> None:
        for listener in self.listeners:
            listener(change)

    def _unpinned_tiers(self) -> list[Tier]:
        return [tier for tier in self._settings.tiers.values() if tier.backend is None]

    def _gathered(self) -> dict[str, Assignment]:
        """Return the assignments that bring tiers on several engines of one GPU together, by tier."""
        return gathered(
            self._settings, {tier.name: self.tiers[tier.name].assignment for tier in self._unpinned_tiers()}
        )

    def _check_gpu(self, wanted: Mapping[str, Assignment]) -> None:
        """Check that the engines on one GPU allow a change.

        Raises:
            Conflict: they do not.
        """
        now = {tier.name: self.tiers[tier.name].assignment for tier in self._unpinned_tiers()}
        if all(now.get(name) == assignment for name, assignment in wanted.items()):
            return
        reason = reason_against(self._settings, now | dict(wanted)) or self.reason_to_refuse()
        if reason is not None:
            raise Conflict(reason)

    def _reason_against(self, tier: Tier, assignment: Assignment) -> str | None:
        """Return why `tier` cannot have `assignment`, or None if it can."""
        if tier.backend is not None:
            return f"it is pinned to {tier.backend}"
        if assignment.canary is not None and {*backends_of(assignment)} <= self._settings.on_gpu:
            return f"a canary needs two engines at once, and {ONE_ENGINE}"
        for backend in backends_of(assignment):
            if backend not in tier.models:
                return f"it has no model on {backend}"
        return None

    def _check(self, tier: Tier, assignment: Assignment) -> None:
        if assignment.canary is not None and assignment.canary.backend == assignment.backend:
            raise Conflict(
                f"Tier {tier.name!r} is on {assignment.backend} already. Set 'backend' to the backend for the "
                "rest of its requests. Nothing was changed."
            )
        reason = self._reason_against(tier, assignment)
        if reason is not None:
            raise Conflict(f"Tier {tier.name!r} cannot move: {reason}. Nothing was changed.", param="tier")

    def _default_backend(self, tier: Tier, canary: Canary | None) -> str:
        """Return the backend beside `canary`, for an order that names none."""
        current, rollback_to = self.tiers[tier.name].assignment.backend, self._settings.rollback_to
        return rollback_to if canary is not None and canary.backend == current else current

    def _unpinned_tier(self, name: str) -> Tier:
        tier = self._tier(name)
        if tier.backend is not None:
            raise Conflict(
                f"Tier {tier.name!r} is pinned to {tier.backend} by the settings. Nothing was changed.", param="tier"
            )
        return tier

    def _tier(self, name: str) -> Tier:
        found = self._tier_names.get(name.lower())
        if found is None:
            raise InvalidRequest(f"'tier' must be one of: {', '.join(self._settings.tiers)}.", param="tier")
        return self._settings.tiers[found]

    def _backend(self, name: str, param: str) -> str:
        found = self._backend_names.get(name.lower())
        if found is None:
            raise InvalidRequest(f"'{param}' must be one of: {', '.join(self._settings.backends)}.", param=param)
        return found


def time_in_utc(now: float) -> str:
    """Return `now` in Unix time as the history shows it, such as `2026-11-29T08:30:00.250Z`."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"


def _checked_percent(percent: float) -> float:
    step = 100 / BUCKETS
    if not 0 <= percent <= 100 or abs(percent / step - round(percent / step)) > 1e-6:
        raise InvalidRequest(
            f"'canary.percent' must be a number from 0 to 100, in steps of {step:g}.", param="canary.percent"
        )
    return percent
