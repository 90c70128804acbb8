"""The state of a GPU that several engines share: who has it, the switch in progress, and what to expect.

Decides nothing and does no I/O; `gpu_switch.py` changes it.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

from gateway.config import Settings
from gateway.rollout.assignment import Change
from gateway.rollout.gpu_times import NOTHING, UNKNOWN, Expected, GpuTimes
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.gpu_engine import GpuEngine

Phase = Literal["draining", "freeing", "waking", "ready", "failed"]
Outcome = Literal["done", "failed", "reversed"]
SWITCH_PHASES: tuple[Phase, ...] = ("draining", "freeing", "waking")
"""Phases that a switch goes through, each of which takes time."""


class Switch:
    """One switch.

    `change` is what began it, None if a restart or new settings did. `source` is None if no engine is left.
    """

    def __init__(self, source: str | None, target: str, change: Change | None, began: float) -> None:
        self.source = source
        self.target = target
        self.change = change
        self.began = began
        self.at = now()
        self.is_return = False
        """True if it leads back, so that it is not taken back itself."""

    def __repr__(self) -> str:
        return f"<Switch {self.source} to {self.target}>"


class GpuState:
    """Engines by backend, and their turns. `clock` returns monotonic time in seconds."""

    def __init__(self, settings: Settings, metrics: Metrics, times: GpuTimes, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.times = times
        self.clock = clock
        self.engines: dict[str, GpuEngine] = {}
        self.holding: set[str] = set()
        """Backends whose engines have, or may have, memory of the GPU."""
        self.target: str | None = None
        """Backend that the GPU is for; None before the start."""
        self.switch: Switch | None = None
        self.phase: Phase = "ready"
        self.last: dict[str, Any] | None = None
        """Outcome of the last switch."""
        self._metrics = metrics
        self._phase_began, self._phase_at = clock(), now()

    def __repr__(self) -> str:
        return f"<GpuState {self.target} {self.phase} {self.switch}>"

    def backend(self, name: str) -> Backend:
        return self.engines[name].backend

    @property
    def is_returning(self) -> bool:
        return self.switch is not None and self.switch.is_return

    def holder_besides(self, target: str) -> str | None:
        """Return an engine other than `target` that has the GPU, if there is one."""
        return next((name for name in self.engines if name in self.holding and name != target), None)

    # Changes

    def take_turns(self, target: str) -> None:
        """Give the next turn to `target`.

        An engine that was about to leave stays awake if it is the target now.
        """
        self.target = target
        for name in self.engines:
            backend = self.backend(name)
            if name == target:
                backend.take_turn("awake" if backend.is_probed else "waking", self.expected().seconds)
            elif backend.turn == "awake":
                backend.take_turn("leaving")
            elif backend.turn == "waking":
                backend.take_turn("asleep")

    def enter(self, phase: Phase) -> None:
        """Enter a phase, and tell the waiting requests what to expect."""
        if phase != self.phase:
            self.phase, self._phase_began, self._phase_at = phase, self.clock(), now()
        if self.target is not None and self.backend(self.target).turn == "waking":
            self.backend(self.target).take_turn("waking", self.expected().seconds)

    def end_switch(self) -> Switch | None:
        """End the switch in progress, and return it."""
        switch, self.switch = self.switch, None
        return switch

    def observe(self, backend: str) -> None:
        """Observe the duration of the present phase."""
        self._metrics.gpu_phase.labels(backend, self.phase).observe(self.seconds_in_phase())

    def count(self, switch: Switch, outcome: Outcome, why: str = "") -> None:
        """Count the end of `switch`, and note it unless the switch only leads back to where another began."""
        self._metrics.gpu_switches.labels(switch.source or "none", switch.target, outcome).inc()
        if switch.is_return and switch.change is not None and outcome == "done":
            return
        self.last = {
            "at": switch.at,
            "from": switch.source,
            "to": switch.target,
            "outcome": outcome,
            "seconds": round(self.clock() - switch.began, 3),
            "why": why,
        }

    def note_failure(self, target: str, why: str) -> None:
        """Note that `target`, the only engine that is left, did not come up."""
        self.last = {"at": now(), "from": None, "to": target, "outcome": "failed", "seconds": None, "why": why}

    # Report

    def seconds_in_phase(self) -> float:
        return self.clock() - self._phase_began

    def expected(self) -> Expected:
        """Return the expected time until the target is ready."""
        target = self.target or ""
        if self.phase != "waking":
            return self.expected_to(target)
        total = self.wake_time(target)
        if total.seconds is None:
            return total
        return Expected(round(max(0.0, total.seconds - self.seconds_in_phase()), 3), total.basis)

    def expected_to(self, target: str) -> Expected:
        """Return the expected time of a switch to `target` that began now."""
        if target not in self.engines or self.backend(target).is_probed:
            return NOTHING
        total = NOTHING
        for name in self.engines:
            if name in self.holding and name != target:
                total += drain_time(self.backend(name)) + self.times.expected("free", name, {})
        return total + self.wake_time(target)

    def wake_time(self, name: str) -> Expected:
        """Return the expected time until a backend that starts to wake is ready."""
        return self.times.expected("wake", name, self._mean_loads())

    def _mean_loads(self) -> dict[str, float]:
        """Return the mean time of model loads by backend, as a guess of the time that an Ollama takes to wake."""
        found: dict[str, float] = {}
        load_seconds = self._metrics.load_seconds
        for name in self.engines:
            series = [load_seconds.labels(*labels) for labels in list(load_seconds.keys()) if labels[0] == name]
            count = sum(sum(histogram.counts) for histogram in series)
            if count:
                found[name] = round(sum(histogram.total for histogram in series) / count, 3)
        return found

    def view(self) -> dict[str, Any] | None:
        """Return the part `gpu` of `GET /ops/rollout`, None if no GPU is shared."""
        if self.target is None:
            return None
        switch, backend, back = self.switch, self.backend(self.target), self.settings.rollback_to
        others = [self.backend(name) for name in self.engines if name != self.target]
        rollback = self.expected_to(back)
        is_expected = self.phase not in ("ready", "failed")
        return {
            "holder": self.target if backend.turn == "awake" else None,
            "phase": self.phase,
            "since": self._phase_at,
            "seconds": round(self.seconds_in_phase(), 3),
            "from": None if switch is None else switch.source,
            "to": None if switch is None else switch.target,
            "expected_seconds": self.expected().seconds if is_expected else None,
            "running": sum(server.load for other in others for server in (*other.servers, *other.leaving)),
            "waiting": sum(backend.admission.waiting(lane) for lane in backend.admission.lanes),
            "rollback": {"to": back, "seconds": rollback.seconds, "basis": rollback.basis},
            "last": self.last,
        }


def is_busy(backend: Backend) -> bool:
    """Return whether requests run at `backend`, or are queued for it."""
    admission = backend.admission
    servers = (*backend.servers, *backend.leaving)
    return any(server.load for server in servers) or any(admission.waiting(lane) for lane in admission.lanes)


def drain_time(backend: Backend) -> Expected:
    """Return the expected time until the requests at `backend` have ended: the longest median of its queues."""
    queues = [queue for queue in backend.admission.queues if queue.running or queue.waiting]
    if not queues:
        return NOTHING
    times = [queue.service_seconds() for queue in queues]
    known = [seconds for seconds in times if seconds is not None]
    return UNKNOWN if len(known) < len(times) else Expected(round(max(known), 3), "estimated")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
