"""The composition root: builds each part once, passes it in, and owns the life of the process."""

import asyncio
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from gateway import __version__
from gateway.api.admin_auth import AdminAccess
from gateway.api.auth import ApiKeys
from gateway.api.chat import ChatEndpoint
from gateway.api.cors import Cors
from gateway.api.embeddings import EmbeddingEndpoint
from gateway.api.endpoint import Endpoint, Receive, Scope, Send
from gateway.api.model_names import ModelNames
from gateway.api.operations import Operations
from gateway.api.paths import CHAT_PATHS, EMBEDDING_PATHS
from gateway.api.request_headers import reject_loop, request_id_of
from gateway.api.routes import build as build_ops
from gateway.api.routes import build_metrics_port
from gateway.chat.images import ImageNormalizer
from gateway.config import BackendSettings, Settings, is_same_place
from gateway.config.reload import Reloader
from gateway.errors import GatewayError, ShuttingDown
from gateway.relay.base import Relay
from gateway.relay.context import RelayContext
from gateway.relay.destinations import GenerationCleanup
from gateway.rollout.controller import RolloutController
from gateway.rollout.guard import RolloutGuard
from gateway.rollout.migration import QueueMigration
from gateway.rollout.preflight.check import Preflight
from gateway.rollout.state import Rollout
from gateway.state_file import StateFile
from gateway.telemetry.exchange import Exchange
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.metrics import Label, Metrics
from gateway.upstream.backend import Backend, build
from gateway.upstream.health_checks import HealthChecks
from gateway.upstream.learned_limits import persist_learned_limits
from gateway.upstream.model_loader import ModelLoader

SETTLE_SECONDS = 0.2
"""How late an exchange that is over may show in the log; a scrape of the metrics does not wait."""


class Gateway:
    """The whole gateway as one ASGI application; `async with` it while it serves."""

    def __init__(self, settings: Settings, log: ExchangeLog) -> None:
        self._over: list[Exchange] = []
        self._settling: asyncio.TimerHandle | None = None
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self._log = log
        self._metrics = Metrics(registry, __version__, self.settle)
        self._backends = build(settings.backends.values(), settings.ollama_num_parallel)
        self._state = StateFile(settings.state_file)
        persist_learned_limits(self._state, self._backends, settings.ollama_num_parallel)
        self.rollout = Rollout(settings)
        self._controller = controller = RolloutController(
            self.rollout, self._state, self._metrics, settings.rollback_to
        )
        gateway_id = os.urandom(8).hex().encode()
        keys = ApiKeys(key.get_secret_value() for key in settings.api_keys)
        model_names = ModelNames(settings)
        self._context = RelayContext(settings, self._backends, self._metrics, self._on_exchange, gateway_id)
        for backend in self._backends.values():
            backend.on_away = self._leave_lines
        self._migration = QueueMigration(self._context, self.rollout.tiers)
        controller.move = self._migration.follow
        self._context.requeue_target = self._migration.target_for
        self._loaders: dict[Backend, ModelLoader] = {}
        self._add_loaders(settings, self._backends.values())
        self._health = HealthChecks(settings, self._backends, gateway_id, _refresh)
        self._retirement = GenerationCleanup(self._oldest_generation)
        self._guard = (
            None
            if settings.guard is None
            else RolloutGuard(settings.guard, self.rollout, settings.rollback_to, self._pending, self._context.clock)
        )
        self._operations = Operations(
            settings, self._backends, model_names, controller, self._health, self._metrics, self._guard
        )
        self._preflight = Preflight(self._context, self.rollout)
        self._cors = Cors(settings.cors_origins)
        self._images = ImageNormalizer()
        self.reload = Reloader(lambda: self._context.settings, self._change, self._operations.record_reload)
        chat = ChatEndpoint(self._context, keys, model_names, self.rollout, self._cors, self._images)
        embeddings = EmbeddingEndpoint(self._context, keys, model_names, self._cors)
        self._hot: dict[str, Endpoint[Any]] = dict.fromkeys(CHAT_PATHS, chat) | dict.fromkeys(
            EMBEDDING_PATHS, embeddings
        )
        admin = [settings.admin_key.get_secret_value()] if settings.admin_key else []
        scraper = [settings.metrics_key.get_secret_value()] if settings.metrics_key else []
        self._rest = build_ops(
            self._operations, self._preflight, keys, AdminAccess(admin), AdminAccess([*admin, *scraper])
        )
        self.metrics_port_app = build_metrics_port(self._operations)

    async def __aenter__(self) -> Self:
        await self._health.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._guard = None  # what ends now, we end
        await self._health.__aexit__()
        self._migration.close()
        for loader in list(self._loaders.values()):  # a backend may be dropped meanwhile
            await loader.close()
        await self._retirement.close()
        for backend in self._backends.values():
            backend.close()
        await self._state.close()
        self._images.close()
        self._context.close()
        self.settle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields: Mapping[bytes, bytes] = scope["extensions"]["gateway.client"].fields
        if scope["method"] == "OPTIONS":
            headers = self._cors.preflight_headers(fields)
            if headers is not None:
                await _answer(send, 204, headers, b"")
                return
        endpoint = self._hot.get(scope["path"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
        else:
            await self._serve_rest(scope, fields, receive, send)

    async def _serve_rest(self, scope: Scope, fields: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        extra = [*self._cors.headers(fields), (b"x-request-id", request_id_of(fields).encode())]
        try:
            reject_loop(fields, self._context.gateway_id)
        except GatewayError as error:
            await _answer(send, error.status, [(b"content-type", b"application/json"), *extra], error.envelope())
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await self._rest(scope, receive, send_with_headers)  # type: ignore[arg-type]  # Starlette wants mutable mappings

    # Other settings

    async def _change(self, settings: Settings) -> None:
        """Put `settings` in force, with what `config.compare` lets change. Nothing has changed where it raises.

        Backends whose servers are others are built anew, and asked what they have before anything goes there. Then all changes in one step, between
        two requests. What is under way goes on with what it has; when that is over, what nobody needs any more is let go.
        """
        num_parallel = settings.ollama_num_parallel
        backends = {name: self._kept(item) or Backend(item, num_parallel) for name, item in settings.backends.items()}
        new = [backend for backend in backends.values() if backend not in self._backends.values()]
        self._add_loaders(settings, new)
        try:
            await self._health.probe_new(settings, backends)
        except BaseException:
            for backend in new:
                self._drop(backend)
            raise
        for backend in new:
            backend.on_away = self._leave_lines
        leaving = [backend for backend in self._backends.values() if backend not in backends.values()]
        labels = _labels(self._context.settings)
        for name, item in settings.backends.items():
            if backends[name] not in new:
                backends[name].change(item, num_parallel)
            if (loader := self._loaders.get(backends[name])) is not None:
                loader.change(settings)
        generation = self._context.generation
        self._context.change(settings, backends)
        persist_learned_limits(self._state, self._backends, num_parallel)
        self._controller.reload(settings)
        if self._guard is not None:
            self._guard.reload(settings)
        model_names = ModelNames(settings)
        for endpoint in self._hot.values():
            endpoint.change(model_names)
        self._health.change(settings, self._backends)
        self._operations.change(settings, model_names)
        self._preflight.change()
        for backend in leaving:
            self._migration.abandon(backend)
        self._retirement.add(generation, lambda: self._let_go(generation, leaving, labels))

    def _add_loaders(self, settings: Settings, backends: Iterable[Backend]) -> None:
        for backend in backends:
            if backend.loading is not None:
                self._loaders[backend] = ModelLoader(backend, settings, self._metrics, self._context.gateway_id)

    def _drop(self, backend: Backend) -> None:
        self._health.forget(backend)
        if (loader := self._loaders.pop(backend, None)) is not None:
            loader.stop()
        backend.close()

    def _kept(self, item: BackendSettings) -> Backend | None:
        backend = self._backends.get(item.name)
        return backend if backend is not None and is_same_place(backend.settings, item) else None

    def _let_go(self, generation: int, leaving: list[Backend], labels: dict[Label, set[str]]) -> None:
        """No request is left that began under the settings of `generation`."""
        era = self._context.past.pop(generation)
        for backend in leaving:
            self._drop(backend)
        needed = {backend for later in self._context.past.values() for backend in later.backends.values()}
        for backend in {*era.backends.values()}.intersection(self._health.unused) - needed:
            self._health.forget(backend)
        for backend in self._backends.values():
            backend.admission.forget(self._context.queues)
        self.settle()
        there = _labels(self._context.settings)
        for label, names in labels.items():
            for name in names - there[label]:
                self._metrics.forget(label, name)

    def _oldest_generation(self) -> int:
        return min(
            (relay.generation for relay in self._context.sweep.live if isinstance(relay, Relay)),
            default=self._context.generation,
        )

    # The end

    def begin_drain(self) -> None:
        """Not ready any more; what comes is still served until the door closes."""
        self._operations.is_stopping = True
        self._preflight.stop()

    def cut_off(self) -> None:
        """Streams end with an error event now, the waiting are answered 503."""
        for endpoint in self._hot.values():
            endpoint.is_stopping = True
        for relay in list(self._context.sweep.live):
            assert isinstance(relay, Relay)
            relay.cut_off(ShuttingDown())

    def _leave_lines(self, backend: Backend) -> None:
        """Who waits for a backend that went away may be served by another, or by the one in its place."""
        if backend not in self._backends.values():
            self._migration.abandon(backend)
        for relay in list(self._context.sweep.live):
            assert isinstance(relay, Relay)
            relay.leave_queue(backend)

    # The record of what is over

    def _on_exchange(self, exchange: Exchange) -> None:
        self._over.append(exchange)
        if self._settling is None:
            self._settling = self._context.loop.call_later(SETTLE_SECONDS, self.settle)

    def settle(self) -> None:
        """Count and log what has ended since the last time. Many at once: cheaper than one by one, each with the caches cold."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        over, self._over = self._over, []
        for exchange in over:
            self._metrics.record(exchange)
        self._log.write(over)
        if self._guard is not None:
            self._guard.observe(over)

    def _pending(self, tier: str, backend: str, since: float) -> int:
        """Not those who wait for the dead: they are no answers that are yet to come."""
        relays = (relay for relay in self._context.sweep.live if isinstance(relay, Relay) and relay.arrived >= since)
        return sum(
            relay.route.tier == tier and relay.route.backend == backend and not relay.is_stranded for relay in relays
        )


def _labels(settings: Settings) -> dict[Label, set[str]]:
    """What the metrics may name."""
    return {"tier": {*settings.tiers, *settings.embeddings}, "backend": {*settings.backends}}


def _refresh(backend: Backend) -> None:
    backend.refresh()


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
