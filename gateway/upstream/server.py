"""One server of a backend at run time: its pool, circuit breaker, limits and models."""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

from gateway.admission.limits import LaneName
from gateway.admission.server_slots import ServerSlots
from gateway.config import ServerSettings
from gateway.engines.engine import ModelFacts, Models
from gateway.upstream.circuit_breaker import CircuitBreaker
from gateway.upstream.liveness import DOUBT_SECONDS, Liveness
from gateway.upstream.outlier_detection import OutlierDetector
from gateway.upstream.pool import Pool

WATCH_SECONDS = 1.0
"""Interval at which `end_lost_requests` is called."""

MAX_DISCOVERED = 1000
"""Maximum number of models that are discovered on one backend: the first that its servers list."""

VIA = b"x-gateway-via"
"""Request header with the ids of the gateways that a request has passed through."""

_NO_FACTS = ModelFacts()


def _ignore() -> None:
    pass


class Server(ServerSlots):
    """A server of a backend, and what its probes have found."""

    __slots__ = (
        "_canonical",
        "_configured",
        "_direct_head",
        "_embedding_head",
        "_head",
        "_missing",
        "_other_heads",
        "build_detector",
        "circuit",
        "detectors",
        "discovered",
        "doubt_name",
        "doubted",
        "ignored_names",
        "is_excluded",
        "is_hinted",
        "is_joining",
        "is_leaving",
        "label",
        "liveness",
        "name",
        "pool",
        "up",
    )

    def __init__(
        self,
        name: str,
        settings: ServerSettings,
        pool: Pool,
        head: bytes,
        embedding_head: bytes,
        canonical: Callable[[str], str],
        other_heads: Mapping[str, bytes] | None = None,
    ) -> None:
        """`other_heads` are the heads of further requests, by path."""
        super().__init__()
        self.name = name
        self.label = ""
        """Number in the settings, or the place of a server whose address a host name has."""
        self.pool = pool
        self._head = head
        self._embedding_head = embedding_head
        self._other_heads = other_heads or {}
        self._direct_head: bytes | None = None  # for requests that came through no other gateway
        self._configured = settings.models
        self._canonical = canonical
        self.discovered: Models | None = None
        """Models that the server reports, or None until it has answered a probe."""
        self.ignored_names = 0
        """Number of models in the last answer to a probe whose names are too long."""
        self.up: bool | None = None
        """True if the server answers its probes as expected; None until it was asked."""
        self.circuit = CircuitBreaker(time.monotonic)
        self.detectors: dict[tuple[str, LaneName], OutlierDetector] = {}
        """Outlier detectors by model and lane."""
        self.build_detector: Callable[[str, LaneName], OutlierDetector] = partial(OutlierDetector, clock=time.monotonic)
        self.doubted = asyncio.Event()
        """Set to request a probe at once."""
        self.is_hinted = False
        """True if another replica made this one doubt the server, so that the next probe has to be sure."""
        self.is_excluded = False
        """True if the server does not answer as expected while another server is healthy, or its
        engine does not have the GPU."""
        self.is_joining = False
        """True until the first probe of a server that joined its backend at run time has ended."""
        self.is_leaving = False
        """True if the server gets no new requests, because its host name no longer has its address."""
        self.doubt_name: Callable[[], None] = _ignore
        """Requests a lookup of the host name that has the server's address."""
        self.liveness = Liveness(-math.inf)
        """Signs of life, on the clock of the event loop."""
        self._missing: set[str] = set()

    def __repr__(self) -> str:
        return f"<Server {self.name}, {self.load} in flight, up {self.up}, {self.circuit!r}>"

    def serves(self, model: str) -> bool:
        """Return whether the server has `model`, and is not about to leave its backend.

        Until it has answered a probe, a server without models in the settings counts as having all.
        """
        if self.is_leaving or (self._missing and model in self._missing):
            return False
        if self._configured is not None:
            return model in self._configured
        return self.discovered is None or model in self.discovered or self._find_facts(model) is not None

    def facts(self, model: str) -> ModelFacts:
        """Return the facts that the server reports about `model`."""
        found = self.discovered.get(model) if self.discovered else None
        return found or self._find_facts(model) or _NO_FACTS

    def listed_models(self) -> Iterator[tuple[str, ModelFacts]]:
        """Yield the models that the server reports, without those that the settings exclude."""
        for name, facts in (self.discovered or {}).items():
            if self._configured is None or name in self._configured:
                yield name, facts

    def _find_facts(self, model: str) -> ModelFacts | None:
        """Return the facts of the reported model that the server would use for the name `model`."""
        if self.discovered is None:
            return None
        found = self.discovered.get(model)
        if found is None:
            wanted = self._canonical(model)
            found = next((facts for name, facts in self.discovered.items() if self._canonical(name) == wanted), None)
        return found

    def has_loaded(self, model: str) -> bool:
        """Return whether `model` can serve at once, as far as is known."""
        if self.residency is None:
            return self.serves(model)
        state = self.residency.states.get(self._canonical(model))
        return state is not None and state.is_loaded

    def mark_missing(self, model: str) -> None:
        """Record that the server denied having `model`. This holds until the next probe."""
        self._missing.add(model)

    @property
    def is_well(self) -> bool:
        """True if the server is up, or was not asked yet, and its circuit is not open."""
        return self.up is not False and not self.circuit.is_open

    @property
    def lacks_a_model(self) -> bool:
        """True if a request found a model missing since the last probe."""
        return bool(self._missing)

    def update_models(self, models: Models) -> None:
        """Record the answer to a probe: the models of the server."""
        self.discovered = models
        self.up = True
        self._missing.clear()

    def rest(self) -> None:
        """Forget what is known of the server's health and caches, because its engine sleeps or wakes."""
        self.up = None
        self.pool.close_idle()
        self.prefixes.clear()
        self.liveness = Liveness(-math.inf)
        self.circuit.reset()

    def end_lost_requests(self, now: float) -> int:
        """End the requests that the server does not work on any more (`liveness.py`). Return their number.

        `now` is the time on the clock of the event loop.
        """
        pool, liveness = self.pool, self.liveness
        if pool.has_sign_of_life(now):
            liveness.show_life(now)
        if liveness.is_gone(now):
            return pool.give_up_silent(now - WATCH_SECONDS / 2)
        began = liveness.take_outage(now)
        if began is not None:
            return pool.give_up_silent(began + 2 * WATCH_SECONDS, has_begun=True)
        if liveness.silence(now) >= DOUBT_SECONDS and not liveness.has_failed and pool.is_waiting:
            self.doubted.set()
        return 0

    def is_up(self) -> bool:
        """Return whether the server may get one more request, apart from its slots."""
        circuit = self.circuit
        return not self.is_excluded and (not circuit.restrains or circuit.allows(self.load))

    def gate(self, model: str, lane: LaneName) -> OutlierDetector:
        """Return the outlier detector for requests of `lane` for `model`."""
        detector = self.detectors.get((model, lane))
        if detector is None:
            detector = self.detectors[model, lane] = self.build_detector(model, lane)
        return detector

    def forget_models(self, models: Collection[str]) -> set[str]:
        """Drop what is kept for `models`, which have no requests. Return those that are being loaded."""
        for key in [key for key in self.detectors if key[0] in models]:
            del self.detectors[key]
        loading = set()
        for model in models:
            name = self._canonical(model)
            if self.residency is not None and not self.residency.forget(name):
                loading.add(model)
            if not self.serves(model):
                self.guesses.pop(name, None)
        return loading

    @property
    def ejections(self) -> list[OutlierDetector]:
        """The detectors that have ejected the server."""
        return [detector for detector in self.detectors.values() if detector.restrains]

    @property
    def used_detectors(self) -> list[OutlierDetector]:
        """The detectors of requests that the server gets now and then, or that it was ejected for."""
        return [detector for detector in self.detectors.values() if detector.is_used or detector.restrains]

    def chat_head(self, came_through: bytes, gateway_id: bytes) -> bytes:
        """Return the head of a chat request.

        `came_through` are the header lines of `came_through_lines`; empty for most requests.
        """
        if came_through:
            return self._head + came_through
        if self._direct_head is None:
            self._direct_head = self._head + came_through_lines(b"", gateway_id)
        return self._direct_head

    def embedding_head(self, came_through: bytes, gateway_id: bytes) -> bytes:
        """Return the head of a request for embeddings, like `chat_head`."""
        return self._embedding_head + (came_through or came_through_lines(b"", gateway_id))

    def head_of(self, path: str, came_through: bytes, gateway_id: bytes) -> bytes:
        """Return the head of a request to another path, like `chat_head`."""
        return self._other_heads[path] + (came_through or came_through_lines(b"", gateway_id))


def came_through_lines(via: bytes, gateway_id: bytes, trace_lines: bytes = b"") -> bytes:
    """Return the header lines that tell a server what a request came through.

    `via` is the client's own `x-gateway-via`, to which this gateway adds its id. `trace_lines` name
    the request's trace.
    """
    return b"X-Gateway-Via: %b\r\n%b" % (via + b", " + gateway_id if via else gateway_id, trace_lines)
