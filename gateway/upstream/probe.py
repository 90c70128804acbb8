"""Probe of one server: its health, its models and what is known about them, without spending a token."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Literal

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from gateway.config import Settings
from gateway.engines.engine import LoadedUntil, Models
from gateway.engines.vllm_metrics import prefix_cache_tokens
from gateway.upstream.backend import Backend
from gateway.upstream.server import MAX_DISCOVERED, VIA, Server
from gateway.upstream.transport_error import TransportError

PROBE_SECONDS = 2.0
"""Timeout of each step of a probe: connecting with TLS, and the head of the answer."""
PROBE_STEPS = 3
"""Limit of a whole probe, in multiples of `PROBE_SECONDS`, however many reads its answer takes."""
MAX_PROBE = 8 * 1024 * 1024
"""Maximum number of bytes of an answer: lists of 10,000 models."""
ATTEMPT_WAIT = 0.3
"""Seconds between two attempts."""
MAX_MODEL_NAME = 512
"""Maximum length of a model's name; the settings accept no longer one either."""

ProbeResult = Literal["up", "unreachable", "refused_key", "itself", "no_models"]

_log = logging.getLogger(__name__)


class ProbeFailed(Exception):
    """Failed probe: no usable answer in time. `why` is the reason in plain words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Prober:
    """Probes of the servers of all backends.

    `on_change` is called when the models of a server changed. `on_models` is called each time a
    server has reported its models.
    """

    def __init__(
        self,
        settings: Settings,
        gateway_id: bytes,
        on_change: Callable[[Backend], None],
        on_models: Callable[[Backend], None],
    ) -> None:
        self.settings = settings
        """Settings that say which models are asked about."""
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._on_models = on_models

    async def probe(self, backend: Backend, server: Server, attempts: int) -> tuple[ProbeResult, str]:
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

    async def is_alive(self, backend: Backend, server: Server) -> bool:
        """Return whether a server answers at all."""
        try:
            await self._fetch(backend, server, "GET", backend.engine.health_path or backend.engine.models_path)
        except ProbeFailed:
            return False
        return True

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
        models = _without_long_names(server, models)
        before, lacked, was_up = server.discovered, server.lacks_a_model, server.up
        loaded = await self._probe_models(backend, server, models)
        is_asked = was_up and server.prefixes.is_sized
        if not is_asked and backend.admission.affinity is not None and backend.engine.metrics_path is not None:
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
            server.prefixes.is_sized = True
            tokens = prefix_cache_tokens(content) if status == 200 else None
            if tokens is not None:
                server.prefixes.resize(tokens)

    async def _probe_models(self, backend: Backend, server: Server, models: Models) -> LoadedUntil | None:
        """Ask a server for more facts about its `models`. Return the loaded ones.

        The answers only add to what is known, so a failure has no consequence.
        """
        wanted = [tier.models[backend.name] for tier in self.settings.tiers.values() if backend.name in tier.models]
        pinned = (*self.settings.embeddings.values(), *self.settings.rerankers.values())
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


def _without_long_names(server: Server, models: Models) -> Models:
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
