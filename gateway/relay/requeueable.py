"""The relay of a request that the roll-out may move to another backend while it is queued."""

from msgspec import structs

from gateway.admission.scheduler import Transfer
from gateway.relay.base import MOST_BYTES_PER_TOKEN, SMALLEST_CONTEXT, Relay
from gateway.relay.destinations import Destination
from gateway.relay.in_flight import Requeueable
from gateway.relay.requests import ChatRequest


class RequeueableRelay(Relay):
    """One exchange that follows the roll-out: `Requeueable` as long as no failover chose its backend."""

    _request: ChatRequest

    __slots__ = ()

    @property
    def request(self) -> ChatRequest:
        return self._request

    @property
    def destination(self) -> Destination:
        """The destination that the request is queued for or runs at."""
        return self._destination

    @property
    def follows_rollout(self) -> bool:
        """True if the roll-out chose the request's backend, and not a failover."""
        return self._failover is None or not self._failover.has_left

    def as_requeueable(self) -> Requeueable | None:
        return self if self.follows_rollout else None

    @property
    def is_queued(self) -> bool:
        return self._ticket.is_queued

    def can_be_served_by(self, destination: Destination) -> bool:
        """Return whether the model at `destination` can serve the request, as far as is known."""
        model, backend = destination.route.model, destination.backend
        if self._lane == "vision" and backend.lacks(model, "vision"):
            return False
        return self._request.size <= MOST_BYTES_PER_TOKEN * SMALLEST_CONTEXT or not self._is_longer_than(
            backend.context_length(model)
        )

    def falls_back_from(self, destination: Destination) -> bool:
        """Let the fallback serve the queued request if `destination` accepts none now. Return whether it does.

        A new request for `destination` would be served there too. If the request is queued for the
        fallback's backend already, it keeps its place.
        """
        fallback, backend, model = destination.fallback, destination.backend, destination.route.model
        if fallback is None or not backend.is_restrained or not backend.availability.accepts_none(model, self._lane):
            return False
        other = self._context.destination(fallback, self.workload).backend
        if other.availability.refuses_all(fallback.model, self._lane):
            return False
        if other is not self._backend:
            self._ticket.refuse(backend.availability.error(model, self._lane))
            self._retarget(destination)
            self._move_to(destination)
        return True

    def requeue_on(self, destination: Destination) -> Transfer:
        """Retarget the queued request; `destination` has to accept the transfer at once.

        The request is rendered for the new backend when it gets a slot there.
        """
        self._retarget(destination)
        self._move_to(destination)
        self._ticket.prompt = self._prompt() if destination.backend.admission.affinity is not None else None
        return self._ticket.transfer(self._backend.admission, destination.queues[self._lane], self._claim())

    def _follow_rollout(self, destination: Destination) -> Destination:
        """Return the destination where the roll-out would send the request now.

        The roll-out may have changed while the request had a slot, and no request may join the
        queue of a backend that its tier has left.
        """
        other = self._context.requeue_target(self) if self.follows_rollout else None
        if other is None:
            return destination
        self._move_to(other)
        return other

    def _move_to(self, destination: Destination) -> None:
        self._moved = True
        # The route is the roll-out's choice, for the log and for the guard.
        self._request = structs.replace(self._request, route=destination.route)
        if self._failover is not None:
            self._failover.destination = destination
