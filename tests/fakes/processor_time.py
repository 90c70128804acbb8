"""Comparison of the processor time of two pieces of work: a slower machine, or a busy one, slows down both alike."""

import time
from collections.abc import Callable

ATTEMPTS = 10


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


def processor_seconds(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Return the processor time of one run of `work` in seconds: that of this thread, or of `clock`."""
    began = clock()
    work()
    return clock() - began
