"""Concurrency limits that several replicas of the gateway share: what one of them may use of each.

Pure: no I/O, no clock. `gateway/replicas/leases.py` asks Redis and applies the answers.

Each replica leases some slots of each limit and admits requests within its lease, without asking anyone. A
`SharedLimit` is a `ConcurrencyLimit` whose `limit` is the lease. The rules by which slots move between replicas are in
`gateway/replicas/operations.lua`. This module knows the replica's side of them:

- It tells how many slots it holds, which are those that it may fill or that still run; and how many it could use, its
  demand (`SharedLimits.measure`).
- It is to tell so at once if that can move a slot (`is_due`): its demand has grown beyond what it had asked for
  and what it has; or others wait for slots, and it holds some that it no longer needs or no longer may fill.

Demand. A queued request that needs several limits must not hold one of them while it waits for another replica's slot
of the next, or two replicas could wait for each other. So limits have an order, from the narrow ones (lane, model) to
the server's slots. A request counts toward a limit only as far as the limits before it have room for it: within what
the replica is entitled to, if others wait for their slots too. So no replica waits for a slot of a
narrow limit while it keeps one of a wider limit from others.

Alone. While Redis cannot be reached, each replica goes on with an equal share of each limit (`share_of`). It takes new
requests only up to the smaller of its lease and its share at first, and up to its share once its lease has ended in
Redis as well. With fewer slots than replicas, the replicas take turns of `SLICE_SECONDS`.

Adaptive limits. What one replica has learned is the limit of all; the latest change counts. A replica tries one
request more only when Redis allows it, which is when all slots of all replicas are in use, and one at a time. The limit
rises if the replica holds all slots and sees more answers stream than the limit; or if the lowest numbers of answers
that streamed on each replica during the same second add up to more. It falls by as much as a replica has found that
its own lease is too high.
"""

from collections.abc import Callable
from typing import NamedTuple

from gateway.admission.admitting import Admitting
from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit, LoadSample
from gateway.admission.limits import LimitSource
from gateway.admission.queues import Queue

WANTED, TURNS = 1, 2
"""Contest: other replicas wait for slots; and there are fewer slots than replicas that wait."""
SLICE_SECONDS = 5.0
"""Length of a turn when a replica is alone and there are fewer slots than replicas."""
NO_TRIAL, TRIAL_RUNS, TRIAL_FAILED = 0, 1, 2


class Grant(NamedTuple):
    """Part of one limit that a replica may use, from the answer to its report."""

    limit: int
    """Slots that it may fill."""
    part: int
    """Slots that are its by demand, if others give back what they hold beyond their part."""
    contest: int
    total: int
    version: int
    """Number of the last change of a learned limit."""
    others: int
    """Slots that other replicas hold."""
    may_try: bool
    """True if it may admit one request more than an adaptive limit, on trial."""


class SharedLimit(ConcurrencyLimit):
    """A limit of which this replica leases a part: `limit`. The whole is `total`.

    `on_change` is called when a request ends whose slot others may wait for.
    """

    _count = 0
    starts = 0
    """Number of requests that began."""
    contest = 0
    total = 0
    """The limit over all replicas; the settings' own until Redis has answered."""
    configured = 0
    part = 0
    """Slots that are this replica's by demand, if others give back what they hold beyond theirs."""
    held = 0
    """Slots that Redis counts as this replica's."""
    demand = 0
    """Slots that could be used now, as of the last `SharedLimits.measure`."""
    reported = 0
    """Demand that Redis was told."""
    reported_starts = 0
    room = 0
    """Requests that could still begin within the entitlement, while demand is measured."""
    version = 0
    on_change: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, name: str, total: int, on_change: Callable[[], None]) -> None:
        super().__init__(0)
        self._share(name, total, on_change)

    def _share(self, name: str, total: int, on_change: Callable[[], None]) -> None:
        self.name = name
        self.configured = self.total = self.part = total
        self.on_change = on_change

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.count}/{self.limit} of {self.total}>"

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        before, self._count = self._count, value
        if value > before:
            self.starts += 1
            if self.contest == TURNS:
                self.on_change()
        elif self.contest or value >= self.limit:
            self.on_change()

    def change(self, total: int) -> None:
        self.configured = self.total = total
        self.part = min(self.part, total)
        self.limit = min(self.limit, total)

    @property
    def entitlement(self) -> int:
        return self.part if self.contest else self.total

    @property
    def holds(self) -> int:
        """Slots that no other replica may use."""
        return max(self._count, self.limit)

    @property
    def is_due(self) -> bool:
        """True if a report could move a slot: to this replica, or to another one that waits for it."""
        if self.demand > self.limit and self.demand > self.reported and self.reported <= self.part:
            return True
        if not self.contest:
            return False
        return (
            self.holds < self.held
            or (self.demand < self.reported and self.demand < self.held)
            or (self.contest == TURNS and self.starts != self.reported_starts)
        )

    def report(self) -> tuple[int, ...]:
        """Return the numbers of a report to Redis, in the order of REPORT in `operations.lua`."""
        self.reported, self.reported_starts, self.held = self.demand, self.starts, self.holds
        return (self.configured, 0, self.held, self.count, self.demand, self.starts, 0, 0, 0, 0)

    def apply(self, grant: Grant) -> bool:
        """Put an answer of Redis in force. Return whether the limit was learned anew."""
        self.limit = grant.limit
        self.held = max(self.held, grant.limit)
        self.part = max(grant.part, grant.limit)
        self.contest = grant.contest
        self.total = grant.total
        return False

    def go_alone(self, share: int, may_grow: bool) -> None:
        """Use an equal share, as long as Redis cannot be reached."""
        self.limit = share if may_grow else min(self.limit, share)
        self.part = self.limit
        self.contest = WANTED


class SharedAdaptiveLimit(SharedLimit, AdaptiveLimit):
    """A learned limit of which this replica leases a part."""

    proposal = 0
    """The limit as this replica has found it, if it differs."""
    others = 0
    may_try_one_more = False
    trial = NO_TRIAL

    def __init__(
        self, name: str, total: int, is_held: bool, on_change: Callable[[], None], on_learned: Callable[[], None]
    ) -> None:
        AdaptiveLimit.__init__(self, 0, is_held)
        self._share(name, total, on_change)
        self.on_learned = on_learned
        self._lowest = 0
        self._lowest_before = 0

    def may_try(self, now: float) -> bool:
        return self.may_try_one_more and self._trial is None and self.count >= self.limit and not self.is_held

    def began(self) -> LoadSample:
        is_trial = self.may_try_one_more and self.count > self.limit
        sample = super().began()
        if is_trial:
            self.may_try_one_more = False
            self.trial = TRIAL_RUNS
        return sample

    def confirm(self) -> bool:
        if not self.is_held and not self.others and self.streaming > self.total:
            self._propose(self.streaming)
        return False

    def ended(self, sample: LoadSample, now: float) -> bool:
        had_trial = self._trial is not None
        super().ended(sample, now)
        self._lowest = min(self._lowest, self.streaming)
        if had_trial and self._trial is None and self.trial == TRIAL_RUNS:
            self.trial = TRIAL_FAILED
        return False

    def _learn(self, limit: int) -> None:
        self._reset_evidence()
        if 0 < limit < self.limit:
            self._propose(max(1, self.total - (self.limit - limit)))

    def _propose(self, total: int) -> None:
        self.proposal = total
        self.on_change()

    @property
    def is_due(self) -> bool:
        return self.proposal > 0 or super().is_due

    def begin_period(self) -> None:
        """Begin another period for the lowest number of answers that stream at the same time."""
        self._lowest_before, self._lowest = self._lowest, self.streaming

    def report(self) -> tuple[int, ...]:
        numbers = list(super().report())
        if not self.is_held:
            low = min(self._lowest, self._lowest_before)
            numbers[0], numbers[1] = self.total, 1
            numbers[6:] = low, self.version, self.proposal, self.trial
            self.proposal = 0
            if self.trial == TRIAL_FAILED:
                self.trial = NO_TRIAL
        return tuple(numbers)

    def apply(self, grant: Grant) -> bool:
        was = self.total
        super().apply(grant)
        self.others = grant.others
        self.version = grant.version
        if self.total > was:
            self._trial = None
            self.trial = NO_TRIAL
        self.may_try_one_more = grant.may_try and self._trial is None
        return self.total != was and not self.is_held

    def go_alone(self, share: int, may_grow: bool) -> None:
        super().go_alone(share, may_grow)
        self.may_try_one_more = False


class SharedLimits:
    """All limits that this replica shares, by name. The same name means the same limit on each replica."""

    replicas = 1
    """Number of replicas that share the places in the queues: each has its own."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.on_change = on_change
        """Called when a report may be due. It must not do anything but schedule `measure`."""
        self.by_name: dict[str, SharedLimit] = {}
        self._admissions: list[Admitting] = []

    def __repr__(self) -> str:
        return f"<SharedLimits {len(self.by_name)}>"

    def source(self, backend: str, on_learned: Callable[[], None]) -> "SharedLimitSource":
        """Return the source of the limits of one backend."""
        return SharedLimitSource(self, backend, on_learned)

    def attach(self, admission: Admitting) -> None:
        self._admissions.append(admission)

    def detach(self, admission: Admitting) -> None:
        self._admissions = [one for one in self._admissions if one is not admission]
        self.on_change()

    def changed(self) -> None:
        self.on_change()

    def measure(self) -> None:
        """Compute the demand for each limit."""
        for limit in self.by_name.values():
            limit.demand = limit.count
            limit.room = max(0, limit.entitlement - limit.count)
        for admission in self._admissions:
            for queue in admission.queues:
                if queue.waiting:
                    _add_demand(queue)

    def refresh(self) -> None:
        """Admit the requests that can run now."""
        for admission in self._admissions:
            admission.refresh()

    def take_unused(self) -> list[str]:
        """Drop the limits that no backend needs any more, and return their names."""
        used = {id(limit) for admission in self._admissions for limit in admission.used_limits()}
        unused = [name for name, limit in self.by_name.items() if id(limit) not in used and not limit.count]
        for name in unused:
            del self.by_name[name]
        return unused

    def go_alone(self, replicas: int, place: int, turn: int | None, may_grow: bool) -> None:
        """Use an equal share of each limit. `turn` is the number of the time slice, None between two.

        `may_grow` is false while the leases may still be counted in Redis.
        """
        for limit in self.by_name.values():
            limit.go_alone(share_of(limit.total, replicas, place, turn), may_grow)
        self.refresh()


class SharedLimitSource(LimitSource):
    """Source of the limits of one backend. Limits of the same name are one object."""

    def __init__(self, shared: SharedLimits, backend: str, on_learned: Callable[[], None]) -> None:
        self._shared = shared
        self._backend = backend
        self._on_learned = on_learned

    def fixed(self, place: str, name: str, slots: int) -> ConcurrencyLimit:
        full = f"{self._backend} {place} {name}"
        limit = self._shared.by_name.get(full)
        if type(limit) is SharedLimit:
            limit.change(slots)
        else:
            limit = self._shared.by_name[full] = SharedLimit(full, slots, self._shared.changed)
        self._shared.changed()
        return limit

    def adaptive(self, place: str, name: str, slots: int, is_held: bool) -> ConcurrencyLimit:
        full = f"{self._backend} {place} {name}"
        limit = self._shared.by_name.get(full)
        if not isinstance(limit, SharedAdaptiveLimit):
            limit = self._shared.by_name[full] = SharedAdaptiveLimit(
                full, slots, is_held, self._shared.changed, self._on_learned
            )
        limit.is_held = is_held
        if is_held:
            limit.change(slots)
        self._shared.changed()
        return limit

    def queued(self) -> None:
        self._shared.changed()


def _add_demand(queue: Queue) -> None:
    """Add the queued requests to the demand for the limits that they need.

    They count toward each server that could take them.
    """
    for placement in queue.placements:
        server, gate, state = placement.server, placement.gate, placement.state
        if not server.serves(queue.model) or not server.is_up() or (gate.restrains and not gate.allows()):
            continue
        wanted = queue.waiting if state is None or state.is_ready else 1
        for limit in reversed(placement.limits):
            if isinstance(limit, SharedLimit):
                limit.demand += wanted
                wanted = min(wanted, limit.room)
                limit.room -= wanted


def share_of(total: int, replicas: int, place: int, turn: int | None) -> int:
    """Return the slots of one of several replicas that cannot talk to each other. They add up to `total`.

    `place` is the replica's place among them, from 0 on. With fewer slots than replicas, the slots go to the next
    ones with each `turn`, and to none between turns (None).
    """
    if replicas <= 1:
        return total
    if total < replicas:
        return 1 if turn is not None and (place - turn * total) % replicas < total else 0
    return total // replicas + (place < total % replicas)
