"""The relays in flight, and the one timer that checks their deadlines."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator
from typing import Protocol

from gateway.admission.model_state import ModelState
from gateway.admission.scheduler import Transfer
from gateway.relay.destinations import Destination
from gateway.relay.frozen_models import ModelRequest
from gateway.relay.requests import ChatRequest
from gateway.relay.route import Route
from gateway.relay.stalls import Attempt, eject_stalled
from gateway.upstream.backend import Backend

CHECK_SECONDS = 0.05
"""Interval of the deadline checks, and so the longest delay until a passed deadline is noticed."""

SWEEP_SECONDS = 1.0
"""Interval at which stalled servers are looked for, and requests leave those that hang."""

_log = logging.getLogger(__name__)


class RelayInFlight(ModelRequest, Protocol):
    """A relay as the rest of the gateway sees it while it runs."""

    check_at: float
    """Time, on the clock of `InFlight`, from which `check_deadlines` is worth calling."""

    @property
    def route(self) -> Route: ...
    @property
    def generation(self) -> int: ...
    @property
    def is_stranded(self) -> bool: ...

    def check_deadlines(self, now: float) -> None:
        """End the relay if a deadline has passed; send a keep-alive if one is due."""

    def leave_queue(self, backend: Backend) -> None:
        """Stop waiting for `backend`, which is down, if a fallback can serve the request."""

    def leave_hung_server(self) -> None:
        """Go elsewhere if the request waits for a server that was ejected because it hangs."""

    def attempt(self) -> Attempt | None:
        """Return the request's present attempt, as evidence of whether its server hangs."""

    def as_requeueable(self) -> Requeueable | None:
        """Return the relay for queue migration, or None if it does not follow the roll-out."""


class Requeueable(RelayInFlight, Protocol):
    """A relay whose request can move to the queue of another backend."""

    @property
    def request(self) -> ChatRequest: ...
    @property
    def destination(self) -> Destination: ...
    @property
    def is_queued(self) -> bool: ...

    def can_be_served_by(self, destination: Destination) -> bool:
        """Return whether the model at `destination` can serve the request, as far as is known."""

    def falls_back_from(self, destination: Destination) -> bool:
        """Let the fallback serve the queued request if `destination` accepts none now. Return whether it does."""

    def requeue_on(self, destination: Destination) -> Transfer:
        """Retarget the queued request; `destination` has to accept the transfer at once."""


class InFlight:
    """The relays in flight. One timer checks their deadlines; it runs only while there are relays.

    Iterate over `list(in_flight)` if the loop's body may end a relay.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._next_sweep = -math.inf
        self._relays: set[RelayInFlight] = set()
        self.watch: Callable[[float], None] = lambda now: None
        """Called with the time at each check of the deadlines."""
        self.discard: Callable[[RelayInFlight], None] = self._relays.discard
        """Remove a relay that has ended. Bound once, so the hot path makes one call."""

    def __repr__(self) -> str:
        return f"<InFlight {len(self._relays)}>"

    def __iter__(self) -> Iterator[RelayInFlight]:
        return iter(self._relays)

    def __len__(self) -> int:
        return len(self._relays)

    def add(self, relay: RelayInFlight) -> None:
        self._relays.add(relay)
        if self._timer is None:
            self._timer = self._loop.call_later(CHECK_SECONDS, self._check)

    def send_again(self, state: ModelState) -> None:
        """Return the requests for a model that have no answer yet to the queue, in their order."""
        for relay in sorted(self._relays, key=lambda relay: relay.arrived, reverse=True):
            if relay.model_state is state:
                relay.send_again()

    def oldest_generation(self, default: int) -> int:
        """Return the oldest generation of settings that a relay uses; `default` without relays."""
        return min((relay.generation for relay in self._relays), default=default)

    def count_pending(self, tier: str, backend: str, since: float) -> int:
        """Count the pending requests of `tier` on `backend` that arrived since `since`.

        Requests that wait for servers which are all down do not count: their answers are not near.
        """
        return sum(
            relay.arrived >= since
            and relay.route.tier == tier
            and relay.route.backend == backend
            and not relay.is_stranded
            for relay in self._relays
        )

    def _check(self) -> None:
        now = self._clock()
        for relay in [relay for relay in self._relays if relay.check_at <= now]:
            try:
                relay.check_deadlines(now)
            except Exception:  # the deadlines of all other relays depend on this timer
                _log.exception("the deadline check of a relay failed; its deadlines are no longer enforced")
                relay.check_at = math.inf
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._sweep(now)
        try:
            self.watch(now)
        except Exception:
            _log.exception("the check for frozen models failed")
        self._timer = self._loop.call_later(CHECK_SECONDS, self._check) if self._relays else None

    def _sweep(self, now: float) -> None:
        try:
            eject_stalled([attempt for relay in self._relays if (attempt := relay.attempt()) is not None], now)
            for relay in list(self._relays):
                relay.leave_hung_server()  # those that could not when it was ejected
        except Exception:  # the timer has to go on
            _log.exception("the search for stalled servers failed")
