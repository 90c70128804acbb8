"""Health checks: probe each server for its health and its models, without spending a token.

The log says in plain words what the first probes found, and what has changed since.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Literal, Self

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from gateway.config import Settings
from gateway.engines.engine import LoadedUntil, Models
from gateway.engines.vllm_metrics import prefix_cache_tokens
from gateway.upstream.backend import Backend
from gateway.upstream.connection import TransportError
from gateway.upstream.server import MAX_DISCOVERED, VIA, WATCH_SECONDS, Server

PROBE_SECONDS = 2.0
"""Timeout of each step of a probe: connecting with TLS, and the head of the answer."""
PROBE_STEPS = 3
"""Limit of a whole probe, in multiples of `PROBE_SECONDS`, however many reads its answer takes."""
PROBE_AGAIN_SECONDS = 5.0
"""Longest time from a failed probe to the next one, however long `probe_interval` is."""
MAX_PROBE = 8 * 1024 * 1024
"""Maximum number of bytes of an answer: lists of 10,000 models."""
READY_SECONDS = 2.5
"""Time for which a server that does not answer keeps the gateway from being ready.

It is still probed after that.
"""
FIRST_ATTEMPTS = 3
SURE_ATTEMPTS = 2
"""Attempts of the probe that decides on a suspect server, whose requests have failed too."""
ATTEMPT_WAIT = 0.3
WRONG_ANSWERS_BEFORE_EXCLUDED = 2
"""Number of wrong answers in a row after which a server is excluded."""
MAX_LISTED = 8
MAX_MODEL_NAME = 512
"""Maximum length of a model's name; the settings accept no longer one either."""
SHOWN_NAME = 80
"""Number of characters of a model's name that are logged."""

ProbeResult = Literal["up", "unreachable", "refused_key", "itself", "no_models"]

_log = logging.getLogger(__name__)


class ProbeFailed(Exception):
    """Failed probe: no usable answer in time. `why` is the reason in plain words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class HealthChecks:
    """Probes of the backends that a route leads to.

    The probes drive the circuit breakers of the servers. `on_change` is called when a server came
    up or its models changed. `on_models` is called each time a server has reported its models.
    """

    def __init__(
        self,
        settings: Settings,
        backends: dict[str, Backend],
        gateway_id: bytes,
        on_change: Callable[[Backend], None],
        on_models: Callable[[Backend], None] = lambda backend: None,
    ) -> None:
        self._settings = settings
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._on_models = on_models
        self._backends = reachable(settings, backends)
        self._tasks: dict[Backend, list[asyncio.Task[None]]] = {}
        self._all_asked: asyncio.Event = asyncio.Event()
        self._watch_timer: asyncio.TimerHandle | None = None

    @property
    def backends(self) -> list[Backend]:
        """Backends that are probed. Those on their way out come first."""
        return [*self.unused, *self._backends]

    @property
    def unused(self) -> list[Backend]:
        """Probed backends that no route leads to any more."""
        return [backend for backend in self._tasks if backend not in self._backends]

    @property
    def has_asked_all(self) -> bool:
        """True once every server has been probed, or has had `READY_SECONDS` to answer."""
        return self._all_asked.is_set()

    async def __aenter__(self) -> Self:
        self._start_probes(self._backends, self._all_asked)
        self._watch_timer = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._watch)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # New settings

    async def probe_new(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Start to probe the backends that `settings` lead to and that are not probed yet.

        Wait until each of their servers has answered, or has had `READY_SECONDS` to answer.
        """
        self._settings = settings
        new = [backend for backend in reachable(settings, backends) if backend not in self._tasks]
        all_asked = asyncio.Event()
        self._start_probes(new, all_asked)
        await all_asked.wait()

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Put backends in use that `probe_new` has probed. The others are probed until `forget`."""
        for backend in self._backends:
            if backend in backends.values() and all(server.discovered is not None for server in backend.servers):
                self._report_missing(backend)
        self._backends = reachable(settings, backends)

    def forget(self, backend: Backend) -> None:
        """Stop probing `backend`."""
        for task in self._tasks.pop(backend, ()):
            task.cancel()

    # Probes

    def _start_probes(self, backends: list[Backend], all_asked: asyncio.Event) -> None:
        """Start to probe `backends`.

        Set `all_asked` after the first probe of each server, or after `READY_SECONDS`.
        """
        reports: list[asyncio.Task[None]] = []
        for backend in backends:
            first = [asyncio.create_task(self._first_probe(backend, server)) for server in backend.servers]
            self._tasks[backend] = [
                *first,
                *(asyncio.create_task(self._probe_forever(backend, server, all_asked)) for server in backend.servers),
            ]
            reports += first
        late = asyncio.get_running_loop().call_later(READY_SECONDS, all_asked.set)

        def check_done(_: object = None) -> None:
            if all(report.done() for report in reports):
                late.cancel()
                all_asked.set()

        for report in reports:
            report.add_done_callback(check_done)
        check_done()

    async def _first_probe(self, backend: Backend, server: Server) -> None:
        began = asyncio.get_running_loop().time()
        result, why = await self._probe(backend, server, FIRST_ATTEMPTS)
        self._record(server, result, began, is_sure=True)
        self._report(backend, server, result, why)

    async def _probe_forever(self, backend: Backend, server: Server, all_asked: asyncio.Event) -> None:
        await all_asked.wait()
        wrong_answers = 0
        while True:
            interval = backend.settings.probe_interval
            await _wait_until_set(
                server.doubted, min(interval, PROBE_AGAIN_SECONDS) if server.liveness.has_failed else interval
            )
            server.doubted.clear()
            began = asyncio.get_running_loop().time()
            was_up, is_suspect, models_before = server.up, server.circuit.state == "suspect", server.discovered
            result, why = await self._probe(backend, server, SURE_ATTEMPTS if is_suspect else 1)
            self._record(server, result, began, is_sure=is_suspect)
            wrong_answers = 0 if result in ("up", "unreachable") else wrong_answers + 1
            if wrong_answers >= WRONG_ANSWERS_BEFORE_EXCLUDED:
                server.up = False
            if server.up != was_up:
                self._report(backend, server, result, why)
                self._on_change(backend)
            elif (
                result == "up"
                and models_before is not None
                and models_before.keys() != (server.discovered or {}).keys()
            ):
                self._report(backend, server, result, why)

    def _record(self, server: Server, result: ProbeResult, began: float, *, is_sure: bool) -> None:
        """Record the result of a probe that began at the time `began`.

        `is_sure` means that the server was asked more than once.
        """
        if result == "unreachable":
            server.liveness.probe_failed(began)
            server.pool.close_idle()  # before a request is sent on a connection that may be dead
            server.circuit.probe_missed(is_sure=is_sure)
        else:
            server.liveness.probe_answered(asyncio.get_running_loop().time())
            server.circuit.probe_answered()

    def _watch(self) -> None:
        """End the requests of servers that have vanished."""
        loop = asyncio.get_running_loop()
        self._watch_timer = loop.call_later(WATCH_SECONDS, self._watch)
        for backend in self._tasks:
            for server in backend.servers:
                ended = server.end_lost_requests(loop.time())
                if ended:
                    _log.warning(
                        "backend %s: it has vanished or hangs; %d requests that ran there were ended",
                        server.name,
                        ended,
                    )

    async def _probe(self, backend: Backend, server: Server, attempts: int) -> tuple[ProbeResult, str]:
        """Probe a server with up to `attempts` attempts.

        Return the result, and the reason if the server is unreachable.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(attempts),
            wait=wait_fixed(ATTEMPT_WAIT),
            retry=retry_if_exception_type(ProbeFailed),
            reraise=True,
        )
        try:
            return await retrying(self._ask, backend, server), ""
        except ProbeFailed as failure:
            return "unreachable", failure.why

    async def _ask(self, backend: Backend, server: Server) -> ProbeResult:
        """Ask a server for its models, and first for its health if it has a path for that.

        Update `server` with the answers.

        Raises:
            ProbeFailed: the server did not answer in time, or answered with a server error.
        """
        if backend.engine.health_path is not None:
            status, _ = await self._fetch(backend, server, "GET", backend.engine.health_path)
            if status >= 500 and status != 508:
                raise ProbeFailed(f"it answers with status {status}")
        status, content = await self._fetch(backend, server, "GET", backend.engine.models_path)
        if status == 508:
            return "itself"
        if status in (401, 403):
            return "refused_key"
        if status >= 500:
            raise ProbeFailed(f"it answers with status {status}")
        models = backend.engine.models(content) if status == 200 else None
        if models is None:
            return "no_models"
        models = self._without_long_names(server, models)
        before, lacked, was_up = server.discovered, server.lacks_a_model, server.up
        loaded = await self._probe_models(backend, server, models)
        if not was_up and backend.admission.affinity is not None and backend.engine.metrics_path is not None:
            await self._probe_prefix_cache(backend, server, backend.engine.metrics_path)
        server.update_models(models)
        self._on_models(backend)
        is_ready = server.residency is not None and loaded is not None and server.residency.update(loaded)
        if is_ready or lacked or (before is not None and before != models):
            self._on_change(backend)
        return "up"

    async def _probe_prefix_cache(self, backend: Backend, server: Server, path: str) -> None:
        """Ask a server for the size of its prefix cache. Without an answer, the size stays as it was."""
        with suppress(ProbeFailed):
            status, content = await self._fetch(backend, server, "GET", path)
            tokens = prefix_cache_tokens(content) if status == 200 else None
            if tokens is not None:
                server.prefixes.resize(tokens)

    def _without_long_names(self, server: Server, models: Models) -> Models:
        """Return the models whose names are not too long, and log how many there are besides."""
        usable = {name: facts for name, facts in models.items() if len(name) <= MAX_MODEL_NAME}
        ignored = len(models) - len(usable)
        if ignored and ignored != server.ignored_names:
            _log.warning(
                "backend %s: %d models are ignored, because their names have more than %d characters",
                server.name,
                ignored,
                MAX_MODEL_NAME,
            )
        server.ignored_names = ignored
        return usable

    async def _probe_models(self, backend: Backend, server: Server, models: Models) -> LoadedUntil | None:
        """Ask a server for more facts about its `models`. Return the loaded ones.

        The answers only add to what is known, so a failure has no consequence.
        """
        wanted = [tier.models[backend.name] for tier in self._settings.tiers.values() if backend.name in tier.models]
        pinned = (*self._settings.embeddings.values(), *self._settings.rerankers.values())
        wanted += [item.model for item in pinned if item.backend == backend.name]

        async def ask(method: str, path: str, body: bytes | None) -> bytes | None:
            try:
                status, content = await self._fetch(backend, server, method, path, body)
            except ProbeFailed:
                return None
            return content if status == 200 else None

        others = islice(models, 2 * MAX_DISCOVERED) if backend.settings.discover else ()  # with and without a tag
        return await backend.engine.probe_models(models, server.discovered or {}, wanted, ask, others)

    async def _fetch(
        self, backend: Backend, server: Server, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Return the status and the body of a server's answer.

        Raises:
            ProbeFailed: there was no complete answer in time.
        """
        headers = [*backend.headers(), (VIA.decode(), self._gateway_id.decode())]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        pool = server.pool
        request = b"%bContent-Length: %d\r\n\r\n" % (pool.head(method, path, headers), len(body or b""))
        try:
            async with asyncio.timeout(PROBE_STEPS * PROBE_SECONDS):
                connection = await pool.connect(PROBE_SECONDS)
                connection.is_probe = True
                try:
                    async with asyncio.timeout(PROBE_SECONDS):
                        await connection.send(request, body or b"")
                    return connection.status, await connection.read(MAX_PROBE)
                finally:
                    connection.abort()
        except TransportError as error:
            if error.fault == "too_large":  # not a list of models
                return connection.status, b""
            raise ProbeFailed(_describe(error)) from error
        except TimeoutError as error:
            raise ProbeFailed(_describe(error)) from error

    # Log messages

    def _report(self, backend: Backend, server: Server, result: ProbeResult, why: str) -> None:
        origin = server.pool.origin
        where = f"backend {server.name} ({backend.kind}) at {origin.authority}{origin.prefix}"
        if result == "up":
            models = sorted({name.removesuffix(":latest") for name in server.discovered or {}})
            _log.info("%s: reachable, models there: %s", where, _format_names(models))
            if len(backend.servers) == 1 or all(s.discovered is not None for s in backend.servers):
                self._report_missing(backend)
        elif result == "itself":
            _log.error(
                "%s: this is the gateway itself; set the address of the %s server, not the gateway's",
                where,
                backend.kind,
            )
        elif result == "refused_key":
            _log.error("%s: reachable, but it refuses the key; check the backend's api_key", where)
        elif result == "no_models":
            _log.error("%s: something answers there, but not a server of kind %s", where, backend.kind)
        else:
            _log.warning("%s: not reachable: %s; requests to it fail until it is", where, why)

    def _report_missing(self, backend: Backend) -> None:
        wanted = [(f"tier {tier.name}", tier.models.get(backend.name)) for tier in self._settings.tiers.values()]
        wanted += [
            (f"embedding {name}", item.model)
            for name, item in self._settings.embeddings.items()
            if item.backend == backend.name
        ]
        wanted += [
            (f"reranker {name}", item.model)
            for name, item in self._settings.rerankers.items()
            if item.backend == backend.name
        ]
        for wanted_by, model in wanted:
            if model is not None and not any(server.serves(model) for server in backend.servers):
                available = sorted(
                    {name.removesuffix(":latest") for server in backend.servers for name in server.discovered or {}}
                )
                _log.warning(
                    "%s needs the model %r, which backend %s does not have; it has: %s",
                    wanted_by,
                    model,
                    backend.name,
                    _format_names(available),
                )


def reachable(settings: Settings, backends: Mapping[str, Backend]) -> list[Backend]:
    """Return the backends that a tier, an embedding model or a reranker leads to, and those with `discover`."""
    used = {name for tier in settings.tiers.values() for name in tier.models} | {
        item.backend for item in (*settings.embeddings.values(), *settings.rerankers.values())
    }
    used |= {backend.name for backend in settings.backends.values() if backend.discover}
    return [backend for name, backend in backends.items() if name in used]


def _describe(error: TransportError | TimeoutError) -> str:
    """Describe in plain words, for the log, why a probe got no answer.

    Errors of sockets and of TLS are at the end of the chain of causes of `error`.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message}); set the backend's ca_file to its CA"
        if isinstance(cause, ssl.SSLError):
            return "the TLS handshake failed; check that it serves https"
        if isinstance(cause, socket.gaierror):
            return "its host name cannot be resolved"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, TimeoutError) or error.fault in ("connect_timeout", "unresponsive"):
        return "no answer in time"
    return "no connection" if error.fault == "connect" else "its answer is incomplete or not HTTP"


async def _wait_until_set(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, for at most `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _format_names(names: list[str]) -> str:
    """Format `names` for the log. A server could put line ends into its names, or send long ones."""
    if not names:
        return "none"
    listed = [_shorten(name if name.isprintable() else ascii(name)) for name in names[:MAX_LISTED]]
    return ", ".join(listed) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _shorten(name: str) -> str:
    return name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…"
