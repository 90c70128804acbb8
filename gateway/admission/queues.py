"""Data of admission: servers with their limits, queues, and the requests in them.

Pure. The steps that change this data are in `scheduler.py`.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from gateway.admission.closure import Closure
from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit, LoadSample
from gateway.admission.fair_queue import Claim, FairQueue
from gateway.admission.model_residency import ModelResidency
from gateway.admission.model_state import ModelState
from gateway.admission.prefix_cache import PrefixCache
from gateway.chat.prompt_blocks import PromptBlocks
from gateway.errors import GatewayError

LaneName = str
"""Lane: `text`, `vision`, or another one that the backend is given."""

SERVICE_SAMPLES = 64
BATCH_SHARE = 10
"""Batch requests get one in this many slots while any of them wait."""
POSITION_AGE_SECONDS = 1.0
"""Maximum age of a queue position that is reported to a waiting client."""

LOADING_CHECK_SECONDS = 0.25
"""Interval of timeout checks once a request has used up its wait while its model loads."""


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


class QueueEntry:
    """One request as the state machine sees it: new, queued, in flight or gone."""

    __slots__ = (
        "arrival",
        "claim",
        "is_queued",
        "is_served",
        "is_trial",
        "load_sample",
        "placement",
        "prefill",
        "prompt",
        "queue",
        "started",
    )

    arrival: int
    started: float

    def __init__(self, queue: "Queue", claim: Claim) -> None:
        self.queue = queue
        self.claim = claim
        self.is_queued = False
        self.placement: Placement | None = None
        self.load_sample: LoadSample | None = None
        """The request's state in an adaptive limit."""
        self.is_served = False
        """True if the whole answer arrived. Only then does its duration count as a service time."""
        self.is_trial = False
        """True while the request is the one that an ejected server gets on trial."""
        self.prompt: PromptBlocks | None = None
        """The prompt, if it matters which server gets it (`affinity.py`)."""
        self.prefill = 0
        """Characters of the prompt that the server has yet to compute before the first token."""

    def admitted(self) -> None:
        """React to leaving the queue with a slot."""

    def transferred(self) -> None:
        """React to being moved to a queue of another backend."""

    def refuse(self, error: GatewayError) -> None:
        """End the wait in the queue with `error`."""


class Queue:
    """Requests that need the same limits: the waiting ones, and how many run and for how long."""

    __slots__ = (
        "_own_timeout",
        "_positions",
        "batch",
        "closure",
        "interactive",
        "lane",
        "model",
        "passed_over",
        "placements",
        "room",
        "running",
        "service_times",
    )

    def __init__(
        self,
        model: str,
        lane: "Lane",
        placements: list[Placement],
        room: ConcurrencyLimit,
        own_timeout: float | None,
        closure: Closure | None = None,
    ) -> None:
        self.model = model
        self.lane = lane
        self.placements: list[Placement] = []
        self.room = room
        self._own_timeout = own_timeout
        self.closure = closure or Closure()
        """Time in which the backend admits nothing."""
        self.interactive: FairQueue[QueueEntry] = FairQueue()
        self.batch: FairQueue[QueueEntry] = FairQueue()
        self.passed_over = 0
        """Number of slots in a row that batch requests could have used and others got."""
        self.running = 0
        self.service_times: deque[float] = deque(maxlen=SERVICE_SAMPLES)
        self._positions: tuple[float, dict[QueueEntry, int]] = (-math.inf, {})
        self.add(placements)

    def __repr__(self) -> str:
        return f"<Queue {self.model} {self.lane.name} {self.running} in flight, {self.waiting} waiting>"

    def add(self, placements: Iterable[Placement]) -> None:
        """Let requests run at further servers."""
        for placement in placements:
            self.placements.append(placement)
            if placement.state is not None:
                placement.state.waiters.append(self)

    def drop(self, servers: Collection[ServerSlots]) -> None:
        """Let no request run at `servers` any more."""
        for placement in self.placements:
            if placement.server in servers and placement.state is not None:
                placement.state.waiters.remove(self)
        self.placements = [placement for placement in self.placements if placement.server not in servers]

    @property
    def waiting(self) -> int:
        return self.interactive.count + self.batch.count

    @property
    def queue_timeout(self) -> float:
        return self.lane.limits.queue_timeout if self._own_timeout is None else self._own_timeout

    def wants(self, state: ModelState) -> bool:
        """Return whether loading `state` would let a waiting request start sooner.

        It would not if the last load of `state` failed, if another server is loading the model
        already, or if the model is ready elsewhere and the limits at `state` have no room.
        """
        if not self.waiting or state.has_failed:
            return False
        has_room, is_served = False, False
        for placement in self.placements:
            if placement.state is state:
                has_room = not any(limit.is_full for limit in placement.limits)
            elif placement.server.serves(self.model) and placement.server.is_up():
                if placement.state is not None and placement.state.is_loading:
                    return False
                is_served |= placement.state is None or placement.state.is_ready
        return has_room or not is_served

    def may_try_elsewhere(self, state: ModelState) -> bool:
        """Return whether another server has the model, or could load it and has not failed."""
        others = [
            placement
            for placement in self.placements
            if placement.state is not state and placement.server.serves(self.model) and placement.server.is_up()
        ]
        return any(placement.state is None or not placement.state.has_failed for placement in others)

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        """End the wait of all queued requests with an error."""
        for ticket in [*self.interactive.in_order(), *self.batch.in_order()]:
            ticket.refuse(error())

    def has_slot_but_no_model(self) -> bool:
        """Return whether one more request than those queued could run if the model were loaded.

        While the backend is closed, no model is.
        """
        is_closed = self.closure.is_closed
        return any(
            (is_closed or (placement.state is not None and not placement.state.is_ready and placement.server.is_up()))
            and placement.server.serves(self.model)
            and min(limit.limit - limit.count for limit in placement.limits) > self.waiting
            for placement in self.placements
        )

    def expects_slot(self) -> bool:
        """Return whether one more request than those queued could run with what other replicas are to give back."""
        return any(
            placement.server.serves(self.model)
            and placement.server.is_up()
            and any(limit.is_full for limit in placement.limits)
            and min(limit.entitlement - limit.count for limit in placement.limits) > self.waiting
            for placement in self.placements
        )

    @property
    def is_loading(self) -> bool:
        """True if any server is loading the model."""
        return any(placement.state is not None and placement.state.is_loading for placement in self.placements)

    def load_seconds(self, now: float) -> float:
        """Return how long the model has been loading, over all servers, and the backend closed, in total."""
        loading = (placement.state.load_seconds(now) for placement in self.placements if placement.state is not None)
        return sum(loading) + self.closure.seconds(now)

    def time_left(self, waited: float, loading: float) -> float:
        """Return the rest of the queue timeout for a request that has `waited` this many seconds.

        The model was `loading`, or the backend closed, for part of that time, which does not count.
        As long as this lasts, the result is at least `LOADING_CHECK_SECONDS`.
        """
        is_held_up = self.is_loading or self.closure.is_closed
        return max(self.queue_timeout - (waited - loading), LOADING_CHECK_SECONDS if is_held_up else 0.0)

    def fair_queue(self, claim: Claim) -> "FairQueue[QueueEntry]":
        return self.batch if claim.is_batch else self.interactive

    def next_entry(self) -> "tuple[tuple[int, int, int], QueueEntry]":
        """Return the sort key and the head of this queue.

        The head with the smallest sort key of all queues runs next.
        """
        if not self.batch.count:
            level, queue = 1, self.interactive
        elif self.passed_over >= BATCH_SHARE - 1:
            level, queue = 0, self.batch
        else:
            level, queue = (1, self.interactive) if self.interactive.count else (2, self.batch)
        stamp, ticket = queue.head()
        return (level, stamp, ticket.arrival), ticket

    def position_of(self, ticket: "QueueEntry", now: float) -> int:
        """Return the position of `ticket` in the queue, starting at 0.

        All positions are computed at once and cached for `POSITION_AGE_SECONDS`, because many requests
        ask for theirs.
        """
        if now - self._positions[0] > POSITION_AGE_SECONDS or ticket not in self._positions[1]:
            positions = {entry: number for number, entry in enumerate(self.interactive.in_order())}
            others = len(positions)
            for number, entry in enumerate(self.batch.in_order()):
                positions[entry] = number + min(others, (BATCH_SHARE - 1) * (number + 1))
            self._positions = now, positions
        return self._positions[1][ticket]

    def service_seconds(self) -> float | None:
        """Return the median service time in seconds, of this queue or else of its lane.

        Return None if no service time is known.
        """
        samples = self.service_times or [seconds for queue in self.lane.queues for seconds in queue.service_times]
        return statistics.median(samples) if samples else None

    def rounds(self, ahead: int) -> float:
        """Return the number of service times that pass until `ahead` requests have been served.

        The larger of two estimates counts: by the slots of this queue, and by those of the whole
        lane.
        """
        placements = [placement for placement in self.placements if placement.server.serves(self.model)]
        own = sum(min(limit.limit for limit in placement.limits) for placement in placements)
        in_lane = sum(placement.server.lane_limit(self.lane.name).limit for placement in placements)
        ahead_in_lane = ahead * self.lane.waiting / self.waiting if self.waiting else ahead
        return max(ahead / max(1, own), ahead_in_lane / max(1, in_lane))

    def estimated_wait(self, ahead: int) -> float | None:
        """Estimate the seconds until a request with `ahead` others before it gets a slot.

        Each request is taken to need the median service time. Return None if none is known.
        """
        service = self.service_seconds()
        return None if service is None else service * self.rounds(ahead + 1)


class Lane:
    """The queues of one lane, and the number of requests that may wait in them."""

    def __init__(self, name: LaneName, limits: LaneLimits) -> None:
        self.name = name
        self.limits = limits
        self.room = ConcurrencyLimit(limits.max_queue)
        self.queues: list[Queue] = []

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self.queues)
