"""Servers as admission sees them: their limits, and what has to hold before one gets a request.

Pure.
"""

from abc import ABC, abstractmethod

from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import LaneName
from gateway.admission.model_residency import ModelResidency
from gateway.admission.model_state import ModelState
from gateway.admission.prefix_cache import PrefixCache


class Gate:
    """Gate before the requests of one model in one lane on one server. This one is always open.

    `upstream/outlier_detection.py` has one that closes when too many of these requests fail.
    """

    __slots__ = ("restrains",)

    def __init__(self) -> None:
        self.restrains = False
        """True if `allows` has to be asked. Otherwise every request is allowed."""

    def allows(self) -> bool:
        """Return whether the server may get one more of these requests, apart from its slots."""
        return True

    def accepts(self) -> bool:
        """Return whether it may get one that a fallback could serve as well."""
        return True

    def begin_trial(self) -> bool:
        """Return whether the request that begins while the gate restrains is on trial."""
        return False

    def end_trial(self, began: float) -> None:
        """Record that a request on trial, which began at the time `began`, has ended or gone elsewhere."""

    def succeed(self, claim: Claim, size: int, seconds: float | None, is_trial: bool) -> None:
        """Record a whole answer to a request of `size` bytes.

        Its first token took `seconds`, or None if the answer was not streamed.
        """

    def begin_answer(self) -> None:
        """Record the first token of an answer. Required only while `restrains` is true."""

    def fail(self, reason: str, sent: float, claim: Claim, is_trial: bool) -> None:
        """Record the failure of a request that was sent at the time `sent`."""


class ServerSlots(ABC):
    """A server as admission sees it: what runs there, and what could run."""

    __slots__ = ("guesses", "lanes", "models", "place", "prefixes", "residency", "separate_lanes", "slots")

    def __init__(self) -> None:
        self.place = ""
        """Address, by which all replicas of the gateway know the server."""
        self.slots = ConcurrencyLimit(0)
        self.models: dict[str, ConcurrencyLimit] = {}
        """Model limits by canonical name."""
        self.lanes: dict[LaneName, ConcurrencyLimit] = {}
        """Limits of the lanes that are restricted to some of the server's slots."""
        self.separate_lanes: dict[LaneName, ConcurrencyLimit] = {}
        """Limits of the lanes with separate slots."""
        self.guesses: dict[str, int] = {}
        """Model limits learned earlier, by canonical name."""
        self.residency: ModelResidency | None = None
        """Loaded models, or None if the server does not have to load models."""
        self.prefixes = PrefixCache()

    @property
    def running(self) -> int:
        """Number of requests in the server's shared slots."""
        return self.slots.count

    @property
    def load(self) -> int:
        """Number of requests on the server, including those in separate lanes."""
        return self.slots.count + sum(limit.count for limit in self.separate_lanes.values())

    def lane_limit(self, lane: LaneName) -> ConcurrencyLimit:
        """Return the limit that all requests of `lane` share on this server."""
        return self.separate_lanes.get(lane) or self.lanes.get(lane) or self.slots

    @abstractmethod
    def serves(self, model: str) -> bool:
        """Return whether the server has `model`, given by the name that it uses there."""

    @abstractmethod
    def is_up(self) -> bool:
        """Return whether the server may get one more request, apart from its slots.

        Called before each request.
        """

    def gate(self, model: str, lane: LaneName) -> Gate:
        """Return the gate before requests of `lane` for `model`."""
        return Gate()


class Placement:
    """A server, and the limits, the gate and the model state that one queue's requests need there.

    `state` is None if the server does not have to load models.
    """

    __slots__ = ("adaptive", "gate", "limits", "server", "state")

    def __init__(
        self, server: ServerSlots, limits: tuple[ConcurrencyLimit, ...], gate: Gate, state: ModelState | None = None
    ) -> None:
        self.server = server
        self.limits = limits
        self.gate = gate
        self.state = state
        self.adaptive = next((limit for limit in limits if isinstance(limit, AdaptiveLimit)), None)

    @property
    def busyness(self) -> tuple[int, int]:
        """Sort key: requests in flight at the server, and the number of the last request that it got."""
        return self.limits[0].count, self.server.prefixes.turn
