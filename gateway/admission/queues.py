"""What admission decides over: servers with their bounds, the queues before them, and the requests in these. Pure; the steps are `admission.py`'s."""

import math
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit, LoadSample
from gateway.admission.fair_queue import Claim, FairQueue
from gateway.admission.model_residency import ModelResidency, ModelState
from gateway.errors import GatewayError

LaneName = str
"""`text`, `vision`, or another that the backend was given."""

SERVICE_SAMPLES = 64
BATCH_SHARE = 10
"""One slot in so many is for batch, while some of it waits."""
CENSUS_SECONDS = 1.0
"""How old a place in line may be that is told to who waits there."""

LOADING_SECONDS = 0.25
"""How often one looks who waits for a load and has no time left besides."""


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """`slots` at each server, None: no fewer than the server has; at most `max_queue` waiting, none for longer than `queue_timeout` seconds."""

    slots: int | None
    max_queue: int
    queue_timeout: float
    is_apart: bool = False
    """Its `slots` are besides the server's and the models': they do not count together."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Of a backend: `slots` at each server, of them `model_slots` for each model; None: learned, beginning with `first_guess`, which `can_learn`
    has to allow."""

    slots: int
    model_slots: int | None
    lanes: Mapping[LaneName, LaneLimits]
    can_learn: bool = False
    first_guess: int = 1


@dataclass(frozen=True, slots=True)
class TierLimits:
    """What a tier bounds for its own requests, None: nothing. `slots` come on top of the server's own, the others in place of the shared ones."""

    slots: int | None = None
    model_slots: int | None = None
    lane_slots: int | None = None
    max_queue: int | None = None
    queue_timeout: float | None = None


class ServerSlots(ABC):
    """A server as admission sees it: what runs there, and what could."""

    __slots__ = ("apart", "guesses", "lanes", "models", "residency", "slots")

    def __init__(self) -> None:
        self.slots = ConcurrencyLimit(0)
        self.models: dict[str, ConcurrencyLimit] = {}
        """By the model's canonical name."""
        self.lanes: dict[LaneName, ConcurrencyLimit] = {}
        """Of those that have some of the slots."""
        self.apart: dict[LaneName, ConcurrencyLimit] = {}
        """Of those that have slots besides."""
        self.guesses: dict[str, int] = {}
        """What was learned of models before this start, by canonical name."""
        self.residency: ModelResidency | None = None
        """What it has loaded; None: nothing has to be."""

    @property
    def running(self) -> int:
        """In the slots that all share."""
        return self.slots.count

    @property
    def load(self) -> int:
        """All that runs there."""
        return self.slots.count + sum(limit.count for limit in self.apart.values())

    def lane_limit(self, lane: LaneName) -> ConcurrencyLimit:
        """What all in `lane` have at this server together."""
        return self.apart.get(lane) or self.lanes.get(lane) or self.slots

    @abstractmethod
    def serves(self, model: str) -> bool:
        """Whether `model`, by its name there, is to be had here."""

    @abstractmethod
    def is_up(self) -> bool:
        """Whether it may be given one request more, its slots aside; asked before each."""


class Placement:
    """A server, and what one kind of request needs there: bounds, and the model where that has to be loaded."""

    __slots__ = ("adaptive", "limits", "server", "state")

    def __init__(
        self, server: ServerSlots, limits: tuple[ConcurrencyLimit, ...], state: ModelState | None = None
    ) -> None:
        self.server = server
        self.limits = limits
        self.state = state
        self.adaptive = next((limit for limit in limits if isinstance(limit, AdaptiveLimit)), None)


class QueueEntry:
    """One request, as the state machine knows it: new, in line, in flight or gone."""

    __slots__ = ("arrival", "claim", "is_queued", "is_served", "load_sample", "placement", "queue", "started")

    arrival: int
    started: float

    def __init__(self, queue: "Queue", claim: Claim) -> None:
        self.queue = queue
        self.claim = claim
        self.is_queued = False
        self.placement: Placement | None = None
        self.load_sample: LoadSample | None = None
        """In a learned limit."""
        self.is_served = False
        """The answer came whole: only then does its time tell how long service takes."""

    def admitted(self) -> None:
        """It was in line, and has a place now."""

    def transferred(self) -> None:
        """It is in the line of another backend now."""

    def refuse(self, error: GatewayError) -> None:
        """End its wait in line with `error`."""


class Queue:
    """Requests that need the same: who of them waits, how many run, how long service took of late."""

    __slots__ = (
        "_census",
        "_own_timeout",
        "batch",
        "interactive",
        "lane",
        "model",
        "passed_over",
        "placements",
        "room",
        "running",
        "seconds",
    )

    def __init__(
        self, model: str, lane: "Lane", placements: list[Placement], room: ConcurrencyLimit, own_timeout: float | None
    ) -> None:
        self.model = model
        self.lane = lane
        self.placements = placements
        self.room = room
        self._own_timeout = own_timeout
        self.interactive: FairQueue[QueueEntry] = FairQueue()
        self.batch: FairQueue[QueueEntry] = FairQueue()
        self.passed_over = 0
        """How often the batch that waits has seen another take a slot that it could have had."""
        self.running = 0
        self.seconds: deque[float] = deque(maxlen=SERVICE_SAMPLES)
        self._census: tuple[float, dict[QueueEntry, int]] = (-math.inf, {})
        for placement in placements:
            if placement.state is not None:
                placement.state.waiters.append(self)

    def __repr__(self) -> str:
        return f"<Queue {self.model} {self.lane.name} {self.running} in flight, {self.waiting} waiting>"

    @property
    def waiting(self) -> int:
        return self.interactive.count + self.batch.count

    @property
    def queue_timeout(self) -> float:
        return self.lane.limits.queue_timeout if self._own_timeout is None else self._own_timeout

    def wants(self, state: ModelState) -> bool:
        """Somebody waits who would be better off if `state` was loaded: none other is being, and none that is has this one as its equal."""
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
        """Another server has the model, or could load it and has not failed."""
        others = [
            placement
            for placement in self.placements
            if placement.state is not state and placement.server.serves(self.model) and placement.server.is_up()
        ]
        return any(placement.state is None or not placement.state.has_failed for placement in others)

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        """End the wait of all who are in line."""
        for ticket in [*self.interactive.in_order(), *self.batch.in_order()]:
            ticket.refuse(error())

    def has_slot_but_no_model(self) -> bool:
        """One more could run, beside those who wait here, if the model was loaded."""
        return any(
            placement.state is not None and not placement.state.is_ready and placement.server.serves(self.model) and placement.server.is_up()
            and min(limit.limit - limit.count for limit in placement.limits) > self.waiting
            for placement in self.placements
        )  # fmt: skip

    @property
    def is_loading(self) -> bool:
        """The model is, somewhere."""
        return any(placement.state is not None and placement.state.is_loading for placement in self.placements)

    def load_seconds(self, now: float) -> float:
        """How long the model has been loading, in all."""
        return sum(placement.state.load_seconds(now) for placement in self.placements if placement.state is not None)

    def time_left(self, waited: float, loading: float) -> float:
        """Of the longest wait, for one who `waited` so long, in which the model was `loading` so long; while it still is, some time is left."""
        return max(self.queue_timeout - (waited - loading), LOADING_SECONDS if self.is_loading else 0.0)

    def fair_queue(self, claim: Claim) -> "FairQueue[QueueEntry]":
        return self.batch if claim.is_batch else self.interactive

    def next_entry(self) -> "tuple[tuple[int, int, int], QueueEntry]":
        """Who is next here, and what he is worth beside those of other queues: the least goes first."""
        if not self.batch.count:
            level, line = 1, self.interactive
        elif self.passed_over >= BATCH_SHARE - 1:
            level, line = 0, self.batch
        else:
            level, line = (1, self.interactive) if self.interactive.count else (2, self.batch)
        stamp, ticket = line.head()
        return (level, stamp, ticket.arrival), ticket

    def position_of(self, ticket: "QueueEntry", now: float) -> int:
        """From 0 on. All places are counted at once, and kept for a second: who asks are many."""
        if now - self._census[0] > CENSUS_SECONDS or ticket not in self._census[1]:
            placements = {waiter: number for number, waiter in enumerate(self.interactive.in_order())}
            others = len(placements)
            for number, waiter in enumerate(self.batch.in_order()):
                placements[waiter] = number + min(others, (BATCH_SHARE - 1) * (number + 1))
            self._census = now, placements
        return self._census[1][ticket]

    def service_seconds(self) -> float | None:
        """The median service time in seconds: of this queue, else of its lane; None without a measure."""
        samples = self.seconds or [seconds for queue in self.lane.queues for seconds in queue.seconds]
        return statistics.median(samples) if samples else None

    def rounds(self, ahead: int) -> float:
        """How often service has to take its time until so many `ahead` are through: by the slots of this queue, and by those of the lane."""
        placements = [placement for placement in self.placements if placement.server.serves(self.model)]
        own = sum(min(limit.limit for limit in placement.limits) for placement in placements)
        in_lane = sum(placement.server.lane_limit(self.lane.name).limit for placement in placements)
        crowd = ahead * self.lane.waiting / self.waiting if self.waiting else ahead
        return max(ahead / max(1, own), crowd / max(1, in_lane))

    def estimated_wait(self, ahead: int) -> float | None:
        """Seconds until one with so many `ahead` of it has a slot, should each take the median; None without a measure."""
        service = self.service_seconds()
        return None if service is None else service * self.rounds(ahead + 1)


class Lane:
    """The queues of one lane, and the room for all who wait in them."""

    def __init__(self, name: LaneName, limits: LaneLimits) -> None:
        self.name = name
        self.limits = limits
        self.room = ConcurrencyLimit(limits.max_queue)
        self.queues: list[Queue] = []

    @property
    def waiting(self) -> int:
        return sum(queue.waiting for queue in self.queues)
