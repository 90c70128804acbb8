"""Waits in a queue: `Retry-After`, estimates for queued requests, and requests that need not wait at all.

They follow from the median of the service times. It is never a reason to refuse a request that finds a
free slot, because then an outdated median would never be renewed.

Pure: the caller passes the time, in seconds of the admission's clock.
"""

import math
import random
from typing import NamedTuple

from gateway.admission.queues import BATCH_SHARE, Queue, QueueEntry
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout

RETRY_SECONDS_UNKNOWN = 5


class WaitEstimate(NamedTuple):
    """Estimate for a queued request: its position from 1 on, and the seconds until it runs.

    `seconds` is None if no service time is known.
    """

    position: int
    seconds: float | None
    is_loading: bool = False
    """True if the model is being loaded, which comes first."""


def retry_after(queue: Queue, now: float) -> int:
    """Return the `Retry-After` for a refused request: whole seconds, from 1 to 60.

    This is the estimated wait behind all queued requests, randomised so that clients do not
    come back all at once.
    """
    seconds = queue.estimated_wait(queue.waiting)
    if queue.closure.is_closed:
        left = queue.closure.seconds_left(now)
        seconds = left if seconds is None else seconds + (left or 0.0)
    if seconds is None:
        return RETRY_SECONDS_UNKNOWN
    return min(60, max(1, math.ceil(seconds * random.uniform(0.8, 1.2))))


def wait_estimate(ticket: QueueEntry, now: float) -> WaitEstimate:
    """Return the estimate for a queued ticket."""
    queue = ticket.queue
    ahead = queue.position_of(ticket, now)
    seconds = queue.estimated_wait(ahead)
    if queue.closure.is_closed:
        left = queue.closure.seconds_left(now)
        return WaitEstimate(ahead + 1, None if left is None else left + (seconds or 0.0))
    return WaitEstimate(ahead + 1, seconds, queue.is_loading)


def refuse_hopeless(ticket: QueueEntry, now: float) -> None:
    """Refuse a request that found no slot and for which there is nothing to wait for.

    Raises:
        ModelNotFound: no server has the model.
        QueueFull: `max_queue` requests are waiting already.
        QueueTimeout: the client's deadline cannot be met from this position in the queue.
    """
    queue, claim = ticket.queue, ticket.claim
    if not any(placement.server.serves(queue.model) for placement in queue.placements):
        raise ModelNotFound("The model behind this name is not present on its backend.", param="model")
    if queue.room.is_full and not queue.has_slot_but_no_model() and not queue.expects_slot():
        raise QueueFull(
            "The gateway's queue for this backend is full. Try again later.", retry_after=retry_after(queue, now)
        )
    service = None if claim.timeout is None else queue.service_seconds()
    if service is None or claim.timeout is None:
        return
    ahead = queue.fair_queue(claim).count_ahead_of_new(claim.key)
    if claim.is_batch:
        ahead += min(queue.interactive.count, (BATCH_SHARE - 1) * (ahead + 1))
    closed = queue.closure.seconds_left(now) or 0.0
    if closed + service * (queue.rounds(ahead) + 1) > claim.timeout:
        raise QueueTimeout(
            f"The queue is too long for an answer within {claim.timeout:g} seconds. "
            "Try again later, or allow more time.",
            retry_after=retry_after(queue, now),
        )
