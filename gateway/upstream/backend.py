"""A backend at run time: its servers, with their connections and circuit breakers, and queues."""

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from urllib.parse import urlsplit
from zlib import crc32

from gateway.admission.affinity import Affinity
from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.model_state import ModelState
from gateway.admission.queues import AdmissionLimits, LaneLimits, LaneName, Queue, TierLimits
from gateway.admission.scheduler import Admission
from gateway.config import BackendSettings, LimitOverrides, ServerSettings
from gateway.engines.completions import Completer, OllamaCompleter, OpenAiCompleter
from gateway.engines.embeddings import Embedder, OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import Engine
from gateway.engines.ollama import Ollama
from gateway.engines.ollama_loading import OllamaLoading
from gateway.engines.openai import OpenAi
from gateway.engines.rerank import VllmReranker
from gateway.engines.vllm import Vllm
from gateway.errors import BackendUnavailable
from gateway.upstream.circuit_breaker import CALM, LEVELS, CircuitBreaker, CircuitState
from gateway.upstream.outlier_detection import Change, OutlierDetector
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.retry_budget import RetryBudget
from gateway.upstream.server import Server

IDLE_SECONDS = {"ollama": 30.0, "vllm": 2.5, "openai": 2.5}
"""Seconds that an idle connection is kept, by kind: half of what the servers keep it.

vLLM keeps it for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), other servers for uvicorn's default, Ollama
for ever.
"""


LONGEST_RETRY_AFTER = 60
"""Seconds. A request on trial may readmit a server at any time."""

PAUSE_MARGIN = 0.01
"""Seconds added to the timer of a pause or an ejection.

The loop's clock is a little coarser than the clock that ends the pause.
"""


_log = logging.getLogger(__name__)


UnloadFrozen = Callable[
    [Server, ModelState, Callable[[], bool], Callable[[], str]],
    "asyncio.Task[None] | None",
]


class Backend:
    """A named group of servers, as a backend in HAProxy."""

    def __init__(
        self,
        settings: BackendSettings,
        num_parallel: int | None = None,
        *,
        on_down: Callable[["Backend"], None] = lambda backend: None,
        on_learned: Callable[[], None] = lambda: None,
        on_evicted: Callable[[ModelState], None] = lambda state: None,
    ) -> None:
        self.name = settings.name
        self.kind = settings.kind
        self.settings = settings
        self.engine: Engine = _build_engine(settings)
        self.embedder: Embedder = _build_embedder(settings)
        self.completer = _build_completer(settings, self.engine)
        self.loading = _build_loading(settings)
        """Requests that load models, or None if the servers always have their models loaded."""
        tls = _tls_context(settings)
        self.servers = [self._build_server(number, server, tls) for number, server in enumerate(settings.servers, 1)]
        self.admission = Admission(
            self.servers,
            _admission_limits(settings, num_parallel),
            time.monotonic,
            _call_later,
            self.engine.canonical,
            on_learned,
        )
        self._choose_balance()
        self.budget = RetryBudget()
        self.is_restrained = False
        """True if some server may not get requests.

        Only then is it worth calling `is_down` and `accepts_none`.
        """
        self.on_down = on_down
        """Called when the circuit breaker of a server has opened, or a server was ejected."""
        self.on_evicted = on_evicted
        """Called when a server has evicted a model that may still have requests."""
        self.unload_frozen: UnloadFrozen | None = None
        """`ModelLoader.unload_frozen`, or None if no model has to be loaded."""
        self._timers: set[asyncio.TimerHandle] = set()
        for server in self.servers:
            server.circuit = CircuitBreaker(time.monotonic, partial(self._circuit_changed, server))
            server.build_detector = partial(
                OutlierDetector,
                clock=time.monotonic,
                is_last_resort=self._is_last_resort,
                on_change=partial(self._ejection_changed, server),
            )

    def __repr__(self) -> str:
        return f"<Backend {self.name}: {self.servers!r}>"

    @property
    def is_up(self) -> bool:
        """True if at least one server is healthy."""
        return any(server.is_well for server in self.servers)

    @property
    def circuit_level(self) -> int:
        """Level of the best server: 0 closed, 1 suspect or on trial, 2 open or ejected."""
        return min(self._level(server) for server in self.servers)

    @staticmethod
    def _level(server: Server) -> int:
        """Return the level of a server, which is ejected if all its requests are held back."""
        ejected = min((_ejection_level(detector) for detector in server.used_detectors), default=0)
        return max(LEVELS[server.circuit.state], ejected)

    def gives_requests(self, server: Server) -> bool:
        """Return whether `server` is given requests, for at least one of the models that it serves."""
        if not server.is_well or server.is_excluded or server.circuit.state == "suspect" or server.circuit.is_paused:
            return False
        detectors = server.used_detectors
        return not detectors or any(detector.gets_requests for detector in detectors)

    def is_down(self, model: str) -> bool:
        """Return whether the circuit breaker of every server that has `model` is open."""
        serving = [server for server in self.servers if server.serves(model)]
        return bool(serving) and all(server.circuit.is_open for server in serving)

    def accepts_none(self, model: str, lane: LaneName) -> bool:
        """Return whether no server that has `model` may get requests that a fallback can serve.

        A suspect server counts as accepting requests, because a probe is about to decide on it.
        """
        serving = [server for server in self.servers if server.serves(model)]
        return bool(serving) and not any(
            (server.circuit.state == "suspect" or server.is_up()) and server.gate(model, lane).accepts()
            for server in serving
        )

    def refuses_all(self, model: str, lane: LaneName) -> bool:
        """Return whether every server that has `model` is down, or hangs and has its request on trial.

        A request without a fallback would only wait there.
        """
        serving = [server for server in self.servers if server.serves(model)]
        return bool(serving) and all(
            server.circuit.is_open or ((gate := server.gate(model, lane)).is_hung and not gate.allows())
            for server in serving
        )

    def unavailable(self, model: str, lane: LaneName) -> BackendUnavailable:
        """Return the error for a request that no server can serve.

        Its `Retry-After` is the time to the next probe, or to the end of an ejection.
        """
        ends = [
            detector.until - time.monotonic()
            for server in self.servers
            if (detector := server.detectors.get((model, lane))) is not None and detector.restrains
        ]
        seconds = min(max(1, math.ceil(min(ends, default=self.settings.probe_interval))), LONGEST_RETRY_AFTER)
        return BackendUnavailable("No server of the model backend is available. Try again later.", retry_after=seconds)

    def pause(self, server: Server, seconds: float) -> None:
        """Send no requests to `server` for a number of seconds, because it is full or failing."""
        server.circuit.pause(seconds)
        self._refresh_after(seconds, lambda: server.circuit.allows(server.load))  # ends the pause
        self.refresh()

    def _refresh_after(self, seconds: float, step: Callable[[], object] = lambda: None) -> None:
        def refresh() -> None:
            self._timers.discard(timer)
            step()
            self.refresh()

        timer: asyncio.TimerHandle = asyncio.get_running_loop().call_later(seconds + PAUSE_MARGIN, refresh)
        self._timers.add(timer)

    def refresh(self) -> None:
        """Admit the requests that can run after a server came, went or changed its models."""
        any_is_well = self.is_up
        for server in self.servers:
            server.is_excluded = any_is_well and server.up is False
        self.is_restrained = any(
            server.is_excluded or server.circuit.restrains or server.ejections for server in self.servers
        )
        self.admission.refresh()

    def _circuit_changed(self, server: Server, was: CircuitState, reason: str) -> None:
        state = server.circuit.state
        if server.up is not None:  # the result of the first probe has its own log line
            level = logging.WARNING if state in ("suspect", "open") else logging.INFO
            _log.log(level, "backend %s: circuit %s, was %s (%s)", server.name, state, was, reason)
        if state == "suspect":
            server.doubted.set()
        if state == "open":
            server.up = False
            server.prefixes.clear()
            for detector in server.detectors.values():
                detector.explain(server.circuit.suspected_at)
        if (
            was == "suspect"
            and state == "closed"
            and any(other is not server and other.is_up() for other in self.servers)
        ):
            self.pause(server, CALM)  # a server that fails fast looks idle and would get every request
        self.refresh()
        if state == "open":
            self.on_down(self)

    def _is_last_resort(self, detector: OutlierDetector) -> bool:
        """Return whether no server can serve what `detector` holds back."""
        model, lane = detector.model, detector.lane
        return not any(
            server.serves(model) and server.is_up() and server.gate(model, lane).accepts() for server in self.servers
        )

    def _ejection_changed(self, server: Server, detector: OutlierDetector, change: Change) -> None:
        what = f"{detector.model!r} ({detector.lane})"
        if change == "ejected":
            seconds = detector.until - time.monotonic()
            _log.warning("backend %s: ejected for %s, %.0f s (%s)", server.name, what, seconds, detector.reason)
            self._refresh_after(seconds)
        elif change == "readmitted":
            _log.info("backend %s: readmitted for %s, a request succeeded", server.name, what)
        self.refresh()
        if change == "ejected":
            self.on_down(self)

    def headers(self) -> list[tuple[str, str]]:
        """Return the headers that the settings add to each request to this backend."""
        headers = [(name, value.get_secret_value()) for name, value in self.settings.headers.items()]
        if self.settings.api_key is not None:
            headers.append(("Authorization", f"Bearer {self.settings.api_key.get_secret_value()}"))
        return headers

    def context_length(self, model: str) -> int | None:
        """Return the smallest context length in tokens that a server reports for `model`.

        Return None if no server reports one.
        """
        known = [length for server in self.servers if (length := server.facts(model).context_length) is not None]
        return min(known, default=None)

    def lacks(self, model: str, capability: str) -> bool:
        """Return whether a server reports that `model` lacks `capability`."""
        return any(server.facts(model).lacks(capability) for server in self.servers)

    def queues(
        self, lanes: Iterable[LaneName], tier: str, model: str, overrides: LimitOverrides | None
    ) -> dict[LaneName, Queue]:
        """Return the queues for requests of `tier` for `model`, by lane."""
        return {lane: self.admission.queue(model, lane, tier, _tier_limits(lane, overrides)) for lane in lanes}

    def forget_models(self, models: Collection[str], kept: Collection[Queue]) -> set[str]:
        """Drop what is kept for `models`, unless they have requests, or queues in `kept`.

        Return those for which to call this again later.
        """
        self.admission.forget(kept)
        used = {self.engine.canonical(queue.model) for queue in self.admission.queues}
        unused = {model for model in models if self.engine.canonical(model) not in used}
        later = {queue.model for queue in self.admission.queues if queue not in kept}.intersection(models)
        return later.union(*(server.forget_models(unused) for server in self.servers))

    def learned(self) -> dict[str, dict[str, int]]:
        """Return the learned limits by server and model."""
        return {
            server.name: server.guesses
            | {
                model: limit.limit
                for model, limit in server.models.items()
                if isinstance(limit, AdaptiveLimit) and not limit.is_held
            }
            for server in self.servers
        }

    def recall(self, learned: Mapping[str, Mapping[str, int]]) -> None:
        """Start with limits that were learned earlier. Call it before the first request."""
        for server in self.servers:
            server.guesses = dict(learned.get(server.name, {}))

    def change(self, settings: BackendSettings, num_parallel: int | None = None) -> None:
        """Apply other limits, times and options to the same servers. Requests in flight continue.

        The servers of `settings` have to be the same (`config.is_same_place`).
        """
        self.settings = settings
        self.engine = _build_engine(settings)
        self.embedder = _build_embedder(settings)
        self.completer = _build_completer(settings, self.engine)
        self.loading = _build_loading(settings)
        for server in self.servers:
            server.pool.connect_timeout = settings.limits.connect_timeout
        self._choose_balance()
        self.admission.change(_admission_limits(settings, num_parallel))

    def _choose_balance(self) -> None:
        """Choose servers by their prefix caches if there are several, and their kind has such a cache."""
        uses = len(self.servers) > 1 and self.kind != "ollama" and self.settings.balance == "affinity"
        if not uses:
            self.admission.affinity = None
        elif self.admission.affinity is None:
            self.admission.affinity = Affinity()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for server in self.servers:
            server.pool.close()

    def _build_server(self, number: int, settings: ServerSettings, tls: ssl.SSLContext | None) -> Server:
        url = urlsplit(settings.base_url)
        secure = url.scheme == "https"
        origin = Origin(url.hostname or "", url.port or (443 if secure else 80), tls if secure else None, url.path)
        pool = Pool(origin, connect_timeout=self.settings.limits.connect_timeout, idle_seconds=IDLE_SECONDS[self.kind])
        headers = [("Content-Type", "application/json"), *self.headers()]
        head, embedding_head = (
            pool.head("POST", path, headers) for path in (self.engine.chat_path, self.embedder.path)
        )
        others = {path: pool.head("POST", path, headers) for path in (self.completer.path, VllmReranker.path)}
        name = self.name if len(self.settings.servers) == 1 else f"{self.name}#{number}"
        built = Server(name, settings, pool, head, embedding_head, self.engine.canonical, others)
        built.prefixes.seed = crc32(settings.base_url.encode())
        return built


def _admission_limits(settings: BackendSettings, num_parallel: int | None) -> AdmissionLimits:
    limits = settings.limits
    lanes = {
        "text": LaneLimits(None, limits.max_queue, limits.queue_timeout),
        "vision": LaneLimits(limits.vision_concurrency, limits.vision_max_queue, limits.vision_queue_timeout),
        "embedding": LaneLimits(limits.max_concurrency, limits.max_queue, limits.queue_timeout, is_separate=True),
    }
    model_slots = None if limits.model_concurrency == "auto" else limits.model_concurrency
    return AdmissionLimits(limits.max_concurrency, model_slots, lanes, settings.kind == "ollama", num_parallel or 1)


def _tier_limits(lane: LaneName, overrides: LimitOverrides | None) -> TierLimits | None:
    """Return the limits that a tier sets for itself in `lane`, or None if it sets none."""
    if overrides is None:
        return None
    is_vision = lane == "vision"
    model_slots = overrides.concurrency or overrides.model_concurrency
    own = TierLimits(
        overrides.max_concurrency,
        None if model_slots == "auto" else model_slots,
        overrides.vision_concurrency if is_vision else None,
        overrides.vision_max_queue if is_vision else overrides.max_queue,
        overrides.vision_queue_timeout if is_vision else overrides.queue_timeout,
    )
    return None if own == TierLimits() else own


def _ejection_level(detector: OutlierDetector) -> int:
    return 0 if not detector.restrains else 1 if detector.gets_requests else 2


def _call_later(seconds: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, callback)


def _build_engine(settings: BackendSettings) -> Engine:
    if settings.kind == "ollama":
        return Ollama(settings.keep_alive, settings.num_ctx, settings.truncate)
    return Vllm() if settings.kind == "vllm" else OpenAi()


def _build_loading(settings: BackendSettings) -> OllamaLoading | None:
    return OllamaLoading(settings.keep_alive, settings.num_ctx) if settings.kind == "ollama" else None


def _build_embedder(settings: BackendSettings) -> Embedder:
    return (
        OllamaEmbedder(settings.keep_alive, settings.num_ctx, settings.truncate)
        if settings.kind == "ollama"
        else OpenAiEmbedder()
    )


def _build_completer(settings: BackendSettings, engine: Engine) -> Completer:
    if isinstance(engine, OpenAi):
        return OpenAiCompleter(engine)
    return OllamaCompleter(settings.keep_alive, settings.num_ctx, settings.truncate)


def _tls_context(settings: BackendSettings) -> ssl.SSLContext | None:
    if not any(server.base_url.startswith("https:") for server in settings.servers):
        return None
    return ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
