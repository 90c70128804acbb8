"""Reconfiguration while requests run: build, probe, swap, and clean up what is no longer used."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from gateway.api.auth import ApiKeys
from gateway.api.endpoint import Endpoint
from gateway.api.model_names import ModelNames
from gateway.api.named_keys import NamedKeys
from gateway.api.operations import Operations
from gateway.config import Settings
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destinations, GenerationCleanup
from gateway.relay.discovery import Discovery
from gateway.relay.in_flight import InFlight
from gateway.rollout.controller import RolloutController
from gateway.rollout.gpu_switch import GpuSwitcher
from gateway.rollout.guard import RolloutGuard
from gateway.rollout.migration import QueueMigration
from gateway.rollout.preflight.check import Preflight
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.metrics import Label, Metrics
from gateway.telemetry.recorder import ExchangeRecorder
from gateway.upstream.backend import Backend
from gateway.upstream.backends import Backends
from gateway.upstream.health_checks import HealthChecks
from gateway.upstream.learned_limits import LearnedLimits


class Reconfiguration:
    """Applies new settings in one step between two requests. Those in flight keep what they have.

    A backend whose servers differ is rebuilt, and probed before any request goes there. Once the
    last request that began under the old settings has ended, what only those settings needed is
    released.
    """

    def __init__(
        self,
        *,
        backends: Backends,
        learned_limits: LearnedLimits,
        health: HealthChecks,
        destinations: Destinations,
        discovery: Discovery,
        in_flight: InFlight,
        context: RelayContext,
        controller: RolloutController,
        gpu: GpuSwitcher,
        migration: QueueMigration,
        guard: RolloutGuard | None,
        preflight: Preflight,
        endpoints: Sequence[Endpoint[Any]],
        operations: Operations,
        metrics: Metrics,
        recorder: ExchangeRecorder,
        log: ExchangeLog,
        keys: ApiKeys,
        named_keys: NamedKeys | None,
    ) -> None:
        self._backends = backends
        self._learned_limits = learned_limits
        self._health = health
        self._destinations = destinations
        self._discovery = discovery
        self._context = context
        self._controller = controller
        self._gpu = gpu
        self._migration = migration
        self._guard = guard
        self._preflight = preflight
        self._endpoints = endpoints
        self._operations = operations
        self._metrics = metrics
        self._recorder = recorder
        self._log = log
        self._keys = keys
        self._named_keys = named_keys
        self._cleanup = GenerationCleanup(lambda: in_flight.oldest_generation(destinations.generation))

    async def apply(self, settings: Settings) -> None:
        """Put `settings` in force, as far as `config.compare` lets them change.

        If it raises, nothing has changed.
        """
        with ExitStack() as undo:
            backends = self._build(settings, undo)
            await self._health.probe_new(settings, backends)
            undo.pop_all()
        before, generation = self._destinations.settings, self._destinations.generation
        leaving = [backend for backend in self._backends.current.values() if backend not in backends.values()]
        self._swap(settings, backends)
        for backend in leaving:
            self._migration.abandon(backend)
        self._cleanup.add(generation, lambda: self._retire(generation, before, leaving))

    async def close(self) -> None:
        await self._cleanup.close()

    def _build(self, settings: Settings, undo: ExitStack) -> dict[str, Backend]:
        in_force = list(self._backends.current.values())
        backends = self._backends.built_for(settings)
        for backend in backends.values():
            if backend not in in_force:
                undo.callback(self._drop, backend)
        return backends

    def _swap(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Change everything that depends on the settings.

        It awaits nothing, so no request sees only half of the change.
        """
        if settings.log_level != self._destinations.settings.log_level:
            self._log.change_level(settings.log_level)
        if settings.api_keys != self._destinations.settings.api_keys:
            self._keys.change(key.get_secret_value() for key in settings.api_keys)
        self._backends.change(settings, backends)
        self._destinations.change(settings, backends)
        self._context.change(settings)
        self._learned_limits.restore()
        self._gpu.prepare_reload(settings)
        self._controller.reload(settings)
        self._gpu.finish_reload()
        if self._guard is not None:
            self._guard.reload(settings)
        self._discovery.change(settings)
        model_names = ModelNames(settings, self._discovery)
        if self._named_keys is not None:
            self._named_keys.change(model_names)
        for endpoint in self._endpoints:
            endpoint.change(model_names)
        self._health.change(settings, self._backends.current)
        self._operations.change(settings, model_names)
        self._preflight.change()

    def _retire(self, generation: int, before: Settings, leaving: Sequence[Backend]) -> None:
        """Release what only the settings `before`, of `generation`, needed: they are unused now."""
        snapshot = self._destinations.past.pop(generation)
        for backend in leaving:
            self._drop(backend)
        needed = {backend for later in self._destinations.past.values() for backend in later.backends.values()}
        for backend in {*snapshot.backends.values()}.intersection(self._health.unused) - needed:
            self._health.forget(backend)
        for backend in self._backends.current.values():
            backend.admission.forget(self._destinations.queues)
        self._recorder.settle()
        in_use = _labels(self._destinations.settings)
        for label, names in _labels(before).items():
            for name in names - in_use[label]:
                self._metrics.forget(label, name)

    def _drop(self, backend: Backend) -> None:
        self._health.forget(backend)
        self._backends.drop(backend)


def _labels(settings: Settings) -> dict[Label, set[str]]:
    """Return the label values that metrics may have under `settings`."""
    return {"tier": {*settings.tiers, *settings.embeddings, *settings.rerankers}, "backend": {*settings.backends}}
