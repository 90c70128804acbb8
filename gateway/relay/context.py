"""What a relay is given: the client's side, the request, where it goes, and what all relays share."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gateway.admission.queues import Queue
from gateway.config import Settings
from gateway.relay.destinations import Destination, SettingsSnapshot, _has_route
from gateway.relay.in_flight import Sweep
from gateway.relay.route import Route, fallback_route
from gateway.telemetry.exchange import CHAT, LANES, Exchange
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend

T = TypeVar("T")


class RelayContext:
    """What all relays share. Built in the loop that they run in."""

    def __init__(
        self,
        settings: Settings,
        backends: dict[str, Backend],
        metrics: Metrics,
        on_exchange: Callable[[Exchange], None],
        gateway_id: bytes,
    ) -> None:
        self.generation = 0
        self.past: dict[int, SettingsSnapshot] = {}
        """By generation: what requests that began under it may still need."""
        self.backends = backends
        self.metrics = metrics
        self.on_exchange = on_exchange
        self.gateway_id = gateway_id
        self._take(settings)
        self.loop = asyncio.get_running_loop()
        self.clock = time.monotonic
        self.sweep = Sweep(self.loop, self.clock)
        self.requeue_target: Callable[[Any], Destination | None] = lambda relay: None
        """Where a chat's relay, which gets in line once more, is to wait instead; None: where it was."""
        self._thread = ThreadPoolExecutor(1, "schemas")
        self._destinations: dict[Route, Destination] = {}

    def in_thread(self, work: Callable[..., T], *words: object) -> "asyncio.Future[T]":
        """Work that would hold up everybody else, one after the other: threads of Python take turns on one processor anyway."""
        return self.loop.run_in_executor(self._thread, work, *words)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, settings: Settings) -> None:
        self.settings = settings
        self.max_text_body = settings.max_text_body
        self.commit_after = settings.commit_after
        self.heartbeat = settings.heartbeat
        self.waiting_note = settings.waiting_note

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """From now on `settings` count, with these `backends`: one step, between two requests."""
        self.past[self.generation] = SettingsSnapshot(self.settings, dict(self.backends))
        self.generation += 1
        self._take(settings)
        self.backends.clear()
        self.backends.update(backends)
        self._destinations.clear()

    def destination(self, route: Route, endpoint: str) -> Destination:
        found = self._destinations.get(route)
        if found is None:
            generation = self._generation_of(route, endpoint)
            settings, backends = self.past.get(generation) or SettingsSnapshot(self.settings, self.backends)
            backend, tier = backends[route.backend], settings.tiers[route.tier] if endpoint == CHAT else None
            limits = backend.settings.limits if tier is None else settings.limits_for(route.tier, route.backend)
            metrics = self.metrics.route(route.tier, route.backend, endpoint)
            queues = backend.queues(
                LANES[endpoint], route.tier, route.model, None if tier is None else tier.limits.get(route.backend)
            )
            fallback = None if tier is None else fallback_route(tier, route.backend)
            found = Destination(route, backend, queues, limits, metrics, fallback, generation)
            if generation == self.generation:
                self._destinations[route] = found
        return found

    def _generation_of(self, route: Route, endpoint: str) -> int:
        """The last whose settings have `route`: a request may be on its way to where nothing leads any more."""
        if not self.past or _has_route(self.settings, route, endpoint):
            return self.generation
        return next(
            (
                number
                for number in sorted(self.past, reverse=True)
                if _has_route(self.past[number].settings, route, endpoint)
            ),
            self.generation,
        )

    @property
    def queues(self) -> set[Queue]:
        """Those that a request of now may stand in."""
        return {queue for found in self._destinations.values() for queue in found.queues.values()}
