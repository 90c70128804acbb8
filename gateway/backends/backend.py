"""A backend at run time: its servers, their connections, and the line before them."""

import asyncio
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from gateway.admission import Admission
from gateway.backends.base import Dialect, ModelFacts, Models
from gateway.backends.ollama import Ollama
from gateway.backends.openai import OpenAi
from gateway.backends.vllm import Vllm
from gateway.config import Backend as BackendSettings
from gateway.config import LimitOverrides
from gateway.config import Server as ServerSettings
from gateway.queues import Lane, LaneLimits, Limits, OwnLimits, Queue, Station
from gateway.slots import LearnedBound
from gateway.wire import Origin, Pool

IDLE_SECONDS = {"ollama": 30.0, "vllm": 2.5, "openai": 2.5}
"""Half of what the servers keep an idle connection: vLLM 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), uvicorn's default for others, Ollama for ever."""

VIA = b"x-gateway-via"
"""Request header with the ids of the gateways that a request has come through."""


_NOTHING = ModelFacts()


class Server(Station):
    """One address of a backend, and what its probes have found there."""

    __slots__ = ("_canonical", "_configured", "_head", "discovered", "name", "pool", "up")

    def __init__(self, name: str, settings: ServerSettings, pool: Pool, head: bytes, canonical: Callable[[str], str]) -> None:
        super().__init__()
        self.name = name
        self.pool = pool
        self._head = head
        self._configured = settings.models
        self._canonical = canonical
        self.discovered: Models | None = None
        """Models by the server's own word; None while it has not answered."""
        self.up: bool | None = None
        """None: not asked yet."""

    def __repr__(self) -> str:
        return f"<Server {self.name}, {self.running} in flight, up {self.up}>"

    def serves(self, model: str) -> bool:
        """A server that has told nothing yet is taken at the settings' word."""
        if self._configured is not None:
            return model in self._configured
        return self.discovered is None or self._listed(model) is not None

    def facts(self, model: str) -> ModelFacts:
        """What the server tells of `model`."""
        return self._listed(model) or _NOTHING

    def _listed(self, model: str) -> ModelFacts | None:
        """Of what the server says that it has, the one that it would take for `model`."""
        if self.discovered is None:
            return None
        found = self.discovered.get(model)
        if found is None:
            wanted = self._canonical(model)
            found = next((facts for name, facts in self.discovered.items() if self._canonical(name) == wanted), None)
        return found

    def is_up(self) -> bool:
        return self.up is not False

    def chat_head(self, came_through: bytes, gateway_id: bytes) -> bytes:
        """The head of a chat request; `came_through` is the client's own `x-gateway-via`."""
        via = came_through + b", " + gateway_id if came_through else gateway_id
        return b"%bX-Gateway-Via: %b\r\n" % (self._head, via)


class Backend:
    """What stands behind one name of the settings."""

    def __init__(self, settings: BackendSettings, num_parallel: int | None = None) -> None:
        self.name = settings.name
        self.kind = settings.kind
        self.settings = settings
        self.dialect: Dialect = _dialect(settings)
        tls = _tls(settings)
        self.servers = [self._server(number, server, tls) for number, server in enumerate(settings.servers, 1)]
        self.admission = Admission(self.servers, _limits(settings, num_parallel), time.monotonic, _call_later, self.dialect.canonical)

    def __repr__(self) -> str:
        return f"<Backend {self.name}: {self.servers!r}>"

    @property
    def is_up(self) -> bool:
        return any(server.is_up() for server in self.servers)

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

    def queues(self, tier: str, model: str, overrides: LimitOverrides | None) -> dict[Lane, Queue]:
        """Where requests of `tier` for `model` stand, by lane."""
        return {lane: self.admission.queue(model, lane, tier, _own(lane, overrides)) for lane in self.admission.lanes}

    def learned(self) -> dict[str, dict[str, int]]:
        """The limits that were learned, by server and model."""
        return {
            server.name: server.guesses
            | {model: bound.limit for model, bound in server.models.items() if isinstance(bound, LearnedBound) and not bound.is_held}
            for server in self.servers
        }

    def recall(self, learned: Mapping[str, Mapping[str, int]]) -> None:
        """Begin with what `learned` was before; to be called before the first request."""
        for server in self.servers:
            server.guesses = dict(learned.get(server.name, {}))

    def close(self) -> None:
        for server in self.servers:
            server.pool.close()

    def _server(self, number: int, settings: ServerSettings, tls: ssl.SSLContext | None) -> Server:
        url = urlsplit(settings.base_url)
        secure = url.scheme == "https"
        origin = Origin(url.hostname or "", url.port or (443 if secure else 80), tls if secure else None, url.path)
        pool = Pool(origin, connect_timeout=self.settings.limits.connect_timeout, idle_seconds=IDLE_SECONDS[self.kind])
        head = pool.head("POST", self.dialect.chat_path, [("Content-Type", "application/json"), *self.headers()])
        name = self.name if len(self.settings.servers) == 1 else f"{self.name}#{number}"
        return Server(name, settings, pool, head, self.dialect.canonical)


def _limits(settings: BackendSettings, num_parallel: int | None) -> Limits:
    limits = settings.limits
    lanes = {
        "text": LaneLimits(None, limits.max_queue, limits.queue_timeout),
        "vision": LaneLimits(limits.vision_concurrency, limits.vision_max_queue, limits.vision_queue_timeout),
    }
    model_slots = None if limits.model_concurrency == "auto" else limits.model_concurrency
    return Limits(limits.max_concurrency, model_slots, lanes, settings.kind == "ollama", num_parallel or 1)


def _own(lane: Lane, overrides: LimitOverrides | None) -> OwnLimits | None:
    """What a tier bounds for itself in `lane`; None: nothing."""
    if overrides is None:
        return None
    of_vision = lane == "vision"
    model_slots = overrides.concurrency or overrides.model_concurrency
    own = OwnLimits(
        overrides.max_concurrency,
        None if model_slots == "auto" else model_slots,
        overrides.vision_concurrency if of_vision else None,
        overrides.vision_max_queue if of_vision else overrides.max_queue,
        overrides.vision_queue_timeout if of_vision else overrides.queue_timeout,
    )
    return None if own == OwnLimits() else own


def _call_later(seconds: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, callback)


def _dialect(settings: BackendSettings) -> Dialect:
    if settings.kind == "ollama":
        return Ollama(settings.keep_alive, settings.num_ctx, settings.truncate)
    return Vllm() if settings.kind == "vllm" else OpenAi()


def _tls(settings: BackendSettings) -> ssl.SSLContext | None:
    if not any(server.base_url.startswith("https:") for server in settings.servers):
        return None
    return ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)


def build(settings: Iterable[BackendSettings], num_parallel: int | None = None) -> dict[str, Backend]:
    """The backends of the settings, by name; `num_parallel` is what Ollama was started with, where that is known."""
    return {backend.name: Backend(backend, num_parallel) for backend in settings}
