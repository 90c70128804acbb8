"""Destinations: what all exchanges of one route share, by generation of the settings.

A destination is built once for each route and looked up by each request. Settings that are no
longer in force stay available to the requests that began under them.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gateway.admission.limits import LaneName
from gateway.admission.queues import Queue
from gateway.config import BackendLimits, Settings
from gateway.relay.route import Route, fallback_route
from gateway.telemetry.exchange import CHAT, EMBEDDINGS, LANES, NONE, WORKLOADS, Workload
from gateway.telemetry.metrics import Metrics, RouteMetrics
from gateway.upstream.backend import Backend

CHECK_SECONDS = 0.5
"""Interval at which `GenerationCleanup` checks whether the last request of a generation has
ended."""


class Destination:
    """Backend, queues, limits and metrics that all exchanges of one route share.

    A route is a tier, an embedding model, a reranker or a discovered model, on a backend.
    """

    __slots__ = ("backend", "fallback", "generation", "header_lines", "limits", "metrics", "queues", "route")

    def __init__(
        self,
        route: Route,
        backend: Backend,
        queues: dict[LaneName, Queue],
        limits: BackendLimits,
        metrics: RouteMetrics,
        fallback: Route | None,
        generation: int = 0,
    ) -> None:
        self.route = route
        self.generation = generation
        """Generation of the settings that it was built from."""
        self.fallback = fallback
        """Route to the backend that serves the tier when `backend` cannot; None without a
        fallback."""
        self.backend = backend
        self.queues = queues
        self.limits = limits
        self.metrics = metrics
        # Printable ASCII: `gateway.config` rejects other names.
        names = (route.tier.encode(), route.backend.encode(), route.model.encode())
        self.header_lines = b"x-gateway-tier: %b\r\nx-gateway-backend: %b\r\nx-gateway-model: %b\r\n" % names


class SettingsSnapshot(NamedTuple):
    """Settings that were in force earlier, and the backends that belong to them."""

    settings: Settings
    backends: dict[str, Backend]


class Destinations:
    """The destination of each route, under the last settings that have the route.

    Settings have generations. Requests that began under an earlier generation may still need its
    destinations, so `past` keeps a snapshot of each one until `GenerationCleanup` has seen its last
    request end.
    """

    def __init__(self, settings: Settings, backends: dict[str, Backend], metrics: Metrics) -> None:
        self.settings = settings
        self.backends = backends
        """Backends in force, by name. The dict is changed in place, since others hold it."""
        self.generation = 0
        self.past: dict[int, SettingsSnapshot] = {}
        self._metrics = metrics
        self._destinations: dict[Workload, dict[Route, Destination]] = {
            workload: {} for workload in dict.fromkeys(WORKLOADS.values())
        }

    def __repr__(self) -> str:
        return f"<Destinations of generation {self.generation}, {len(self.past)} earlier ones in use>"

    def get(self, route: Route, workload: Workload) -> Destination:
        found = self._destinations[workload].get(route)
        if found is None:
            found = self._build(route, workload)
            if found.generation == self.generation:
                self._destinations[workload][route] = found
        return found

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Put `settings` and `backends` in force, in one step between two requests."""
        self.past[self.generation] = SettingsSnapshot(self.settings, dict(self.backends))
        self.generation += 1
        self.settings = settings
        self.backends.clear()
        self.backends.update(backends)
        for known in self._destinations.values():
            known.clear()

    def forget(self, routes: Iterable[Route]) -> None:
        """Drop the destinations of routes that no longer lead to a model. Their requests keep them."""
        for route in routes:
            for known in self._destinations.values():
                known.pop(route, None)

    @property
    def queues(self) -> set[Queue]:
        """The queues that new requests may enter."""
        return {
            queue
            for known in self._destinations.values()
            for destination in known.values()
            for queue in destination.queues.values()
        }

    def _build(self, route: Route, workload: Workload) -> Destination:
        generation = self._generation_of(route, workload)
        settings, backends = self.past.get(generation) or SettingsSnapshot(self.settings, self.backends)
        backend = backends[route.backend]
        metrics = self._metrics.route(route.tier, route.backend, workload)
        if workload != CHAT or route.tier == NONE:
            queues = backend.queues(LANES[workload], route.tier, route.model, None)
            return Destination(route, backend, queues, backend.settings.limits, metrics, None, generation)
        tier = settings.tiers[route.tier]
        queues = backend.queues(LANES[workload], route.tier, route.model, tier.limits.get(route.backend))
        limits = settings.limits_for(route.tier, route.backend)
        fallback = fallback_route(tier, route.backend, settings.on_gpu)
        return Destination(route, backend, queues, limits, metrics, fallback, generation)

    def _generation_of(self, route: Route, workload: Workload) -> int:
        """Return the last generation that has `route`: the settings may have removed it since."""
        if not self.past or _has_route(self.settings, route, workload):
            return self.generation
        for number in sorted(self.past, reverse=True):
            if _has_route(self.past[number].settings, route, workload):
                return number
        return self.generation


def _has_route(settings: Settings, route: Route, workload: Workload) -> bool:
    if route.tier == NONE and route.backend in settings.backends and settings.backends[route.backend].discover:
        return True
    if workload != CHAT:
        item = (settings.embeddings if workload == EMBEDDINGS else settings.rerankers).get(route.tier)
        return item is not None and (item.backend, item.model) == (route.backend, route.model)
    tier = settings.tiers.get(route.tier)
    return tier is not None and tier.models.get(route.backend) == route.model


class GenerationCleanup:
    """Releases what earlier settings needed, once the last request that began under them has ended.

    `oldest` returns the oldest generation that a request in flight uses, or the current one without
    requests.
    """

    def __init__(self, oldest: Callable[[], int]) -> None:
        self._oldest = oldest
        self._leaving: dict[int, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<GenerationCleanup of generations {sorted(self._leaving)}>"

    def add(self, generation: int, clean_up: Callable[[], None]) -> None:
        """Call `clean_up` once no request of this or an earlier generation is in flight."""
        self._leaving[generation] = clean_up
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Clean up every generation at once: no request is in flight any longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for generation in sorted(self._leaving):
            self._leaving.pop(generation)()

    async def _run(self) -> None:
        while self._leaving:
            await asyncio.sleep(CHECK_SECONDS)
            oldest = self._oldest()
            for generation in sorted(number for number in self._leaving if number < oldest):
                self._leaving.pop(generation)()
