"""One request's way through admission, with the waiting and the time-outs that `admission.py` leaves out."""

import asyncio
from typing import Self

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import Queue, QueueEntry, ServerSlots
from gateway.admission.scheduler import Admission, Transfer, WaitEstimate
from gateway.errors import GatewayError, QueueTimeout

LATE_SECONDS = 0.02
"""Not worth a timer: the end of a wait may come so early."""


class Ticket(QueueEntry):
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
        QueueEntry.__init__(self, queue, claim)
        self._admission = admission
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Ticket {'in flight' if self.placement else 'in line' if self.is_queued else 'gone'} {self.queue!r}>"

    @property
    def server(self) -> ServerSlots:
        """Where it runs."""
        assert self.placement is not None
        return self.placement.server

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
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self._time_out, seconds, now, self.queue.load_seconds(now)
        )

    def _time_out(self, seconds: float, since: float, loaded_before: float) -> None:
        waited = self._admission.now() - since
        left = self.queue.time_left(waited, self.queue.load_seconds(since + waited) - loaded_before)
        if self.claim.timeout is not None:
            left = min(left, self.claim.timeout - waited)
        if left > LATE_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(left, self._time_out, seconds, since, loaded_before)
            return
        retry_after = self._admission.retry_after(self.queue)
        is_clients = self.claim.timeout is not None and self.claim.timeout <= self.queue.queue_timeout
        within = "in the time that the client gave" if is_clients else f"within {seconds:g} seconds"
        self.refuse(QueueTimeout(f"No slot came free {within}. Try again later.", retry_after=retry_after))

    def refuse(self, error: GatewayError) -> None:
        """End the wait in line with `error`."""
        if self.is_queued and self._waiter is not None and not self._waiter.done():
            self._admission.leave(self)
            self._waiter.set_exception(error)

    def admitted(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def transfer(self, admission: Admission, queue: Queue, claim: Claim) -> Transfer:
        """What `admission.take_over` takes, which has to follow at once; `claim` differs in its timeout alone."""
        source, self._admission, self.claim = self._admission, admission, claim
        return Transfer(self, source, queue)

    def transferred(self) -> None:
        self._timer.cancel()
        self._start_clock()

    @property
    def has_waited(self) -> bool:
        """There was no slot at once."""
        return self._waiter is not None

    def reassign(self) -> bool:
        """To another server, keeping a slot throughout; False when none has room."""
        return self._admission.reassign(self)

    def first_token(self) -> None:
        """The first piece of the answer came."""
        self._admission.first_token(self)

    def wait_estimate(self) -> WaitEstimate:
        return self._admission.wait_estimate(self)
