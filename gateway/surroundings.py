"""What a relay is given: the client's side, the request, where it goes, and what all relays share."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

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

    __slots__ = ("backend", "fallback", "generation", "header_lines", "limits", "metrics", "queues", "route")

    def __init__(
        self,
        route: Route,
        backend: Backend,
        queues: dict[Lane, Queue],
        limits: Limits,
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
        self.generation = 0
        self.past: dict[int, Era] = {}
        """By generation: what requests that began under it may still need."""
        self.backends = backends
        self.metrics = metrics
        self.on_exchange = on_exchange
        self.gateway_id = gateway_id
        self._take(settings)
        self.loop = asyncio.get_running_loop()
        self.clock = time.monotonic
        self.sweep = Sweep(self.loop, self.clock)
        self.lead: Callable[[Any], Destination | None] = lambda relay: None
        """Where a chat's relay, which gets in line once more, is to wait instead; None: where it was."""
        self._thread = ThreadPoolExecutor(1, "schemas")
        self._destinations: dict[Route, Destination] = {}

    def in_thread(self, work: Callable[..., T], *words: object) -> "asyncio.Future[T]":
        """Work that would hold up everybody else, one after the other: threads of Python take turns on one processor anyway."""
        return self.loop.run_in_executor(self._thread, work, *words)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, settings: Settings) -> None:
        self.settings = settings
        self.max_text_body = settings.max_text_body
        self.commit_after = settings.commit_after
        self.heartbeat = settings.heartbeat
        self.waiting_note = settings.waiting_note

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """From now on `settings` count, with these `backends`: one step, between two requests."""
        self.past[self.generation] = Era(self.settings, dict(self.backends))
        self.generation += 1
        self._take(settings)
        self.backends.clear()
        self.backends.update(backends)
        self._destinations.clear()

    def destination(self, route: Route, endpoint: str) -> Destination:
        found = self._destinations.get(route)
        if found is None:
            generation = self._generation_of(route, endpoint)
            settings, backends = self.past.get(generation) or Era(self.settings, self.backends)
            backend, tier = backends[route.backend], settings.tiers[route.tier] if endpoint == CHAT else None
            limits = backend.settings.limits if tier is None else settings.limits_for(route.tier, route.backend)
            metrics = self.metrics.route(route.tier, route.backend, endpoint)
            queues = backend.queues(LANES[endpoint], route.tier, route.model, None if tier is None else tier.limits.get(route.backend))
            fallback = None if tier is None else fallback_route(tier, route.backend)
            found = Destination(route, backend, queues, limits, metrics, fallback, generation)
            if generation == self.generation:
                self._destinations[route] = found
        return found

    def _generation_of(self, route: Route, endpoint: str) -> int:
        """The last whose settings have `route`: a request may be on its way to where nothing leads any more."""
        if not self.past or _leads(self.settings, route, endpoint):
            return self.generation
        return next((number for number in sorted(self.past, reverse=True) if _leads(self.past[number].settings, route, endpoint)), self.generation)

    @property
    def queues(self) -> set[Queue]:
        """Those that a request of now may stand in."""
        return {queue for found in self._destinations.values() for queue in found.queues.values()}


class Era(NamedTuple):
    """What counted once."""

    settings: Settings
    backends: dict[str, Backend]


def _leads(settings: Settings, route: Route, endpoint: str) -> bool:
    if endpoint != CHAT:
        item = settings.embeddings.get(route.tier)
        return item is not None and (item.backend, item.model) == (route.backend, route.model)
    tier = settings.tiers.get(route.tier)
    return tier is not None and tier.models.get(route.backend) == route.model
