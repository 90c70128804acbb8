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
from collections.abc import Iterable, Iterator, Mapping

from gateway.admission.scheduler import Admission, Mover
from gateway.errors import BackendUnavailable
from gateway.relay.chat import ChatRelay
from gateway.relay.context import Surroundings
from gateway.relay.destinations import Destination
from gateway.relay.route import Route
from gateway.rollout.canary import bucket_of
from gateway.rollout.state import BUCKETS, Change, Line, Position, backends_of
from gateway.telemetry.exchange import CHAT
from gateway.upstream.backend import Backend

Left = tuple[str, str]
"""A tier, and a backend that it has left."""

_log = logging.getLogger("gateway.rollout")


class Moves:
    """Moves what is under way when `lines`, the tiers by name, have changed."""

    def __init__(self, shared: Surroundings, lines: Mapping[str, Line]) -> None:
        self._shared = shared
        self._lines = lines
        self._ends: dict[Left, asyncio.TimerHandle] = {}

    def follow(self, change: Change) -> int:
        """How many of those in line have moved."""
        for tier, move in change.tiers.items():
            self._end_later(tier, move.before, move.after, change.is_rollback)
        return self._lead(relay for relay in self._relays() if relay.is_in_line and relay.request.route.tier in change.tiers)

    def leave(self, backend: Backend) -> int:
        """`backend`, which other settings have replaced, is dead: who waits for it goes where his tier is now. How many did."""
        waiting = (relay for relay in self._relays() if relay.is_in_line and relay.destination.backend is backend)
        return self._lead(relay for relay in waiting if backend.is_away(relay.destination.route.model))

    def _lead(self, relays: Iterable[ChatRelay]) -> int:
        ways: dict[Route, Destination | None] = {}
        found: list[tuple[float, int, ChatRelay, Destination]] = []
        for relay in relays:
            destination = self.lead(relay, ways)
            if destination is not None:
                found.append((relay.arrived, len(found), relay, destination))
        found.sort()
        crowds: dict[Admission, list[Mover]] = {}
        for *_, relay, destination in found:
            crowds.setdefault(destination.backend.admission, []).append(relay.follow(destination))
        for admission, movers in crowds.items():
            admission.take_over(movers)
        if found:
            _log.info("requests that waited and follow the roll-out: %d", len(found))
        return len(found)

    def lead(self, relay: ChatRelay, ways: dict[Route, Destination | None] | None = None) -> Destination | None:
        """Where `relay`, which is in line or gets in line once more, is to wait; None: where it was. `ways` are known already."""
        if relay.request.route.tier not in self._lines:
            return None
        route = self._route(relay)
        ways = {} if ways is None else ways
        if route not in ways:
            ways[route] = self._way(route)
        destination = ways[route]
        if destination is None or destination.backend is relay.destination.backend or not relay.fits(destination):
            return None
        return destination

    def close(self) -> None:
        for timer in self._ends.values():
            timer.cancel()
        self._ends.clear()

    def _relays(self) -> Iterator[ChatRelay]:
        """Those that a roll-out moves, where it has led them."""
        return (relay for relay in self._shared.sweep.live if isinstance(relay, ChatRelay) and relay.is_led)

    def _route(self, relay: ChatRelay) -> Route:
        """What the roll-out chooses for its conversation now."""
        request = relay.request
        line = self._lines[request.route.tier]
        if line.canary is None:
            return line.route
        bucket = request.bucket
        return line.side(bucket_of(request.key_id, request.session, request.chat, BUCKETS) if bucket is None else bucket)

    def _way(self, route: Route) -> Destination | None:
        """None: nobody there can serve, as far as is known."""
        destination = self._shared.destination(route, CHAT)
        backend = destination.backend
        is_served = not backend.is_away(route.model) and any(server.serves(route.model) for server in backend.servers)
        return destination if is_served else None

    # The end of those who stay

    def _end_later(self, tier: str, before: Position, after: Position, is_rollback: bool) -> None:
        here = set(backends_of(after))
        for backend in here:
            self._forget((tier, backend))
        cutoff = self._shared.settings.rollback_cutoff
        if is_rollback and cutoff is not None:
            now = self._shared.clock()
            for backend in set(backends_of(before)) - here:
                self._forget((tier, backend))
                self._ends[tier, backend] = self._shared.loop.call_later(cutoff, self._end, (tier, backend), now)

    def _forget(self, left: Left) -> None:
        timer = self._ends.pop(left, None)
        if timer is not None:
            timer.cancel()

    def _end(self, left: Left, rolled_back: float) -> None:
        """End those of a tier that were at a backend at the time of the rollback, and still are."""
        del self._ends[left]
        relays = [
            relay for relay in self._relays() if (relay.request.route.tier, relay.destination.route.backend) == left and relay.arrived <= rolled_back
        ]
        for relay in relays:
            relay.cut_off(BackendUnavailable("The gateway has moved to another model backend, and this one had its time. Try again.", retry_after=1))
        if relays:
            seconds = self._shared.clock() - rolled_back
            _log.warning("requests of tier %s cut off at backend %s, %.3g s after the rollback: %d", *left, seconds, len(relays))
