"""The roll-out of one of several replicas: orders from any of them apply to all.

Pure: no I/O; the clocks are passed in. `sharing.py` exchanges the state with the others.

An order takes effect here at once and is recorded with its stamp (`shared_state.py`). Orders of other
replicas arrive by `merge`. For each tier the newest order counts, as far as the settings of this
replica allow it. `LLM_BACKEND` is for tiers that no order has moved: a variable that differs on one
replica, for example while replicas are updated one after another, must not move the others.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from gateway.config import Settings, Tier
from gateway.rollout.assignment import (
    Assignment,
    Change,
    ChangeCause,
    ForAll,
    Move,
    PersistedRollout,
    Restored,
    RolloutResult,
)
from gateway.rollout.shared_state import OthersRegister, Register, SharedState, Stamp, merge, visible
from gateway.rollout.state import HISTORY, Rollout, time_in_utc

OLDEST = 1
"""Number of what a replica had set before it shared the roll-out: any order is newer."""


class SharedRollout(Rollout):
    """The state of all tiers, shared with other replicas.

    `replica` is the name of this one, and `common_clock` the Unix time that all agree on.
    """

    def __init__(
        self,
        settings: Settings,
        replica: str,
        clock: Callable[[], float] = time.time,
        common_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(settings, clock)
        self.replica = replica
        self._common_clock = common_clock
        self._older: list[Change] = []
        """History from before the roll-out was shared."""
        self.shared_state = SharedState()
        self.is_in_sync = False
        """True if the others have all orders that this replica has."""
        self.on_order: Callable[[], None] = lambda: None
        """Called when this replica knows more than the others."""

    # Orders

    def undo(self, *, by: str = "", cause: ChangeCause = "operator") -> RolloutResult:
        if not self.history:
            return RolloutResult(None)
        last = self.history[-1]
        wanted, unmoved = {}, {}
        for name, move in last.tiers.items():
            reason = self._reason_against(self._settings.tiers[name], move.before) if name in self.tiers else None
            if reason:
                unmoved[name] = reason
            else:  # or a tier that only other replicas have
                wanted[name] = move.before
        others = self.shared_state.others
        is_for_all = others is not None and others.stamp == last.stamp
        return RolloutResult(self._apply(wanted, by, cause, is_void=is_for_all), unmoved)

    def _apply(
        self,
        wanted: Mapping[str, Assignment],
        by: str,
        cause: ChangeCause,
        for_all: ForAll | None = None,
        *,
        is_rollback: bool = False,
        why: str = "",
        is_void: bool = False,
    ) -> Change | None:
        all_moves = {name: Move(self._ordered(name, assignment), assignment) for name, assignment in wanted.items()}
        moves = {name: move for name, move in all_moves.items() if move.before != move.after}
        number = max(int(self._common_clock() * 1000), self.shared_state.last_number + 1)
        stamp = number, self.replica
        at = time_in_utc(self._clock())
        change = Change(at, by, cause, moves or all_moves, is_rollback, why, self.replica, number)
        self.shared_state = merge(
            self.shared_state,
            SharedState(
                {name: Register(*stamp, assignment) for name, assignment in wanted.items()},
                _register_of(for_all, stamp, is_void=is_void),
                # The others may have moved the tiers meanwhile, and then an order without an effect here has one.
                [change] if moves or (wanted and not self.is_in_sync) else [],
            ),
        )
        self.is_in_sync = False
        self._follow()
        self.on_order()
        return change if moves else None

    def _ordered(self, name: str, otherwise: Assignment) -> Assignment:
        """Return what was ordered for a tier, or else where it is, or `otherwise` for an unknown one."""
        register = self.shared_state.tiers.get(name)
        if register is not None:
            return register.assignment
        return self.tiers[name].assignment if name in self.tiers else otherwise

    # Other replicas

    def merge(self, state: SharedState) -> bool:
        """Apply the orders in `state`, and return whether this replica knows more than that."""
        merged = merge(self.shared_state, state)
        if merged != self.shared_state:
            self.shared_state = merged
            self._follow()
        return self.shared_state != state

    def _follow(self) -> None:
        """Assign the tiers as ordered, and tell the listeners, an order at a time."""
        moved = self._assign_ordered()
        log = {change.stamp: change for change in self.shared_state.log}
        for stamp in sorted(moved):
            known = log.get(stamp) or Change(time_in_utc(stamp[0] / 1000), "", "operator", {}, False, "", *stamp[::-1])
            self._tell(replace(known, tiers=moved[stamp]))

    def _assign_ordered(self) -> dict[Stamp, dict[str, Move]]:
        """Assign the tiers as ordered, as far as the settings allow; return what moved here, by order."""
        moved: dict[Stamp, dict[str, Move]] = {}
        for tier in self._unpinned_tiers():
            self._include(tier)
            register = self.shared_state.tiers.get(tier.name)
            if register is None:
                continue
            now = self.tiers[tier.name].assignment
            here = self._closest_allowed(tier, register.assignment, Assignment(now.backend))
            if here != now:
                self.tiers[tier.name].assign(here)
                moved.setdefault(register.stamp, {})[tier.name] = Move(now, here)
        self.history.clear()
        self.history.extend((*self._older, *visible(self.shared_state.log))[-HISTORY:])
        return moved

    def _include(self, tier: Tier) -> None:
        """Apply the last order for all tiers to `tier`, if the replica that took it does not have the tier."""
        others, register = self.shared_state.others, self.shared_state.tiers.get(tier.name)
        if others is None or others.is_void or (register is not None and register.stamp >= others.stamp):
            return
        before = self._ordered(tier.name, self.tiers[tier.name].assignment)
        after = Assignment(others.backend or self._default_backend(tier, others.canary), others.canary)
        if self._reason_against(tier, after) is not None:
            if not others.is_rollback:
                return
            after = Assignment(before.backend)
        moved = [
            replace(change, tiers={tier.name: Move(before, after)})
            for change in self.shared_state.log
            if change.stamp == others.stamp and before != after
        ]
        self.shared_state = merge(
            self.shared_state, SharedState({tier.name: Register(*others.stamp, after)}, log=moved)
        )

    # Settings and restarts

    def reload(self, settings: Settings) -> Change | None:
        change = super().reload(settings)
        self._follow()  # the settings may have tiers and models that they lacked when an order came
        self.on_order()
        return change

    def _after_reload(self, tier: Tier, old: Assignment | None, given: Assignment, is_moved: bool) -> Assignment:
        register = self.shared_state.tiers.get(tier.name)
        if register is None:
            return super()._after_reload(tier, old, given, is_moved)
        otherwise = given if old is None else self._closest_allowed(tier, Assignment(old.backend), given)
        return self._closest_allowed(tier, register.assignment, otherwise)

    def to_persist(self) -> Any:
        kept = super().to_persist()
        return kept if self.shared_state.is_empty else {**kept, "shared": msgspec.to_builtins(self.shared_state)}

    def restore(self, kept: Any) -> Restored:
        """Restore the state from before a restart. `LLM_BACKEND` does not take precedence over orders."""
        try:
            found = msgspec.convert(kept, PersistedRollout)
            shared = None if found.shared is None else msgspec.convert(found.shared, SharedState)
        except msgspec.ValidationError:
            return Restored(["the roll-out in the state file is invalid; the settings apply"])
        if shared is None:
            return self._begin_sharing(super().restore(kept))
        self._older = [change for change in found.history if not change.number]
        self.shared_state = shared
        self._assign_ordered()
        return Restored([])

    def _begin_sharing(self, restored: Restored) -> Restored:
        """Make what was set before the roll-out was shared the oldest order."""
        self._older = list(self.history)
        default = Assignment(self._settings.llm_backend)
        set_before = {
            tier.name: Register(OLDEST, self.replica, assignment)
            for tier in self._unpinned_tiers()
            if (assignment := self.tiers[tier.name].assignment) != default
        }
        self.shared_state = SharedState(set_before)
        return restored

    def unfollowed(self) -> dict[str, str]:
        """Return the tiers that are not where they were ordered to be, each with the reason in words."""
        found = {}
        for tier in self._unpinned_tiers():
            register = self.shared_state.tiers.get(tier.name)
            if register is not None and (reason := self._reason_against(tier, register.assignment)):
                here = self.tiers[tier.name].assignment
                found[tier.name] = f"it was ordered to {register.assignment}, but here {reason}; it is on {here}"
        return found

    def note(self) -> str | None:
        """Return a sentence for the log if tiers are not where `LLM_BACKEND` says."""
        variable = self._settings.llm_backend
        if all(self.tiers[tier.name].assignment == Assignment(variable) for tier in self._unpinned_tiers()):
            return None
        return (
            f"LLM_BACKEND is {variable}, but the roll-out that the replicas share takes precedence: {self}. "
            f"To leave it, run `gateway rollback` (moves to {self._settings.rollback_to}) or `gateway switch`"
        )


def _register_of(for_all: ForAll | None, stamp: Stamp, *, is_void: bool) -> OthersRegister | None:
    if is_void:
        return OthersRegister(*stamp, is_void=True)
    return None if for_all is None else OthersRegister(*stamp, for_all.backend, for_all.canary, for_all.is_rollback)
