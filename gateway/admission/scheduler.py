"""Which request may go upstream now, at which server, and which waits. Synchronous: it decides; waiting happens in `tickets.py`.

Slots. A backend has servers. A request holds, for as long as it runs: a slot of its server; a slot of its model there, or of its tier there
where the tier has a bound of its own; and in a lane that has slots of its own (images on Ollama) one of those. In a lane that is apart
(embeddings) it holds one of the lane's slots there and nothing else. Each is a `Bound`: a limit and a
count. The bounds that one request needs at one server are a `Place`; what needs the same bounds is a `Queue`: one lane of one model,
for all tiers without bounds of their own together, and for each tier with such apart. There are as many queues as the settings make,
however many requests wait.

States. A ticket is (1) new, (2) in line: in exactly one `Line` of its queue and counted once in the queue's `room`, (3) in flight: counted once in
each bound of its place, or (4) gone. Only `Admission` moves it, in these steps, none of which awaits:

  enter    1 → 3 when a place has room, 1 → 2 when none has, 1 → 4 with an error when no server has the model, the line is full, or the
           client's deadline cannot be met. One who finds room overtakes nobody who could run: by I2 there is none.
  leave    2 → 4, or 3 → 4, which frees slots: then `_assign`. Of a ticket that is gone: nothing happens, so it may be called twice.
  _assign  2 → 3, until nobody in line can run. Called after every step that can make room: leave, move, a server that came up or
           has other models (`refresh`), a limit that was changed or learned; and after `take_over`.
  move     3 → 3, at another server.
  take_over  2 → 2 or 3, from the lines of other backends into this one's: the roll-out leads there now. All of them in one step, in the order
           given, behind those who wait here. Their turns begin anew: keys and persons stand in the ring as their first ones came. The
           lines that they leave have no more room to run than before, so there nobody is let in.

Invariants. I1: no bound is exceeded, but by one on trial in a `AdaptiveLimit`, and after a limit was lowered. I2: between two steps nobody is in
line who could run; so a text never stands behind an image that cannot go, nor a model behind another one's busy server. I3: no more wait than
`max_queue`, those aside who wait for nothing but a load, and those that were taken over: they had been let into a line. I4: each ticket ends
once. I5: who left the line is never let in. I6: a ticket in line is in one line of one backend, and only there.

Who is next. All in one queue need the same, so only the heads of queues are asked: the step costs the number of queues, not of requests.
Among the heads that can run: interactive before batch; then the key that has waited for its turn the longest (`turns.py`); keys go on in all
queues of a lane when they are served in one, lanes do not wait for each other. A batch head that was passed over `BATCH_SHARE - 1` times, when it
could have run, goes first: it gets one slot in ten.

A server that is not up gets nothing: who needs it waits until it is, or is told by the relay that the backend is away.

Loads. Where models have to be loaded (Ollama), a place has the `ModelState` of its model there, and takes somebody from the line only while that is
ready; who moves from another server may come before. When somebody waits whom only this keeps back, `Loads.look` sees to the load (`loads.py`):
after each arrival in line, and at the end of `_assign`. So I2 reads: nobody in line could run, and who could run but for a load has that
seen to. A load needs no slot. Time in which the model loads is not counted as waiting, but for the client's own deadline.

Time. What service takes is measured per queue, of those who were served whole. From its median come `Retry-After`, the estimate for those who
wait, and the refusal of deadlines that cannot be met. It is never a reason against one who finds a free slot: a measure that is
out of date would not be renewed.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from gateway.admission.concurrency_limits import CONFIRM_SECONDS, TRY_AGAIN_SECONDS, AdaptiveLimit, ConcurrencyLimit
from gateway.admission.model_residency import ModelState
from gateway.admission.queues import (
    BATCH_SHARE,
    AdmissionLimits,
    Lane,
    LaneName,
    Placement,
    Queue,
    QueueEntry,
    ServerSlots,
    TierLimits,
)
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout

RETRY_SECONDS_UNKNOWN = 5


class WaitEstimate(NamedTuple):
    """What one who waits can be told: the place in line from 1 on, and the seconds until it runs, None: not known."""

    position: int
    seconds: float | None
    is_loading: bool = False
    """The model is being loaded, which comes before."""


class Transfer(NamedTuple):
    """One who is in line at `source`, and the queue of another admission where it is to stand."""

    ticket: QueueEntry
    source: "Admission"
    queue: Queue


class Admission:
    """The slots and the lines of one backend.

    `clock` is monotonic, in seconds; `alarm` calls back after so many seconds; `canonical` makes one of the names that a server takes for a model;
    `on_learned` is called when a learned limit changed.
    """

    def __init__(
        self,
        servers: Sequence[ServerSlots],
        limits: AdmissionLimits,
        clock: Callable[[], float],
        alarm: Callable[[float, Callable[[], None]], object],
        canonical: Callable[[str], str] = lambda name: name,
        on_learned: Callable[[], None] = lambda: None,
    ) -> None:
        self._servers = servers
        self._clock = clock
        self._alarm = alarm
        self._canonical = canonical
        self._limits = limits
        self._lanes = {name: Lane(name, lane) for name, lane in limits.lanes.items()}
        self._queues: dict[tuple[str, LaneName, str, TierLimits | None], Queue] = {}
        self._stamp = 0
        self._queued = 0
        self._on_learned = on_learned
        for server in servers:
            server.slots.limit = limits.slots

    def __repr__(self) -> str:
        lanes = ", ".join(f"{name} {self.running(name)}+{self.waiting(name)}" for name in self._lanes)
        return f"<Admission in flight+waiting: {lanes}; slots {[server.slots for server in self._servers]}>"

    # What there is

    @property
    def lanes(self) -> Sequence[LaneName]:
        return tuple(self._lanes)

    def running(self, lane: LaneName) -> int:
        return sum(queue.running for queue in self._lanes[lane].queues)

    def waiting(self, lane: LaneName) -> int:
        return sum(queue.waiting for queue in self._lanes[lane].queues)

    def queue(self, model: str, lane: LaneName, tier: str = "", own: TierLimits | None = None) -> Queue:
        """Where requests for `model` in `lane` stand; `tier` counts only with limits of its `own`."""
        key = (model, lane, "" if own is None else tier, own)
        found = self._queues.get(key)
        if found is None:
            wanted_lane = self._lanes[lane]
            own = own or TierLimits()
            placements = [
                Placement(
                    server, self._limits_at(server, model, wanted_lane, own), self._state(server, model, wanted_lane)
                )
                for server in self._servers
            ]
            room = wanted_lane.room if own.max_queue is None else ConcurrencyLimit(own.max_queue)
            found = self._queues[key] = Queue(model, wanted_lane, placements, room, own.queue_timeout)
            wanted_lane.queues.append(found)
        return found

    def _state(self, server: ServerSlots, model: str, lane: Lane) -> ModelState | None:
        return (
            None
            if server.residency is None
            else server.residency.state(self._canonical(model), model, lane.limits.is_apart)
        )

    def _limits_at(self, server: ServerSlots, model: str, lane: Lane, own: TierLimits) -> tuple[ConcurrencyLimit, ...]:
        if lane.limits.is_apart:
            return (server.apart.setdefault(lane.name, ConcurrencyLimit(lane.limits.slots or self._limits.slots)),)
        found = [server.slots]
        if own.slots is not None:
            found.append(ConcurrencyLimit(own.slots))
        found.append(self._model_limit(server, model) if own.model_slots is None else ConcurrencyLimit(own.model_slots))
        if own.lane_slots is not None:
            found.append(ConcurrencyLimit(own.lane_slots))
        elif lane.limits.slots is not None:
            found.append(server.lanes.setdefault(lane.name, ConcurrencyLimit(lane.limits.slots)))
        return tuple(found)

    def _model_limit(self, server: ServerSlots, model: str) -> ConcurrencyLimit:
        name = self._canonical(model)
        found = server.models.get(name)
        if found is None:
            limits = self._limits
            limit = server.guesses.get(name, limits.first_guess) if limits.model_slots is None else limits.model_slots
            found = server.models[name] = (
                AdaptiveLimit(limit, limits.model_slots is not None) if limits.can_learn else ConcurrencyLimit(limit)
            )
        return found

    def change(self, limits: AdmissionLimits) -> None:
        """Other limits, for the same lanes; what runs goes on. A tier with other limits of its own gets another queue."""
        self._limits = limits
        for server in self._servers:
            server.slots.limit = limits.slots
            for current in server.models.values():
                if isinstance(current, AdaptiveLimit):
                    current.is_held = limits.model_slots is not None
                current.limit = current.limit if limits.model_slots is None else limits.model_slots
            for name, current in (server.lanes | server.apart).items():
                current.limit = limits.lanes[name].slots or limits.slots
        for name, lane in self._lanes.items():
            lane.limits = limits.lanes[name]
            lane.room.limit = lane.limits.max_queue
        self._admit_next()

    def forget(self, kept: Collection[Queue]) -> None:
        """Let go of what only queues need that are not `kept`, where nobody is in them. What was learned of a model stays as a guess."""
        for key, queue in list(self._queues.items()):
            if queue not in kept and not queue.running and not queue.waiting:
                del self._queues[key]
                queue.lane.queues.remove(queue)
                for placement in queue.placements:
                    if placement.state is not None:
                        placement.state.waiters.remove(queue)
        used = {
            id(limit) for queue in self._queues.values() for placement in queue.placements for limit in placement.limits
        }
        for server in self._servers:
            for name, limit in [item for item in server.models.items() if id(item[1]) not in used]:
                del server.models[name]
                if isinstance(limit, AdaptiveLimit) and not limit.is_held:
                    server.guesses[name] = limit.limit

    # Steps

    def enter(self, ticket: QueueEntry) -> None:
        """Admit `ticket` or put it in line.

        Raises:
            ModelNotFound: no server has the model.
            QueueFull: `max_queue` requests wait already.
            QueueTimeout: the client's deadline cannot be met from this place in line.
        """
        queue = ticket.queue
        placement = self._free_placement(queue)
        if placement is not None:
            self._start(ticket, placement)
            return
        self._refuse_hopeless(ticket)
        self._enqueue(ticket)
        if self._trial_placement(queue) is not None or self._schedule_loads():
            self._admit_next()

    def leave(self, ticket: QueueEntry) -> None:
        """The request is over, or has left the line."""
        if ticket.placement is not None:
            now = self._clock()
            if ticket.is_served:
                ticket.queue.seconds.append(now - ticket.started)
            self._stop(ticket, ticket.placement, now)
            self._admit_next()
        elif ticket.is_queued:
            self._dequeue(ticket)

    def reassign(self, ticket: QueueEntry) -> bool:
        """Give `ticket`, which is in flight, a slot at another server; False when none has room."""
        here = ticket.placement
        assert here is not None
        other = self._free_placement(ticket.queue, besides=here.server)
        if other is None:
            return False
        self._stop(ticket, here, self._clock())
        self._start(ticket, other)
        self._admit_next()
        return True

    def accept_transfers(self, transfers: "Iterable[Transfer]") -> None:
        """Put those who wait for other backends in line here, whatever `max_queue` says; the servers of this one have to serve their models."""
        for ticket, source, queue in transfers:
            source.leave(ticket)
            ticket.queue = queue
            self._enqueue(ticket)
            ticket.transferred()
        self._admit_next()

    def refresh(self) -> None:
        """A server came up or changed its models: see who can run now."""
        self._admit_next()

    def _admit_next(self) -> None:
        while self._queued:
            runnable = [
                (*queue.next_entry(), placement, queue)
                for lane in self._lanes.values()
                for queue in lane.queues
                if queue.interactive.count or queue.batch.count
                if (placement := self._free_placement(queue) or self._trial_placement(queue)) is not None
            ]
            if not runnable:
                if self._schedule_loads():
                    continue
                return
            _, ticket, placement, queue = min(runnable) if len(runnable) > 1 else runnable[0]
            for *_, other in runnable:
                other.passed_over += not ticket.claim.is_batch and other.batch.count > 0
            if ticket.claim.is_batch:
                queue.passed_over = 0
            self._dequeue(ticket)
            self._stamp += 1
            for other in queue.lane.queues:
                other.fair_queue(ticket.claim).served(ticket.claim, self._stamp)
            self._start(ticket, placement)
            ticket.admitted()

    def _enqueue(self, ticket: QueueEntry) -> None:
        queue = ticket.queue
        self._stamp += 1
        ticket.arrival = self._stamp
        ticket.is_queued = True
        self._queued += 1
        queue.fair_queue(ticket.claim).add(ticket, self._stamp)
        queue.room.count += 1

    def _schedule_loads(self) -> bool:
        """Have loaded what is waited for; whether a model became ready by that."""
        looks = [server.residency.schedule() for server in self._servers if server.residency is not None]
        return any(looks)

    def _dequeue(self, ticket: QueueEntry) -> None:
        ticket.is_queued = False
        self._queued -= 1
        ticket.queue.fair_queue(ticket.claim).remove(ticket)
        ticket.queue.room.count -= 1

    def _start(self, ticket: QueueEntry, placement: Placement) -> None:
        ticket.placement = placement
        ticket.started = self._clock()
        ticket.queue.running += 1
        if placement.state is not None:
            placement.state.running += 1
        for limit in placement.limits:
            limit.count += 1
        if placement.adaptive is not None:
            ticket.load_sample = placement.adaptive.began()

    def _stop(self, ticket: QueueEntry, placement: Placement, now: float) -> None:
        ticket.placement = None
        ticket.queue.running -= 1
        if placement.state is not None:
            placement.state.running -= 1
            placement.state.rests_since = now
        for limit in placement.limits:
            limit.count -= 1
        adaptive, part = placement.adaptive, ticket.load_sample
        if adaptive is not None and part is not None:
            ticket.load_sample = None
            before = adaptive.next_try
            if adaptive.ended(part, now):
                self._on_learned()
            if adaptive.next_try > before:
                self._alarm(TRY_AGAIN_SECONDS, self._admit_next)

    def _free_placement(self, queue: Queue, besides: ServerSlots | None = None) -> Placement | None:
        """The least busy server that can take one of `queue` now."""
        best: Placement | None = None
        for placement in queue.placements:
            server = placement.server
            if server is besides or not server.serves(queue.model) or not server.is_up():
                continue
            if placement.state is not None and not placement.state.is_ready and besides is None:
                continue
            for limit in placement.limits:
                if limit.count >= limit.limit:
                    break
            else:
                if best is None or placement.limits[0].count < best.limits[0].count:
                    best = placement
        return best

    def _trial_placement(self, queue: Queue) -> Placement | None:
        """Where one more than is known to be right may be tried."""
        for placement in queue.placements:
            adaptive = placement.adaptive
            if (
                adaptive is None
                or not adaptive.may_try(self._clock())
                or (placement.state is not None and not placement.state.is_ready)
            ):
                continue
            has_room = all(limit is adaptive or not limit.is_full for limit in placement.limits)
            if has_room and placement.server.is_up() and placement.server.serves(queue.model):
                return placement
        return None

    # What is learned

    def first_token(self, ticket: QueueEntry) -> None:
        """The first piece of the answer came."""
        adaptive = ticket.placement.adaptive if ticket.placement is not None else None
        if adaptive is not None and ticket.load_sample is not None and adaptive.first_token(ticket.load_sample):
            self._alarm(CONFIRM_SECONDS, lambda: self._confirm(adaptive))

    def _confirm(self, adaptive: AdaptiveLimit) -> None:
        if adaptive.confirm():
            self._on_learned()
            self._admit_next()

    # Time

    def now(self) -> float:
        return self._clock()

    def retry_after(self, queue: Queue) -> int:
        """Whole seconds, 1 to 60: the line's length times the median service time, spread so that clients do not come back at once."""
        seconds = queue.estimated_wait(queue.waiting)
        if seconds is None:
            return RETRY_SECONDS_UNKNOWN
        return min(60, max(1, math.ceil(seconds * random.uniform(0.8, 1.2))))

    def wait_estimate(self, ticket: QueueEntry) -> WaitEstimate:
        """Of a ticket that is in line."""
        ahead = ticket.queue.position_of(ticket, self._clock())
        return WaitEstimate(ahead + 1, ticket.queue.estimated_wait(ahead), ticket.queue.is_loading)

    def _refuse_hopeless(self, ticket: QueueEntry) -> None:
        queue, claim = ticket.queue, ticket.claim
        if not any(placement.server.serves(queue.model) for placement in queue.placements):
            raise ModelNotFound("The model behind this name is not present on its backend.", param="model")
        if queue.room.is_full and not queue.has_slot_but_no_model():
            raise QueueFull(
                "The gateway's queue for this backend is full. Try again later.", retry_after=self.retry_after(queue)
            )
        service = None if claim.timeout is None else queue.service_seconds()
        if service is None or claim.timeout is None:
            return
        ahead = queue.fair_queue(claim).count_ahead_of_new(claim.key)
        if claim.is_batch:
            ahead += min(queue.interactive.count, (BATCH_SHARE - 1) * (ahead + 1))
        if service * (queue.rounds(ahead) + 1) > claim.timeout:
            raise QueueTimeout(
                f"The line is too long for an answer within {claim.timeout:g} seconds. Try again later, or allow more time.",
                retry_after=self.retry_after(queue),
            )
