"""Availability of a backend: whether its servers take requests, and the error for those that none takes.

Decides from what circuit breakers, outlier detectors and the turn on a shared GPU say, and awaits
nothing.
"""

import math
import time
from typing import Literal, Protocol

from gateway.admission.limits import LaneName
from gateway.config import BackendSettings
from gateway.errors import BackendUnavailable
from gateway.upstream.circuit_breaker import LEVELS
from gateway.upstream.outlier_detection import OutlierDetector
from gateway.upstream.server import Server

LONGEST_RETRY_AFTER = 60
"""Seconds. A request on trial may readmit a server at any time."""

GpuTurn = Literal["awake", "leaving", "asleep", "waking"]
"""Turn of a backend that shares the GPU with others. Those that do not are always `awake`.

`leaving`: what is queued and runs ends there, and new requests are refused. `asleep`: it gets none.
`waking`: requests are queued, and none is admitted yet.
"""


class ServerGroup(Protocol):
    """The backend whose availability is asked for."""

    settings: BackendSettings
    servers: list[Server]
    turn: GpuTurn


class Availability:
    """Availability of one backend, now.

    For a request, ask only while `Backend.is_restrained` is true; otherwise every server takes it.
    """

    def __init__(self, backend: ServerGroup) -> None:
        self._backend = backend

    def __repr__(self) -> str:
        return f"<Availability up {self.is_up}, circuit level {self.circuit_level}>"

    # Reports

    @property
    def is_up(self) -> bool:
        """True if at least one server is healthy."""
        return any(server.is_well for server in self._backend.servers)

    @property
    def circuit_level(self) -> int:
        """Level of the best server: 0 closed, 1 suspect or on trial, 2 open or ejected."""
        return min((_level(server) for server in self._backend.servers), default=LEVELS["open"])

    def gives_requests(self, server: Server) -> bool:
        """Return whether `server` is given requests, for at least one of the models that it serves."""
        if not server.is_well or server.is_excluded or server.circuit.state == "suspect" or server.circuit.is_paused:
            return False
        return not server.ejections or any(detector.gets_requests for detector in server.used_detectors)

    # Decisions about requests

    @property
    def refuses_new(self) -> bool:
        """True if new requests are refused, because another engine has the GPU or is about to."""
        return self._backend.turn in ("leaving", "asleep")

    def is_down(self, model: str) -> bool:
        """Return whether no server may serve `model`: the circuit breaker of every server that has it is open.

        Nor may one if none is known, or their engine sleeps.
        """
        if self._backend.turn in ("asleep", "waking"):
            return self._backend.turn == "asleep"
        serving = self._serving(model)
        return not self._backend.servers or (bool(serving) and all(server.circuit.is_open for server in serving))

    def accepts_none(self, model: str, lane: LaneName) -> bool:
        """Return whether no server that has `model` may get requests that a fallback can serve.

        A suspect server counts as accepting requests, because a probe is about to decide on it. Requests
        wait for an engine that is being woken.
        """
        if self._backend.turn != "awake":
            return self.refuses_new
        serving = self._serving(model)
        return (bool(serving) or not self._backend.servers) and not any(
            (server.circuit.state == "suspect" or server.is_up()) and server.gate(model, lane).accepts()
            for server in serving
        )

    def refuses_all(self, model: str, lane: LaneName) -> bool:
        """Return whether every server that has `model` is down, or hangs and has its request on trial.

        A request without a fallback would only wait there.
        """
        if self._backend.turn != "awake":
            return self.refuses_new
        serving = self._serving(model)
        return (bool(serving) or not self._backend.servers) and all(
            server.circuit.is_open or ((gate := server.gate(model, lane)).is_hung and not gate.allows())
            for server in serving
        )

    def is_last_resort(self, detector: OutlierDetector) -> bool:
        """Return whether no server can serve what `detector` holds back."""
        model, lane = detector.model, detector.lane
        return not any(
            server.serves(model) and server.is_up() and server.gate(model, lane).accepts()
            for server in self._backend.servers
        )

    def error(self, model: str, lane: LaneName) -> BackendUnavailable:
        """Return the error for a request that no server can serve.

        Its `Retry-After` is the time to the next probe or lookup, or to the end of an ejection.
        """
        if self.refuses_new:
            return without_gpu()
        if not self._backend.servers:
            return BackendUnavailable(
                "No server of the model backend is known yet: its host name is not resolved. Try again later.",
                retry_after=1,
            )
        ends = [
            detector.until - time.monotonic()
            for server in self._backend.servers
            if (detector := server.detectors.get((model, lane))) is not None and detector.restrains
        ]
        soonest = min(ends, default=self._backend.settings.probe_interval)
        seconds = min(max(1, math.ceil(soonest)), LONGEST_RETRY_AFTER)
        return BackendUnavailable("No server of the model backend is available. Try again later.", retry_after=seconds)

    def _serving(self, model: str) -> list[Server]:
        return [server for server in self._backend.servers if server.serves(model)]


def without_gpu() -> BackendUnavailable:
    """Return the error for a request to an engine that does not have the GPU."""
    return BackendUnavailable(
        "The engine of this model does not have the GPU now. Try again later, or use another model.",
        retry_after=LONGEST_RETRY_AFTER,
    )


def _level(server: Server) -> int:
    """Return the level of a server, which is ejected if all its requests are held back."""
    if not server.ejections:
        return LEVELS[server.circuit.state]
    ejected = min((_ejection_level(detector) for detector in server.used_detectors), default=0)
    return max(LEVELS[server.circuit.state], ejected)


def _ejection_level(detector: OutlierDetector) -> int:
    return 0 if not detector.restrains else 1 if detector.gets_requests else 2
