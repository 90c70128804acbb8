"""Slots that the replicas of one machine share: who holds how many, and who gets the next one.

Pure: `messages` says who has to be told what after each step.

Theory of operation. Each concurrency limit has a name and a total, the limit in the settings. Its
slots are held by replicas or are free. A replica starts requests only in slots that it holds, and
keeps a slot when its request ends, so that under light load nothing is sent. When it first names a
limit, it gets its share. If a request finds no slot, the replica tells what it wants, and gives back
the slots of that want that it holds without use. It gets all the slots of one request at once or
none, so no replica waits for a slot while it holds another one that nobody can use.

While somebody waits for a slot that is not free, every replica is told how many it may `keep`: an
equal part, if it waits as well, else only those that it uses. It gives back the others at once, and
each further one as its request ends. Replicas that wait get slots in turn.

Invariant: The slots that replicas hold never exceed the total, except after it was lowered. The
total is the smallest one that a replica has named, so that a limit that is lowered applies from the
first reload on, and one that is raised from the last. Slots of a replica that has died count as
held until `forget`, since its requests may still run at the server for a moment.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gateway.replicas.messages import Want

MAX_GRANTS = 64
"""Requests of one replica that get slots in one step."""


class Step(NamedTuple):
    """What replicas have to be told: slots that they got, and slots of which they may keep so many."""

    granted: dict[int, dict[str, int]]
    keep: dict[int, dict[str, int | None]]


class SlotPool:
    """The slots of all limits. `shares` is the number of replicas that the slots are meant for."""

    def __init__(self, shares: int) -> None:
        self._shares = shares
        self._totals: dict[int, Mapping[str, int]] = {}
        self._held: dict[str, dict[int, int]] = {}
        self._free: dict[str, int] = {}
        """Results of `free` since something changed."""
        self._total: dict[str, int] = {}
        """Results of `total` since something changed."""
        self._wanted: dict[int, frozenset[str]] = {}
        """Names of the slots that replicas wait for, since that changed."""
        self._wants: dict[int, list[Want]] = {}
        self._told: dict[int, dict[str, int]] = {}
        self._turns: list[int] = []
        """Replicas, the one whose turn is next first."""

    def __repr__(self) -> str:
        return f"<SlotPool {self._held} wanted {self._wants}>"

    def total(self, name: str) -> int:
        """Return the limit in force, 0 if no replica has such a limit."""
        total = self._total.get(name)
        if total is None:
            total = min((totals[name] for totals in self._totals.values() if name in totals), default=0)
            self._total[name] = total
        return total

    def held(self, name: str) -> int:
        """Return how many slots all replicas hold."""
        return sum(self._held.get(name, {}).values())

    def free(self, name: str) -> int:
        """Return how many slots nobody holds; negative after a limit was lowered."""
        free = self._free.get(name)
        if free is None:
            free = self._free[name] = self.total(name) - self.held(name)
        return free

    # Steps

    def set_totals(self, replica: int, totals: Mapping[str, int]) -> Step:
        """Set the limits that `replica` has in force. For each new one it gets its share."""
        before = self._totals.get(replica, {})
        self._totals[replica] = totals
        self._total.clear()
        self._free.clear()
        if replica not in self._turns:
            self._turns.append(replica)
        granted: dict[str, int] = {}
        for name in totals.keys() - before.keys():
            share = min(self.total(name) // self._shares, self.free(name))
            if share > 0 and not self._held.get(name, {}).get(replica):
                self._grant(replica, name, share)
                granted[name] = share
        self._forget_unused([*self._held])
        step = self._settle()
        for name, share in granted.items():
            of_replica = step.granted.setdefault(replica, {})
            of_replica[name] = of_replica.get(name, 0) + share
        return step

    def set_wants(self, replica: int, wants: list[Want]) -> Step:
        """Replace what `replica` waits for."""
        self._wants[replica] = wants
        self._wanted.pop(replica, None)
        return self._settle()

    def give(self, replica: int, slots: Mapping[str, int]) -> Step:
        """Take back slots that `replica` held."""
        for name, count in slots.items():
            holders = self._held.get(name, {})
            holders[replica] = max(0, holders.get(replica, 0) - count)
            self._free.pop(name, None)
        self._forget_unused(slots)
        return self._settle()

    def leave(self, replica: int) -> None:
        """Take `replica` off the turns: it has died. Its slots stay held until `forget`."""
        self._wants.pop(replica, None)
        self._totals.pop(replica, None)
        self._total.clear()
        self._free.clear()
        self._wanted.pop(replica, None)
        self._told.pop(replica, None)
        if replica in self._turns:
            self._turns.remove(replica)

    def forget(self, replica: int) -> Step:
        """Free the slots of a replica that has left."""
        for holders in self._held.values():
            holders.pop(replica, None)
        self._free.clear()
        self._forget_unused([*self._held])
        return self._settle()

    # Decisions

    def _grant(self, replica: int, name: str, count: int = 1) -> None:
        holders = self._held.setdefault(name, {})
        holders[replica] = holders.get(replica, 0) + count
        self._free.pop(name, None)

    def _forget_unused(self, names: Iterable[str]) -> None:
        """Forget those limits that no replica has and nobody holds a slot of."""
        for name in names:
            if not self.held(name) and not self.total(name):
                self._held.pop(name, None)
                self._free.pop(name, None)

    def _settle(self) -> Step:
        step = Step({}, {})
        while (found := self._next()) is not None:
            replica, way = found
            for name in way:
                self._grant(replica, name)
                granted = step.granted.setdefault(replica, {})
                granted[name] = granted.get(name, 0) + 1
            self._turns.remove(replica)
            self._turns.append(replica)
        self._tell_what_to_keep(step)
        return step

    def _next(self) -> tuple[int, tuple[str, ...]] | None:
        """Return the replica whose turn it is and that can get the slots of one request, and these."""
        for replica in self._turns:
            for want in self._wants.get(replica, ()):
                if want.requests <= 0:
                    continue
                for way in want.ways:
                    for name in way:
                        if self.free(name) <= 0:
                            break
                    else:
                        want.requests -= 1
                        if not want.requests:
                            self._wanted.pop(replica, None)
                        return replica, way
        return None

    def _tell_what_to_keep(self, step: Step) -> None:
        wanting: dict[str, int] = {}
        for replica in self._wants:
            for name in self._wanted_by(replica):
                wanting[name] = wanting.get(name, 0) + 1
        contested = {name for name in wanting if self.free(name) <= 0}
        contested.update(name for name in self._held if self.free(name) < 0)
        parts = {name: self._parts(name, wanting.get(name, 0)) for name in contested}
        for replica in self._turns:
            told, wanted = self._told.setdefault(replica, {}), self._wanted_by(replica)
            keep: dict[str, int | None] = {name: None for name in told if name not in contested}
            for name in (contested & self._totals[replica].keys()) | (contested & told.keys()):
                part = parts[name][name not in wanted]
                if part != told.get(name):
                    keep[name] = told[name] = part
            if keep:
                step.keep[replica] = keep
                for name in [name for name, part in keep.items() if part is None]:
                    del told[name]

    def _wanted_by(self, replica: int) -> frozenset[str]:
        """Return the names of the slots that a replica waits for."""
        wanted = self._wanted.get(replica)
        if wanted is None:
            wants = [want for want in self._wants.get(replica, ()) if want.requests > 0]
            wanted = self._wanted[replica] = frozenset(name for want in wants for way in want.ways for name in way)
        return wanted

    def _parts(self, name: str, wanting: int) -> tuple[int, int]:
        """Return how many contested slots a replica that wants some may keep after their requests, and another."""
        total = max(0, self.total(name))
        return (total // wanting, 0) if wanting else (0, total // max(1, len(self._turns)))
