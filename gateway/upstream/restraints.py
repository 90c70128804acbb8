"""Restraints of a backend's servers: puts in force what circuit breakers and outlier detectors decide, and pauses.

Each change is logged, told to the others that it concerns, and followed by a refresh of the backend,
which admits the requests that can run now. So is the end of a pause or an ejection, by a timer.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

from gateway.admission.limits import LaneName
from gateway.upstream.circuit_breaker import CALM, CircuitBreaker, CircuitState
from gateway.upstream.outlier_detection import Change, OutlierDetector
from gateway.upstream.server import Server

PAUSE_MARGIN = 0.01
"""Seconds added to the timer of a pause or an ejection.

The loop's clock is a little coarser than the clock that ends the pause.
"""

OnEvent = Callable[[Server, Literal["down", "up", "ejected"], str, LaneName], None]
"""Called when a server has died, is well again, or was ejected for a model and a lane."""

_log = logging.getLogger(__name__)


class Restraints:
    """Restraints of the servers of one backend.

    - `servers` are those that may get requests, in the backend's own list.
    - `is_last_resort` returns whether no other server can serve what a detector holds back.
    - `refresh` is called when a restraint has begun or ended.
    - `on_down` is called when the circuit breaker of a server has opened, or a server was ejected.
    """

    def __init__(
        self,
        servers: Collection[Server],
        is_last_resort: Callable[[OutlierDetector], bool],
        refresh: Callable[[], None],
        on_down: Callable[[], None],
        on_event: OnEvent | None,
    ) -> None:
        self._servers = servers
        self._is_last_resort = is_last_resort
        self._refresh = refresh
        self._on_down = on_down
        self._on_event = on_event
        self._timers: set[asyncio.TimerHandle] = set()

    def __repr__(self) -> str:
        return f"<Restraints, {len(self._timers)} with a timer>"

    def observe(self, server: Server) -> None:
        """Give `server` a circuit breaker and outlier detectors whose decisions take effect here."""
        server.circuit = CircuitBreaker(time.monotonic, partial(self._circuit_changed, server))
        server.build_detector = partial(
            OutlierDetector,
            clock=time.monotonic,
            is_last_resort=self._is_last_resort,
            on_change=partial(self._ejection_changed, server),
        )

    def pause(self, server: Server, seconds: float) -> None:
        """Send no requests to `server` for a number of seconds, because it is full or failing."""
        server.circuit.pause(seconds)
        self._refresh_after(seconds, lambda: server.circuit.allows(server.load))  # ends the pause
        self._refresh()

    def close(self) -> None:
        """Forget the ends of pauses and ejections."""
        for timer in self._timers:
            timer.cancel()

    def _refresh_after(self, seconds: float, step: Callable[[], object] = lambda: None) -> None:
        def refresh() -> None:
            self._timers.discard(timer)
            step()
            self._refresh()

        timer: asyncio.TimerHandle = asyncio.get_running_loop().call_later(seconds + PAUSE_MARGIN, refresh)
        self._timers.add(timer)

    def _circuit_changed(self, server: Server, was: CircuitState, reason: str) -> None:
        state = server.circuit.state
        if server.is_leaving:
            return
        if server.up is not None:  # the result of the first probe has its own log line
            level = logging.WARNING if state in ("suspect", "open") else logging.INFO
            _log.log(level, "backend %s: circuit %s, was %s (%s)", server.name, state, was, reason)
        if state == "suspect":
            server.doubted.set()
        if state == "open":
            server.up = False
            server.prefixes.clear()
            for detector in server.detectors.values():
                detector.explain(server.circuit.suspected_at)
        if (
            was == "suspect"
            and state == "closed"
            and any(other is not server and other.is_up() for other in self._servers)
        ):
            self.pause(server, CALM)  # a server that fails fast looks idle and would get every request
        self._refresh()
        if self._on_event is not None and (state == "open" or (state == "closed" and was == "half_open")):
            self._on_event(server, "down" if state == "open" else "up", "", "text")
        if state == "open":
            self._on_down()

    def _ejection_changed(self, server: Server, detector: OutlierDetector, change: Change) -> None:
        if server.is_leaving:
            return
        what = f"{detector.model!r} ({detector.lane})"
        if change == "ejected":
            seconds = detector.until - time.monotonic()
            _log.warning("backend %s: ejected for %s, %.0f s (%s)", server.name, what, seconds, detector.reason)
            self._refresh_after(seconds)
        elif change == "readmitted":
            _log.info("backend %s: readmitted for %s, a request succeeded", server.name, what)
        self._refresh()
        if change == "ejected":
            if self._on_event is not None:
                self._on_event(server, "ejected", detector.model, detector.lane)
            self._on_down()
