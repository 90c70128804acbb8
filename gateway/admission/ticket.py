"""One request's way through admission, with the waiting and the time-outs that `admission.py` leaves out."""

import asyncio
from typing import Self

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import Entry, Queue, Station
from gateway.admission.scheduler import Admission, Mover, Outlook
from gateway.errors import GatewayError, QueueTimeout

LATE_SECONDS = 0.02
"""Not worth a timer: the end of a wait may come so early."""


class Ticket(Entry):
    """One request's place: gives its slot, or its place in line, back on leaving the block, however that comes about.

        with Ticket(admission, queue, claim) as ticket:
            if ticket.place is None:
                await ticket.wait()

    Raises, on entering:
        QueueFull, QueueTimeout, ModelNotFound
    """

    __slots__ = ("_admission", "_timer", "_waiter")

    _timer: asyncio.TimerHandle

    def __init__(self, admission: Admission, queue: Queue, claim: Claim) -> None:
        Entry.__init__(self, queue, claim)
        self._admission = admission
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Ticket {'in flight' if self.place else 'in line' if self.is_in_line else 'gone'} {self.queue!r}>"

    @property
    def station(self) -> Station:
        """Where it runs."""
        assert self.place is not None
        return self.place.station

    def __enter__(self) -> Self:
        self._admission.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self)

    async def wait(self) -> None:
        """Until it has a slot.

        Raises:
            QueueTimeout: none came free in `queue_timeout` seconds, those aside in which the model was loading, or in the time that the client gives.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        self._start_clock()
        try:
            await self._waiter
        finally:
            self._timer.cancel()

    def _start_clock(self) -> None:
        longest = self.queue.queue_timeout
        seconds = longest if self.claim.timeout is None else min(longest, self.claim.timeout)
        now = self._admission.now()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, seconds, now, self.queue.load_seconds(now))

    def _expire(self, seconds: float, since: float, loaded_before: float) -> None:
        waited = self._admission.now() - since
        left = self.queue.time_left(waited, self.queue.load_seconds(since + waited) - loaded_before)
        if self.claim.timeout is not None:
            left = min(left, self.claim.timeout - waited)
        if left > LATE_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(left, self._expire, seconds, since, loaded_before)
            return
        retry_after = self._admission.retry_after(self.queue)
        is_clients = self.claim.timeout is not None and self.claim.timeout <= self.queue.queue_timeout
        within = "in the time that the client gave" if is_clients else f"within {seconds:g} seconds"
        self.refuse(QueueTimeout(f"No slot came free {within}. Try again later.", retry_after=retry_after))

    def refuse(self, error: GatewayError) -> None:
        """End the wait in line with `error`."""
        if self.is_in_line and self._waiter is not None and not self._waiter.done():
            self._admission.leave(self)
            self._waiter.set_exception(error)

    def admitted(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def mover(self, admission: Admission, queue: Queue, claim: Claim) -> Mover:
        """What `admission.take_over` takes, which has to follow at once; `claim` differs in its timeout alone."""
        source, self._admission, self.claim = self._admission, admission, claim
        return Mover(self, source, queue)

    def taken_over(self) -> None:
        self._timer.cancel()
        self._start_clock()

    @property
    def has_waited(self) -> bool:
        """There was no slot at once."""
        return self._waiter is not None

    def move(self) -> bool:
        """To another server, keeping a slot throughout; False when none has room."""
        return self._admission.move(self)

    def spoke(self) -> None:
        """The first piece of the answer came."""
        self._admission.spoke(self)

    def outlook(self) -> Outlook:
        return self._admission.outlook(self)
