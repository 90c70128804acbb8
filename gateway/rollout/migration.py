"""Queue migration: queued requests follow the roll-out, and a rollback may cut running ones off.

Theory of operation. `follow` is called with each change, in the step that makes the change, so no
request sees the new state together with an old queue. In the tiers that moved, a queued request
whose backend would no longer be chosen for it is put into the queue of the new backend, in order of
arrival. Admission then admits what can run there. Four kinds of request stay where they are:

1. a request that has its slot: it runs, or is about to;
2. a request that the other backend cannot serve, as far as is known: the backend is down, or lacks
   the model, or the model takes no images or has too short a context;
3. a request that would be on the tier's fallback now, because the servers of the other backend are
   ejected: it stays if it is queued for the fallback already, and else goes there;
4. a request that a failure has sent elsewhere (`gateway/relay/failover.py`): the roll-out did not
   choose its backend.

If new settings have put another server in a backend's place, requests that are queued for the old
one are served there. If the old one is down, they go where their tier is now (`abandon`), or for a
discovered model, to the new server.

A request may have had its slot when the roll-out moved, then meet a server that is gone, and have
to queue again. It joins the queue where the roll-out would send it now (`target_for`).

Once `rollback_cutoff` has passed after a rollback, requests that are still at a backend that their
tier has left end with an error, whether running or queued. They do not if the tier has returned to
that backend in the meantime, and a second rollback sets its own cutoff. The cutoff does not apply
to a request that a failure sends to that backend afterwards.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from gateway.admission.scheduler import Admission, Transfer
from gateway.errors import BackendUnavailable
from gateway.relay.destinations import Destination, Destinations
from gateway.relay.in_flight import InFlight, Requeueable
from gateway.relay.route import Route
from gateway.rollout.assignment import BUCKETS, Assignment, Change, TierRoute, backends_of
from gateway.rollout.canary import canary_bucket
from gateway.telemetry.exchange import CHAT, NONE
from gateway.upstream.backend import Backend

Departure = tuple[str, str]
"""A tier, and the backend that it has left."""

_log = logging.getLogger(__name__)


class QueueMigration:
    """Moves queued requests when one of `tiers`, by name, has changed."""

    def __init__(
        self,
        destinations: Destinations,
        in_flight: InFlight,
        tiers: Mapping[str, TierRoute],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._destinations = destinations
        self._in_flight = in_flight
        self._tiers = tiers
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._cutoffs: dict[Departure, asyncio.TimerHandle] = {}

    def follow(self, change: Change) -> int:
        """Move queued requests after `change`; return how many moved."""
        for tier, move in change.tiers.items():
            self._schedule_cutoff(tier, move.before, move.after, change.is_rollback)
        return self._migrate(
            relay for relay in self._relays() if relay.is_queued and relay.request.route.tier in change.tiers
        )

    def abandon(self, backend: Backend) -> int:
        """Move requests away from `backend`, which new settings have replaced, if it is down.

        Return how many moved.
        """
        queued = (relay for relay in self._relays() if relay.is_queued and relay.destination.backend is backend)
        return self._migrate(relay for relay in queued if backend.availability.is_down(relay.destination.route.model))

    def on_backend_down(self, backend: Backend) -> None:
        """Let requests that are queued for `backend` be served by its replacement or a fallback.

        Requests that wait for a server of it that hangs go to another server or the fallback.
        """
        if backend not in self._destinations.backends.values():
            self.abandon(backend)
        for relay in list(self._in_flight):
            relay.leave_queue(backend)
            relay.leave_hung_server()

    def _migrate(self, relays: Iterable[Requeueable]) -> int:
        known: dict[Route, Destination | None] = {}
        found: list[tuple[float, int, Requeueable, Destination]] = []
        for relay in relays:
            destination = self.target_for(relay, known)
            if destination is not None and not relay.falls_back_from(destination):
                found.append((relay.arrived, len(found), relay, destination))
        found.sort()
        transfers: dict[Admission, list[Transfer]] = {}
        for *_, relay, destination in found:
            transfers.setdefault(destination.backend.admission, []).append(relay.requeue_on(destination))
        for admission, transferred in transfers.items():
            admission.accept_transfers(transferred)
        if found:
            _log.info("moved %d queued requests to the new backend", len(found))
        return len(found)

    def target_for(
        self, relay: Requeueable, known: dict[Route, Destination | None] | None = None
    ) -> Destination | None:
        """Return the destination that `relay`, which is queued or about to be, has to move to.

        None means that it stays. `known` has the destinations of routes that were looked up before.
        """
        tier = relay.request.route.tier
        if tier not in self._tiers and tier != NONE:
            return None
        route = relay.request.route if tier == NONE else self._route(relay)
        known = {} if known is None else known
        if route not in known:
            known[route] = self._target(route)
        destination = known[route]
        if (
            destination is None
            or destination.backend is relay.destination.backend
            or not relay.can_be_served_by(destination)
        ):
            return None
        return destination

    def close(self) -> None:
        for timer in self._cutoffs.values():
            timer.cancel()
        self._cutoffs.clear()

    def _relays(self) -> Iterator[Requeueable]:
        """Yield the relays that follow the roll-out."""
        found = (relay.as_requeueable() for relay in self._in_flight)
        return (relay for relay in found if relay is not None)

    def _route(self, relay: Requeueable) -> Route:
        """Return the route that the roll-out would choose now for the request's conversation."""
        request = relay.request
        tier_route = self._tiers[request.route.tier]
        if tier_route.canary is None:
            return tier_route.route
        bucket = request.bucket
        return tier_route.side(
            canary_bucket(request.key_id, request.session, request.chat, BUCKETS) if bucket is None else bucket
        )

    def _target(self, route: Route) -> Destination | None:
        """Return the destination of `route`, or None if no server there is known to serve it."""
        destination = self._destinations.get(route, CHAT)
        backend, model = destination.backend, route.model
        is_served = not backend.availability.is_down(model) and any(server.serves(model) for server in backend.servers)
        return destination if is_served else None

    # Cutoff after a rollback

    def _schedule_cutoff(self, tier: str, before: Assignment, after: Assignment, is_rollback: bool) -> None:
        serving = set(backends_of(after))
        for backend in serving:
            self._cancel_cutoff((tier, backend))
        cutoff = self._destinations.settings.rollback_cutoff
        if is_rollback and cutoff is not None:
            now = self._clock()
            for backend in set(backends_of(before)) - serving:
                self._cancel_cutoff((tier, backend))
                self._cutoffs[tier, backend] = self._loop.call_later(cutoff, self._cut_off, (tier, backend), now)

    def _cancel_cutoff(self, left: Departure) -> None:
        timer = self._cutoffs.pop(left, None)
        if timer is not None:
            timer.cancel()

    def _cut_off(self, left: Departure, rolled_back: float) -> None:
        """End the requests of a tier that are still at a backend since before the rollback."""
        del self._cutoffs[left]
        relays = [
            relay
            for relay in self._relays()
            if (relay.request.route.tier, relay.destination.route.backend) == left and relay.arrived <= rolled_back
        ]
        for relay in relays:
            relay.cut_off(
                BackendUnavailable(
                    "This request was cut off because its model moved to another backend. Try again.",
                    retry_after=1,
                )
            )
        if relays:
            seconds = self._clock() - rolled_back
            _log.warning(
                "cut off %d requests of tier %s on backend %s, %.3g s after the rollback", len(relays), *left, seconds
            )
