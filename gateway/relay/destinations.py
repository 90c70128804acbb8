"""Destinations, the values that all exchanges of one route share, and the clean-up of settings that are no longer in force."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from gateway.admission.queues import LaneName, Queue
from gateway.config import BackendLimits, Settings
from gateway.relay.route import Route
from gateway.telemetry.exchange import CHAT
from gateway.telemetry.metrics import RouteMetrics
from gateway.upstream.backend import Backend


class Destination:
    """What all exchanges of one tier, or of one embedding model, on one backend share, looked up once."""

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
        """Of the settings that it is made of."""
        self.fallback = fallback
        """Where the tier lets requests go that `backend` cannot serve."""
        self.backend = backend
        self.queues = queues
        self.limits = limits
        self.metrics = metrics
        names = (
            route.tier.encode(),
            route.backend.encode(),
            route.model.encode(),
        )  # printable ASCII: gateway.config sees to it
        self.header_lines = b"x-gateway-tier: %b\r\nx-gateway-backend: %b\r\nx-gateway-model: %b\r\n" % names


class SettingsSnapshot(NamedTuple):
    """What counted once."""

    settings: Settings
    backends: dict[str, Backend]


def _has_route(settings: Settings, route: Route, endpoint: str) -> bool:
    if endpoint != CHAT:
        item = settings.embeddings.get(route.tier)
        return item is not None and (item.backend, item.model) == (route.backend, route.model)
    tier = settings.tiers.get(route.tier)
    return tier is not None and tier.models.get(route.backend) == route.model


CHECK_SECONDS = 0.5
"""How late the end of the last request may be noticed."""


class GenerationCleanup:
    """`oldest` tells the generation of the oldest request that is under way, and the present one where there is none."""

    def __init__(self, oldest: Callable[[], int]) -> None:
        self._oldest = oldest
        self._leaving: dict[int, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<GenerationCleanup of generations {sorted(self._leaving)}>"

    def add(self, generation: int, clean_up: Callable[[], None]) -> None:
        """Call `clean_up` once no request of this generation, or of one before, is left."""
        self._leaving[generation] = clean_up
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """No request is left: clean up what there is."""
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
