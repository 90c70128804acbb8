"""Queues of admission, and the requests in them.

Pure. The steps that change this data are in `scheduler.py`.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable

from gateway.admission.closure import Closure
from gateway.admission.concurrency_limits import ConcurrencyLimit, LoadSample
from gateway.admission.fair_queue import Claim, FairQueue
from gateway.admission.limits import LaneLimits, LaneName
from gateway.admission.model_state import ModelState
from gateway.admission.server_slots import Placement, ServerSlots
from gateway.chat.prompt_blocks import PromptBlocks
from gateway.errors import GatewayError

SERVICE_SAMPLES = 64
BATCH_SHARE = 10
"""Batch requests get one in this many slots while any of them wait."""
POSITION_AGE_SECONDS = 1.0
"""Maximum age of a queue position that is reported to a waiting client."""

LOADING_CHECK_SECONDS = 0.25
"""Interval of timeout checks once a request has used up its wait while its model loads."""


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
