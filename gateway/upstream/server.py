"""One server of a backend at run time: its pool, circuit breaker, limits and models."""

import asyncio
import time
from collections.abc import Callable

from gateway.admission.queues import ServerSlots
from gateway.config import ServerSettings
from gateway.engines.engine import ModelFacts, Models
from gateway.upstream.circuit_breaker import CircuitBreaker
from gateway.upstream.pool import Pool

VIA = b"x-gateway-via"
"""Request header with the ids of the gateways that a request has come through."""

_NOTHING = ModelFacts()


class Server(ServerSlots):
    """One address of a backend, and what its probes have found there."""

    __slots__ = (
        "_canonical", "_configured", "_embedding_head", "_head", "_missing", "_own_head", "circuit", "discovered", "doubted",
        "is_left_out", "name", "pool", "up",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        settings: ServerSettings,
        pool: Pool,
        head: bytes,
        embedding_head: bytes,
        canonical: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.name = name
        self.pool = pool
        self._head = head
        self._embedding_head = embedding_head
        self._own_head: bytes | None = None  # of what came through no other gateway
        self._configured = settings.models
        self._canonical = canonical
        self.discovered: Models | None = None
        """Models by the server's own word; None while it has not answered."""
        self.up: bool | None = None
        """Whether it answers its probe as it should; None: not asked yet."""
        self.circuit = CircuitBreaker(time.monotonic)
        self.doubted = asyncio.Event()
        """A probe should look at once."""
        self.is_left_out = False
        """It lives but is of no use, and another is."""
        self._missing: set[str] = set()

    def __repr__(self) -> str:
        return f"<Server {self.name}, {self.load} in flight, up {self.up}, {self.circuit!r}>"

    def serves(self, model: str) -> bool:
        """A server that has told nothing yet is taken at the settings' word."""
        if self._missing and model in self._missing:
            return False
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

    def mark_missing(self, model: str) -> None:
        """The server said that it does not have `model`: believed until the next probe."""
        self._missing.add(model)

    @property
    def is_well(self) -> bool:
        """It answers its probe, or has not been asked."""
        return self.up is not False and not self.circuit.is_open

    @property
    def lacks_a_model(self) -> bool:
        """Something was missed since the last probe."""
        return bool(self._missing)

    def update_models(self, models: Models) -> None:
        """A probe was answered: these are there."""
        self.discovered = models
        self.up = True
        self._missing.clear()

    def is_up(self) -> bool:
        """Whether it may be given one request more, its slots aside."""
        circuit = self.circuit
        return not self.is_left_out and (not circuit.restrains or circuit.allows(self.load))

    def chat_head(self, came_through: bytes, gateway_id: bytes) -> bytes:
        """The head of a chat request; `came_through` is the client's own `x-gateway-via`."""
        if came_through:
            return b"%bX-Gateway-Via: %b\r\n" % (self._head, _via(came_through, gateway_id))
        if self._own_head is None:
            self._own_head = b"%bX-Gateway-Via: %b\r\n" % (self._head, gateway_id)
        return self._own_head

    def embedding_head(self, came_through: bytes, gateway_id: bytes) -> bytes:
        """The head of a request for embeddings, likewise."""
        return b"%bX-Gateway-Via: %b\r\n" % (self._embedding_head, _via(came_through, gateway_id))


def _via(came_through: bytes, gateway_id: bytes) -> bytes:
    return came_through + b", " + gateway_id if came_through else gateway_id
