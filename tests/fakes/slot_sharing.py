"""Several replicas' admissions that share slots through a pool, with messages that take their time."""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gateway.admission.hub_limits import HubLimits, Way
from gateway.admission.limits import AdmissionLimits
from gateway.admission.scheduler import Admission
from gateway.replicas.messages import Want
from gateway.replicas.slot_pool import SlotPool, Step
from tests.fakes.admission import Clock, Server


class Replica:
    """One replica: an admission, its limits, and what is on the way to and from it."""

    def __init__(self, sharing: "Sharing", number: int, limits: AdmissionLimits, servers: Sequence[Server]) -> None:
        self.number = number
        self.sharing = sharing
        self.received = 0
        self.inbox: deque[Callable[[], None]] = deque()
        self.outbox: deque[Callable[[], None]] = deque()
        self.limits = HubLimits(self, sharing.replicas, sharing.clock.alarm)
        source = self.limits.source("backend", lambda: None)
        self.admission = Admission(servers, limits, sharing.clock, sharing.clock.alarm, source=source)
        self.limits.attach(self.admission)

    def __repr__(self) -> str:
        return f"<Replica {self.number} {self.limits}>"

    def set_totals(self, totals: Mapping[str, int]) -> None:
        self.outbox.append(lambda: self.sharing.tell(self.sharing.pool.set_totals(self.number, totals)))

    def want(self, wants: Sequence[tuple[int, list[Way]]]) -> None:
        received = self.received

        def arrive() -> None:
            if received == self.sharing.sent[self.number]:
                self.sharing.tell(self.sharing.pool.set_wants(self.number, [Want(*want) for want in wants]))

        self.outbox.append(arrive)

    def give(self, slots: Mapping[str, int]) -> None:
        self.outbox.append(lambda: self.sharing.tell(self.sharing.pool.give(self.number, slots)))

    def granted(self, slots: Mapping[str, int]) -> None:
        self.received += 1
        self.limits.granted(slots)


class Sharing:
    """Replicas 1 to `replicas` and their pool. `deliver` delivers messages in a random order of the replicas."""

    def __init__(self, replicas: int, limits: AdmissionLimits, seed: int = 0, servers: int = 1) -> None:
        self.replicas = replicas
        self.clock = Clock()
        self.pool = SlotPool(replicas)
        self.sent = dict.fromkeys(range(1, replicas + 1), 0)
        self.messages = 0
        self._random = random.Random(seed)
        self.members: dict[int, Replica] = {}
        for number in range(1, replicas + 1):
            places = [Server("m", "n") for _ in range(servers)]
            for place, server in enumerate(places):
                server.place = f"server {place}"
            self.members[number] = Replica(self, number, limits, places)

    def tell(self, step: Step) -> None:
        for number, slots in step.granted.items():
            self.sent[number] += 1
            member = self.members[number]
            member.inbox.append(partial(member.granted, slots))
        for number, keep in step.keep.items():
            member = self.members[number]
            member.inbox.append(partial(member.limits.keep, keep))

    def deliver_one(self) -> bool:
        """Deliver one message, of those at the head of their streams. Return False if there is none."""
        streams = [stream for member in self.members.values() for stream in (member.inbox, member.outbox) if stream]
        if not streams:
            return False
        self.messages += 1
        self._random.choice(streams).popleft()()
        return True

    def settle(self) -> None:
        """Deliver everything, and let time pass until nothing changes any more."""
        for _ in range(20):
            self.clock.pass_time(0.06)
            while self.deliver_one():
                self.clock.pass_time(0)
