"""What a relay is given: the client's side, the request, where it goes, and what all relays share."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from gateway.backends.backend import Backend
from gateway.config import Limits, Settings
from gateway.embedding import Embedding
from gateway.metering import CHAT, LANES, Exchange
from gateway.metrics import Metrics, RouteMetrics
from gateway.protocol import Chat
from gateway.queues import Lane, Queue
from gateway.routing import Route, fallback_route
from gateway.turns import Claim
from gateway.watch import Sweep

T = TypeVar("T")


class Client(Protocol):
    """The client's side of the exchange, as the door hands it over in `scope["extensions"]["gateway.client"]`. Writing never blocks."""

    gone: bool
    paused: bool
    notes: dict[str, Any]
    on_leave: Callable[[], None] | None
    on_pause: Callable[[], None] | None
    on_resume: Callable[[], None] | None

    def whole_body(self) -> bytes | None: ...
    def open(self, status: int, header_lines: bytes) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def answer(self, status: int, header_lines: bytes, body: bytes) -> None: ...


class Destination:
    """What all exchanges of one tier, or of one embedding model, on one backend share, looked up once."""

    __slots__ = ("backend", "fallback", "header_lines", "limits", "metrics", "queues", "route")

    def __init__(
        self, route: Route, backend: Backend, queues: dict[Lane, Queue], limits: Limits, metrics: RouteMetrics, fallback: Route | None
    ) -> None:
        self.route = route
        self.fallback = fallback
        """Where the tier lets requests go that `backend` cannot serve."""
        self.backend = backend
        self.queues = queues
        self.limits = limits
        self.metrics = metrics
        names = (route.tier.encode(), route.backend.encode(), route.model.encode())  # printable ASCII: gateway.config sees to it
        self.header_lines = b"x-gateway-tier: %b\r\nx-gateway-backend: %b\r\nx-gateway-model: %b\r\n" % names


class Request(Struct, frozen=True, gc=False):
    """What was known of a request when its forwarding began. Times in seconds."""

    id: str
    key_id: str
    claim: Claim
    size: int
    """Bytes of the request's body."""
    route: Route
    came_through: bytes
    read_timeout: float | None
    """How long the client waits for a plain answer, where it says so."""
    extra_lines: bytes
    """Header lines sent with the answer, whatever it is."""


class ChatRequest(Request, frozen=True, gc=False):
    """One for a chat completion."""

    chat: Chat
    answer_id: str
    """The `id` in the answer's body."""
    created: int
    """Unix time."""
    session: bytes = b""
    """The client's name for the conversation; empty without one."""
    bucket: int | None = None
    """Of a canary, where it cannot be told from `chat` any more."""


class EmbeddingRequest(Request, frozen=True, gc=False):
    """One for embeddings."""

    embedding: Embedding


class Surroundings:
    """What all relays share. Built in the loop that they run in."""

    def __init__(
        self, settings: Settings, backends: dict[str, Backend], metrics: Metrics, on_exchange: Callable[[Exchange], None], gateway_id: bytes
    ) -> None:
        self.settings = settings
        self.backends = backends
        self.metrics = metrics
        self.on_exchange = on_exchange
        self.gateway_id = gateway_id
        self.max_text_body = settings.max_text_body
        self.commit_after = settings.commit_after
        self.heartbeat = settings.heartbeat
        self.waiting_note = settings.waiting_note
        self.loop = asyncio.get_running_loop()
        self.clock = time.monotonic
        self.sweep = Sweep(self.loop, self.clock)
        self._thread = ThreadPoolExecutor(1, "schemas")
        self._destinations: dict[Route, Destination] = {}

    def in_thread(self, work: Callable[..., T], *words: object) -> "asyncio.Future[T]":
        """Work that would hold up everybody else, one after the other: threads of Python take turns on one processor anyway."""
        return self.loop.run_in_executor(self._thread, work, *words)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def destination(self, route: Route, endpoint: str) -> Destination:
        found = self._destinations.get(route)
        if found is None:
            backend, tier = self.backends[route.backend], self.settings.tiers[route.tier] if endpoint == CHAT else None
            limits = backend.settings.limits if tier is None else self.settings.limits_for(route.tier, route.backend)
            metrics = self.metrics.route(route.tier, route.backend, endpoint)
            queues = backend.queues(LANES[endpoint], route.tier, route.model, None if tier is None else tier.limits.get(route.backend))
            fallback = None if tier is None else fallback_route(tier, route.backend)
            found = self._destinations[route] = Destination(route, backend, queues, limits, metrics, fallback)
        return found
