"""Bounds of processor time: a slower machine, or a busy one, slows down the work and what it is compared with alike."""

import time
from collections.abc import Callable
from functools import cache

import orjson

ATTEMPTS = 10
ATTEMPTS_WITH_SECONDS = 40
"""Other work on the machine makes a step take twice as long for a second or two."""


def assert_at_most(
    times: float,
    work: Callable[[], object],
    *,
    yardstick: Callable[[], object],
    clock: Callable[[], float] = time.thread_time,
) -> None:
    """Check that `work` takes at most `times` as long as `yardstick`.

    They run in turn. The shortest run of each counts, because other work on the machine only adds to
    it. The check ends with the first attempt that shows it. `clock` may be `time.process_time`, for
    work that other threads do.
    """
    unit = min(processor_seconds(yardstick, clock) for _ in range(3))
    least = float("inf")
    for _ in range(ATTEMPTS):
        least = min(least, processor_seconds(work, clock))
        unit = min(unit, processor_seconds(yardstick, clock))
        if least <= times * unit:
            return
    raise AssertionError(f"took {least / unit:.1f} times as long as the yardstick, of {unit * 1000:.2f} ms")


def assert_seconds_at_most(
    seconds: float, cost: Callable[[], float], slowness: Callable[[], dict[str, float]] | None = None
) -> None:
    """Check that `cost`, a number of seconds of processor time, is at most `seconds` on the machine of the bound.

    That machine needs `REFERENCE_SECONDS` for `REFERENCE_WORK`. On a slower one, `cost` may be as many
    times `seconds` as the work takes times as long. Both run in turn. The least of each counts, because
    other work on the machine only adds to it. The check ends with the first attempt that shows it.
    """
    slowness = slowness or machine_slowness
    least, ratios = cost(), {"the machine of the bound": 1.0}
    for _ in range(ATTEMPTS_WITH_SECONDS):
        if least <= seconds * max(1.0, *ratios.values()):
            return
        measured = slowness()
        ratios = {name: min(ratio, ratios.get(name, ratio)) for name, ratio in measured.items()}
        least = min(least, cost())
    slow = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    raise AssertionError(f"took {least * 1000:.1f} ms, not {seconds * 1000:g} ms; slowness of the machine: {slow}")


@cache
def _text() -> bytes:
    return orjson.dumps("A" * 20 * 1024 * 1024)


@cache
def _objects() -> bytes:
    return orjson.dumps([{"a": number} for number in range(120_000)])


def _interpret() -> int:
    total = 0
    for number in range(800_000):
        total ^= number
    return total


REFERENCE_WORK: dict[str, Callable[[], object]] = {
    "memory": lambda: orjson.loads(_text()),
    "objects": lambda: orjson.loads(_objects()),
    "bytecode": _interpret,
}
"""What steps of parsing consist of. A run takes about as long as the steps that are measured: in a shorter one, other
work would show less.
"""
REFERENCE_SECONDS = {"memory": 0.027, "objects": 0.021, "bytecode": 0.025}
"""Processor time of each, with nothing else to do, on the machine for which bounds in seconds are given."""


def machine_slowness() -> dict[str, float]:
    """Return how many times as long as `REFERENCE_SECONDS` each kind of work takes now."""
    return {name: processor_seconds(work) / REFERENCE_SECONDS[name] for name, work in REFERENCE_WORK.items()}


def processor_seconds(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Return the processor time of one run of `work` in seconds: that of this thread, or of `clock`."""
    began = clock()
    work()
    return clock() - began
