"""Tests of bounds of processor time: a slow or busy machine meets them, work that takes twice as long does not."""

import pytest

from tests.fakes.processor_time import REFERENCE_SECONDS, REFERENCE_WORK, assert_seconds_at_most, machine_slowness


def check(costs: list[float], *slowness: float) -> None:
    """Check a bound of 50 ms, at costs that repeat, on a machine that is so many times as slow, in turn."""
    attempt = iter(range(1000))
    slow = iter(range(1000))
    assert_seconds_at_most(
        0.05,
        lambda: costs[next(attempt) % len(costs)],
        lambda: {"bytecode": slowness[next(slow) % len(slowness)], "memory": 1.0},
    )


def test_slow_machine_meets_the_bound() -> None:
    check([0.04 * 1.6], 1.6)


def test_busy_machine_meets_the_bound() -> None:
    check([0.12, 0.08, 0.11, 0.09, 0.049], 3.0, 1.0, 2.0)
    check([0.07, 0.06, 0.08], 2.0, 1.3, 1.9)  # it is never idle


@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.3, 3.0])
def test_work_that_takes_twice_as_long_exceeds_the_bound(slowness: float) -> None:
    with pytest.raises(AssertionError, match=r"not 50 ms; slowness of the machine: bytecode \d"):
        check([2 * 0.036 * max(1.0, slowness)], slowness, 4 * slowness)


def test_slowness_is_measured_by_each_kind_of_work() -> None:
    assert REFERENCE_WORK.keys() == REFERENCE_SECONDS.keys() == machine_slowness().keys()
    assert all(ratio > 0 for ratio in machine_slowness().values())
