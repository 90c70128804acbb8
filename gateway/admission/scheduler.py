"""Admission: decides which request runs now, on which server, and which one waits.

Synchronous: it decides, and `ticket.py` waits.

Slots. A backend has servers. While a request runs, it holds:

- a slot of its server;
- a slot of its model on that server, or of its tier there, if the tier has a limit of its own;
- in a lane with slots of its own (images on Ollama), one of these slots too.

In a separate lane (embeddings), a request holds one of the lane's slots on that server and nothing
else. Each of these is a `ConcurrencyLimit`: a limit and a count. The limits that a request needs on
one server form a `Placement` (`server_limits.py`). Requests that need the same limits share a
`Queue`. For each lane of each model, there is one queue for all tiers without limits of their own,
and one more for each tier with such limits. The number of queues depends on the settings, not on the
number of waiting requests.

States. A ticket is in one of four states:

1. new;
2. queued: it is in exactly one `FairQueue` of its queue, and counted once in the queue's `room`;
3. in flight: it is counted once in each limit of its placement;
4. gone.

Only `Admission` moves tickets between states, in the following steps. None of them awaits.

  enter             1 → 3 if a placement has room, 1 → 2 if none has. 1 → 4 with an error if no
                    server has the model, the queue is full, or the client's deadline cannot be met.
                    A request that finds room overtakes no other that could run: by I2, no such
                    request is queued.
  leave             2 → 4, or 3 → 4. The latter frees slots, so `_admit_next` follows. For a ticket
                    that is gone it does nothing, so it may be called twice.
  _admit_next       2 → 3, until no queued request can run. Called after every step that can make
                    room: `leave`, `reassign`, `refresh` (a server came up or its models changed), a
                    changed or learned limit; and after `accept_transfers`.
  reassign          3 → 3, on another server.
  accept_transfers  2 → 2 or 3, from the queues of other backends into the queues of this one,
                    because the roll-out now leads here. It moves all tickets in one step, in the
                    given order, behind the requests queued here. Their turns start over: keys and
                    persons enter the ring in the order of their first requests. The queues that
                    they leave have no more free slots than before, so nothing is admitted there.

Invariants.

I1: No limit is exceeded, except by one request on trial in an `AdaptiveLimit`, and after a limit
    was lowered.
I2: Between two steps, no queued request could run. So a text request never waits behind an image
    that cannot run, and a request for one model never waits behind the busy server of another.
I3: At most `max_queue` requests wait. Not counted are requests that wait for nothing but a load,
    and transferred ones and those that entered again, which had been accepted already.
I4: Each ticket ends once.
I5: A ticket that left its queue is never admitted.
I6: A queued ticket is in one queue of one backend, and nowhere else.

Order. All requests in a queue need the same limits, so only the heads of the queues are compared.
The cost of a step grows with the number of queues, not of requests. Of the heads that can run,
interactive requests come before batch requests. Next comes the key that has waited the longest for
its turn (`fair_queue.py`). When a key is served from one queue, it goes to the end of the ring in
all queues of the lane. Lanes do not wait for each other. A batch head that was passed over
`BATCH_SHARE - 1` times, although it could have run, goes first, so batch requests get one slot in
ten.

Closure. A backend whose engine does not have the GPU is closed (`closure.py`): none of its servers
is up. The requests that wait for it do so without a limit, except for the client's own deadline.

A server that is not up, or whose gate is closed for the queue, gets no requests. Requests that need
it stay queued until it is up, or until the relay ends their wait because the backend is down.

Model loads. Where models have to be loaded (Ollama), a placement has the `ModelState` of its model
on that server, and takes requests from the queue only while that state is ready. A request that is
reassigned from another server may run there before that. If a load is all that holds a queued
request back, `ModelResidency.schedule` takes care of the load (`model_residency.py`). It runs after
each arrival in a queue and at the end of `_admit_next`. So with loads, I2 reads: no queued request
could run, and where only a load is missing, the load has been taken care of. A load needs no slot.
The time that a model takes to load does not count as waiting, except toward the client's own
deadline.

Time. Service times are measured per queue, over the requests that got their whole answer. What
follows from them is in `wait_estimates.py`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from gateway.admission.affinity import Affinity
from gateway.admission.closure import Closure
from gateway.admission.concurrency_limits import CONFIRM_SECONDS, TRY_AGAIN_SECONDS, AdaptiveLimit, ConcurrencyLimit
from gateway.admission.limits import AdmissionLimits, LaneName, LimitSource, TierLimits
from gateway.admission.queues import Lane, Queue, QueueEntry
from gateway.admission.server_limits import ServerLimits, forget_models, limits_of
from gateway.admission.server_slots import Placement, ServerSlots
from gateway.admission.wait_estimates import refuse_hopeless


class Transfer(NamedTuple):
    """A ticket that is queued at `source`, and the queue of another admission that it joins."""

    ticket: QueueEntry
    source: "Admission"
    queue: Queue


class Admission:
    """Slots and queues of one backend.

    - `clock` returns monotonic time in seconds.
    - `call_later` calls a function after a number of seconds.
    - `canonical` maps the names that a server accepts for a model to one of them.
    - `on_learned` is called when a learned limit has changed.
    - `affinity` chooses among several servers by their prefix caches. Without it, the least busy one
      is chosen.
    - `source` makes the limits, which replicas of the gateway may share.
    """

    def __init__(
        self,
        servers: Sequence[ServerSlots],
        limits: AdmissionLimits,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        canonical: Callable[[str], str] = lambda name: name,
        on_learned: Callable[[], None] = lambda: None,
        affinity: Affinity | None = None,
        source: LimitSource | None = None,
    ) -> None:
        self.affinity = affinity
        self._source = source or LimitSource()
        self.closure = Closure()
        """Time in which nothing is admitted; the servers are not up meanwhile (`upstream/backend.py`)."""
        self._has_several = len(servers) > 1
        self._turn = 0
        self._servers = list(servers)
        self._clock = clock
        self._call_later = call_later
        self._limits = ServerLimits(limits, self._source, canonical)
        self._lanes = {name: Lane(name, lane) for name, lane in limits.lanes.items()}
        self._queues: dict[tuple[str, LaneName, str, TierLimits | None], Queue] = {}
        self._stamp = 0
        self._queued = 0
        self._on_learned = on_learned
        self._limits.add(servers)

    def __repr__(self) -> str:
        lanes = ", ".join(f"{name} {self.running(name)}+{self.waiting(name)}" for name in self._lanes)
        return f"<Admission in flight+waiting: {lanes}; slots {[server.slots for server in self._servers]}>"

    # Lanes, queues and limits

    @property
    def queues(self) -> Collection[Queue]:
        return tuple(self._queues.values())

    @property
    def lanes(self) -> Sequence[LaneName]:
        return tuple(self._lanes)

    def running(self, lane: LaneName) -> int:
        return sum(queue.running for queue in self._lanes[lane].queues)

    def waiting(self, lane: LaneName) -> int:
        return sum(queue.waiting for queue in self._lanes[lane].queues)

    def queue(self, model: str, lane: LaneName, tier: str = "", own: TierLimits | None = None) -> Queue:
        """Return the queue of requests for `model` in `lane`.

        `tier` matters only if the tier has limits of its `own`.
        """
        key = (model, lane, "" if own is None else tier, own)
        queue = self._queues.get(key)
        if queue is None:
            shared_lane = self._lanes[lane]
            own = own or TierLimits()
            placements = [self._limits.placement(server, model, shared_lane, own, tier) for server in self._servers]
            room = shared_lane.room if own.max_queue is None else ConcurrencyLimit(own.max_queue)
            queue = self._queues[key] = Queue(model, shared_lane, placements, room, own.queue_timeout, self.closure)
            shared_lane.queues.append(queue)
        return queue

    def add(self, servers: Collection[ServerSlots]) -> None:
        """Let requests of all queues run at further servers. Call `refresh` when they may get some."""
        self._servers += servers
        self._has_several = True
        self._limits.add(servers)
        for (model, _, tier, own), queue in self._queues.items():
            limits = own or TierLimits()
            queue.add(self._limits.placement(server, model, queue.lane, limits, tier) for server in servers)

    def drop(self, servers: Collection[ServerSlots]) -> None:
        """Forget servers that get no requests any more, and that none runs at."""
        gone = set(servers)
        self._servers = [server for server in self._servers if server not in gone]
        for queue in self._queues.values():
            queue.drop(gone)
        self._source.dropped()

    def used_limits(self) -> Iterator[ConcurrencyLimit]:
        """Yield the limits that the requests of this backend need."""
        yield from limits_of(self._servers)
        yield from self._limits_of_queues()

    def _limits_of_queues(self) -> Iterator[ConcurrencyLimit]:
        for queue in self._queues.values():
            for placement in queue.placements:
                yield from placement.limits

    def change(self, limits: AdmissionLimits) -> None:
        """Apply other limits to the same lanes. Requests in flight continue.

        A tier whose own limits change gets another queue.
        """
        self._limits.change(limits, self._servers)
        for name, lane in self._lanes.items():
            lane.limits = limits.lanes[name]
            lane.room.limit = lane.limits.max_queue
        self._admit_next()

    def forget(self, kept: Collection[Queue]) -> None:
        """Drop the empty queues that are not in `kept`, and everything that only they need.

        A limit that was learned for a model is kept as the next guess.
        """
        for key, queue in list(self._queues.items()):
            if queue not in kept and not queue.running and not queue.waiting:
                del self._queues[key]
                queue.lane.queues.remove(queue)
                for placement in queue.placements:
                    if placement.state is not None:
                        placement.state.waiters.remove(queue)
        forget_models(self._servers, [*self._limits_of_queues()])
        self._source.dropped()

    # Steps

    def enter(self, ticket: QueueEntry) -> None:
        """Admit `ticket` or queue it.

        Raises:
            ModelNotFound: no server has the model.
            QueueFull: `max_queue` requests are waiting already.
            QueueTimeout: the client's deadline cannot be met from this position in the queue.
        """
        queue = ticket.queue
        placement = self._free_placement(queue, ticket)
        if placement is not None:
            self._start(ticket, placement)
            return
        refuse_hopeless(ticket, self._clock())
        self._enqueue(ticket)
        if self._trial_placement(queue) is not None or self._schedule_loads():
            self._admit_next()

    def enter_again(self, ticket: QueueEntry, *, is_first: bool) -> None:
        """Admit or queue a request that had a slot, regardless of `max_queue`.

        With `is_first`, it comes before all others.
        """
        placement = self._free_placement(ticket.queue, ticket)
        if placement is not None:
            self._start(ticket, placement)
            return
        self._enqueue(ticket, is_first=is_first)
        self._admit_next()

    def leave(self, ticket: QueueEntry) -> None:
        """End a request in flight, or remove a queued one."""
        if ticket.placement is not None:
            now = self._clock()
            if ticket.is_served:
                ticket.queue.service_times.append(now - ticket.started)
            self._stop(ticket, ticket.placement, now)
            if self._queued:
                self._admit_next()
        elif ticket.is_queued:
            self._dequeue(ticket)

    def reassign(self, ticket: QueueEntry) -> bool:
        """Give `ticket`, which is in flight, a slot on another server.

        Return False if no other server has room.
        """
        current = ticket.placement
        assert current is not None
        other = self._free_placement(ticket.queue, ticket, excluding=current.server)
        if other is None:
            return False
        self._stop(ticket, current, self._clock())
        self._start(ticket, other)
        self._admit_next()
        return True

    def accept_transfers(self, transfers: "Iterable[Transfer]") -> None:
        """Queue requests here that wait for other backends, regardless of `max_queue`.

        The servers of this backend must serve the models of their queues.
        """
        for ticket, source, queue in transfers:
            source.leave(ticket)
            ticket.queue = queue
            self._enqueue(ticket)
            ticket.transferred()
        self._admit_next()

    def refresh(self) -> None:
        """Admit the requests that can run now that a server came up or changed its models."""
        self._admit_next()

    def _admit_next(self) -> None:
        while self._queued:
            runnable = [
                (*head, placement, queue)
                for lane in self._lanes.values()
                for queue in lane.queues
                if queue.interactive.count or queue.batch.count
                for head in (queue.next_entry(),)
                if (placement := self._free_placement(queue, head[1]) or self._trial_placement(queue)) is not None
            ]
            if not runnable:
                if self._schedule_loads():
                    continue
                self._source.queued()
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

    def _enqueue(self, ticket: QueueEntry, *, is_first: bool = False) -> None:
        queue = ticket.queue
        self._stamp += 1
        ticket.arrival = self._stamp
        ticket.is_queued = True
        self._queued += 1
        if is_first:
            queue.fair_queue(ticket.claim).add_first(ticket)
        else:
            queue.fair_queue(ticket.claim).add(ticket, self._stamp)
        queue.room.count += 1
        self._source.queued()

    def _schedule_loads(self) -> bool:
        """Start the loads that queued requests wait for. Return whether a model became ready.

        The server that has the fewest models comes first: a load there evicts none.
        """
        residencies = [server.residency for server in self._servers if server.residency is not None]
        if len(residencies) > 1:
            residencies.sort(key=lambda residency: residency.occupancy)
        became_ready = [residency.schedule() for residency in residencies]
        return any(became_ready)

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
        if placement.gate.restrains:
            ticket.is_trial = placement.gate.begin_trial()
        if placement.adaptive is not None:
            ticket.load_sample = placement.adaptive.began()
        if self._has_several:
            self._turn += 1
            placement.server.prefixes.turn = self._turn
            if ticket.prompt is not None and self.affinity is not None:
                ticket.prefill = self.affinity.begin(ticket.prompt, placement, ticket.queue.placements)

    def _stop(self, ticket: QueueEntry, placement: Placement, now: float) -> None:
        ticket.placement = None
        ticket.queue.running -= 1
        if ticket.prefill and ticket.prompt is not None:
            placement.server.prefixes.pending -= ticket.prefill
            if not ticket.is_served:
                placement.server.prefixes.forget_end(ticket.prompt, ticket.prefill)
            ticket.prefill = 0
        if placement.state is not None:
            placement.state.running -= 1
            placement.state.idle_since = now
        for limit in placement.limits:
            limit.count -= 1
        if ticket.is_trial:
            ticket.is_trial = False
            placement.gate.end_trial(ticket.started)
        adaptive, sample = placement.adaptive, ticket.load_sample
        if adaptive is not None and sample is not None:
            ticket.load_sample = None
            before = adaptive.next_try
            if adaptive.ended(sample, now):
                self._on_learned()
            if adaptive.next_try > before:
                self._call_later(TRY_AGAIN_SECONDS, self._admit_next)

    def _free_placement(
        self, queue: Queue, ticket: QueueEntry, excluding: ServerSlots | None = None
    ) -> Placement | None:
        """Return the best placement that can take `ticket`, a request of `queue`, now.

        Without affinity, that is the one on the least busy server. Of equally busy servers, it is the
        one that got a request longest ago.
        """
        best: Placement | None = None
        possible: list[Placement] | None = [] if ticket.prompt is not None and self.affinity is not None else None
        for placement in queue.placements:
            for limit in placement.limits:  # first, since requests wait as a rule because all of them are full
                if limit.count >= limit.limit:
                    break
            else:
                server = placement.server
                if server is excluding or not server.serves(queue.model) or not server.is_up():
                    continue
                if placement.gate.restrains and not placement.gate.allows():
                    continue
                if placement.state is not None and not placement.state.is_ready and excluding is None:
                    continue
                if possible is not None:
                    possible.append(placement)
                elif best is None or placement.busyness < best.busyness:
                    best = placement
        if possible and self.affinity is not None and ticket.prompt is not None:
            return self.affinity.choose(ticket.prompt, possible)
        return best

    def _trial_placement(self, queue: Queue) -> Placement | None:
        """Return a placement where one request more than the learned limit may be tried."""
        now = self._clock()
        for placement in queue.placements:
            adaptive = placement.adaptive
            if (
                adaptive is None
                or not adaptive.may_try(now)
                or (placement.gate.restrains and not placement.gate.allows())
                or (placement.state is not None and not placement.state.is_ready)
            ):
                continue
            has_room = all(limit is adaptive or not limit.is_full for limit in placement.limits)
            if has_room and placement.server.is_up() and placement.server.serves(queue.model):
                return placement
        return None

    # Learning

    def first_token(self, ticket: QueueEntry) -> None:
        """Record the first token of the answer."""
        if ticket.prefill and ticket.placement is not None:
            ticket.placement.server.prefixes.pending -= ticket.prefill
            ticket.prefill = 0
        adaptive = ticket.placement.adaptive if ticket.placement is not None else None
        if adaptive is not None and ticket.load_sample is not None and adaptive.first_token(ticket.load_sample):
            self._call_later(CONFIRM_SECONDS, lambda: self._confirm(adaptive))

    def _confirm(self, adaptive: AdaptiveLimit) -> None:
        if adaptive.confirm():
            self._on_learned()
            self._admit_next()

    # Time

    def now(self) -> float:
        return self._clock()
