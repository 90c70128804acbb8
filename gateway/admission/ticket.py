"""One request's way through admission, with the waiting and timeouts that `scheduler.py` omits."""

import asyncio
from typing import Self

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import Queue, QueueEntry
from gateway.admission.scheduler import Admission, Transfer
from gateway.admission.server_slots import ServerSlots
from gateway.admission.wait_estimates import WaitEstimate, retry_after, wait_estimate
from gateway.errors import GatewayError, QueueTimeout

LATE_SECONDS = 0.02
"""Tolerance of the queue timeout: a wait may end this much early, to save a further timer."""


class Ticket(QueueEntry):
    """A request's slot or position in a queue, released when the `with` block is left in any way.

        with Ticket(admission, queue, claim) as ticket:
            if ticket.placement is None:
                await ticket.wait()

    Raises, on entering:
        QueueFull, QueueTimeout, ModelNotFound
    """

    __slots__ = ("_admission", "_goes_first", "_timer", "_waiter")

    _timer: asyncio.TimerHandle

    def __init__(self, admission: Admission, queue: Queue, claim: Claim) -> None:
        QueueEntry.__init__(self, queue, claim)
        self._admission = admission
        self._goes_first: bool | None = None
        """For a request that had a slot before: whether it goes before the others in the queue."""
        self._waiter: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Ticket {'in flight' if self.placement else 'queued' if self.is_queued else 'gone'} {self.queue!r}>"

    @property
    def server(self) -> ServerSlots:
        """Server that the request runs on. The request must be in flight."""
        assert self.placement is not None
        return self.placement.server

    def __enter__(self) -> Self:
        if self._goes_first is None:
            self._admission.enter(self)
        else:
            self._admission.enter_again(self, is_first=self._goes_first)
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self)

    def enter_again(self, goes_first: bool) -> None:
        """Make the ticket that of a request that had a slot before. It is not refused."""
        self._goes_first = goes_first

    async def wait(self) -> None:
        """Wait for a slot.

        Time during which the model loads, or the backend is closed, does not count toward
        `queue_timeout`. It does count toward the client's own timeout.

        Raises:
            QueueTimeout: no slot came free within `queue_timeout` seconds, or within the client's
                timeout.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        self._start_timer()
        try:
            await self._waiter
        finally:
            self._timer.cancel()

    def _start_timer(self) -> None:
        longest = self.queue.queue_timeout
        seconds = longest if self.claim.timeout is None else min(longest, self.claim.timeout)
        now = self._admission.now()
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self._on_timeout, seconds, now, self.queue.load_seconds(now)
        )

    def _on_timeout(self, seconds: float, since: float, loaded_before: float) -> None:
        waited = self._admission.now() - since
        loading = max(0.0, self.queue.load_seconds(since + waited) - loaded_before)  # a server may have left
        left = self.queue.time_left(waited, loading)
        if self.claim.timeout is not None:
            left = min(left, self.claim.timeout - waited)
        if left > LATE_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(left, self._on_timeout, seconds, since, loaded_before)
            return
        is_client_timeout = self.claim.timeout is not None and self.claim.timeout <= self.queue.queue_timeout
        limit = "the client's deadline (x-gateway-timeout)" if is_client_timeout else f"{seconds:g} seconds"
        seconds = retry_after(self.queue, self._admission.now())
        self.refuse(QueueTimeout(f"No slot came free within {limit}. Try again later.", retry_after=seconds))

    def refuse(self, error: GatewayError) -> None:
        """End the wait in the queue with `error`."""
        if self.is_queued and self._waiter is not None and not self._waiter.done():
            self._admission.leave(self)
            self._waiter.set_exception(error)

    def admitted(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def transfer(self, admission: Admission, queue: Queue, claim: Claim) -> Transfer:
        """Return the transfer of this ticket to `queue` of `admission`.

        Pass it to `admission.accept_transfers` immediately afterwards. `claim` replaces the
        ticket's claim and may differ from it only in its timeout.
        """
        source, self._admission, self.claim = self._admission, admission, claim
        return Transfer(self, source, queue)

    def transferred(self) -> None:
        self._timer.cancel()
        self._start_timer()

    @property
    def enters_again(self) -> bool:
        """True if the request had a slot before."""
        return self._goes_first is not None

    @property
    def has_waited(self) -> bool:
        """True if there was no free slot on arrival."""
        return self._waiter is not None

    def reassign(self) -> bool:
        """Move to another server, holding a slot throughout. Return False if no server has room."""
        return self._admission.reassign(self)

    def first_token(self) -> None:
        """Record the first token of the answer."""
        self._admission.first_token(self)

    def wait_estimate(self) -> WaitEstimate:
        return wait_estimate(self, self._admission.now())
