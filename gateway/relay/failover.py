"""What a failed attempt means: to the server's circuit, and for where the request may go next. Decides; awaits nothing.

An attempt is a request sent to a server. There are `MAX_ATTEMPTS` of them at most, whatever the way from one to the next:

1. to another server of the same backend: nothing came back from this one but perhaps the head of a stream, or it is full, or lacks the model;
2. to the other backend, where the tier allows one: this one is away, full, lacks the model, or broke before its first piece;
3. back into the line that it came from: it had waited there, and met a server that was gone.

Where the first attempt reached a server, the second is a retry, and has to find room in the backend's budget.

A kept connection of a server that dies looks stale, so the request would be sent to it once more, on a fresh one. Where nobody takes that, both
together are one attempt.
"""

from gateway.admission.ticket import Ticket
from gateway.errors import BackendUnavailable, GatewayError, InvalidRequest, ModelNotFound, UpstreamError
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.telemetry.exchange import CHAT, Meter
from gateway.upstream.failures import MISSING, SERVER_FAULTS, UNSENT, record_failure
from gateway.upstream.server import Server

MAX_ATTEMPTS = 2
"""Servers tried for one request; each try may cost a GPU's time."""


class Failover:
    """The way of one request from its first failure on. `destination` is where it goes now."""

    __slots__ = ("_context", "_first_failure", "_reason", "_waits_again", "destination")

    def __init__(self, context: RelayContext, destination: Destination) -> None:
        self._context = context
        self.destination = destination
        self._first_failure: GatewayError | None = None
        """Of the backend that was left; None: it still is the first."""
        self._reason: str | None = None
        self._waits_again = False

    @property
    def has_left(self) -> bool:
        """It is at another backend than the roll-out's."""
        return self._first_failure is not None

    def retry_elsewhere(
        self, ticket: Ticket, server: Server, error: GatewayError, meter: Meter, *, sent: float, answered: bool
    ) -> bool:
        """The attempt at `server` failed: whether `ticket` has a slot at another server of the backend now.

        `answered`: a part of an answer had come before, and not just the head of a stream.
        """
        reason = self._reason = record_failure(
            self.destination.backend, self.destination.route.model, server, error, sent
        )
        if meter.met_stale and reason in UNSENT:
            meter.attempts -= 1
        if reason is None or meter.attempts >= MAX_ATTEMPTS or meter.first_piece is not None:
            return False
        if not self._may_retry(reason, sent, meter):
            return False
        if not answered and ticket.reassign():
            self._count_retry(reason, sent, meter)
            return True
        if reason in UNSENT and ticket.has_waited and self._fallback() is None:
            server.circuit.mark_suspect(reason)
            self._count_retry(reason, sent, meter)
            self._waits_again = True
        return False

    def destination_after(self, failure: GatewayError, meter: Meter) -> Destination:
        """Where the request gets in line next, having left with `failure`.

        Raises:
            GatewayError: nowhere; this is what the client gets.
        """
        if self._waits_again:
            self._waits_again = False
            return self.destination
        if self._first_failure is not None:
            raise _client_error(self._first_failure, failure)
        left, other = self.destination, self._fallback()
        if meter.attempts >= MAX_ATTEMPTS or meter.first_piece is not None or not _may_fall_back(failure):
            raise failure
        if other is None:
            if meter.attempts or not isinstance(failure, BackendUnavailable) or left.backend.is_down(left.route.model):
                raise failure
            return left  # not away, but full for a while: it waits there
        if meter.attempts and self._reason is not None:
            now = self._context.clock()
            if not self._may_retry(self._reason, now, meter):
                raise failure
            self._count_retry(self._reason, now, meter)
        self._first_failure = failure.with_traceback(None)  # which holds the frames, and they this
        self.destination = other
        self._context.metrics.fallbacks.labels(left.route.tier, left.route.backend, other.route.backend).inc()
        return other

    def _fallback(self) -> Destination | None:
        """Where the tier lets it go, unless nobody is there."""
        way = self.destination.fallback
        other = None if way is None else self._context.destination(way, CHAT)  # only tiers have one
        return None if other is None or other.backend.is_down(other.route.model) else other

    def _may_retry(self, reason: str, now: float, meter: Meter) -> bool:
        return self._is_free(reason, meter) or self.destination.backend.budget.has_room(now)

    def _count_retry(self, reason: str, now: float, meter: Meter) -> None:
        """Count a second attempt, wherever it goes."""
        backend, metrics = self.destination.backend, self._context.metrics
        if not self._is_free(reason, meter):
            backend.budget.spend(now)
        metrics.upstream_errors.labels(backend.name, reason).inc()
        metrics.retries.labels(backend.name, reason).inc()

    def _is_free(self, reason: str, meter: Meter) -> bool:
        """It has cost no server anything yet."""
        return reason == MISSING or (reason in UNSENT and not meter.met_stale)


def _may_fall_back(failure: GatewayError) -> bool:
    """Another backend may do better. A full line or a time-out is the gateway's own word, and no reason to load another backend."""
    if isinstance(failure, UpstreamError):
        return failure.reason in SERVER_FAULTS
    return isinstance(failure, BackendUnavailable | ModelNotFound)


def _client_error(first: GatewayError, second: GatewayError) -> GatewayError:
    """Of the failures of two backends, the one that helps the client: that the second cannot serve the request is none of its business."""
    if isinstance(second, InvalidRequest | ModelNotFound):
        return first
    if isinstance(first, BackendUnavailable):
        if isinstance(second, UpstreamError):
            return first
        if isinstance(second, BackendUnavailable):
            second.retry_after = max(first.retry_after or 0, second.retry_after or 0)
    return second
