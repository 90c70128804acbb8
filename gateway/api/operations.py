"""Health, status and metrics: the responses about the gateway itself."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import permutations, product, zip_longest
from typing import Any, get_args

from prometheus_client.exposition import choose_encoder

from gateway import __version__
from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.api.model_catalog import ModelCatalog
from gateway.api.model_names import ModelNames
from gateway.api.peers import Peers
from gateway.config import Settings, Tier
from gateway.errors import InvalidRequest
from gateway.relay.turns import in_turns
from gateway.rollout.assignment import ChangeCause
from gateway.rollout.controller import RolloutController
from gateway.rollout.gpu_state import SWITCH_PHASES, Outcome
from gateway.rollout.guard import RolloutGuard
from gateway.telemetry.exchange import NONE
from gateway.telemetry.exposition import LabelledRegistry, join_pages, page_steps
from gateway.telemetry.live import ALL, KEPT, STEP, WINDOW, LiveFigures
from gateway.telemetry.metrics import Histogram, Histograms, Metrics
from gateway.upstream.availability import GpuTurn
from gateway.upstream.backend import Backend
from gateway.upstream.health_checks import HealthChecks
from gateway.upstream.outlier_detection import OutlierDetector

SHOWN_LIMITS = (
    "max_concurrency",
    "model_concurrency",
    "vision_concurrency",
    "max_queue",
    "vision_max_queue",
    "queue_timeout",
    "vision_queue_timeout",
)


TURNS: dict[GpuTurn, str] = {"awake": "awake", "leaving": "leaving", "asleep": "sleeping", "waking": "waking"}
"""States of a backend on a GPU that holds one engine; any other backend is always awake."""


class Operations:
    """Source of the responses about the gateway itself."""

    def __init__(
        self,
        settings: Settings,
        backends: dict[str, Backend],
        model_names: ModelNames,
        controller: RolloutController,
        health: HealthChecks,
        metrics: Metrics,
        guard: RolloutGuard | None,
        live: LiveFigures,
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._model_names = model_names
        self.catalog = ModelCatalog(settings, backends, model_names, controller.rollout)
        self.controller = controller
        self._health = health
        self._metrics = metrics
        self._guard = guard
        self._live = live
        self.is_stopping = False
        self.view_replicas: Callable[[], dict[str, Any] | None] = lambda: None
        """Returns the state of the replicas that share limits, None if this one shares none."""
        self.peers: Peers | None = None
        """The other replicas of this machine, if there are several."""
        self.last_reload: dict[str, Any] | None = None
        """Outcome of the last reload of the settings."""

    def change(self, settings: Settings, model_names: ModelNames) -> None:
        """Report on the changed settings from now on."""
        self._settings = settings
        self._model_names = model_names
        self.catalog.change(settings, model_names)
        self._live.keep({NONE, *settings.tiers, *settings.embeddings, *settings.rerankers}, {NONE, *settings.backends})

    @property
    def _causes(self) -> list[str]:
        """Causes that a change of the roll-out may have."""
        return [cause for cause in get_args(ChangeCause) if cause != "exclusive" or self._settings.exclusive]

    def record_reload(self, outcome: dict[str, Any]) -> None:
        self.last_reload = outcome

    # Health

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of `/readyz`."""
        if self.is_stopping or not self._health.has_asked_all:
            return 503, {"status": "draining" if self.is_stopping else "starting", "unserved_tiers": []}
        unserved = [tier.name for tier in self._settings.tiers.values() if not self._is_served(tier.name)]
        return 200, {"status": "ready", "unserved_tiers": unserved}

    def _is_served(self, tier_name: str) -> bool:
        tier = self._settings.tiers[tier_name]
        backend = self.controller.rollout.active_backend(tier_name)
        if self._backends[backend].availability.refuses_new:
            return False
        return any(server.is_well and server.serves(tier.models[backend]) for server in self._backends[backend].servers)

    def status(self) -> dict[str, Any]:
        """Return the body of `/ops/status` without its series, which `/ops/events` sends apart.

        With several replicas on a machine it covers all of them, as they were within the last second.
        """
        self._live.want()
        own = self.own_status()
        return own if self.peers is None else self.peers.whole_status(own)

    def own_status(self) -> dict[str, Any]:
        """Return the status of this process, in which live figures and latencies cover all replicas."""
        return {
            "version": __version__,
            "ready": self.readiness()[1],
            "backends": {backend.name: self._backend_status(backend) for backend in self._backends.values()},
            "tiers": {tier.name: self._tier_status(tier) for tier in self._settings.tiers.values()},
            "discovered": {
                found.name: {
                    "backend": found.route.backend,
                    "capabilities": None if found.capabilities is None else sorted(found.capabilities),
                }
                for found in self._model_names.discovered()
            },
            "rollout": {
                "rollback_to": self._settings.rollback_to,
                "shared": self.controller.is_shared,
                "history": self.controller.history(),
                "gpu": self.controller.gpu(),
            },
            "reload": self.last_reload,
            "replicas": self.view_replicas(),
            "processes": None,
            "default_tier": self._settings.default_tier,
            "live": {"step": STEP, "window": WINDOW, "kept": KEPT},
            "errors": self._live.errors(),
        }

    async def status_with_series(self, tier: str | None = None) -> dict[str, Any]:
        """Return the body of `/ops/status`, with the series of one tier or of all tiers together.

        Raises:
            InvalidRequest: There is no such tier.
        """
        if self.peers is not None:
            await self.peers.refresh()
        return {**self.status(), "series": self.series(tier)}

    def series(self, tier: str | None = None, last: int = KEPT) -> dict[str, Any]:
        """Return the course of the live figures of one tier or, with None, of all tiers together.

        Raises:
            InvalidRequest: There is no such tier.
        """
        backends = self._settings.backends if tier is None else self._tier(tier).models
        return {"tier": tier, **self._live.series(ALL if tier is None else tier, backends, last)}

    @property
    def sample_number(self) -> int:
        """Number of samples of the live figures so far."""
        return self._live.number

    def _tier(self, name: str) -> Tier:
        tier = self._settings.tiers.get(name)
        if tier is None:
            raise InvalidRequest(f"'tier' must be one of: {', '.join(self._settings.tiers)}.", param="tier")
        return tier

    def _tier_status(self, tier: Tier) -> dict[str, Any]:
        view = self.controller.view_tier(tier.name)
        return {
            "active_backend": view["backend"],
            "canary": view["canary"],
            "share": view["share"],
            "pinned": view["pinned"],
            "guard": None if self._guard is None else self._guard.view(tier.name),
            "models": tier.models,
            "latency": {backend: self._latency(tier.name, backend) for backend in tier.models},
            "live": {backend: self._live.figures(tier.name, backend) for backend in tier.models},
        }

    def _latency(self, tier: str, backend: str) -> dict[str, Any]:
        """Return percentiles since the start, in seconds; null without samples.

        They are estimated from the buckets of the histograms.
        """
        series = {
            "time_to_first_token": self._metrics.time_to_first_token,
            "inter_token_latency": self._metrics.gaps,
            "duration": self._metrics.duration,
        }
        found = {name: self._whole(name, histograms, (tier, backend)) for name, histograms in series.items()}
        return {
            name: {
                f"p{share}": None if histogram is None else _rounded(histogram.quantile(share / 100))
                for share in (50, 99)
            }
            for name, histogram in found.items()
        }

    def _whole(self, latency: str, histograms: Histograms, side: tuple[str, str]) -> Histogram | None:
        """Return the histogram of a tier on a backend, with the observations of all replicas."""
        own = histograms.find(side)
        if self.peers is None:
            return own
        whole = histograms.empty()
        for counts in ([] if own is None else own.counts, *self.peers.latency_counts(latency, side)):
            whole.counts = [one + other for one, other in zip_longest(whole.counts, counts, fillvalue=0)]
        return whole

    def _backend_status(self, backend: Backend) -> dict[str, Any]:
        admission = backend.admission
        limits = backend.settings.limits
        return {
            "kind": backend.kind,
            "up": backend.availability.is_up,
            "state": TURNS[backend.turn],
            "running": {lane: admission.running(lane) for lane in admission.lanes},
            "waiting": {lane: admission.waiting(lane) for lane in admission.lanes},
            "live": self._live.figures(ALL, backend.name),
            "limits": {name: getattr(limits, name) for name in SHOWN_LIMITS},
            "names": [
                {
                    "name": name.label,
                    "resolved": name.failure is None,
                    "failure": name.failure,
                    "servers": len(name.servers),
                    "ignored": name.ignored,
                }
                for name in backend.names
            ],
            "servers": [
                {
                    "name": server.name,
                    "up": server.up,
                    "circuit": server.circuit.state,
                    "paused": server.circuit.is_paused,
                    "gets_requests": backend.availability.gives_requests(server),
                    "ejections": [_ejection(detector) for detector in server.ejections],
                    "running": server.load,
                    "connections": server.pool.open_connections,
                    "models": None if server.discovered is None else sorted(server.discovered),
                    "loads": None
                    if server.residency is None
                    else {name: state.word for name, state in server.residency.states.items()},
                    "model_slots": {
                        model: {
                            "running": bound.count,
                            "limit": bound.total,
                            "learned": isinstance(bound, AdaptiveLimit) and not bound.is_held,
                        }
                        for model, bound in server.models.items()
                    },
                }
                for server in backend.servers
            ],
            "leaving": [{"name": server.name, "running": server.load} for server in backend.leaving],
        }

    # Metrics

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics as Prometheus text or OpenMetrics, and the content type.

        `accept` is the request header that chooses the format. With several replicas on a machine,
        the series of all of them are there, with their number in the label `replica`.
        """
        encode, content_type = choose_encoder(accept)
        if self.peers is None:
            self._fill_gauges()
            return await in_turns(page_steps(self._metrics.registry, encode)), content_type
        pages = await self.peers.metrics_pages(accept)
        return join_pages([await self.labelled_page(accept), *pages]), content_type

    async def labelled_page(self, accept: str) -> bytes:
        """Return the metrics of this replica alone, with its number as a label."""
        assert self.peers is not None
        self._fill_gauges()
        encode, _ = choose_encoder(accept)
        return await in_turns(page_steps(LabelledRegistry(self._metrics.registry, self.peers.number), encode))

    def _fill_gauges(self) -> None:
        metrics = self._metrics
        replicas = self.view_replicas()
        if replicas is not None:  # it knows of more machines than the peers
            metrics.redis_up.labels(replicas["redis"]).set(replicas["up"])
        elif self.peers is not None:
            metrics.replicas.set(self.peers.replicas)
        for gauge in (
            metrics.running,
            metrics.waiting,
            metrics.backend_up,
            metrics.circuit_state,
            metrics.server_up,
            metrics.server_running,
            metrics.name_resolved,
            metrics.active_backend,
            metrics.backend_asleep,
        ):
            gauge.clear()  # removes series that are no longer in the settings
        for backend in self._health.backends:
            self._set_gauges(backend)
        for tier in self._settings.tiers.values():
            for name in tier.models:
                metrics.active_backend.labels(tier.name, name).set(
                    name == self.controller.rollout.active_backend(tier.name)
                )
            for move in permutations(tier.models, 2):
                for cause in self._causes:
                    metrics.switches.labels(tier.name, *move, cause)  # so that a rate includes the first one
        self._begin_gpu_series()

    def _begin_gpu_series(self) -> None:
        """Have all series of switches of a shared GPU, so that a rate includes the first one."""
        engines = self._settings.on_gpu
        for move in (*permutations(engines, 2), *product([NONE], engines)):
            for outcome in get_args(Outcome):
                self._metrics.gpu_switches.labels(*move, outcome)
        for engine, phase in product(engines, SWITCH_PHASES):
            self._metrics.gpu_phase.labels(engine, phase)

    def _set_gauges(self, backend: Backend) -> None:
        """Set the gauges of a backend. A name may have two backends: one drains, one replaces it."""
        metrics = self._metrics
        for lane in backend.admission.lanes:
            metrics.running.labels(backend.name, lane).inc(backend.admission.running(lane))
            metrics.waiting.labels(backend.name, lane).inc(backend.admission.waiting(lane))
        metrics.backend_up.labels(backend.name).set(backend.availability.is_up)
        metrics.circuit_state.labels(backend.name).set(backend.availability.circuit_level)
        if backend.admission.affinity is not None:
            for outcome, count in backend.admission.affinity.take_counts().items():
                metrics.affinity.labels(backend.name, outcome).inc(count)
        if backend.name in self._settings.on_gpu:
            metrics.backend_asleep.labels(backend.name).set(not backend.is_probed)
        for server in backend.servers if backend.is_probed else ():  # one whose engine sleeps is not dead
            metrics.server_up.labels(backend.name, server.label).set(backend.availability.gives_requests(server))
        for server in (*backend.servers, *backend.leaving):
            metrics.server_running.labels(backend.name, server.label).inc(server.load)
        for name in backend.names:
            metrics.name_resolved.labels(backend.name, name.label).set(name.failure is None)


def _ejection(detector: OutlierDetector) -> dict[str, Any]:
    """Return an ejection as `/ops/status` shows it; `until` is the time of the first request on trial."""
    left = detector.until - time.monotonic()
    until = datetime.fromtimestamp(time.time() + left, UTC)
    return {
        "model": detector.model,
        "lane": detector.lane,
        "state": detector.word,
        "reason": detector.reason,
        "until": until.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "gets_requests": detector.gets_requests,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
