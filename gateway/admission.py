"""Which request may go upstream now, at which server, and which waits. Synchronous; waiting happens in `Ticket`.

How it works. A backend has servers; a server has slots, and fewer of them for requests with images (the vision lane). A request is
served at the least busy server that has its model and a free slot. When there is none it waits in line; each time a slot comes free, the
lines are asked in order of arrival and the first request that can run there runs: a text does not wait behind an image that cannot go yet.

Invariants: a server never has more in flight than its slots; a ticket is in line, in flight, or gone, and only `Admission` moves it.
"""

import asyncio
import heapq
import math
import random
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from gateway.errors import ModelNotFound, QueueFull, QueueTimeout

Lane = Literal["text", "vision"]

RETRY_SECONDS_UNKNOWN = 5
SERVICE_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """`slots` per server; `max_queue` waiting per backend; `queue_timeout` in seconds."""

    slots: int
    max_queue: int
    queue_timeout: float


class Station(ABC):
    """A server as admission sees it: what runs there, and what could."""

    __slots__ = ("running", "running_vision")

    def __init__(self) -> None:
        self.running = 0
        self.running_vision = 0

    @abstractmethod
    def serves(self, model: str) -> bool:
        """Whether `model`, by its name there, is to be had here."""

    @abstractmethod
    def is_up(self) -> bool:
        """False only for a server known to be away."""


@dataclass(eq=False, slots=True)
class Line:
    """A lane of a backend: who waits, and how long service took of late."""

    limits: LaneLimits
    waiting: dict["Ticket", None] = field(default_factory=dict)
    service_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=SERVICE_SAMPLES))


class Admission:
    """The slots and the line of one backend."""

    def __init__(self, stations: Sequence[Station], text: LaneLimits, vision: LaneLimits, clock: Callable[[], float]) -> None:
        self._stations = stations
        self._lines: dict[Lane, Line] = {"text": Line(text), "vision": Line(vision)}
        self._clock = clock
        self._arrivals = 0

    def __repr__(self) -> str:
        return f"<Admission {self.running('text')}+{self.running('vision')} in flight, {self.waiting('text')}+{self.waiting('vision')} waiting>"

    def running(self, lane: Lane) -> int:
        vision = sum(station.running_vision for station in self._stations)
        return vision if lane == "vision" else sum(station.running for station in self._stations) - vision

    def waiting(self, lane: Lane) -> int:
        return len(self._lines[lane].waiting)

    def retry_after(self, lane: Lane) -> int:
        """Whole seconds, 1 to 60: the line's length times the median service time, spread so that clients do not come back at once."""
        line = self._lines[lane]
        if not line.service_seconds:
            return RETRY_SECONDS_UNKNOWN
        slots = line.limits.slots * len(self._stations)
        seconds = (len(line.waiting) + 1) * statistics.median(line.service_seconds) / slots * random.uniform(0.8, 1.2)
        return min(60, max(1, math.ceil(seconds)))

    def ticket(self, model: str, lane: Lane) -> "Ticket":
        """A place for one request: `async with admission.ticket(...) as station`."""
        self._arrivals += 1
        return Ticket(self, model, lane, self._arrivals)

    def _pick(self, ticket: "Ticket", besides: Station | None = None) -> Station | None:
        """The least busy server that can take `ticket` now; one that is down only where no other has the model."""
        best: Station | None = None
        is_any_up = False
        for station in self._stations:
            if station is besides or not station.serves(ticket.model):
                continue
            up = station.is_up()
            if up and not is_any_up:
                is_any_up, best = True, None
            if up is is_any_up and self._has_room(station, ticket.lane) and (best is None or station.running < best.running):
                best = station
        return best

    def _has_room(self, station: Station, lane: Lane) -> bool:
        if lane == "vision" and station.running_vision >= self._lines["vision"].limits.slots:
            return False
        return station.running < self._lines["text"].limits.slots

    def enter(self, ticket: "Ticket") -> bool:
        """Admit `ticket` or put it in line; True when it was admitted.

        Raises:
            ModelNotFound: no server has the model.
            QueueFull: `max_queue` requests wait already.
        """
        line = self._lines[ticket.lane]
        station = self._pick(ticket)
        if station is not None:
            self._start(ticket, station)
            return True
        if not any(station.serves(ticket.model) for station in self._stations):
            raise ModelNotFound("The model behind this name is not present on its backend.", param="model")
        if len(line.waiting) >= line.limits.max_queue:
            raise QueueFull("The gateway's queue for this backend is full. Try again later.", retry_after=self.retry_after(ticket.lane))
        line.waiting[ticket] = None
        return False

    def move(self, ticket: "Ticket") -> bool:
        """Give `ticket`, which is in flight, a slot at another server; False when none has room."""
        assert ticket.station is not None
        other = self._pick(ticket, besides=ticket.station)
        if other is None:
            return False
        self._stop(ticket)
        self._start(ticket, other)
        self._assign()
        return True

    def leave(self, ticket: "Ticket") -> None:
        """The request is over, or has left the line."""
        if ticket.station is not None:
            if ticket.is_served:
                self._lines[ticket.lane].service_seconds.append(self._clock() - ticket.started)
            self._stop(ticket)
            self._assign()
        else:
            self._lines[ticket.lane].waiting.pop(ticket, None)

    def refresh(self) -> None:
        """A server came up or changed its models: see who can run now."""
        self._assign()

    def expired(self, ticket: "Ticket") -> QueueTimeout:
        seconds = self._lines[ticket.lane].limits.queue_timeout
        return QueueTimeout(f"No slot came free within {seconds:g} seconds. Try again later.", retry_after=self.retry_after(ticket.lane))

    def queue_timeout(self, lane: Lane) -> float:
        return self._lines[lane].limits.queue_timeout

    def _start(self, ticket: "Ticket", station: Station) -> None:
        ticket.station = station
        ticket.started = self._clock()
        station.running += 1
        station.running_vision += ticket.lane == "vision"

    def _stop(self, ticket: "Ticket") -> None:
        assert ticket.station is not None
        ticket.station.running -= 1
        ticket.station.running_vision -= ticket.lane == "vision"
        ticket.station = None

    def _assign(self) -> None:
        text, vision = self._lines["text"].waiting, self._lines["vision"].waiting
        if not (text or vision):
            return
        chosen = []
        for ticket in heapq.merge(text, vision, key=lambda ticket: ticket.arrival):
            if not any(self._has_room(station, "text") for station in self._stations):
                break
            station = self._pick(ticket)
            if station is not None:
                self._start(ticket, station)
                chosen.append(ticket)
        for ticket in chosen:
            del self._lines[ticket.lane].waiting[ticket]
            ticket.admitted()


class Ticket:
    """One request's place: waits for a slot on entering, gives it back on leaving, however that comes about.

    Raises, on entering:
        QueueFull, QueueTimeout, ModelNotFound
    """

    __slots__ = ("_admission", "_waiter", "arrival", "is_served", "lane", "model", "started", "station")

    def __init__(self, admission: Admission, model: str, lane: Lane, arrival: int) -> None:
        self._admission = admission
        self._waiter: asyncio.Future[None] | None = None
        self.model = model
        self.lane = lane
        self.arrival = arrival
        self.station: Station | None = None
        self.started = 0.0
        self.is_served = False
        """The answer came whole: only then does its time tell how long service takes."""

    async def __aenter__(self) -> Self:
        if not self._admission.enter(self):
            try:
                await self._wait()
            except BaseException:
                self._admission.leave(self)
                raise
        return self

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(self._admission.queue_timeout(self.lane), self._expire)
        try:
            await self._waiter
        finally:
            timer.cancel()

    def _expire(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._admission.expired(self))

    def admitted(self) -> None:
        assert self._waiter is not None
        if not self._waiter.done():
            self._waiter.set_result(None)

    def move(self) -> bool:
        """To another server, keeping a slot throughout; False when none has room."""
        return self._admission.move(self)

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave(self)
