"""Loads the models of an Ollama by requests of the gateway's own, which go on when clients leave.

`admission/model_residency.py` decides when to load which model, and which one makes room.
`relay/frozen_models.py` decides which one has frozen.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from email.utils import parsedate_to_datetime
from functools import partial

from gateway.admission.model_residency import LoadedModels, ModelResidency
from gateway.admission.model_state import ModelState
from gateway.config import Settings
from gateway.engines.engine import MAX_REFUSAL
from gateway.engines.ollama_loading import loaded
from gateway.errors import BackendUnavailable, Crash, GatewayError, InvalidRequest, UpstreamError, UpstreamTimeout
from gateway.telemetry.exchange import NONE
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.failures import NO_FIRST_PIECE, SERVER_FAULTS, UNSENT, record_failure, with_retry_after
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

REPORT_TIMEOUT_SECONDS = 5.0
"""Timeout of the request that asks which models are loaded, and of one that unloads a model."""

UNLOAD_SECONDS = 10.0
"""Time that a server has to unload a model whose requests have ended.

Ollama waits up to 5 s until a GPU reports that its memory is free again.
"""
UNLOAD_CHECK_SECONDS = 0.25

CONNECTION_FAULTS = SERVER_FAULTS - {"status_5xx"}

_log = logging.getLogger(__name__)


class ModelLoader:
    """Model loads of one backend, one at a time on each server.

    Create it before the backend gets its first request.
    """

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
        for server in backend.servers:
            self._add_residency(server)
        backend.adopt = self.adopt
        backend.unload_frozen = self.unload_frozen
        self.change(settings)

    def __repr__(self) -> str:
        return f"<ModelLoader {self._backend.name}: {[server.residency for server in self._backend.servers]}>"

    def change(self, settings: Settings) -> None:
        """Apply other settings to the same servers."""
        self._settings = settings
        canonical = self._backend.engine.canonical
        self._named = {canonical(model) for model in self._models_of_settings()}
        for server in self._backend.servers:
            self._warm(server)

    def adopt(self, server: Server) -> None:
        """Load the models of a server that joins the backend."""
        self._add_residency(server)
        self._warm(server)

    def _add_residency(self, server: Server) -> None:
        backend = self._backend
        server.residency = ModelResidency(
            time.monotonic,
            lambda seconds, callback: asyncio.get_running_loop().call_later(seconds, callback),
            lambda: backend.settings.swap_after,
            partial(_may_load, server),
            partial(self._start_load, server),
            backend.refresh,
            partial(self._start_making_room, server),
            backend.on_evicted,
        )

    def _warm(self, server: Server) -> None:
        """Have the models of the settings loaded that are to be loaded without a request."""
        assert server.residency is not None
        for state in server.residency.states.values():
            state.warm = False
        canonical = self._backend.engine.canonical
        for model, is_embedding in self._warm_models():
            server.residency.state(canonical(model), model, is_embedding).warm = True

    def stop(self) -> None:
        """Cancel the loads and unloads in progress."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel the loads and unloads in progress, and wait for their end."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Turns on a shared GPU

    async def abort_loads(self) -> None:
        """End the loads in progress: Ollama drops a load whose client leaves."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._backend.servers:
            assert server.residency is not None
            for state in server.residency.states.values():
                if state.is_loading:
                    server.residency.ended(state, False, None, None)

    async def load(self, server: Server, model: str) -> GatewayError | None:
        """Load `model` for the engine's new turn, before requests are admitted. Return why it failed, if it did."""
        residency = server.residency
        assert residency is not None
        state = residency.state(self._backend.engine.canonical(model), model, is_embedding=False)
        report = await self._loaded_models(server)
        if report is None or state.name not in report.until:
            failure = await self._send_load(server, state)
            if failure is not None:
                return failure()
            report = await self._loaded_models(server)
        residency.update(report.until if report is not None else (state.name,))
        return None

    def is_empty(self, server: Server) -> None:
        """Record that `server` has unloaded all its models. Those that are to stay warm are loaded in its next turn."""
        assert server.residency is not None
        server.residency.update(())
        self.change(self._settings)

    def _start_load(self, server: Server, state: ModelState) -> None:
        self._start(self._load(server, state))

    def _start_making_room(self, server: Server, state: ModelState) -> None:
        self._start(self._make_room(server, state))

    def _start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None] | None":
        if self._is_closed:
            work.close()
            return None
        # Not in the context of the request that happened to be handled: its trace would get this connection.
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, server: Server, state: ModelState) -> None:
        residency = server.residency
        assert residency is not None
        sent = time.monotonic()
        before = after = None
        failure: Callable[[], GatewayError] | None = None
        try:
            before = await self._loaded_models(server)
            if before is None or state.name not in before.until:
                sent = time.monotonic()
                failure = await self._send_load(server, state)
                error = None if failure is None else failure()
                if not isinstance(error, UpstreamTimeout) and not (
                    isinstance(error, UpstreamError) and error.reason in CONNECTION_FAULTS
                ):
                    after = await self._loaded_models(server)
        except Exception:
            failure = Crash
            _log.exception("backend %s: loading a model failed inside the gateway", server.name)
        error = None if failure is None else failure()
        if failure is not None and not isinstance(error, InvalidRequest | BackendUnavailable) and not _is_unsent(error):
            self._refuse_waiters(state, failure)
        # After an InvalidRequest, the requests themselves find out what is wrong.
        is_loaded = error is None or isinstance(error, InvalidRequest)
        residency.ended(state, is_loaded, before, after)
        if error is None:
            if server.circuit.is_troubled:
                server.circuit.succeed()
        else:
            self._record_failed_load(server, state, error, sent)
        self._backend.refresh()
        if residency.schedule():
            self._backend.refresh()

    async def _send_load(self, server: Server, state: ModelState) -> Callable[[], GatewayError] | None:
        """Send the load. Return a factory of the error for waiting requests, or None on success."""
        backend, model = self._backend, state.model
        head = (server.embedding_head if state.is_embedding else server.chat_head)(b"", self._gateway_id)
        assert backend.loading is not None
        body = backend.loading.body(model, state.is_embedding)
        client_error = backend.embedder.client_error if state.is_embedding else backend.engine.client_error
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._load_timeout(model)):
                with await server.pool.request(head, body) as response:
                    content = await response.read(MAX_REFUSAL)
                    if response.status != 200:
                        error = with_retry_after(client_error(response.status, content), response)
                        return partial(_repeat, partial(client_error, response.status, content), error)
        except TimeoutError:
            return partial(UpstreamTimeout, NO_FIRST_PIECE)
        except TransportError as fault:
            return partial(UpstreamError, fault.fault)
        took = time.monotonic() - began
        self._metrics.load_seconds.labels(backend.name, self._label(state)).observe(took)
        _log.info("backend %s: loaded the model %r in %.1f s", server.name, model, took)
        return None

    # Unloads

    async def _make_room(self, server: Server, state: ModelState) -> None:
        """Unload a held model that a load waits for, if the server still has it loaded."""
        report = await self._loaded_models(server)
        if report is None or state.name not in report.until or not state.is_held or state.running:
            return
        if await self._send_unload(server, state):
            assert server.residency is not None
            server.residency.unloaded(state)
            self._metrics.model_unloads.labels(self._backend.name, self._label(state), "make_room").inc()
            _log.info("backend %s: unloaded the model %r, so that another one can be loaded", server.name, state.model)

    def unload_frozen(
        self, server: Server, state: ModelState, is_frozen: Callable[[], bool], end_requests: Callable[[], str]
    ) -> "asyncio.Task[None] | None":
        """Start to unload a model that seems to have frozen, so that its requests can be sent again.

        Nothing happens unless the server answers that the model is loaded, and `is_frozen` still
        holds then. `end_requests` has to end the model's requests at the server, because Ollama
        unloads no model that has any. It returns what to log about them. Returns None once the
        loader is closed.
        """
        return self._start(self._unload_frozen(server, state, is_frozen, end_requests))

    async def _unload_frozen(
        self, server: Server, state: ModelState, is_frozen: Callable[[], bool], end_requests: Callable[[], str]
    ) -> None:
        residency = server.residency
        assert residency is not None
        report = await self._loaded_models(server)
        if report is not None and state.name not in report.until:
            state.activity.missing_at = time.monotonic()  # it is being loaded, or unloaded, by a request
            return
        if report is None or not is_frozen():
            return  # the server hangs; or the model answers again, or has just been loaded
        state.activity.was_unloaded = True
        residency.begin_unload(state)
        is_gone = False
        try:
            if await self._send_unload(server, state):
                what = end_requests()
                is_gone = await self._wait_until_gone(server, state)
                self._report_unload(server, state, is_gone, what)
        finally:
            residency.end_unload(state, is_loaded=not is_gone)
        self._backend.refresh()

    def _report_unload(self, server: Server, state: ModelState, is_gone: bool, what: str) -> None:
        self._metrics.model_unloads.labels(self._backend.name, self._label(state), "frozen").inc()
        if is_gone:
            _log.warning("backend %s: the model %r had frozen and was unloaded; %s", server.name, state.model, what)
        else:
            _log.error(
                "backend %s: the model %r has frozen, and the server does not unload it; %s. Restart the server",
                server.name,
                state.model,
                what,
            )

    async def _send_unload(self, server: Server, state: ModelState) -> bool:
        """Tell the server to unload a model. Return whether it will."""
        loading = self._backend.loading
        assert loading is not None
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
                headers = [("Content-Type", "application/json"), *self._backend.headers()]
                head = b"%bX-Gateway-Via: %b\r\n" % (
                    server.pool.head("POST", loading.unload_path, headers),
                    self._gateway_id,
                )
                with await server.pool.request(head, loading.unload_body(state.model)) as response:
                    await response.read(MAX_REFUSAL)
                    reason = f"status {response.status}"
                    if response.status == 200:
                        return True
        except TimeoutError:
            reason = "no answer in time"
        except TransportError as fault:
            reason = fault.fault
        _log.warning("backend %s: the model %r was not unloaded (%s)", server.name, state.model, reason)
        return False

    async def _wait_until_gone(self, server: Server, state: ModelState) -> bool:
        """Wait until the server no longer reports the model. Return False if it still does so."""
        try:
            async with asyncio.timeout(UNLOAD_SECONDS):
                while True:
                    report = await self._loaded_models(server)
                    if report is not None and state.name not in report.until:
                        return True
                    await asyncio.sleep(UNLOAD_CHECK_SECONDS)
        except TimeoutError:
            return False

    def _models_of_settings(self) -> Iterator[str]:
        name = self._backend.name
        yield from (tier.models[name] for tier in self._settings.tiers.values() if name in tier.models)
        yield from (item.model for item in self._settings.embeddings.values() if item.backend == name)

    def _label(self, state: ModelState) -> str:
        """Return the model's name as the value of a label; `none` for a discovered model."""
        return state.model if state.name in self._named else NONE

    def _warm_models(self) -> Iterator[tuple[str, bool]]:
        """Yield the models to load without a request, and whether each is an embedding model."""
        name = self._backend.name
        yield from (
            (tier.models[name], False) for tier in self._settings.tiers.values() if tier.warm and name in tier.models
        )
        yield from (
            (item.model, True) for item in self._settings.embeddings.values() if item.warm and item.backend == name
        )

    def _load_timeout(self, model: str) -> float:
        """Return the timeout of a load in seconds: the longest `first_token_timeout` of a tier."""
        name, settings = self._backend.name, self._settings
        times = [
            settings.limits_for(tier, name).first_token_timeout
            for tier in settings.tiers.values()
            if tier.models.get(name) == model
        ]
        return max(times, default=self._backend.settings.limits.first_token_timeout)

    async def _loaded_models(self, server: Server) -> LoadedModels | None:
        """Return the loaded models that the server reports, or None if it does not answer."""
        loading = self._backend.loading
        assert loading is not None
        head = server.pool.head("GET", loading.path, self._backend.headers())
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
                with await server.pool.request(head) as response:
                    content = await response.read(MAX_REFUSAL)
                    until = loaded(content) if response.status == 200 else None
                    return None if until is None else LoadedModels(until, _unix_time(response.fields.get(b"date", b"")))
        except (TransportError, TimeoutError):
            return None

    def _record_failed_load(self, server: Server, state: ModelState, error: GatewayError, sent: float) -> None:
        """Record a failed load in the server's circuit. Let requests go elsewhere if it was busy."""
        reason = error.reason if isinstance(error, UpstreamError) else error.code
        _log.warning("backend %s: the model %r was not loaded (%s)", server.name, state.model, reason)
        if isinstance(error, UpstreamTimeout):
            server.circuit.fail("no_first_piece", sent)
        elif isinstance(error, UpstreamError) and _is_unsent(error) and server.circuit.state == "closed":
            server.circuit.mark_suspect(error.reason)  # queued requests keep waiting
        else:
            record_failure(self._backend, state.model, server, error, sent)
        if isinstance(error, BackendUnavailable):
            self._backend.on_down(self._backend)

    def _refuse_waiters(self, state: ModelState, failure: Callable[[], GatewayError]) -> None:
        """End the wait for the model with the error, unless another server has still to try."""
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


def _repeat(client_error: Callable[[], GatewayError], first: GatewayError) -> GatewayError:
    """Return the error anew: each request that gets it changes it."""
    error = client_error()
    error.retry_after = first.retry_after
    if isinstance(error, BackendUnavailable) and isinstance(first, BackendUnavailable):
        error.pause = first.pause
    return error


def _unix_time(value: bytes) -> float:
    """Parse a `Date` header to Unix time, or return this machine's time if that fails."""
    try:
        return parsedate_to_datetime(value.decode("latin-1")).timestamp()
    except ValueError:
        return time.time()
