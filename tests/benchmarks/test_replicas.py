"""The bench of several replicas: what it makes of the figures."""

import pytest

from benchmarks.load import LoadOutcome
from benchmarks.replicas import Measured, table


def measured(replicas: int, *, answers: int, cpu: float, load: float, upstream: float) -> Measured:
    found = Measured(replicas)
    found.add(LoadOutcome(answers=answers, seconds=4.5, cpu_seconds=cpu, own_cpu_seconds=load), upstream * 5 / 4.5)
    return found


def test_throughput_is_compared_with_what_the_cores_allow() -> None:
    """One replica uses one core. Two of them and what they serve for would need three, of two."""
    one = measured(1, answers=4500, cpu=4.5, load=1.5, upstream=0.75)
    two = measured(2, answers=6000, cpu=6.0, load=2.0, upstream=1.0)
    assert one.rates == [1000]
    assert one.possible(2) == pytest.approx(1000)
    assert two.possible(2) == pytest.approx(2 / 0.0015)
    assert two.possible(4) == pytest.approx(2000)


def test_table_has_ratios_side_by_side() -> None:
    lines = table(
        [
            measured(1, answers=4500, cpu=4.5, load=1.5, upstream=0.75),
            measured(2, answers=6000, cpu=6.6, load=2.0, upstream=1.0),
        ],
        2,
    ).splitlines()
    assert lines[2] == "1 | 1,000 | 1.00 x | 1000 us | 1.00 x | 1,000 | 100%"
    assert lines[3].startswith("2 | 1,333 | 1.33 x | 1100 us | 1.10 x | 1,250")
    assert lines[-1].endswith("1: 1.00 x, 2: 1.82 x.")
