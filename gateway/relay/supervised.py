"""One exchange as the rest of the gateway sees it while it runs.

The roll-out, the registry of relays in flight and the watch over frozen models and hung servers
read it, and interrupt it, through the methods of `SupervisedRelay`.
"""

import math

from gateway.admission.model_state import ModelState
from gateway.errors import GatewayError, ModelUnloaded, ServerHangs, UpstreamError
from gateway.relay.failover import Failover
from gateway.relay.in_flight import Requeueable
from gateway.relay.route import Route
from gateway.relay.stalls import Attempt
from gateway.relay.state import RelayState
from gateway.upstream.backend import Backend
from gateway.upstream.failures import UNRESPONSIVE
from gateway.upstream.outlier_detection import OutlierDetector
from gateway.upstream.server import Server


class SupervisedRelay(RelayState):
    """The view for `gateway/relay/in_flight.py` and `gateway/relay/frozen_models.py`."""

    __slots__ = ()

    @property
    def route(self) -> Route:
        """The route that the roll-out chose."""
        return self._request.route

    @property
    def arrived(self) -> float:
        """Time of arrival, on the clock that all relays share."""
        return self._meter.arrived

    @property
    def generation(self) -> int:
        """Generation of the settings that the request's destination belongs to."""
        return self._destination.generation

    @property
    def is_stranded(self) -> bool:
        """True if the request is queued for servers that are all down."""
        return (
            self._ticket.is_queued
            and self._backend.is_restrained
            and self._backend.availability.is_down(self._destination.route.model)
        )

    @property
    def model_state(self) -> ModelState | None:
        """State of the model that the request is in flight for; None if the server loads no models."""
        placement = self._ticket.placement
        return None if placement is None else placement.state

    @property
    def place(self) -> tuple[Backend, Server]:
        """Backend and server of the request in flight."""
        assert self._server is not None
        return self._backend, self._server

    @property
    def sent_at(self) -> float:
        """Time at which the attempt in flight began."""
        return self._ticket.started

    @property
    def first_token_timeout(self) -> float:
        return self._limits.first_token_timeout

    @property
    def may_be_silent(self) -> bool:
        """True if the engine may hold back output for a long time."""
        return False

    @property
    def patience(self) -> float:
        """Seconds in which a first token is to be expected."""
        state = self.model_state
        return math.inf if state is None else state.activity.patience(self._lane, self._request.size)

    def last_heard(self, now: float) -> float:
        """Return the time of the last piece of the answer, or `now` if the client does not read."""
        if self._client.paused:
            return now
        return -math.inf if self._meter.first_piece is None else self._meter.last_piece

    def as_requeueable(self) -> Requeueable | None:
        return None

    # Interrupt

    def cut_off(self, error: GatewayError) -> None:
        """End the relay with `error`: the gateway stops, or `rollback_cutoff` has passed."""
        self._cancel_scope.end(error)

    def leave_queue(self, backend: Backend) -> None:
        """Stop waiting for `backend` if it accepts no requests and a fallback is up."""
        fallback, model = self._destination.fallback, self._destination.route.model
        if fallback is None or backend is not self._backend or not backend.availability.accepts_none(model, self._lane):
            return
        other = self._context.destination(fallback, self.workload).backend
        if not other.availability.refuses_all(fallback.model, self._lane):
            self._ticket.refuse(backend.availability.error(model, self._lane))

    def leave_hung_server(self) -> None:
        """Go elsewhere if the request waits for the first token of a server that hangs."""
        server, ticket = self._server, self._ticket
        if not self._backend.is_restrained or server is None or ticket.placement is None or self._client.paused:
            return
        detector = self._detector(server)
        if self._meter.first_piece is not None or not detector.is_hung or ticket.started > detector.ejected_at:
            return  # one that was sent after the ejection is on trial
        if self._failover is None:
            self._failover = Failover(self._context, self._destination, self._lane)
        if self._cancel_scope.may_interrupt and self._failover.leave(ticket, server, self._meter):
            self._meter.last_piece = self._context.clock()  # its time for a first token begins anew
            self.check_at = 0.0
            self._cancel_scope.interrupt(ServerHangs())

    def leave_dead_server(self) -> bool:
        """End the attempt at a server whose circuit is open, as if its connection had broken.

        Return False if the server is not known to be dead, or nothing can be interrupted.
        """
        server = self._server
        if server is None or not server.circuit.is_open:
            return False
        if not self._cancel_scope.interrupt(UpstreamError(UNRESPONSIVE)):
            return False
        self.check_at = math.inf  # until the next attempt
        return True

    def send_again(self, *, is_first: bool = True) -> bool:
        """Send the request again, from the queue on, if its answer has not begun.

        There it comes before all others, or with `is_first` false, after them. Return whether the
        request is sent again. Only requests to servers that load models can be.
        """
        if not self.awaits_first_token or not self._cancel_scope.interrupt(ModelUnloaded()):
            return False
        self._goes_first = is_first
        return True

    # Evidence of whether its server hangs

    def attempt(self) -> Attempt | None:
        """Return the request's present attempt, or None if it is not at a server that can be judged by it."""
        server, meter = self._server, self._meter
        if server is None or server.residency is not None or self._ticket.placement is None or self._client.paused:
            return None
        return Attempt(
            server,
            self._detector(server),
            self._is_streamed_upstream,
            meter.first_piece is None,
            self._ticket.is_trial,
            meter.last_piece,
            self._request.size,
            self._limits.first_token_timeout,
            self._request.claim,
            self._has_alternative,
        )

    def _detector(self, server: Server) -> OutlierDetector:
        return server.gate(self._destination.route.model, self._lane)

    def _has_alternative(self) -> bool:
        """Return whether another server, or the fallback, could serve the request now."""
        model, fallback = self._destination.route.model, self._destination.fallback
        if any(
            other is not self._server and other.serves(model) and other.is_up() and self._detector(other).accepts()
            for other in self._backend.servers
        ):
            return True
        if fallback is None:
            return False
        backend = self._context.destination(fallback, self.workload).backend
        return not backend.availability.refuses_all(fallback.model, self._lane)
