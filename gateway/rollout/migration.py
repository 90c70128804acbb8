"""Requests follow the roll-out: those in line go to the backend that serves their tier now, those that run may be given so many seconds.

Theory of operation. `follow` is told of each change in the step that makes it, so no request sees the new state beside an old line. Of the tiers that
have moved, who waits for a backend that would not be chosen for him any more is put into the other one's line, in the order of arrival; admission
lets in who can run there. Three kinds of request stay where they are:

1. one that has its slot: it runs, or is about to;
2. one that the other backend cannot serve, as far as is known: it is away, lacks the model, has no eyes for images, or too short a context;
3. one that a failure has led elsewhere (`forwarding.py`): the roll-out did not choose for it.

Where other settings have put another server in a backend's place, who waits for the old one is served there; when that is dead, he goes where his
tier is now (`leave`).

A request that had its slot when the roll-out moved, met a server that was gone, and gets in line once more, does so where it would go now (`lead`).

Once `rollback_cutoff` has passed after a rollback, who is still at a backend that the tier has left ends with an error, running or in line.
Not, when the tier has come back there meanwhile; and a second rollback gives its own time. A failure that leads a request to that
backend afterwards is none of this.
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
from gateway.rollout.canary import canary_bucket
from gateway.rollout.state import BUCKETS, Assignment, Change, TierRoute, backends_of
from gateway.telemetry.exchange import CHAT
from gateway.upstream.backend import Backend

Departure = tuple[str, str]
"""A tier, and a backend that it has left."""

_log = logging.getLogger("gateway.rollout")


class QueueMigration:
    """Moves what is under way when `lines`, the tiers by name, have changed."""

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
        """How many of those in line have moved."""
        for tier, move in change.tiers.items():
            self._schedule_cutoff(tier, move.before, move.after, change.is_rollback)
        return self._migrate(
            relay for relay in self._relays() if relay.is_queued and relay.request.route.tier in change.tiers
        )

    def abandon(self, backend: Backend) -> int:
        """`backend`, which other settings have replaced, is dead: who waits for it goes where his tier is now. How many did."""
        waiting = (relay for relay in self._relays() if relay.is_queued and relay.destination.backend is backend)
        return self._migrate(relay for relay in waiting if backend.is_down(relay.destination.route.model))

    def on_backend_down(self, backend: Backend) -> None:
        """Let requests that wait for `backend` be served elsewhere: by its replacement, or by a fallback."""
        if backend not in self._destinations.backends.values():
            self.abandon(backend)
        for relay in list(self._in_flight):
            relay.leave_queue(backend)

    def _migrate(self, relays: Iterable[Requeueable]) -> int:
        known: dict[Route, Destination | None] = {}
        found: list[tuple[float, int, Requeueable, Destination]] = []
        for relay in relays:
            destination = self.target_for(relay, known)
            if destination is not None:
                found.append((relay.arrived, len(found), relay, destination))
        found.sort()
        crowds: dict[Admission, list[Transfer]] = {}
        for *_, relay, destination in found:
            crowds.setdefault(destination.backend.admission, []).append(relay.requeue_on(destination))
        for admission, movers in crowds.items():
            admission.accept_transfers(movers)
        if found:
            _log.info("requests that waited and follow the roll-out: %d", len(found))
        return len(found)

    def target_for(
        self, relay: Requeueable, known: dict[Route, Destination | None] | None = None
    ) -> Destination | None:
        """Where `relay`, which is in line or gets in line once more, is to wait; None: where it was. `ways` are known already."""
        if relay.request.route.tier not in self._tiers:
            return None
        route = self._route(relay)
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
        """Those that a roll-out moves, where it has led them."""
        found = (relay.as_requeueable() for relay in self._in_flight)
        return (relay for relay in found if relay is not None)

    def _route(self, relay: Requeueable) -> Route:
        """What the roll-out chooses for its conversation now."""
        request = relay.request
        tier_route = self._tiers[request.route.tier]
        if tier_route.canary is None:
            return tier_route.route
        bucket = request.bucket
        return tier_route.side(
            canary_bucket(request.key_id, request.session, request.chat, BUCKETS) if bucket is None else bucket
        )

    def _target(self, route: Route) -> Destination | None:
        """None: nobody there can serve, as far as is known."""
        destination = self._destinations.get(route, CHAT)
        backend = destination.backend
        is_served = not backend.is_down(route.model) and any(server.serves(route.model) for server in backend.servers)
        return destination if is_served else None

    # The end of those who stay

    def _schedule_cutoff(self, tier: str, before: Assignment, after: Assignment, is_rollback: bool) -> None:
        here = set(backends_of(after))
        for backend in here:
            self._forget((tier, backend))
        cutoff = self._destinations.settings.rollback_cutoff
        if is_rollback and cutoff is not None:
            now = self._clock()
            for backend in set(backends_of(before)) - here:
                self._forget((tier, backend))
                self._cutoffs[tier, backend] = self._loop.call_later(cutoff, self._cut_off, (tier, backend), now)

    def _forget(self, left: Departure) -> None:
        timer = self._cutoffs.pop(left, None)
        if timer is not None:
            timer.cancel()

    def _cut_off(self, left: Departure, rolled_back: float) -> None:
        """End those of a tier that were at a backend at the time of the rollback, and still are."""
        del self._cutoffs[left]
        relays = [
            relay
            for relay in self._relays()
            if (relay.request.route.tier, relay.destination.route.backend) == left and relay.arrived <= rolled_back
        ]
        for relay in relays:
            relay.cut_off(
                BackendUnavailable(
                    "The gateway has moved to another model backend, and this one had its time. Try again.",
                    retry_after=1,
                )
            )
        if relays:
            seconds = self._clock() - rolled_back
            _log.warning(
                "requests of tier %s cut off at backend %s, %.3g s after the rollback: %d", *left, seconds, len(relays)
            )
