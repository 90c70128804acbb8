"""A backend at run time: its servers, their connections and circuits, and the line before them."""

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from urllib.parse import urlsplit

from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.queues import AdmissionLimits, LaneLimits, LaneName, Queue, TierLimits
from gateway.admission.scheduler import Admission
from gateway.config import BackendSettings, LimitOverrides, ServerSettings
from gateway.engines.embeddings import Embedder, OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import Engine
from gateway.engines.ollama import Ollama
from gateway.engines.ollama_loading import OllamaLoading
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm
from gateway.errors import BackendUnavailable
from gateway.upstream.circuit_breaker import CALM, LEVELS, CircuitBreaker, CircuitState
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.retry_budget import RetryBudget
from gateway.upstream.server import Server

IDLE_SECONDS = {"ollama": 30.0, "vllm": 2.5, "openai": 2.5}
"""Half of what the servers keep an idle connection: vLLM 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), uvicorn's default for others, Ollama for ever."""


PAUSE_MARGIN = 0.01
"""Seconds. The loop's clock is a little coarser than the one that ends a pause."""


_log = logging.getLogger("gateway.circuit")


class Backend:
    """What stands behind one name of the settings."""

    def __init__(
        self,
        settings: BackendSettings,
        num_parallel: int | None = None,
        *,
        on_down: Callable[["Backend"], None] = lambda backend: None,
        on_learned: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = settings.name
        self.kind = settings.kind
        self.settings = settings
        self.engine: Engine = _engine(settings)
        self.embedder: Embedder = _embedder(settings)
        self.loading = _loading(settings)
        """How models are loaded; None: they always are."""
        tls = _tls(settings)
        self.servers = [self._server(number, server, tls) for number, server in enumerate(settings.servers, 1)]
        self.admission = Admission(
            self.servers,
            _limits(settings, num_parallel),
            time.monotonic,
            _call_later,
            self.engine.canonical,
            on_learned,
        )
        self.budget = RetryBudget()
        self.is_restrained = False
        """Some server may not be given requests: only then are `is_down` and `accepts_none` worth a call."""
        self.on_down = on_down
        """Called when the circuit breaker of a server has opened."""
        self._pauses: set[asyncio.TimerHandle] = set()
        for server in self.servers:
            server.circuit = CircuitBreaker(time.monotonic, partial(self._circuit_changed, server))

    def __repr__(self) -> str:
        return f"<Backend {self.name}: {self.servers!r}>"

    @property
    def is_up(self) -> bool:
        """A server of it is well."""
        return any(server.is_well for server in self.servers)

    @property
    def circuit_level(self) -> int:
        """The best of its servers' circuits, as `LEVELS` counts."""
        return min(LEVELS[server.circuit.state] for server in self.servers)

    def is_down(self, model: str) -> bool:
        """Every server that has `model` is known to be dead."""
        serving = [server for server in self.servers if server.serves(model)]
        return bool(serving) and all(server.circuit.is_open for server in serving)

    def accepts_none(self, model: str) -> bool:
        """No server that has `model` may be given requests for now; one that a probe is looking at will be known at once."""
        serving = [server for server in self.servers if server.serves(model)]
        return bool(serving) and not any(server.circuit.state == "suspect" or server.is_up() for server in serving)

    def unavailable(self) -> BackendUnavailable:
        """What a request gets that nobody can serve."""
        seconds = max(1, math.ceil(self.settings.probe_interval))
        return BackendUnavailable("No server of the model backend is available. Try again later.", retry_after=seconds)

    def pause(self, server: Server, seconds: float) -> None:
        """Leave `server` alone for so long: it is full, or fails."""
        server.circuit.pause(seconds)
        timer: asyncio.TimerHandle = asyncio.get_running_loop().call_later(
            seconds + PAUSE_MARGIN, lambda: self._resume(server, timer)
        )
        self._pauses.add(timer)
        self.refresh()

    def _resume(self, server: Server, timer: asyncio.TimerHandle) -> None:
        self._pauses.discard(timer)
        server.circuit.allows(server.load)  # notices that the pause is over
        self.refresh()

    def refresh(self) -> None:
        """A server came or went, or its models changed: see who can run now."""
        is_any_well = self.is_up
        for server in self.servers:
            server.is_left_out = is_any_well and server.up is False
        self.is_restrained = any(server.is_left_out or server.circuit.restrains for server in self.servers)
        self.admission.refresh()

    def _circuit_changed(self, server: Server, was: CircuitState, reason: str) -> None:
        state = server.circuit.state
        if server.up is not None:  # what the first probe finds is told apart
            level = logging.WARNING if state in ("suspect", "open") else logging.INFO
            _log.log(level, "backend %s: circuit %s, was %s (%s)", server.name, state, was, reason)
        if state == "suspect":
            server.doubted.set()
        if state == "open":
            server.up = False
        if (
            was == "suspect"
            and state == "closed"
            and any(other is not server and other.is_up() for other in self.servers)
        ):
            self.pause(server, CALM)  # failing fast looks idle: it would get all that comes
        self.refresh()
        if state == "open":
            self.on_down(self)

    def headers(self) -> list[tuple[str, str]]:
        """What the settings send with each request to this backend."""
        headers = [(name, value.get_secret_value()) for name, value in self.settings.headers.items()]
        if self.settings.api_key is not None:
            headers.append(("Authorization", f"Bearer {self.settings.api_key.get_secret_value()}"))
        return headers

    def context_length(self, model: str) -> int | None:
        """The smallest that a server of this backend tells for `model`, in tokens."""
        known = [length for server in self.servers if (length := server.facts(model).context_length) is not None]
        return min(known, default=None)

    def lacks(self, model: str, capability: str) -> bool:
        """By the word of the servers that tell."""
        return any(server.facts(model).lacks(capability) for server in self.servers)

    def queues(
        self, lanes: Iterable[LaneName], tier: str, model: str, overrides: LimitOverrides | None
    ) -> dict[LaneName, Queue]:
        """Where requests of `tier` for `model` stand, by lane."""
        return {lane: self.admission.queue(model, lane, tier, _own(lane, overrides)) for lane in lanes}

    def learned(self) -> dict[str, dict[str, int]]:
        """The limits that were learned, by server and model."""
        return {
            server.name: server.guesses
            | {
                model: bound.limit
                for model, bound in server.models.items()
                if isinstance(bound, AdaptiveLimit) and not bound.is_held
            }
            for server in self.servers
        }

    def recall(self, learned: Mapping[str, Mapping[str, int]]) -> None:
        """Begin with what `learned` was before; to be called before the first request."""
        for server in self.servers:
            server.guesses = dict(learned.get(server.name, {}))

    def change(self, settings: BackendSettings, num_parallel: int | None = None) -> None:
        """Other limits, times and manners for the same servers (`config.is_same_place`); what runs goes on."""
        self.settings = settings
        self.engine, self.embedder, self.loading = _engine(settings), _embedder(settings), _loading(settings)
        for server in self.servers:
            server.pool.connect_timeout = settings.limits.connect_timeout
        self.admission.change(_limits(settings, num_parallel))

    def close(self) -> None:
        for timer in self._pauses:
            timer.cancel()
        for server in self.servers:
            server.pool.close()

    def _server(self, number: int, settings: ServerSettings, tls: ssl.SSLContext | None) -> Server:
        url = urlsplit(settings.base_url)
        secure = url.scheme == "https"
        origin = Origin(url.hostname or "", url.port or (443 if secure else 80), tls if secure else None, url.path)
        pool = Pool(origin, connect_timeout=self.settings.limits.connect_timeout, idle_seconds=IDLE_SECONDS[self.kind])
        headers = [("Content-Type", "application/json"), *self.headers()]
        head, embedding_head = (
            pool.head("POST", path, headers) for path in (self.engine.chat_path, self.embedder.path)
        )
        name = self.name if len(self.settings.servers) == 1 else f"{self.name}#{number}"
        return Server(name, settings, pool, head, embedding_head, self.engine.canonical)


def _limits(settings: BackendSettings, num_parallel: int | None) -> AdmissionLimits:
    limits = settings.limits
    lanes = {
        "text": LaneLimits(None, limits.max_queue, limits.queue_timeout),
        "vision": LaneLimits(limits.vision_concurrency, limits.vision_max_queue, limits.vision_queue_timeout),
        "embedding": LaneLimits(limits.max_concurrency, limits.max_queue, limits.queue_timeout, is_separate=True),
    }
    model_slots = None if limits.model_concurrency == "auto" else limits.model_concurrency
    return AdmissionLimits(limits.max_concurrency, model_slots, lanes, settings.kind == "ollama", num_parallel or 1)


def _own(lane: LaneName, overrides: LimitOverrides | None) -> TierLimits | None:
    """What a tier bounds for itself in `lane`; None: nothing."""
    if overrides is None:
        return None
    of_vision = lane == "vision"
    model_slots = overrides.concurrency or overrides.model_concurrency
    own = TierLimits(
        overrides.max_concurrency,
        None if model_slots == "auto" else model_slots,
        overrides.vision_concurrency if of_vision else None,
        overrides.vision_max_queue if of_vision else overrides.max_queue,
        overrides.vision_queue_timeout if of_vision else overrides.queue_timeout,
    )
    return None if own == TierLimits() else own


def _call_later(seconds: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, callback)


def _engine(settings: BackendSettings) -> Engine:
    if settings.kind == "ollama":
        return Ollama(settings.keep_alive, settings.num_ctx, settings.truncate)
    return Vllm() if settings.kind == "vllm" else OpenAi()


def _loading(settings: BackendSettings) -> OllamaLoading | None:
    return OllamaLoading(settings.keep_alive, settings.num_ctx) if settings.kind == "ollama" else None


def _embedder(settings: BackendSettings) -> Embedder:
    return (
        OllamaEmbedder(settings.keep_alive, settings.num_ctx, settings.truncate)
        if settings.kind == "ollama"
        else OpenAiEmbedder()
    )


def _tls(settings: BackendSettings) -> ssl.SSLContext | None:
    if not any(server.base_url.startswith("https:") for server in settings.servers):
        return None
    return ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
