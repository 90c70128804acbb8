"""Concurrency limits of one of several replicas on a machine: what it holds of each, and what it asks for.

Synchronous: a `SlotHub` has the slots of all replicas, and this module decides what to ask of it.

A limit's `limit` is the number of slots that this replica holds, so the steps of `scheduler.py` apply
unchanged: a request runs in a slot that is held, or it is queued. After each turn of the event loop
in which something changed, the hub is told what the queued requests could use. Slots that are held and
could not start one of these requests by themselves are given back at the same time: the hub grants the
slots of a request all at once, so no two replicas wait for each other's.

A limit that nothing needs any more, such as those of a server whose host name has lost its address, is
forgotten with its last request, and its slots go back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gateway.admission.admitting import Admitting
from gateway.admission.concurrency_limits import ConcurrencyLimit
from gateway.admission.limits import LimitSource
from gateway.admission.queues import Queue

MOST_WANTED = 8
"""Requests of one queue for which slots are asked at a time."""

LOOK_SECONDS = 0.05
"""Interval at which it is checked, while requests are queued, which servers could take them."""

Way = tuple[str, ...]
"""Names of all the slots that one request takes at once."""


class SlotHub(Protocol):
    """Holder of the slots of all replicas."""

    def set_totals(self, totals: Mapping[str, int]) -> None:
        """Report the limits of the settings, by the names of their slots."""

    def want(self, wants: Sequence[tuple[int, list[Way]]]) -> None:
        """Ask for slots for a number of requests each, which can run in one of several ways.

        This replaces what was asked before.
        """

    def give(self, slots: Mapping[str, int]) -> None:
        """Give back slots, by name."""


class HubLimit(ConcurrencyLimit):
    """Limit of all replicas, of which this one holds `limit` slots."""

    __slots__ = ("_count", "_limits", "_total", "is_unused", "keep", "name")

    def __init__(self, name: str, limits: "HubLimits") -> None:
        self._count = 0
        self.keep: int | None = None
        """Number of slots to keep after their requests have ended, since others wait; None: all."""
        self.is_unused = False
        """True if nothing needs the limit any more but requests that still run."""
        self._limits = limits
        self._total = 0
        self.name = name
        super().__init__(0)

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        is_end, self._count = value < self._count, value
        if is_end and (self.keep is not None or self.is_unused):
            self._limits.give_back(self)
            self._limits.touch()

    @property
    def total(self) -> int:
        return self._total

    @property
    def entitlement(self) -> int:
        return max(self.limit, -(-self._total // self._limits.replicas))

    def change(self, total: int) -> None:
        """Set another limit for all replicas. What this one holds follows when the hub says so."""
        if total != self._total:
            self._total = total
            self._limits.totals_changed()


class HubLimits:
    """All limits of this replica. `call_later` is that of the event loop."""

    def __init__(self, hub: SlotHub, replicas: int, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self.replicas = replicas
        """Number of replicas that share the limits."""
        self._hub = hub
        self._call_later = call_later
        self._by_name: dict[str, HubLimit] = {}
        self._admissions: list[Admitting] = []
        self._given: dict[str, int] = {}
        self._wanted: list[tuple[int, list[Way]]] = []
        self._has_new_totals = False
        self._has_to_ask = False
        self._has_dropped = False
        self._is_scheduled = False
        self._looks_again = False

    def __repr__(self) -> str:
        return f"<HubLimits {self._by_name}>"

    def source(self, backend: str, on_learned: Callable[[], None]) -> "HubLimitSource":
        """Return the source of the limits of one backend."""
        return HubLimitSource(self, backend)

    def attach(self, admission: Admitting) -> None:
        self._admissions.append(admission)

    def detach(self, admission: Admitting) -> None:
        """Ask for nothing more for a backend that is dropped. What it holds goes back as others need it."""
        self._admissions.remove(admission)
        self.dropped()

    def limit(self, name: str) -> HubLimit:
        """Return the limit with this name; it is made at the first call."""
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name[name] = HubLimit(name, self)
        return found

    def dropped(self) -> None:
        """Forget soon the limits that no backend needs any more."""
        self._has_dropped = True
        self.touch()

    def totals_changed(self) -> None:
        self._has_new_totals = True
        self.touch()

    # From the hub

    def granted(self, slots: Mapping[str, int]) -> None:
        """Add slots to those that this replica holds, and start requests in them."""
        for name, count in slots.items():
            if (limit := self._by_name.get(name)) is not None:
                limit.limit += count
            else:  # it was forgotten while the message was on its way
                self._given[name] = self._given.get(name, 0) + count
        self._has_to_ask = True  # the hub has to learn what is still wanted, even if it is the same
        for admission in self._admissions:
            admission.refresh()
        self.touch()

    def keep(self, slots: Mapping[str, int | None]) -> None:
        """Give back all unused slots beyond these, now and as requests end; None: keep all."""
        for name, keep in slots.items():
            if (limit := self._by_name.get(name)) is not None:
                limit.keep = keep
                self.give_back(limit)

    # Steps

    def _look_again(self) -> None:
        self._looks_again = False
        self.touch()

    def touch(self) -> None:
        """Tell the hub what has changed, after this turn of the event loop."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._call_later(0, self._settle)

    def give_back(self, limit: HubLimit) -> None:
        """Give back the unused slots of `limit` that this replica may not keep."""
        keep = 0 if limit.is_unused else limit.keep
        if keep is not None:
            self._give(limit, limit.limit - max(limit.count, keep))

    def _give(self, limit: HubLimit, count: int) -> None:
        if count > 0:
            limit.limit -= count
            self._given[limit.name] = self._given.get(limit.name, 0) + count
            self.touch()

    def _forget_unused(self) -> None:
        """Forget the limits that nothing needs; one that requests still run in gives its slots back as they end."""
        used = {id(limit) for admission in self._admissions for limit in admission.used_limits()}
        unused = [limit for limit in self._by_name.values() if id(limit) not in used]
        for limit in unused:
            limit.is_unused = True
            self.give_back(limit)
            if not limit.count:
                del self._by_name[limit.name]
                self._has_new_totals = True
        self._has_dropped = any(limit.count for limit in unused)

    def _settle(self) -> None:
        if self._has_dropped:
            self._forget_unused()
        if self._has_new_totals:
            self._has_new_totals = False
            self._hub.set_totals({name: limit.total for name, limit in self._by_name.items() if limit.total})
        wanted = self._wants()
        for name in {name for _, ways in wanted for way in ways for name in way}:
            limit = self._by_name[name]
            self._give(limit, limit.limit - limit.count)
        if self._given:
            given, self._given = self._given, {}
            self._hub.give(given)
        if self._has_to_ask or wanted != self._wanted:
            self._has_to_ask = False
            self._wanted = wanted
            self._hub.want(wanted)
        self._is_scheduled = False

    def _wants(self) -> list[tuple[int, list[Way]]]:
        """Return what the queued requests could use, in the order of their queues."""
        waiting = [queue for admission in self._admissions for queue in admission.queues if queue.waiting]
        if waiting and not self._looks_again:
            self._looks_again = True
            self._call_later(LOOK_SECONDS, self._look_again)
        waiting.sort(key=lambda queue: queue.next_entry()[0])
        wants = ((min(queue.waiting, MOST_WANTED), _ways(queue)) for queue in waiting)
        return [(requests, ways) for requests, ways in wants if ways]


class HubLimitSource(LimitSource):
    """Source of the limits of one backend. Limits of the same name are one object."""

    def __init__(self, limits: HubLimits, backend: str) -> None:
        self._limits = limits
        self._backend = backend

    def fixed(self, place: str, name: str, slots: int) -> ConcurrencyLimit:
        limit = self._limits.limit(f"{self._backend} {place} {name}")
        limit.is_unused = False
        limit.change(slots)
        return limit

    def adaptive(self, place: str, name: str, slots: int, is_held: bool) -> ConcurrencyLimit:
        """Return a limit that stays at `slots`: no replica sees all requests that run in parallel."""
        return self.fixed(place, name, slots)

    def queued(self) -> None:
        self._limits.touch()

    def dropped(self) -> None:
        self._limits.dropped()


def _ways(queue: Queue) -> list[Way]:
    """Return the ways in which a request of `queue` could run now, if it had the slots."""
    return [
        tuple(limit.name for limit in placement.limits if isinstance(limit, HubLimit))
        for placement in queue.placements
        if placement.server.serves(queue.model)
        and placement.server.is_up()
        and not (placement.gate.restrains and not placement.gate.allows())
        and (placement.state is None or placement.state.is_ready)
    ]
