"""Limits of admission as the settings and tiers give them, and where the counted ones come from.

Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit

LaneName = str
"""Lane: `text`, `vision`, or another one that the backend is given."""


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """Limits of a lane: `slots` on each server, queued requests, and seconds in the queue.

    `slots` is None if the lane may use all slots of a server.
    """

    slots: int | None
    max_queue: int
    queue_timeout: float
    is_separate: bool = False
    """True if `slots` are separate: they do not count toward the server or its models."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Limits of a backend: `slots` on each server, and `model_slots` of them for each model.

    If `model_slots` is None, the limit is learned, starting at `first_guess`. This requires
    `can_learn`.
    """

    slots: int
    model_slots: int | None
    lanes: Mapping[LaneName, LaneLimits]
    can_learn: bool = False
    first_guess: int = 1


@dataclass(frozen=True, slots=True)
class TierLimits:
    """Limits that a tier sets for its own requests. None means that the tier sets no such limit.

    `slots` applies in addition to the server's slots. The others replace the shared limits.
    """

    slots: int | None = None
    model_slots: int | None = None
    lane_slots: int | None = None
    max_queue: int | None = None
    queue_timeout: float | None = None


class LimitSource:
    """Source of the limits of one backend. This one makes limits of this replica alone.

    `place` is the server's address, and `name` that of the limit there.
    """

    def fixed(self, place: str, name: str, slots: int) -> ConcurrencyLimit:
        """Return a limit that is set by the operator."""
        return ConcurrencyLimit(slots)

    def adaptive(self, place: str, name: str, slots: int, is_held: bool) -> ConcurrencyLimit:
        """Return a limit that is learned, from `slots` on."""
        return AdaptiveLimit(slots, is_held)

    def queued(self) -> None:
        """Record that a request was queued, or that queued requests still cannot run after something changed."""

    def dropped(self) -> None:
        """Record that servers or queues were dropped, whose limits may not be needed any more."""
