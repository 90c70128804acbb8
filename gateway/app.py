"""The composition root: builds each part once, passes it in, and is the ASGI application."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from gateway import __version__
from gateway.api.access import Access
from gateway.api.auth import ApiKeys
from gateway.api.chat import ChatParts
from gateway.api.client_endpoints import client_endpoints
from gateway.api.cors import Cors
from gateway.api.endpoint import EndpointParts, Receive, Scope, Send
from gateway.api.error_forms import error_answer
from gateway.api.events import Events
from gateway.api.hosts import is_loopback_name
from gateway.api.key_routes import limit_headers
from gateway.api.model_names import ModelNames
from gateway.api.named_keys import NamedKeys
from gateway.api.operations import Operations
from gateway.api.paths import checks_host, plain_path
from gateway.api.peers import Peers
from gateway.api.request_headers import reject_loop, request_id_of
from gateway.api.routes import build, build_metrics_port
from gateway.body_memory import BodyMemory
from gateway.chat.images import ImageNormalizer
from gateway.config import ConfigError, Settings
from gateway.config.reload import Reloader
from gateway.downstream.cycle import RequestResponseCycle
from gateway.errors import GatewayError, ShuttingDown
from gateway.keys.accounts import Accounts
from gateway.reconfigure import Reconfiguration
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destinations
from gateway.relay.discovery import Discovery
from gateway.relay.in_flight import InFlight
from gateway.relay.requests import ClientConnection
from gateway.replicas.member import HubMember
from gateway.replicas.member_state import MemberState
from gateway.rollout.assignment import Change
from gateway.rollout.controller import RolloutController
from gateway.rollout.gpu_switch import GpuSwitcher
from gateway.rollout.guard import RolloutGuard
from gateway.rollout.migration import QueueMigration
from gateway.rollout.preflight.check import Preflight
from gateway.rollout.shared import SharedRollout
from gateway.rollout.sharing import RolloutSharing
from gateway.rollout.state import Rollout
from gateway.sharing.base import Sharing
from gateway.sharing.hub_sharing import HubSharing
from gateway.state_file import StateFile
from gateway.telemetry.live import LiveFigures
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.recorder import ExchangeRecorder
from gateway.telemetry.recording import TrafficRecording
from gateway.telemetry.trace_context import Tracer, pass_on
from gateway.upstream.backend import Backend
from gateway.upstream.backends import Backends
from gateway.upstream.gpu_engine import GpuEngine
from gateway.upstream.health_checks import HealthChecks
from gateway.upstream.image_fetcher import ImageFetcher
from gateway.upstream.learned_limits import LearnedLimits
from gateway.usage.recorder import UsageRecorder


class Gateway:
    """The whole gateway as one ASGI application; `async with` it while it serves."""

    def __init__(
        self,
        settings: Settings,
        log: ExchangeLog,
        admin_token: str | None = None,
        address: str | None = None,
        tracer: Tracer | None = None,
        *,
        ollama_port: int | None = None,
        accounts: Accounts | None = None,
        usage: UsageRecorder | None = None,
        member: HubMember | None = None,
    ) -> None:
        """Build the gateway.

        `admin_token` grants access to `/ops` and `/metrics`, if it is set. `address` is the IP
        address that the gateway listens on, and `ollama_port` the second port, if they are known
        better than from the settings. `tracer` makes a span of each exchange; without one, clients'
        traces are only passed on. `accounts` are those of the keys in `keys_file`, if it has been
        read before. `usage` records who used how much; its owner closes it after the gateway. `member`
        connects one of several replicas on this machine with the others.

        Raises:
            ConfigError: `keys_file` cannot be used, or several replicas have `exclusive` backends.
        """
        if settings.exclusive and (member, settings.redis_url) != (None, None):
            raise ConfigError(["exclusive: true, but replicas share the roll-out; expected a single gateway"])
        self._clock = clock = time.monotonic
        self._gateway_id = gateway_id = os.urandom(8).hex().encode()
        self.body_memory = BodyMemory(settings.max_waiting_bytes)
        """Memory of the request bodies that are read or wait."""
        self._metrics = metrics = Metrics(_registry(), __version__, self.settle)
        metrics.waiting_bytes.set_function(lambda: self.body_memory.used)
        self._state = StateFile(settings.state_file) if member is None else MemberState(member)
        self._backends: dict[str, Backend] = {}
        """Backends in force, by name. `Backends` fills the dict; a change of the settings updates
        it in place."""
        self._in_flight = InFlight(asyncio.get_running_loop(), clock)
        self._destinations = destinations = Destinations(settings, self._backends, metrics)
        self._sharing = sharing = _sharing_of(settings, member, self._state, metrics.replicas.set)
        self._build_rollout(settings)

        self._live = LiveFigures(metrics, self._loads, asyncio.get_running_loop().call_later)
        observers = [self._live.observe, *([self._guard.observe] if self._guard else [])]
        self._recorder = ExchangeRecorder(metrics, log, observers, None if usage is None else usage.observe)
        if usage is not None:
            usage.settle = self.settle
            sharing.share_usage(usage, settings.usage_days)
        self._traffic = TrafficRecording()
        self._tracer = tracer
        if tracer is not None:
            tracer.on_exchanges = metrics.keep_exemplars

        self._build_backends(settings)
        self._context = RelayContext(
            settings,
            destinations=destinations,
            in_flight=self._in_flight,
            metrics=metrics,
            clock=clock,
            requeue_target=self._migration.target_for,
            on_exchange=self._recorder.record,
            body_memory=self.body_memory,
            gateway_id=gateway_id,
            traffic=self._traffic,
            begin_trace=pass_on if tracer is None else tracer.begin,
        )
        self._preflight = Preflight(self._context, self.rollout, self._gpu.state)

        is_local = is_loopback_name(address or settings.host)
        access = Access(settings, accounts, admin_token, is_local=is_local, ollama_port=ollama_port)
        self._build_apis(settings, access, usage, member)
        self._reconfiguration = self._build_reconfiguration(access.keys, log)
        self.reload = Reloader(lambda: self.settings, self._reconfiguration.apply, self._operations.record_reload)

    def _build_rollout(self, settings: Settings) -> None:
        """Build what decides which backend serves, and moves requests and engines when that changes."""
        self._rollout_sharing: RolloutSharing | None = None
        document = self._sharing.document
        if document is None:
            self.rollout = Rollout(settings)
        else:
            self.rollout = shared = SharedRollout(settings, document.replica, common_clock=document.now)
            self._rollout_sharing = RolloutSharing(shared, document)
            self._sharing.add(self._rollout_sharing)
        self._migration = QueueMigration(self._destinations, self._in_flight, self.rollout.tiers, self._clock)
        self._gpu = GpuSwitcher(
            settings,
            self.rollout,
            self._backends,
            lambda backend: GpuEngine(backend, self._backend_set.loader(backend), self._health.check, self._gateway_id),
            self._metrics,
            self._state,
            self._clock,
            lambda change: None if self._guard is None else self._guard.watch(change),
        )
        self._controller = RolloutController(
            self.rollout,
            self._state,
            self._metrics,
            settings.rollback_to,
            self._follow,
            self._rollout_sharing,
            self._gpu.state.view,
        )
        self._guard: RolloutGuard | None = None
        if settings.guard is not None:
            self._guard = RolloutGuard(
                settings.guard,
                self.rollout,
                settings.rollback_to,
                self._in_flight.count_pending,
                self._clock,
                lambda: self._gpu.is_switching,
            )

    def _build_backends(self, settings: Settings) -> None:
        """Build the backends, and what finds out how they are and which models they have."""
        sharing = self._sharing
        self._learned_limits = LearnedLimits(self._state, self._backends, settings.ollama_num_parallel)
        self._backend_set = Backends(
            self._backends,
            settings,
            self._metrics,
            self._gateway_id,
            on_down=self._migration.on_backend_down,
            on_learned=self._learned_limits.save,
            on_evicted=self._in_flight.send_again,
            on_event=sharing.share_hints(self._backends, self._clock),
            shared=sharing.limits,
        )
        self._learned_limits.restore()
        sharing.share_affinity(self._backends, self._clock)
        self._discovery = Discovery(settings, self._destinations)
        self._health = HealthChecks(settings, self._backends, self._gateway_id, Backend.refresh, self._discovery.update)

    def _build_apis(
        self, settings: Settings, access: Access, usage: UsageRecorder | None, member: HubMember | None
    ) -> None:
        """Build the endpoints of clients and operators."""
        model_names = ModelNames(settings, self._discovery)
        self._operations = operations = Operations(
            settings,
            self._backends,
            model_names,
            self._controller,
            self._health,
            self._metrics,
            self._guard,
            self._live,
        )
        operations.view_replicas = self._sharing.view
        self._peers = operations.peers = None if member is None else self._peers_of(member)
        self._events = Events(operations.status, operations.series, lambda: operations.sample_number)
        self.named_keys: NamedKeys | None = None
        if access.accounts is not None and settings.keys_file is not None:
            forget, count_plain = self._metrics.keys.forget, access.keys.count_plain
            self.named_keys = NamedKeys(
                access.accounts, settings.keys_file, model_names, self._state, forget, count_plain
            )
            self._sharing.share_keys(self.named_keys)
        self._cors = Cors(settings.cors_origins)
        self._hosts = access.hosts
        self._images = ImageNormalizer()
        self._image_fetcher = ImageFetcher()
        self._endpoints = client_endpoints(
            EndpointParts(self._context, access.keys, model_names, self._cors, self._hosts),
            ChatParts(self.rollout, self._images, self._image_fetcher),
            access.operator,
        )
        self._rest = build(operations, self._events, self._preflight, access, self.named_keys, usage)
        self.metrics_port_app = build_metrics_port(operations)

    def _build_reconfiguration(self, keys: ApiKeys, log: ExchangeLog) -> Reconfiguration:
        return Reconfiguration(
            backends=self._backend_set,
            learned_limits=self._learned_limits,
            health=self._health,
            destinations=self._destinations,
            discovery=self._discovery,
            in_flight=self._in_flight,
            context=self._context,
            controller=self._controller,
            gpu=self._gpu,
            migration=self._migration,
            guard=self._guard,
            preflight=self._preflight,
            endpoints=list(dict.fromkeys(self._endpoints.values())),
            operations=self._operations,
            metrics=self._metrics,
            recorder=self._recorder,
            log=log,
            keys=keys,
            named_keys=self.named_keys,
        )

    @property
    def settings(self) -> Settings:
        """Settings in force."""
        return self._destinations.settings

    async def __aenter__(self) -> Self:
        await self._sharing.__aenter__()
        self._gpu.begin()
        await self._health.__aenter__()
        if self.named_keys is not None:
            self.named_keys.start()
        if self._peers is not None:
            self._peers.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sharing.__aexit__()
        self._recorder.detach_observers()
        self._events.close()
        self._live.close()
        if self._peers is not None:
            await self._peers.close()
        await self._gpu.close()
        await self._health.__aexit__()
        self._migration.close()
        await self._backend_set.close()
        await self._reconfiguration.close()
        for backend in self._backends.values():
            backend.close()
        if self.named_keys is not None:
            self.named_keys.stop()
        await self._state.close()
        self._images.close()
        self._recorder.settle()
        await self._traffic.close()
        if self._tracer is not None:
            await self._tracer.close()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return what serves the request. It is not awaited here, which would cost a coroutine more."""
        client: ClientConnection = scope["extensions"]["gateway.client"]
        fields = client.fields
        if scope["method"] == "OPTIONS":
            headers = self._cors.preflight_headers(fields)
            if headers is not None:
                return _answer(send, 204, headers, b"")
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is None and (path := plain_path(scope["path"])) != scope["path"]:
            scope = {**scope, "path": path}
            endpoint = self._endpoints.get(path)
        if endpoint is not None:
            return endpoint(scope, receive, send)
        return self._serve_rest(scope, fields, receive, send)

    async def _serve_rest(self, scope: Scope, fields: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        extra = [*self._cors.headers(fields), (b"x-request-id", request_id_of(fields).encode())]
        try:
            reject_loop(fields, self._context.gateway_id)
            if checks_host(scope["path"]):
                self._hosts.check(fields)
        except GatewayError as error:
            headers, body = error_answer(scope["path"], error)
            await _answer(send, error.status, [*headers, *extra], body)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                person = fields.get((self._context.settings.user_header or "").encode(), b"").decode("latin-1")
                limits = limit_headers(scope["extensions"], person)
                message = {**message, "headers": [*message.get("headers", ()), *limits, *extra]}
            await send(message)

        await self._rest(scope, receive, send_with_headers)  # type: ignore[arg-type]  # mutable in Starlette

    def begin_drain(self) -> None:
        """Report "not ready" from now on. Requests are served until the listening socket closes."""
        self._operations.is_stopping = True
        self._sharing.begin_leaving()
        self._events.close()
        self._preflight.stop()

    def cut_off(self) -> None:
        """End all requests: streams with an error event, queued and new requests with 503."""
        for endpoint in self._endpoints.values():
            endpoint.is_stopping = True
        for relay in list(self._in_flight):
            relay.cut_off(ShuttingDown())

    def _peers_of(self, member: HubMember) -> Peers:
        """Return the other replicas of this machine, which get the figures of this one."""
        operations = self._operations
        peers = Peers(member, member.hello.name, self._metrics, self._live, operations.own_status, self._loads)
        peers.answer_metrics(operations.labelled_page)
        return peers

    def settle(self) -> None:
        """Count and log the exchanges that have finished so far."""
        self._recorder.settle()

    def _follow(self, change: Change) -> int:
        """Let the engines and the queued requests follow a change of the roll-out; return how many moved."""
        self._gpu.follow(change)
        return self._migration.follow(change)

    def _loads(self) -> dict[str, tuple[int, int]]:
        """Return how many requests run and wait, by backend."""
        return {
            name: (
                sum(map(backend.admission.running, backend.admission.lanes)),
                sum(map(backend.admission.waiting, backend.admission.lanes)),
            )
            for name, backend in self._backends.items()
        }


def _sharing_of(
    settings: Settings, member: HubMember | None, state: StateFile, on_count: Callable[[int], None]
) -> Sharing:
    """Return what connects the gateway with its replicas: Redis, the parent of those on this machine, or nothing."""
    if settings.redis_url is not None:
        from gateway.sharing.redis_sharing import RedisSharing  # noqa: PLC0415  # takes 0.3 s and 14 MB

        return RedisSharing(settings.redis_url.get_secret_value(), member, state, on_count)
    return Sharing() if member is None else HubSharing(member)


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_client_connection(cycle: RequestResponseCycle) -> ClientConnection:
    """Prove to the type checker that the HTTP server's cycle is a `ClientConnection`."""
    return cycle
