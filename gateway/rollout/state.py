"""Which backend serves each tier: the active one, perhaps a canary beside it, and what was changed when. Pure: no I/O; the clock is passed in.

Theory of operation. Each tier has one `Position`. A change gives some tiers new assignments, all of them in one synchronous call, so that every
request sees either the old state or the new one. There are three changes:

1. `set` moves every tier that is not pinned, or one, or nothing at all where one of them cannot go there.
2. `rollback` moves what can be moved and names the rest: it is never refused.
3. `undo` goes back to the state before the last change. It is a change itself, so a second one takes the first back.

A change that changes nothing leaves no trace. Pinned tiers never move.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.config import Settings, Tier
from gateway.errors import Conflict, InvalidRequest
from gateway.relay.route import Route

BUCKETS = 10_000
"""Of conversations; a percentage has so many steps."""
HISTORY = 50
"""Changes that are remembered."""

ChangeCause = Literal["operator", "guard", "start", "reload"]
Percent = Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)]


class Canary(Struct, frozen=True):
    """The backend that gets `percent` of a tier's conversations."""

    backend: str
    percent: Percent


class Assignment(Struct, frozen=True):
    """Who serves a tier: `backend`, or the canary for its part."""

    backend: str
    canary: Canary | None = None

    def __str__(self) -> str:
        return (
            self.backend
            if self.canary is None
            else f"{self.backend} with {self.canary.percent:g} % on {self.canary.backend}"
        )


class Move(Struct, frozen=True, rename={"before": "from", "after": "to"}):
    """What a change did to one tier."""

    before: Assignment
    after: Assignment

    @property
    def ends(self) -> tuple[str, str]:
        """The backend that has less of the tier now, and the one that has more."""
        old, new = self.before, self.after
        if old.backend != new.backend:
            return old.backend, new.backend
        there, here = _part(old), _part(new)
        if old.canary and new.canary and old.canary.backend != new.canary.backend:
            return old.canary.backend, new.canary.backend
        other = (new.canary or old.canary or Canary(new.backend, 0)).backend
        return (new.backend, other) if here > there else (other, new.backend)


class Change(Struct, frozen=True, omit_defaults=True):
    """One step of the history. `at` is UTC; `by` the id of the key that asked for it, `local` without one, empty for the gateway itself.

    `why` is what a guard found, in plain words.
    """

    at: str
    by: str
    cause: ChangeCause
    tiers: dict[str, Move]
    is_rollback: bool = False
    why: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{name} from {move.before} to {move.after}" for name, move in self.tiers.items())


class PersistedRollout(Struct, frozen=True):
    """What outlives a restart. `llm_backend` is the setting at the time of the last change."""

    llm_backend: str
    tiers: dict[str, Assignment]
    history: list[Change]


class RolloutResult(Struct, frozen=True):
    """What became of an order. `unmoved` names tiers that could not follow, and why."""

    change: Change | None
    unmoved: dict[str, str] = {}


class Restored(Struct, frozen=True):
    """What was found of an earlier run: `notes` in plain words. `is_over`: it does not count, and must not come back."""

    notes: list[str]
    is_over: bool = False


class TierRoute:
    """One tier as requests see it. `requests` and `canary_requests` count since its position last changed, while there is a canary."""

    __slots__ = (
        "_canary_buckets",
        "_canary_route",
        "_tier",
        "assignment",
        "canary",
        "canary_requests",
        "requests",
        "route",
    )

    def __init__(self, tier: Tier, assignment: Assignment) -> None:
        self._tier = tier
        self.assign(assignment)

    def __repr__(self) -> str:
        return f"<TierRoute {self._tier.name} on {self.assignment}>"

    @property
    def is_pinned(self) -> bool:
        return self._tier.backend is not None

    def assign(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.route = self._route(assignment.backend)
        self.canary = assignment.canary
        self.requests = self.canary_requests = 0
        self._canary_route = self._route(assignment.canary.backend) if assignment.canary else self.route
        self._canary_buckets = round(assignment.canary.percent * BUCKETS / 100) if assignment.canary else 0

    def choose(self, bucket: int) -> Route:
        """The route of a conversation in `bucket`. While there is no canary, `route` says the same at no cost."""
        self.requests += 1
        if bucket >= self._canary_buckets:
            return self.route
        self.canary_requests += 1
        return self._canary_route

    def side(self, bucket: int) -> Route:
        """The same, not counted: for a request that was counted when it came."""
        return self.route if bucket >= self._canary_buckets else self._canary_route

    def _route(self, backend: str) -> Route:
        return Route(self._tier.name, backend, self._tier.models[backend])


class Rollout:
    """The state of all tiers. `lines` has them by name; `listeners` are told of each change once it is in force."""

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

    def __repr__(self) -> str:
        return f"<Rollout {self}>"

    def __str__(self) -> str:
        """In words: `vllm`, or each tier with its own."""
        assignments = {
            str(self.tiers[tier.name].assignment) for tier in self._settings.tiers.values() if tier.backend is None
        }
        if len(assignments) == 1:
            return assignments.pop()
        return ", ".join(f"{name} on {tier_route.assignment}" for name, tier_route in self.tiers.items())

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
        """Put every tier that is not pinned, or `tier` alone, on `backend`; None: where it is. `canary` replaces the one that is there.

        A canary of the backend that has all of a tier, with no `backend` named, leaves the rest to `rollback_to`.

        Raises:
            InvalidRequest: a name means nothing, or the canary is no other backend.
            Conflict: a tier has no model there, or `tier` is pinned. Nothing has changed.
        """
        target = None if backend is None else self._backend(backend, "backend")
        if canary is not None:
            canary = Canary(self._backend(canary.backend, "canary.backend"), _percent(canary.percent))
            if canary.backend == target:
                raise InvalidRequest("'canary.backend' must be another backend than 'backend'.", param="canary.backend")
        elif target is None:
            raise InvalidRequest("Missing required parameter: 'backend'.", param="backend")
        tiers = self._movable() if tier is None else [self._unpinned(tier)]
        wanted = {item.name: Assignment(target or self._rest(item, canary), canary) for item in tiers}
        for item in tiers:
            self._check(item, wanted[item.name])
        return RolloutResult(self._apply(wanted, by, cause))

    def rollback(
        self,
        *,
        tier: str | None = None,
        to: str | None = None,
        by: str = "",
        cause: ChangeCause = "operator",
        why: str = "",
    ) -> RolloutResult:
        """Put every tier that is not pinned, or `tier` alone, wholly on `to`, else on the settings' `rollback_to`.

        A tier without a model there loses its canary and stays where it is.

        Raises:
            InvalidRequest: a name means nothing.
        """
        target = self._settings.rollback_to if to is None else self._backend(to, "to")
        named = None if tier is None else self._tier(tier)
        wanted: dict[str, Assignment] = {}
        unmoved: dict[str, str] = {}
        for item in self._movable() if named is None else [named]:
            if item.backend is not None:
                unmoved[item.name] = f"it is pinned to {item.backend}"
                continue
            if target not in item.models:
                unmoved[item.name] = f"it has no model on {target}"
            wanted[item.name] = Assignment(
                target if target in item.models else self.tiers[item.name].assignment.backend
            )
        return RolloutResult(self._apply(wanted, by, cause, is_rollback=True, why=why), unmoved)

    def undo(self, *, by: str = "", cause: ChangeCause = "operator") -> RolloutResult:
        """Back to the state before the last change. A tier that the settings do not let go there any more stays."""
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
        return RolloutResult(self._apply(wanted, by, cause), unmoved)

    def reload(self, settings: Settings) -> Change | None:
        """Go on with other settings. Tiers stay where they are as far as these let them; where `LLM_BACKEND` is another one, it counts for all
        that are not pinned, as at a start. A tier that is new begins where the settings say."""
        is_moved = settings.llm_backend != self._settings.llm_backend
        before, moves = dict(self.tiers), dict[str, Move]()
        self._settings = settings
        self._tier_names = {name.lower(): name for name in settings.tiers}
        self._backend_names = {name.lower(): name for name in settings.backends}
        self.tiers.clear()  # in place: who chooses by them has them
        for tier in settings.tiers.values():
            here = Assignment(tier.backend or settings.llm_backend)
            old = before.get(tier.name)
            if old is not None and tier.backend is None and not is_moved:
                here = self._nearest(tier, old.assignment, here)
            self.tiers[tier.name] = TierRoute(tier, here)
            if old is not None and old.assignment == here:
                self.tiers[tier.name].requests, self.tiers[tier.name].canary_requests = (
                    old.requests,
                    old.canary_requests,
                )
            elif old is not None:
                moves[tier.name] = Move(old.assignment, here)
        return self._remember(moves, "", "reload") if moves else None

    def _nearest(self, tier: Tier, assignment: Assignment, otherwise: Assignment) -> Assignment:
        """Of where `tier` is, as much as can stay: all of it, or the backend without its canary."""
        for possible in (assignment, Assignment(assignment.backend)):
            if self._reason_against(tier, possible) is None:
                return possible
        return otherwise

    # What is kept

    def to_persist(self) -> Any:
        """What `restore` takes, as JSON has it."""
        tiers = {tier.name: self.tiers[tier.name].assignment for tier in self._movable()}
        return msgspec.to_builtins(PersistedRollout(self._settings.llm_backend, tiers, list(self.history)))

    def restore(self, kept: Any) -> Restored:
        """Take up what was kept before a restart, and say in plain words where it differs from the settings.

        It counts unless `LLM_BACKEND` has changed since. Not a change, unless the variable takes tiers away from where an operator had them.
        """
        try:
            found = msgspec.convert(kept, PersistedRollout)
        except msgspec.ValidationError:
            return Restored(["the roll-out in the state file cannot be read; the settings count"])
        self.history.extend(found.history)
        variable = self._settings.llm_backend
        if found.llm_backend != variable:
            return self._prefer_variable(found)
        notes = []
        for name, assignment in found.tiers.items():
            reason = (
                self._reason_against(self._settings.tiers[name], assignment)
                if name in self.tiers
                else "there is no such tier any more"
            )
            if reason is None:
                self.tiers[name].assign(assignment)
            else:
                notes.append(f"tier {name} was on {assignment}, but {reason}: the settings count for it")
        if any(self.tiers[tier.name].assignment != Assignment(variable) for tier in self._movable()):
            when = f" at {self.history[-1].at}" if self.history else ""
            notes.insert(
                0,
                f"LLM_BACKEND is {variable}, but the roll-out that was set{when} counts: {self}. Two ways out: `gateway rollback` (leads to "
                f"{self._settings.rollback_to}), or start with an empty GATEWAY_STATE_FILE. Another LLM_BACKEND counts at the next start, too",
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
        note = f"LLM_BACKEND is {variable} and was {found.llm_backend} when the roll-out was last set: the variable counts, every tier that is "
        note += f"not pinned is on {variable}" + (" (`gateway undo` brings back what was set)" if moved else "")
        return Restored([note], is_over=True)

    # Steps

    def _apply(
        self, wanted: Mapping[str, Assignment], by: str, cause: ChangeCause, *, is_rollback: bool = False, why: str = ""
    ) -> Change | None:
        """The one place where tiers move. It never waits."""
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
        now = self._clock()
        at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
        change = Change(at, by, cause, moves, is_rollback, why)
        self.history.append(change)
        for listener in self.listeners:
            listener(change)
        return change

    def _movable(self) -> list[Tier]:
        return [tier for tier in self._settings.tiers.values() if tier.backend is None]

    def _reason_against(self, tier: Tier, assignment: Assignment) -> str | None:
        """Why `tier` cannot be there."""
        if tier.backend is not None:
            return f"it is pinned to {tier.backend}"
        for backend in backends_of(assignment):
            if backend not in tier.models:
                return f"it has no model on {backend}"
        return None

    def _check(self, tier: Tier, assignment: Assignment) -> None:
        if assignment.canary is not None and assignment.canary.backend == assignment.backend:
            raise Conflict(
                f"Tier {tier.name!r} is on {assignment.backend} already; name 'backend', which is to serve the rest. Nothing was changed."
            )
        reason = self._reason_against(tier, assignment)
        if reason is not None:
            raise Conflict(f"Tier {tier.name!r} cannot go there: {reason}. Nothing was changed.", param="tier")

    def _rest(self, tier: Tier, canary: Canary | None) -> str:
        """Who serves what `canary` leaves, where nobody is named."""
        here, back = self.tiers[tier.name].assignment.backend, self._settings.rollback_to
        return back if canary is not None and canary.backend == here else here

    def _unpinned(self, name: str) -> Tier:
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


def backends_of(assignment: Assignment) -> Iterable[str]:
    """All that serve a tier there."""
    yield assignment.backend
    if assignment.canary is not None:
        yield assignment.canary.backend


def _part(assignment: Assignment) -> float:
    return assignment.canary.percent if assignment.canary else 0


def _percent(percent: float) -> float:
    step = 100 / BUCKETS
    if not 0 <= percent <= 100 or abs(percent / step - round(percent / step)) > 1e-6:
        raise InvalidRequest(
            f"'canary.percent' must be a number from 0 to 100, in steps of {step:g}.", param="canary.percent"
        )
    return percent
