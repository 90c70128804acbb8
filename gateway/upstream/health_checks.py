"""Health checks: when each server is probed, and what follows from the results."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from gateway.config import Settings
from gateway.upstream.backend import Backend
from gateway.upstream.probe import Prober, ProbeResult
from gateway.upstream.probe_report import report, report_missing_models
from gateway.upstream.server import WATCH_SECONDS, Server

PROBE_AGAIN_SECONDS = 5.0
"""Longest time from a failed probe to the next one, however long `probe_interval` is."""
READY_SECONDS = 2.5
"""Time for which a server that does not answer keeps the gateway from being ready.

It is still probed after that.
"""
FIRST_ATTEMPTS = 3
SURE_ATTEMPTS = 2
"""Attempts of the probe that decides on a suspect server, whose requests have failed too."""
WRONG_ANSWERS_BEFORE_EXCLUDED = 2
"""Number of wrong answers in a row after which a server is excluded."""
_log = logging.getLogger(__name__)


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
        self._prober = Prober(settings, gateway_id, on_change, on_models)
        self._on_change = on_change
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
        self._prober.settings = settings
        new = [backend for backend in reachable(settings, backends) if backend not in self._tasks]
        all_asked = asyncio.Event()
        self._start_probes(new, all_asked)
        await all_asked.wait()

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Put backends in use that `probe_new` has probed. The others are probed until `forget`."""
        for backend in self._backends:
            if backend in backends.values() and all(server.discovered is not None for server in backend.servers):
                report_missing_models(self._prober.settings, backend)
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
        first_probes: list[asyncio.Task[None]] = []
        for backend in backends:
            first = [asyncio.create_task(self._first_probe(backend, server)) for server in backend.servers]
            self._tasks[backend] = [
                *first,
                *(asyncio.create_task(self._probe_forever(backend, server, all_asked)) for server in backend.servers),
            ]
            first_probes += first
        late = asyncio.get_running_loop().call_later(READY_SECONDS, all_asked.set)

        def check_done(_: object = None) -> None:
            if all(probe.done() for probe in first_probes):
                late.cancel()
                all_asked.set()

        for probe in first_probes:
            probe.add_done_callback(check_done)
        check_done()

    async def _first_probe(self, backend: Backend, server: Server) -> None:
        began = asyncio.get_running_loop().time()
        result, why = await self._prober.probe(backend, server, FIRST_ATTEMPTS)
        self._record(server, result, began, is_sure=True)
        report(self._prober.settings, backend, server, result, why)

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
            result, why = await self._prober.probe(backend, server, SURE_ATTEMPTS if is_suspect else 1)
            self._record(server, result, began, is_sure=is_suspect)
            wrong_answers = 0 if result in ("up", "unreachable") else wrong_answers + 1
            if wrong_answers >= WRONG_ANSWERS_BEFORE_EXCLUDED:
                server.up = False
            if server.up != was_up:
                report(self._prober.settings, backend, server, result, why)
                self._on_change(backend)
            elif (
                result == "up"
                and models_before is not None
                and models_before.keys() != (server.discovered or {}).keys()
            ):
                report(self._prober.settings, backend, server, result, why)

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


def reachable(settings: Settings, backends: Mapping[str, Backend]) -> list[Backend]:
    """Return the backends that a tier, an embedding model or a reranker leads to, and those with `discover`."""
    used = {name for tier in settings.tiers.values() for name in tier.models} | {
        item.backend for item in (*settings.embeddings.values(), *settings.rerankers.values())
    }
    used |= {backend.name for backend in settings.backends.values() if backend.discover}
    return [backend for name, backend in backends.items() if name in used]


async def _wait_until_set(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, for at most `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
