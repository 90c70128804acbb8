"""Failover: where a request goes after a failed attempt. Decides; awaits nothing.

Theory of operation. An attempt is a request sent to a server. A request has at most `MAX_ATTEMPTS`
of them. From one attempt to the next, it goes:

1. to another server of the same backend, if this one sent nothing back (except perhaps the head of
   a stream), answered with a 5xx, is full, lacks the model, or was ejected because it hangs;
2. to another backend, if the tier has a fallback and this backend is down, is full, lacks the
   model, was ejected, or failed before its first token;
3. back to the front of the queue that it came from, if it met a server that was gone after it had
   waited there or while the others are busy, if its server was about to leave the backend
   (`upstream/server_names.py`), or if it leaves a server that hangs while the others are busy.

If the first attempt reached a server, the second one is a retry and needs room in the backend's
retry budget. A retry away from a server that gets no new requests (its circuit is open, or it was
ejected) needs no room: no more requests follow than were in flight there.

A pooled connection of a server that dies looks stale, so the request is sent to that server once
more, on a new connection. If that fails too before a byte has come, both tries together count as
one attempt.
"""

from gateway.admission.limits import LaneName
from gateway.admission.ticket import Ticket
from gateway.errors import (
    BackendUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    ServerHangs,
    UpstreamError,
)
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.telemetry.exchange import CHAT, Meter
from gateway.upstream.failures import (
    MISSING,
    SERVER_FAULTS,
    UNRESPONSIVE,
    UNSENT,
    record_failure,
    record_outlier,
)
from gateway.upstream.outlier_detection import HANG
from gateway.upstream.server import Server

MAX_ATTEMPTS = 2
"""Servers that are tried for one request. Each try may cost GPU time."""


class Failover:
    """Failover state of one request from its first failure on. `destination` is the current one."""

    __slots__ = ("_context", "_first_failure", "_is_free", "_lane", "_reason", "destination", "returns_to_queue")

    def __init__(self, context: RelayContext, destination: Destination, lane: LaneName) -> None:
        self._context = context
        self.destination = destination
        self._lane = lane
        self._is_free = False
        """True if the second attempt needs no room in the retry budget."""
        self._first_failure: GatewayError | None = None
        """Failure of the first backend; None while the request is still there."""
        self._reason: str | None = None
        self.returns_to_queue = False
        """True if the request goes back to the queue that it came from, before all others."""

    @property
    def has_left(self) -> bool:
        """True if the request has fallen back to a backend that the roll-out did not choose."""
        return self._first_failure is not None

    def retry_elsewhere(
        self, ticket: Ticket, server: Server, error: GatewayError, meter: Meter, *, sent: float, answered: bool
    ) -> bool:
        """Record the failed attempt at `server`, and look for another server of the backend.

        Return whether `ticket` has a slot there now, so that the request can be sent again.
        `sent` is the time at which the attempt began. `answered` is true if part of an answer had
        arrived, and not only the head of a stream.
        """
        record_outlier(server, ticket, error, sent)
        reason = self._reason = record_failure(
            self.destination.backend, self.destination.route.model, server, error, sent
        )
        if meter.met_stale and reason is not None and not answered:
            meter.attempts -= 1
        if reason is None or meter.attempts >= MAX_ATTEMPTS or meter.first_piece is not None:
            return False
        self._is_free = _costs_nothing(reason, meter) or self._gets_no_more(server, ticket)
        if not self._may_retry(sent):
            return False
        if not answered and ticket.reassign():
            self._count_retry(reason, sent)
            return True
        if self._may_wait_again(ticket, server, reason, answered) and self._fallback() is None:
            server.circuit.mark_suspect(reason)
            self._count_retry(reason, sent)
            self.returns_to_queue = True
        return False

    def _may_wait_again(self, ticket: Ticket, server: Server, reason: str, answered: bool) -> bool:
        """Return whether a request that failed at `server` may wait for a slot once more."""
        if reason not in UNSENT:
            return server.is_leaving and not answered
        model = self.destination.route.model
        return ticket.has_waited or any(
            other is not server and other.serves(model) and other.is_up() for other in self.destination.backend.servers
        )

    def leave(self, ticket: Ticket, server: Server, meter: Meter) -> bool:
        """Let a request leave `server`, which hangs, if another server or the fallback can serve it.

        `ticket` then has a slot on another server, or `destination_after` leads to the fallback, or
        back to the queue if the other servers are busy.
        """
        if meter.attempts - meter.met_stale >= MAX_ATTEMPTS or meter.first_piece is not None or self.has_left:
            return False
        if not ticket.reassign() and self._fallback() is None:
            if self.destination.backend.availability.accepts_none(self.destination.route.model, self._lane):
                return False
            self.returns_to_queue = True
        if meter.met_stale:
            meter.attempts -= 1
        self._is_free, self._reason = True, HANG
        return True

    def count_move(self, now: float) -> None:
        """Count that a request that has left a server that hangs is sent to another one of the backend."""
        self._count_retry(HANG, now)

    def destination_after(self, failure: GatewayError, meter: Meter) -> Destination:
        """Return the destination to queue at after `failure`.

        Raises:
            GatewayError: there is none; this is what the client gets.
        """
        if self.returns_to_queue:
            self.returns_to_queue = False
            if isinstance(failure, ServerHangs):
                self._count_retry(HANG, self._context.clock())
            return self.destination
        if self._first_failure is not None:
            raise _client_error(self._first_failure, failure)
        left, other = self.destination, self._fallback()
        if meter.attempts >= MAX_ATTEMPTS or meter.first_piece is not None or not _may_fall_back(failure):
            raise failure
        if other is None:
            if (
                meter.attempts
                or not isinstance(failure, BackendUnavailable)
                or left.backend.availability.refuses_all(left.route.model, self._lane)
            ):
                raise failure
            return left  # the backend is only full for a while, or fails: the request waits for it, or tries it
        if meter.attempts and self._reason is not None:
            now = self._context.clock()
            if not self._may_retry(now):
                raise failure
            self._count_retry(self._reason, now)
        # A traceback would hold the frames, and the frames hold this object.
        self._first_failure = failure.with_traceback(None)
        self.destination = other
        self._context.metrics.fallbacks.labels(left.route.tier, left.route.backend, other.route.backend).inc()
        return other

    def _fallback(self) -> Destination | None:
        """Return the destination that the tier falls back to, unless it is down or hangs."""
        route = self.destination.fallback
        other = None if route is None else self._context.destination(route, CHAT)  # only chats have fallbacks
        return None if other is None or other.backend.availability.refuses_all(other.route.model, self._lane) else other

    def _gets_no_more(self, server: Server, ticket: Ticket) -> bool:
        """Return whether `server` gets no new requests like this one now, but for one on trial."""
        if server.is_leaving:
            return True
        if server.circuit.is_open or ticket.placement is None:
            return server.circuit.is_open
        gate = ticket.placement.gate
        return not (gate.allows() if self.destination.fallback is None else gate.accepts())

    def _may_retry(self, now: float) -> bool:
        return self._is_free or self.destination.backend.budget.has_room(now)

    def _count_retry(self, reason: str, now: float) -> None:
        """Count a second attempt, wherever it goes, and charge the budget for it."""
        backend, metrics = self.destination.backend, self._context.metrics
        if not self._is_free:
            backend.budget.spend(now)
        metrics.upstream_errors.labels(backend.name, reason).inc()
        metrics.retries.labels(backend.name, reason).inc()


def _costs_nothing(reason: str, meter: Meter) -> bool:
    """Return whether a second attempt adds no load: the first one costs no server anything, or no more."""
    return reason in (MISSING, UNRESPONSIVE) or (reason in UNSENT and not meter.met_stale)


def _may_fall_back(failure: GatewayError) -> bool:
    """Return whether another backend may do better.

    A full queue or a timeout is the gateway's own decision, and not a reason to burden another
    backend.
    """
    if isinstance(failure, UpstreamError):
        return failure.reason in SERVER_FAULTS
    return isinstance(failure, BackendUnavailable | ModelNotFound)


def _client_error(first: GatewayError, second: GatewayError) -> GatewayError:
    """Return the more helpful of two backends' failures.

    That the second backend cannot serve such a request does not concern the client.
    """
    if isinstance(second, InvalidRequest | ModelNotFound):
        return first
    if isinstance(first, BackendUnavailable):
        if isinstance(second, UpstreamError):
            return first
        if isinstance(second, BackendUnavailable):
            second.retry_after = max(first.retry_after or 0, second.retry_after or 0)
    return second
