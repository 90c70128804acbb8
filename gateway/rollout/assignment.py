"""The values of the roll-out: assignments of tiers to backends, and what changes them.

Pure: no I/O, no clock.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gateway.config import Tier
from gateway.relay.route import Route

BUCKETS = 10_000
"""Buckets that conversations are hashed into: a percentage has this many steps."""

ChangeCause = Literal["operator", "guard", "start", "reload", "exclusive"]
"""Cause of a change; `exclusive`: an engine did not get the GPU."""
Percent = Annotated[int, Meta(ge=0, le=100)] | Annotated[float, Meta(ge=0, le=100)]


class Canary(Struct, frozen=True):
    """The backend that gets `percent` of a tier's conversations."""

    backend: str
    percent: Percent


class Assignment(Struct, frozen=True):
    """The backends that serve a tier: `backend`, except for the share that the canary gets."""

    backend: str
    canary: Canary | None = None

    def __str__(self) -> str:
        return (
            self.backend
            if self.canary is None
            else f"{self.backend} with {self.canary.percent:g} % on {self.canary.backend}"
        )


class Move(Struct, frozen=True, rename={"before": "from", "after": "to"}):
    """The effect of a change on one tier."""

    before: Assignment
    after: Assignment

    @property
    def ends(self) -> tuple[str, str]:
        """The backend that lost part of the tier, and the one that gained it."""
        old, new = self.before, self.after
        if old.backend != new.backend:
            return old.backend, new.backend
        share_before, share_after = _canary_percent(old), _canary_percent(new)
        if old.canary and new.canary and old.canary.backend != new.canary.backend:
            return old.canary.backend, new.canary.backend
        other = (new.canary or old.canary or Canary(new.backend, 0)).backend
        return (new.backend, other) if share_after > share_before else (other, new.backend)


class Change(Struct, frozen=True, omit_defaults=True):
    """One entry of the history.

    `at` is in UTC. `by` is the id of the key that asked for the change, `local` if no key was
    needed, and empty for the gateway itself. `why` is the guard's finding, in words. Where replicas
    share the roll-out, `replica` took the order, and `number` is its place among all orders.
    """

    at: str
    by: str
    cause: ChangeCause
    tiers: dict[str, Move]
    is_rollback: bool = False
    why: str = ""
    replica: str = ""
    number: int = 0

    @property
    def stamp(self) -> tuple[int, str]:
        return self.number, self.replica

    def __str__(self) -> str:
        return ", ".join(f"{name} from {move.before} to {move.after}" for name, move in self.tiers.items())


class ForAll(Struct, frozen=True):
    """An order for all tiers. Without `backend`, each tier stays on its backend."""

    backend: str | None
    canary: Canary | None = None
    is_rollback: bool = False


class PersistedRollout(Struct, frozen=True, omit_defaults=True):
    """The roll-out in the state file. `llm_backend` is the setting at the time of writing.

    `shared` is the state that replicas share, as `shared_state.py` encodes it.
    """

    llm_backend: str
    tiers: dict[str, Assignment]
    history: list[Change]
    shared: Any = None


class RolloutResult(Struct, frozen=True):
    """The result of an order. `unmoved` names the tiers that could not follow, with the reason."""

    change: Change | None
    unmoved: dict[str, str] = {}


class Restored(Struct, frozen=True):
    """The result of restoring an earlier run's roll-out. `notes` are sentences for the log.

    `is_over` is true if the persisted roll-out does not count any longer and must not come back.
    """

    notes: list[str]
    is_over: bool = False


class TierRoute:
    """One tier as requests see it.

    `requests` and `canary_requests` count since the assignment last changed, while there is a
    canary.
    """

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
        """Return the route of a conversation in `bucket`, and count the request.

        Without a canary, `route` is the same at no cost.
        """
        self.requests += 1
        if bucket >= self._canary_buckets:
            return self.route
        self.canary_requests += 1
        return self._canary_route

    def side(self, bucket: int) -> Route:
        """Return the same as `choose`, for a request that has already been counted."""
        return self.route if bucket >= self._canary_buckets else self._canary_route

    def _route(self, backend: str) -> Route:
        return Route(self._tier.name, backend, self._tier.models[backend])


def backends_of(assignment: Assignment) -> Iterable[str]:
    """Yield all backends that serve a tier with `assignment`."""
    yield assignment.backend
    if assignment.canary is not None:
        yield assignment.canary.backend


def _canary_percent(assignment: Assignment) -> float:
    return assignment.canary.percent if assignment.canary else 0
