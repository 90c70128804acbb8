"""Health checks: when each server is probed, and what follows from the results."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Self

from gateway.config import Settings
from gateway.upstream.backend import Backend
from gateway.upstream.probe import Prober, ProbeResult
from gateway.upstream.probe_report import has_reported, report, report_missing_models
from gateway.upstream.server import WATCH_SECONDS, Server
from gateway.upstream.server_names import Membership

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

UNFIT: dict[ProbeResult, str] = {
    "refused_key": "it refuses the key",
    "itself": "its address is the gateway's own",
    "no_models": "it is not a server of this kind",
}
"""Reasons why a server that answers cannot serve."""

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
        self._on_models = on_models
        self._backends = reachable(settings, backends)
        self._tasks: dict[Backend, list[asyncio.Task[None]]] = {}
        self._joined: dict[Server, tuple[asyncio.Task[None], asyncio.Future[None]]] = {}
        """Probes of the servers at the addresses of host names, and the ends of their first probes."""
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
        tasks += [task for task, _ in self._joined.values()]
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
            if backend in backends.values() and has_reported(backend):
                report_missing_models(self._prober.settings, backend)
        self._backends = reachable(settings, backends)

    def forget(self, backend: Backend) -> None:
        """Stop probing `backend`."""
        for task in self._tasks.pop(backend, ()):
            task.cancel()
        self._stop_probes((*backend.servers, *backend.leaving))

    # Probes

    def _start_probes(self, backends: list[Backend], all_asked: asyncio.Event) -> None:
        """Start to probe `backends`.

        Set `all_asked` after the first probe of each server, or after `READY_SECONDS`.
        """
        first_probes: list[asyncio.Future[None]] = []
        for backend in backends:
            first = [asyncio.create_task(self._first_probe(backend, server)) for server in backend.servers]
            self._tasks[backend] = [
                *first,
                *(asyncio.create_task(self._probe_forever(backend, server, all_asked)) for server in backend.servers),
            ]
            first_probes += first
            for name in backend.names:
                start, left = partial(self._probe_joined, backend), partial(self._react_to_leaving, backend)
                membership = Membership(backend, name, start, left)
                self._tasks[backend].append(asyncio.create_task(membership.run()))
                first_probes.append(membership.has_begun)
        late = asyncio.get_running_loop().call_later(READY_SECONDS, all_asked.set)

        def check_done(_: object = None) -> None:
            if all(probe.done() for probe in first_probes):
                late.cancel()
                all_asked.set()

        for probe in first_probes:
            probe.add_done_callback(check_done)
        check_done()

    def _probe_joined(self, backend: Backend, server: Server) -> "asyncio.Future[None]":
        """Start to probe a server that joins, unless it is probed. Return the end of its first probe."""
        if server not in self._joined:
            first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._joined[server] = asyncio.create_task(self._probe_from_first(backend, server, first)), first
        return self._joined[server][1]

    async def _probe_from_first(self, backend: Backend, server: Server, first: "asyncio.Future[None]") -> None:
        try:
            await self._first_probe(backend, server)
        finally:
            first.set_result(None)
        server.is_joining = False
        self._on_change(backend)
        await self._probe_forever(backend, server)

    def _react_to_leaving(self, backend: Backend) -> None:
        """Forget servers that have left without requests, and the models that only they had."""
        self._stop_probes(backend.drop_drained())
        self._on_models(backend)

    def _stop_probes(self, servers: Iterable[Server]) -> None:
        for server in servers:
            if server in self._joined:
                self._joined.pop(server)[0].cancel()

    async def _first_probe(self, backend: Backend, server: Server) -> None:
        began = asyncio.get_running_loop().time()
        if not backend.is_probed:
            return
        result, why = await self._prober.probe(backend, server, FIRST_ATTEMPTS)
        if not backend.is_probed:
            return
        self._record(server, result, began, is_sure=True)
        report(self._prober.settings, backend, server, result, why)

    async def _probe_forever(self, backend: Backend, server: Server, all_asked: asyncio.Event | None = None) -> None:
        if all_asked is not None:
            await all_asked.wait()
        wrong_answers = 0
        while True:
            interval = backend.settings.probe_interval
            await _wait_until_set(
                server.doubted, min(interval, PROBE_AGAIN_SECONDS) if server.liveness.has_failed else interval
            )
            server.doubted.clear()
            if not backend.is_probed:
                continue
            began = asyncio.get_running_loop().time()
            if server.is_leaving:
                self._record_life(server, await self._prober.is_alive(backend, server), began)
                continue
            was_up, models_before = server.up, server.discovered
            is_suspect, server.is_hinted = server.circuit.state == "suspect" or server.is_hinted, False
            result, why = await self._prober.probe(backend, server, SURE_ATTEMPTS if is_suspect else 1)
            if server.is_leaving:
                continue
            if not backend.is_probed:  # it was told to free the GPU meanwhile
                continue
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

    async def check(self, backend: Backend) -> str:
        """Probe the servers of a backend that is being woken. Return why none is up; empty if one is.

        Failures are not recorded: they are expected until the engine has started.
        """

        async def probe(server: Server) -> str:
            began = asyncio.get_running_loop().time()
            result, why = await self._prober.probe(backend, server, 1)
            if result == "up":
                self._record(server, result, began, is_sure=False)
            return why or UNFIT.get(result, "")

        reasons = await asyncio.gather(*(probe(server) for server in backend.servers))
        return "" if "" in reasons else reasons[0]

    def _record(self, server: Server, result: ProbeResult, began: float, *, is_sure: bool) -> None:
        """Record the result of a probe that began at the time `began`.

        `is_sure` means that the server was asked more than once.
        """
        self._record_life(server, result != "unreachable", began)
        if result == "unreachable":
            server.pool.close_idle()  # before a request is sent on a connection that may be dead
            server.circuit.probe_missed(is_sure=is_sure)
            server.doubt_name()
        else:
            server.circuit.probe_answered()

    def _record_life(self, server: Server, is_alive: bool, began: float) -> None:
        if is_alive:
            server.liveness.probe_answered(asyncio.get_running_loop().time())
        else:
            server.liveness.probe_failed(began)

    def _watch(self) -> None:
        """End the requests of servers that have vanished, and forget servers that have left."""
        loop = asyncio.get_running_loop()
        self._watch_timer = loop.call_later(WATCH_SECONDS, self._watch)
        for backend in self._tasks:
            self._stop_probes(backend.drop_drained())
            for server in (*backend.servers, *backend.leaving):
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
