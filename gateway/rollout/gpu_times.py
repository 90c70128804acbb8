"""The times that engines took to free the GPU and to wake, and what they let expect. Pure."""

import statistics
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

KEPT = 5
"""Times of each sort that are kept for a backend, the last ones."""

Basis = Literal["measured", "estimated", "unknown", "none"]
"""Origin of an expected time; `none`: there is nothing to do."""


class Expected(Struct, frozen=True):
    """An expected time in seconds, None if it is unknown."""

    seconds: float | None
    basis: Basis

    def __add__(self, other: "Expected") -> "Expected":
        if self.seconds is None or other.seconds is None:
            return Expected(None, "unknown")
        order: list[Basis] = ["none", "measured", "estimated"]
        return Expected(round(self.seconds + other.seconds, 3), max(self.basis, other.basis, key=order.index))


NOTHING = Expected(0.0, "none")
UNKNOWN = Expected(None, "unknown")


class _Kept(Struct):
    free: dict[str, list[float]] = {}
    wake: dict[str, list[float]] = {}


class GpuTimes:
    """Measured times by backend, in seconds."""

    def __init__(self, kept: Any = None) -> None:
        """`kept` is what `to_persist` returned in an earlier run; anything else is ignored."""
        try:
            found = msgspec.convert(kept or {}, _Kept)
        except msgspec.ValidationError:
            found = _Kept()
        self._times = {"free": found.free, "wake": found.wake}

    def __repr__(self) -> str:
        return f"<GpuTimes {self._times}>"

    def to_persist(self) -> Any:
        return {step: dict(times) for step, times in self._times.items()}

    def record(self, step: Literal["free", "wake"], backend: str, seconds: float) -> None:
        times = [*self._times[step].get(backend, ()), round(seconds, 3)]
        self._times[step] = {**self._times[step], backend: times[-KEPT:]}

    def expected(self, step: Literal["free", "wake"], backend: str, guesses: Mapping[str, float]) -> Expected:
        """Return the median of the last times; if there are none, the guess for the backend."""
        times = self._times[step].get(backend)
        if times:
            return Expected(statistics.median(times), "measured")
        guess = guesses.get(backend)
        return UNKNOWN if guess is None else Expected(guess, "estimated")
