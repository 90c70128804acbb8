"""Asks each server, without spending a token, whether it lives and which models it has, and says at the start in plain words what it found."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal, Self

import httpx2
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from gateway.config import Settings
from gateway.engines.engine import LoadedUntil, Models
from gateway.upstream.backend import Backend
from gateway.upstream.server import VIA, Server

PROBE_SECONDS = 2.0
"""For each step of a probe: connecting, TLS, each read. httpx2 closes what it gives up in time; cancelled in a TLS handshake it does not."""
PROBE_STEPS = 3
"""A probe has so many times that in all, however many reads its answer takes."""
MAX_PROBE = 1024 * 1024  # bytes
READY_SECONDS = 2.5
"""How long a server that does not answer keeps the gateway from being ready; it is asked on all the same."""
FIRST_ATTEMPTS = 3
SURE_ATTEMPTS = 2
"""Of a probe that decides alone, since failed requests speak against the server too."""
ATTEMPT_WAIT = 0.3
ODD_BEFORE_EXCLUDED = 2
"""Probes in a row that were answered, but not as they should."""
MAX_LISTED = 8

ProbeResult = Literal["up", "unreachable", "refused_key", "itself", "no_models"]

_log = logging.getLogger("gateway.health")


class ProbeFailed(Exception):
    """No whole answer in time; `why` in plain words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class HealthChecks:
    """Probes of the backends that something can reach. They move the servers' circuits; `on_change` is called when a server came up or its models
    changed."""

    def __init__(
        self, settings: Settings, backends: dict[str, Backend], gateway_id: bytes, on_change: Callable[[Backend], None]
    ) -> None:
        self._settings = settings
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._backends = reachable(settings, backends)
        self._tasks: dict[Backend, list[asyncio.Task[None]]] = {}
        self._first: asyncio.Event = asyncio.Event()

    @property
    def backends(self) -> list[Backend]:
        """Those that are probed; those that are on their way out come first."""
        return [*self.unused, *self._backends]

    @property
    def unused(self) -> list[Backend]:
        """Those that nothing leads to any more."""
        return [backend for backend in self._tasks if backend not in self._backends]

    @property
    def has_asked_all(self) -> bool:
        """Every server has been asked once, whatever it said."""
        return self._first.is_set()

    async def __aenter__(self) -> Self:
        self._begin(self._backends, self._first)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Other settings

    async def probe_new(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Begin to probe those of `backends` too that `settings` lead to; until each server has answered, or has had the time for it."""
        self._settings = settings
        unmet = [backend for backend in reachable(settings, backends) if backend not in self._tasks]
        met = asyncio.Event()
        self._begin(unmet, met)
        await met.wait()

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Those that were met are in use now. The others that were are probed on until `forget`."""
        for backend in self._backends:
            if backend in backends.values() and all(server.discovered is not None for server in backend.servers):
                self._report_missing(backend)
        self._backends = reachable(settings, backends)

    def forget(self, backend: Backend) -> None:
        """It is asked no more."""
        for task in self._tasks.pop(backend, ()):
            task.cancel()

    # Probes

    def _begin(self, backends: list[Backend], met: asyncio.Event) -> None:
        """Probe `backends`; `met` is set when all were asked once."""
        reports: list[asyncio.Task[None]] = []
        for backend in backends:
            first = [asyncio.create_task(self._first_report(backend, server)) for server in backend.servers]
            self._tasks[backend] = [
                *first,
                *(asyncio.create_task(self._probe_forever(backend, server, met)) for server in backend.servers),
            ]
            reports += first
        late = asyncio.get_running_loop().call_later(READY_SECONDS, met.set)

        def look(_: object = None) -> None:
            if all(report.done() for report in reports):
                late.cancel()
                met.set()

        for report in reports:
            report.add_done_callback(look)
        look()

    async def _first_report(self, backend: Backend, server: Server) -> None:
        finding, why = await self._probe(backend, server, FIRST_ATTEMPTS)
        if finding == "unreachable":
            server.circuit.probe_missed(is_sure=True)
        self._report(backend, server, finding, why)

    async def _probe_forever(self, backend: Backend, server: Server, met: asyncio.Event) -> None:
        await met.wait()
        odd = 0
        while True:
            await _until_set(server.doubted, backend.settings.probe_interval)
            server.doubted.clear()
            was_up, is_suspect, had = server.up, server.circuit.state == "suspect", server.discovered
            finding, why = await self._probe(backend, server, SURE_ATTEMPTS if is_suspect else 1)
            if finding == "unreachable":
                server.circuit.probe_missed(is_sure=is_suspect)
            else:
                server.circuit.probe_answered()
            odd = 0 if finding in ("up", "unreachable") else odd + 1
            if odd >= ODD_BEFORE_EXCLUDED:
                server.up = False
            if server.up != was_up:
                self._report(backend, server, finding, why)
                self._on_change(backend)
            elif finding == "up" and had is not None and had.keys() != (server.discovered or {}).keys():
                self._report(backend, server, finding, why)

    async def _probe(self, backend: Backend, server: Server, attempts: int) -> tuple[ProbeResult, str]:
        """What one probe found, which is tried so often; and why it found nothing."""
        again = AsyncRetrying(
            stop=stop_after_attempt(attempts),
            wait=wait_fixed(ATTEMPT_WAIT),
            retry=retry_if_exception_type(ProbeFailed),
            reraise=True,
        )
        try:
            return await again(self._ask, backend, server), ""
        except ProbeFailed as failure:
            return "unreachable", failure.why

    async def _ask(self, backend: Backend, server: Server) -> ProbeResult:
        """Whether the server is well, where it says so apart, and its list of models. Tells `server` what there is.

        Raises:
            ProbeFailed
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
        before, lacked = server.discovered, server.lacks_a_model
        loaded = await self._learn(backend, server, models)
        server.update_models(models)
        is_ready = server.residency is not None and loaded is not None and server.residency.update(loaded)
        if is_ready or lacked or (before is not None and before != models):
            self._on_change(backend)
        return "up"

    async def _learn(self, backend: Backend, server: Server, models: Models) -> LoadedUntil | None:
        """What is asked besides only adds to what is known: it fails without a consequence. Gives what is loaded."""
        wanted = [tier.models[backend.name] for tier in self._settings.tiers.values() if backend.name in tier.models]
        wanted += [item.model for item in self._settings.embeddings.values() if item.backend == backend.name]

        async def ask(method: str, path: str, body: bytes | None) -> bytes | None:
            try:
                status, content = await self._fetch(backend, server, method, path, body)
            except ProbeFailed:
                return None
            return content if status == 200 else None

        return await backend.engine.probe_models(models, server.discovered or {}, wanted, ask)

    async def _fetch(
        self, backend: Backend, server: Server, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the server's answer.

        Raises:
            ProbeFailed
        """
        origin = server.pool.origin
        url = f"{'https' if origin.tls else 'http'}://{origin.authority}{origin.prefix}{path}"
        headers = [*backend.headers(), (VIA.decode(), self._gateway_id.decode()), ("Accept-Encoding", "identity")]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        try:
            async with (
                asyncio.timeout(PROBE_STEPS * PROBE_SECONDS),
                httpx2.AsyncClient(trust_env=False, verify=origin.tls or False, timeout=PROBE_SECONDS) as client,
                client.stream(method, url, headers=headers, content=body) as answer,
            ):
                return answer.status_code, await _read(answer)
        except (httpx2.HTTPError, TimeoutError) as error:
            raise ProbeFailed(_why(error)) from error

    # In plain words

    def _report(self, backend: Backend, server: Server, finding: ProbeResult, why: str) -> None:
        origin = server.pool.origin
        where = f"backend {server.name} ({backend.kind}) at {origin.authority}{origin.prefix}"
        if finding == "up":
            models = sorted({name.removesuffix(":latest") for name in server.discovered or {}})
            _log.info("%s: reachable, models there: %s", where, _listed(models))
            if len(backend.servers) == 1 or all(s.discovered is not None for s in backend.servers):
                self._report_missing(backend)
        elif finding == "itself":
            _log.error(
                "%s: this is the gateway itself; set the address of the %s server, not the gateway's",
                where,
                backend.kind,
            )
        elif finding == "refused_key":
            _log.error("%s: reachable, but it refuses the key; check the backend's api_key", where)
        elif finding == "no_models":
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
        for who, model in wanted:
            if model is not None and not any(server.serves(model) for server in backend.servers):
                there = sorted(
                    {name.removesuffix(":latest") for server in backend.servers for name in server.discovered or {}}
                )
                _log.warning(
                    "%s wants the model %r of backend %s, which is not there; there is: %s",
                    who,
                    model,
                    backend.name,
                    _listed(there),
                )


def reachable(settings: Settings, backends: Mapping[str, Backend]) -> list[Backend]:
    """The backends that a tier or an embedding model leads to."""
    used = {name for tier in settings.tiers.values() for name in tier.models} | {
        e.backend for e in settings.embeddings.values()
    }
    return [backend for name, backend in backends.items() if name in used]


def _why(error: Exception) -> str:
    """What kept a probe from an answer, for the log. The errors of sockets and of TLS stand at the end of what raised `error`."""
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message}); the backend's ca_file can name who vouches for it"
        if isinstance(cause, ssl.SSLError):
            return "it does not speak TLS as https needs it"
        if isinstance(cause, socket.gaierror):
            return "its host name is not known"
        cause = cause.__cause__ or cause.__context__
    return "no connection" if isinstance(error, httpx2.ConnectError) else "its answer broke off, or was no HTTP"


async def _until_set(event: asyncio.Event, seconds: float) -> None:
    """Until `event` is set, `seconds` at the longest."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _read(answer: httpx2.Response) -> bytes:
    """The body as it was sent; what is longer than `MAX_PROBE` is no list of models."""
    content = b""
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > MAX_PROBE:
            return b""
    return content


def _listed(names: list[str]) -> str:
    """For the log: a server could put line ends into its names."""
    if not names:
        return "none"
    names = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")
