"""Loads the models of an Ollama under requests of the gateway's own, which go on when clients leave. When is decided in `loads.py`."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import partial

from gateway.admission.model_residency import LoadedModels, ModelResidency, ModelState
from gateway.config import Settings
from gateway.engines.engine import MAX_REFUSAL
from gateway.engines.ollama_loading import loaded
from gateway.errors import BackendUnavailable, Crash, GatewayError, InvalidRequest, UpstreamError, UpstreamTimeout
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.connection import WireError
from gateway.upstream.failures import NO_FIRST_PIECE, SERVER_FAULTS, UNSENT, record_failure, with_retry_after
from gateway.upstream.server import Server

LOOK_SECONDS = 5.0
"""Longest time for the question what is loaded."""

CONNECTION_FAULTS = SERVER_FAULTS - {"status_5xx"}

_log = logging.getLogger("gateway.loader")


class ModelLoader:
    """The loads of one backend, each server's one after the other. It has to be there before the first request."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        metrics: Metrics,
        gateway_id: bytes,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._metrics = metrics
        self._gateway_id = gateway_id
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        assert backend.loading is not None
        self._look_heads = {
            server: server.pool.head("GET", backend.loading.path, backend.headers()) for server in backend.servers
        }
        for server in backend.servers:
            server.residency = ModelResidency(
                time.monotonic,
                lambda seconds, callback: asyncio.get_running_loop().call_later(seconds, callback),
                lambda: backend.settings.swap_after,
                partial(_may_load, server),
                partial(self._begin, server),
                backend.refresh,
            )
        self.change(settings)

    def __repr__(self) -> str:
        return f"<Loader {self._backend.name}: {[server.residency for server in self._backend.servers]}>"

    def change(self, settings: Settings) -> None:
        """Go on with other settings, for the same servers."""
        self._settings = settings
        canonical = self._backend.engine.canonical
        for server in self._backend.servers:
            assert server.residency is not None
            for state in server.residency.states.values():
                state.warm = False
            for model, is_apart in self._warm():
                server.residency.state(canonical(model), model, is_apart).warm = True

    def stop(self) -> None:
        """Drop what is being loaded."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Drop what is being loaded, and wait until it is."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, server: Server, state: ModelState) -> None:
        if not self._is_closed:
            task = asyncio.get_running_loop().create_task(self._load(server, state))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _load(self, server: Server, state: ModelState) -> None:
        loads = server.residency
        assert loads is not None
        sent = time.monotonic()
        before = after = None
        failure: Callable[[], GatewayError] | None = None
        try:
            before = await self._shown(server)
            if before is None or state.name not in before.until:
                sent = time.monotonic()
                failure = await self._ask(server, state)
                error = None if failure is None else failure()
                if not isinstance(error, UpstreamTimeout) and not (
                    isinstance(error, UpstreamError) and error.reason in CONNECTION_FAULTS
                ):
                    after = await self._shown(server)
        except Exception:
            failure = Crash
            _log.exception("backend %s: the load of a model failed in the gateway", server.name)
        error = None if failure is None else failure()
        if failure is not None and not isinstance(error, InvalidRequest | BackendUnavailable) and not _is_unsent(error):
            self._refuse_waiters(state, failure)
        is_loaded = error is None or isinstance(
            error, InvalidRequest
        )  # the requests themselves will be told what is wrong
        loads.ended(state, is_loaded, before, after)
        if error is None:
            if server.circuit.is_troubled:
                server.circuit.succeed()
        else:
            self._note(server, state, error, sent)
        self._backend.refresh()
        if loads.schedule():
            self._backend.refresh()

    async def _ask(self, server: Server, state: ModelState) -> Callable[[], GatewayError] | None:
        """What makes the error of those who wait; None: it is loaded."""
        backend, model = self._backend, state.model
        head = (server.embedding_head if state.is_apart else server.chat_head)(b"", self._gateway_id)
        assert backend.loading is not None
        body = backend.loading.body(model, state.is_apart)
        refusal = backend.embedder.client_error if state.is_apart else backend.engine.client_error
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._longest(model)):
                with await server.pool.request(head, body) as response:
                    content = await response.read(MAX_REFUSAL)
                    if response.status != 200:
                        error = with_retry_after(refusal(response.status, content), response)
                        return partial(_again, partial(refusal, response.status, content), error)
        except TimeoutError:
            return partial(UpstreamTimeout, NO_FIRST_PIECE)
        except WireError as fault:
            return partial(UpstreamError, fault.fault)
        took = time.monotonic() - began
        self._metrics.load_seconds.labels(backend.name, model).observe(took)
        _log.info("backend %s: loaded the model %r in %.1f s", server.name, model, took)
        return None

    def _warm(self) -> Iterator[tuple[str, bool]]:
        """Models that are loaded without a request, and whether they make embeddings."""
        name = self._backend.name
        yield from (
            (tier.models[name], False) for tier in self._settings.tiers.values() if tier.warm and name in tier.models
        )
        yield from (
            (item.model, True) for item in self._settings.embeddings.values() if item.warm and item.backend == name
        )

    def _longest(self, model: str) -> float:
        """Seconds that its load may take: the longest that a tier waits for a first piece of it."""
        name, settings = self._backend.name, self._settings
        times = [
            settings.limits_for(tier, name).first_token_timeout
            for tier in settings.tiers.values()
            if tier.models.get(name) == model
        ]
        return max(times, default=self._backend.settings.limits.first_token_timeout)

    async def _shown(self, server: Server) -> LoadedModels | None:
        """What is loaded; None: it does not tell."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                with await server.pool.request(self._look_heads[server]) as response:
                    content = await response.read(MAX_REFUSAL)
                    until = loaded(content) if response.status == 200 else None
                    return None if until is None else LoadedModels(until, _date(response.fields.get(b"date", b"")))
        except (WireError, TimeoutError):
            return None

    def _note(self, server: Server, state: ModelState, error: GatewayError, sent: float) -> None:
        """What a failed load means to the server's circuit, and to those who may go elsewhere."""
        reason = error.reason if isinstance(error, UpstreamError) else error.code
        _log.warning("backend %s: the model %r was not loaded (%s)", server.name, state.model, reason)
        if isinstance(error, UpstreamTimeout):
            server.circuit.fail("no_first_piece", sent)
        elif isinstance(error, UpstreamError) and _is_unsent(error) and server.circuit.state == "closed":
            server.circuit.mark_suspect(error.reason)  # those in line wait, as for any server that went away
        else:
            record_failure(self._backend, state.model, server, error, sent)
        if isinstance(error, BackendUnavailable):
            self._backend.on_down(self._backend)

    def _refuse_waiters(self, state: ModelState, failure: Callable[[], GatewayError]) -> None:
        """Those who wait for the model get the error, unless another server has still to try."""
        state.has_failed = True
        waiting_queues = [waiters for waiters in state.waiters if not waiters.may_try_elsewhere(state)]
        for waiters in waiting_queues:
            waiters.refuse(failure)
        if waiting_queues:
            for server in self._backend.servers:
                if server.residency is not None and state.name in server.residency.states:
                    server.residency.states[state.name].has_failed = False


def _is_unsent(error: GatewayError | None) -> bool:
    return isinstance(error, UpstreamError) and error.reason in UNSENT


def _may_load(server: Server, model: str) -> bool:
    return server.is_up() and server.serves(model)


def _again(refusal: Callable[[], GatewayError], first: GatewayError) -> GatewayError:
    """The same error anew: each who gets it changes it."""
    error = refusal()
    error.retry_after = first.retry_after
    if isinstance(error, BackendUnavailable) and isinstance(first, BackendUnavailable):
        error.pause = first.pause
    return error


def _date(value: bytes) -> float:
    """A `Date` header in Unix time; this machine's where there is none."""
    try:
        return parsedate_to_datetime(value.decode("latin-1")).timestamp()
    except ValueError:
        return time.time()
