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

Invariants. I1: no bound is exceeded, but by one on trial in a `LearnedBound`, and after a limit was lowered. I2: between two steps nobody is in
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

from gateway.admission.concurrency_limits import CONFIRM_SECONDS, TRY_AGAIN_SECONDS, Bound, LearnedBound
from gateway.admission.model_residency import ModelState
from gateway.admission.queues import BATCH_SHARE, Entry, Lane, Limits, OwnLimits, Place, Queue, SharedLane, Station
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout

RETRY_SECONDS_UNKNOWN = 5


class Outlook(NamedTuple):
    """What one who waits can be told: the place in line from 1 on, and the seconds until it runs, None: not known."""

    place: int
    seconds: float | None
    is_loading: bool = False
    """The model is being loaded, which comes before."""


class Mover(NamedTuple):
    """One who is in line at `source`, and the queue of another admission where it is to stand."""

    ticket: Entry
    source: "Admission"
    queue: Queue


class Admission:
    """The slots and the lines of one backend.

    `clock` is monotonic, in seconds; `alarm` calls back after so many seconds; `canonical` makes one of the names that a server takes for a model;
    `on_learned` is called when a learned limit changed.
    """

    def __init__(
        self,
        stations: Sequence[Station],
        limits: Limits,
        clock: Callable[[], float],
        alarm: Callable[[float, Callable[[], None]], object],
        canonical: Callable[[str], str] = lambda name: name,
    ) -> None:
        self._stations = stations
        self._clock = clock
        self._alarm = alarm
        self._canonical = canonical
        self._limits = limits
        self._lanes = {name: SharedLane(name, lane) for name, lane in limits.lanes.items()}
        self._queues: dict[tuple[str, Lane, str, OwnLimits | None], Queue] = {}
        self._stamp = 0
        self._in_line = 0
        self.on_learned: Callable[[], None] = lambda: None
        for station in stations:
            station.slots.limit = limits.slots

    def __repr__(self) -> str:
        lanes = ", ".join(f"{name} {self.running(name)}+{self.waiting(name)}" for name in self._lanes)
        return f"<Admission in flight+waiting: {lanes}; slots {[station.slots for station in self._stations]}>"

    # What there is

    @property
    def lanes(self) -> Sequence[Lane]:
        return tuple(self._lanes)

    def running(self, lane: Lane) -> int:
        return sum(queue.running for queue in self._lanes[lane].queues)

    def waiting(self, lane: Lane) -> int:
        return sum(queue.waiting for queue in self._lanes[lane].queues)

    def queue(self, model: str, lane: Lane, tier: str = "", own: OwnLimits | None = None) -> Queue:
        """Where requests for `model` in `lane` stand; `tier` counts only with limits of its `own`."""
        key = (model, lane, "" if own is None else tier, own)
        found = self._queues.get(key)
        if found is None:
            shared = self._lanes[lane]
            own = own or OwnLimits()
            places = [Place(station, self._bounds(station, model, shared, own), self._state(station, model, shared)) for station in self._stations]
            room = shared.room if own.max_queue is None else Bound(own.max_queue)
            found = self._queues[key] = Queue(model, shared, places, room, own.queue_timeout)
            shared.queues.append(found)
        return found

    def _state(self, station: Station, model: str, lane: SharedLane) -> ModelState | None:
        return None if station.loads is None else station.loads.state(self._canonical(model), model, lane.limits.is_apart)

    def _bounds(self, station: Station, model: str, lane: SharedLane, own: OwnLimits) -> tuple[Bound, ...]:
        if lane.limits.is_apart:
            return (station.apart.setdefault(lane.name, Bound(lane.limits.slots or self._limits.slots)),)
        bounds = [station.slots]
        if own.slots is not None:
            bounds.append(Bound(own.slots))
        bounds.append(self._model_bound(station, model) if own.model_slots is None else Bound(own.model_slots))
        if own.lane_slots is not None:
            bounds.append(Bound(own.lane_slots))
        elif lane.limits.slots is not None:
            bounds.append(station.lanes.setdefault(lane.name, Bound(lane.limits.slots)))
        return tuple(bounds)

    def _model_bound(self, station: Station, model: str) -> Bound:
        name = self._canonical(model)
        found = station.models.get(name)
        if found is None:
            limits = self._limits
            limit = station.guesses.get(name, limits.first_guess) if limits.model_slots is None else limits.model_slots
            found = station.models[name] = LearnedBound(limit, limits.model_slots is not None) if limits.can_learn else Bound(limit)
        return found

    def change(self, limits: Limits) -> None:
        """Other limits, for the same lanes; what runs goes on. A tier with other limits of its own gets another queue."""
        self._limits = limits
        for station in self._stations:
            station.slots.limit = limits.slots
            for bound in station.models.values():
                if isinstance(bound, LearnedBound):
                    bound.is_held = limits.model_slots is not None
                bound.limit = bound.limit if limits.model_slots is None else limits.model_slots
            for name, bound in (station.lanes | station.apart).items():
                bound.limit = limits.lanes[name].slots or limits.slots
        for name, lane in self._lanes.items():
            lane.limits = limits.lanes[name]
            lane.room.limit = lane.limits.max_queue
        self._assign()

    def forget(self, kept: Collection[Queue]) -> None:
        """Let go of what only queues need that are not `kept`, where nobody is in them. What was learned of a model stays as a guess."""
        for key, queue in list(self._queues.items()):
            if queue not in kept and not queue.running and not queue.waiting:
                del self._queues[key]
                queue.lane.queues.remove(queue)
                for place in queue.places:
                    if place.state is not None:
                        place.state.crowds.remove(queue)
        used = {id(bound) for queue in self._queues.values() for place in queue.places for bound in place.bounds}
        for station in self._stations:
            for name, bound in [item for item in station.models.items() if id(item[1]) not in used]:
                del station.models[name]
                if isinstance(bound, LearnedBound) and not bound.is_held:
                    station.guesses[name] = bound.limit

    # Steps

    def enter(self, ticket: Entry) -> None:
        """Admit `ticket` or put it in line.

        Raises:
            ModelNotFound: no server has the model.
            QueueFull: `max_queue` requests wait already.
            QueueTimeout: the client's deadline cannot be met from this place in line.
        """
        queue = ticket.queue
        place = self._free(queue)
        if place is not None:
            self._start(ticket, place)
            return
        self._refuse_hopeless(ticket)
        self._into_line(ticket)
        if self._on_trial(queue) is not None or self._look_at_loads():
            self._assign()

    def leave(self, ticket: Entry) -> None:
        """The request is over, or has left the line."""
        if ticket.place is not None:
            now = self._clock()
            if ticket.is_served:
                ticket.queue.seconds.append(now - ticket.started)
            self._stop(ticket, ticket.place, now)
            self._assign()
        elif ticket.is_in_line:
            self._out_of_line(ticket)

    def move(self, ticket: Entry) -> bool:
        """Give `ticket`, which is in flight, a slot at another server; False when none has room."""
        here = ticket.place
        assert here is not None
        other = self._free(ticket.queue, besides=here.station)
        if other is None:
            return False
        self._stop(ticket, here, self._clock())
        self._start(ticket, other)
        self._assign()
        return True

    def take_over(self, movers: "Iterable[Mover]") -> None:
        """Put those who wait for other backends in line here, whatever `max_queue` says; the servers of this one have to serve their models."""
        for ticket, source, queue in movers:
            source.leave(ticket)
            ticket.queue = queue
            self._into_line(ticket)
            ticket.taken_over()
        self._assign()

    def refresh(self) -> None:
        """A server came up or changed its models: see who can run now."""
        self._assign()

    def _assign(self) -> None:
        while self._in_line:
            runnable = [
                (*queue.best(), place, queue)
                for lane in self._lanes.values()
                for queue in lane.queues
                if queue.interactive.count or queue.batch.count
                if (place := self._free(queue) or self._on_trial(queue)) is not None
            ]
            if not runnable:
                if self._look_at_loads():
                    continue
                return
            _, ticket, place, queue = min(runnable) if len(runnable) > 1 else runnable[0]
            for *_, other in runnable:
                other.passed_over += not ticket.claim.is_batch and other.batch.count > 0
            if ticket.claim.is_batch:
                queue.passed_over = 0
            self._out_of_line(ticket)
            self._stamp += 1
            for other in queue.lane.queues:
                other.line(ticket.claim).passed_on(ticket.claim, self._stamp)
            self._start(ticket, place)
            ticket.admitted()

    def _into_line(self, ticket: Entry) -> None:
        queue = ticket.queue
        self._stamp += 1
        ticket.arrival = self._stamp
        ticket.is_in_line = True
        self._in_line += 1
        queue.line(ticket.claim).add(ticket, self._stamp)
        queue.room.count += 1

    def _look_at_loads(self) -> bool:
        """Have loaded what is waited for; whether a model became ready by that."""
        looks = [station.loads.look() for station in self._stations if station.loads is not None]
        return any(looks)

    def _out_of_line(self, ticket: Entry) -> None:
        ticket.is_in_line = False
        self._in_line -= 1
        ticket.queue.line(ticket.claim).remove(ticket)
        ticket.queue.room.count -= 1

    def _start(self, ticket: Entry, place: Place) -> None:
        ticket.place = place
        ticket.started = self._clock()
        ticket.queue.running += 1
        if place.state is not None:
            place.state.running += 1
        for bound in place.bounds:
            bound.count += 1
        if place.learned is not None:
            ticket.part = place.learned.began()

    def _stop(self, ticket: Entry, place: Place, now: float) -> None:
        ticket.place = None
        ticket.queue.running -= 1
        if place.state is not None:
            place.state.running -= 1
            place.state.rests_since = now
        for bound in place.bounds:
            bound.count -= 1
        learned, part = place.learned, ticket.part
        if learned is not None and part is not None:
            ticket.part = None
            before = learned.next_try
            if learned.ended(part, now):
                self.on_learned()
            if learned.next_try > before:
                self._alarm(TRY_AGAIN_SECONDS, self._assign)

    def _free(self, queue: Queue, besides: Station | None = None) -> Place | None:
        """The least busy server that can take one of `queue` now."""
        best: Place | None = None
        for place in queue.places:
            station = place.station
            if station is besides or not station.serves(queue.model) or not station.is_up():
                continue
            if place.state is not None and not place.state.is_ready and besides is None:
                continue
            for bound in place.bounds:
                if bound.count >= bound.limit:
                    break
            else:
                if best is None or place.bounds[0].count < best.bounds[0].count:
                    best = place
        return best

    def _on_trial(self, queue: Queue) -> Place | None:
        """Where one more than is known to be right may be tried."""
        for place in queue.places:
            learned = place.learned
            if learned is None or not learned.may_try(self._clock()) or (place.state is not None and not place.state.is_ready):
                continue
            has_room = all(bound is learned or not bound.is_full for bound in place.bounds)
            if has_room and place.station.is_up() and place.station.serves(queue.model):
                return place
        return None

    # What is learned

    def spoke(self, ticket: Entry) -> None:
        """The first piece of the answer came."""
        learned = ticket.place.learned if ticket.place is not None else None
        if learned is not None and ticket.part is not None and learned.spoke(ticket.part):
            self._alarm(CONFIRM_SECONDS, lambda: self._confirm(learned))

    def _confirm(self, learned: LearnedBound) -> None:
        if learned.confirm():
            self.on_learned()
            self._assign()

    # Time

    def now(self) -> float:
        return self._clock()

    def retry_after(self, queue: Queue) -> int:
        """Whole seconds, 1 to 60: the line's length times the median service time, spread so that clients do not come back at once."""
        seconds = queue.wait(queue.waiting)
        if seconds is None:
            return RETRY_SECONDS_UNKNOWN
        return min(60, max(1, math.ceil(seconds * random.uniform(0.8, 1.2))))

    def outlook(self, ticket: Entry) -> Outlook:
        """Of a ticket that is in line."""
        ahead = ticket.queue.place_of(ticket, self._clock())
        return Outlook(ahead + 1, ticket.queue.wait(ahead), ticket.queue.is_loading)

    def _refuse_hopeless(self, ticket: Entry) -> None:
        queue, claim = ticket.queue, ticket.claim
        if not any(place.station.serves(queue.model) for place in queue.places):
            raise ModelNotFound("The model behind this name is not present on its backend.", param="model")
        if queue.room.is_full and not queue.has_slot_but_no_model():
            raise QueueFull("The gateway's queue for this backend is full. Try again later.", retry_after=self.retry_after(queue))
        service = None if claim.timeout is None else queue.service()
        if service is None or claim.timeout is None:
            return
        ahead = queue.line(claim).ahead_of_new(claim.key)
        if claim.is_batch:
            ahead += min(queue.interactive.count, (BATCH_SHARE - 1) * (ahead + 1))
        if service * (queue.rounds(ahead) + 1) > claim.timeout:
            raise QueueTimeout(
                f"The line is too long for an answer within {claim.timeout:g} seconds. Try again later, or allow more time.",
                retry_after=self.retry_after(queue),
            )
