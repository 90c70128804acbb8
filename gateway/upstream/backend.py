"""A backend at run time: its servers, which may join and leave, and its queues."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from gateway.admission.affinity import Affinity
from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.hub_limits import HubLimits
from gateway.admission.limits import LaneName
from gateway.admission.model_state import ModelState
from gateway.admission.queues import Queue
from gateway.admission.scheduler import Admission
from gateway.admission.shared_limits import SharedLimits
from gateway.config import BackendSettings, LimitOverrides
from gateway.engines.rerank import VllmReranker
from gateway.upstream.admission_limits import admission_limits, tier_limits
from gateway.upstream.availability import Availability, GpuTurn, without_gpu
from gateway.upstream.kinds import build_parts
from gateway.upstream.restraints import OnEvent, Restraints
from gateway.upstream.retry_budget import RetryBudget
from gateway.upstream.server import Server
from gateway.upstream.server_factory import ServerFactory
from gateway.upstream.server_names import ServerName

UnloadFrozen = Callable[
    [Server, ModelState, Callable[[], bool], Callable[[], str]],
    "asyncio.Task[None] | None",
]


class Backend:
    """A named group of servers, as a backend in HAProxy.

    `on_down` is called when the circuit breaker of a server has opened, a server was ejected, or some
    have left; `on_evicted` when a server has evicted a model that may still have requests.

    Attributes:
        loading: requests that load models, or None if the servers always have their models loaded.
        servers: servers that may get requests; changed in place by `join` and `leave`.
        names: host names whose addresses are servers.
        is_restrained: True if some server may not get requests, or none is known. Only then is it
            worth asking `availability`.
        unload_frozen: `ModelLoader.unload_frozen`, or None if no model has to be loaded.
        adopt: `ModelLoader.adopt`, if models have to be loaded; called before a server joins.
    """

    def __init__(
        self,
        settings: BackendSettings,
        num_parallel: int | None = None,
        *,
        on_down: Callable[["Backend"], None] = lambda backend: None,
        on_learned: Callable[[], None] = lambda: None,
        on_evicted: Callable[[ModelState], None] = lambda state: None,
        on_event: OnEvent | None = None,
        shared: SharedLimits | HubLimits | None = None,
    ) -> None:
        self.name = settings.name
        self.kind = settings.kind
        self.settings = settings
        self.engine, self.embedder, self.completer, self.loading = build_parts(settings)
        self._factory = factory = self._build_factory()
        self.servers = factory.build_all(settings.limits.connect_timeout)
        self.names = [ServerName(server, factory.origin(server)) for server in settings.servers if server.is_name]
        self._shared = shared
        self.admission = self._build_admission(num_parallel, on_learned)
        self._choose_balance()
        self.budget = RetryBudget()
        self.is_restrained = not self.servers
        self.turn: GpuTurn = "awake"
        self.availability = Availability(self)
        self.restraints = Restraints(
            self.servers, self.availability.is_last_resort, self.refresh, partial(on_down, self), on_event
        )
        self.on_down = on_down
        self.on_evicted = on_evicted
        self.unload_frozen: UnloadFrozen | None = None
        self.adopt: Callable[[Server], None] = lambda server: None
        self._recalled: dict[str, Mapping[str, int]] = {}
        for server in self.servers:
            self.restraints.observe(server)

    def __repr__(self) -> str:
        return f"<Backend {self.name}: {self.servers!r}>"

    @property
    def affinity(self) -> Affinity | None:
        """Choice among the servers by their prefix caches, None if they are not chosen so."""
        return self.admission.affinity

    # Turns on a shared GPU

    @property
    def is_probed(self) -> bool:
        """True if the health checks judge the backend: its engine is expected to answer."""
        return self.turn in ("awake", "leaving")

    def take_turn(self, turn: GpuTurn, expected_seconds: float | None = None) -> None:
        """Change the turn. `expected_seconds` is the expected time to the end of `waking`, None if unknown.

        What was known about the health of an engine that sleeps or wakes is forgotten.
        """
        was, self.turn = self.turn, turn
        now = time.monotonic()
        if turn == "waking":
            self.admission.closure.close(now, expected_seconds)
        else:
            self.admission.closure.open(now)
        if turn in ("asleep", "waking") and was != turn:
            for server in self.servers:
                server.rest()
        self.refresh()

    def refuse_queued(self) -> None:
        """End the wait of the requests that are queued for an engine that does not get the GPU."""
        for queue in self.admission.queues:
            if queue.waiting:
                queue.refuse(without_gpu)

    def refresh(self) -> None:
        """Admit the requests that can run after a server came, went or changed its models."""
        any_is_well = any(server.is_well and not server.is_joining for server in self.servers)
        is_closed = self.turn in ("asleep", "waking")
        for server in self.servers:
            server.is_excluded = is_closed or server.is_joining or (any_is_well and server.up is False)
        self.is_restrained = (
            not self.servers
            or self.turn != "awake"
            or any(server.is_excluded or server.circuit.restrains or server.ejections for server in self.servers)
        )
        self.admission.refresh()

    # Servers at the addresses of a host name

    def build_at(self, name: ServerName, address: str) -> Server:
        """Return a new server at one of the addresses of `name`. It gets requests once `is_joining` is false."""
        server = self._factory.build_at(name.settings, address, self.settings.limits.connect_timeout)
        server.is_joining = server.is_excluded = True
        server.doubt_name = name.doubted.set
        server.guesses = dict(self._recalled.pop(server.name, {}))
        self.restraints.observe(server)
        self.adopt(server)
        self.admission.add([server])
        return server

    def join(self, servers: Collection[Server]) -> None:
        """Add servers of `build_at`, or take back those that were leaving."""
        for server in servers:
            if server.is_leaving:
                server.is_leaving = False
                server.doubted.set()
        self.servers += servers
        self.refresh()

    def leave(self, servers: Collection[Server]) -> None:
        """Give `servers` no more requests. Those that run there continue."""
        for server in servers:
            server.is_leaving = server.is_excluded = True
            server.pool.retire()
        self.servers[:] = [server for server in self.servers if not server.is_leaving]
        self.refresh()
        if self.is_restrained:
            self.on_down(self)

    @property
    def leaving(self) -> list[Server]:
        """Servers whose last requests run."""
        return [server for name in self.names for server in name.leaving.values()]

    def drop_drained(self) -> list[Server]:
        """Forget the servers that were leaving and whose last request has ended. Return them."""
        drained: list[Server] = []
        for name in self.names:
            for address, server in list(name.leaving.items()):
                if not server.load:
                    drained.append(name.leaving.pop(address))
                    server.pool.close()
        if drained:
            self.admission.drop(drained)
        return drained

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
        own = {lane: tier_limits(lane, overrides, self._replicas) for lane in lanes}
        return {lane: self.admission.queue(model, lane, tier, limits) for lane, limits in own.items()}

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
                model: limit.total
                for model, limit in server.models.items()
                if isinstance(limit, AdaptiveLimit) and not limit.is_held
            }
            for server in self.servers
        }

    def recall(self, learned: Mapping[str, Mapping[str, int]]) -> None:
        """Start with limits that were learned earlier. Call it before the first request.

        A server whose address is not known yet starts with them if it is among the first that join.
        """
        self._recalled = dict(learned)
        for server in self.servers:
            server.guesses = dict(learned.get(server.name, {}))

    def change(self, settings: BackendSettings, num_parallel: int | None = None) -> None:
        """Apply other limits, times and options to the same servers. Requests in flight continue.

        The servers of `settings` have to be the same (`config.is_same_place`).
        """
        self.settings = settings
        self.engine, self.embedder, self.completer, self.loading = build_parts(settings)
        for server in (*self.servers, *self.leaving):
            server.pool.connect_timeout = settings.limits.connect_timeout
        self._choose_balance()
        self.admission.change(admission_limits(settings, num_parallel, self._replicas))

    @property
    def _replicas(self) -> int:
        return 1 if self._shared is None else self._shared.replicas

    def _build_factory(self) -> ServerFactory:
        return ServerFactory(
            self.settings,
            self.headers(),
            self.engine.chat_path,
            self.embedder.path,
            (self.completer.path, VllmReranker.path),
            self.engine.canonical,
        )

    def _build_admission(self, num_parallel: int | None, on_learned: Callable[[], None]) -> Admission:
        admission = Admission(
            self.servers,
            admission_limits(self.settings, num_parallel, self._replicas),
            time.monotonic,
            _call_later,
            self.engine.canonical,
            on_learned,
            source=None if self._shared is None else self._shared.source(self.name, on_learned),
        )
        if self._shared is not None:
            self._shared.attach(admission)
        return admission

    def _choose_balance(self) -> None:
        """Choose servers by their prefix caches if there may be several, and their kind has such a cache."""
        uses = (
            (len(self.servers) > 1 or bool(self.names))
            and self.kind != "ollama"
            and self.settings.balance == "affinity"
        )
        if not uses:
            self.admission.affinity = None
        elif self.admission.affinity is None:
            self.admission.affinity = Affinity()

    def close(self) -> None:
        if self._shared is not None:
            self._shared.detach(self.admission)
        self.restraints.close()
        for server in (*self.servers, *self.leaving):
            server.pool.close()


def _call_later(seconds: float, callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, callback)
