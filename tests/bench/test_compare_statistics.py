import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bench.compare_statistics import paired, paired_ratio, t_quantile, welch, welch_ratio


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (1e7, 1.9600)]
)
def test_quantiles_of_student_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)


def test_a_drift_that_acts_on_both_sides_cancels_in_pairs() -> None:
    """Unpaired, the same figures show nothing."""
    drifting = [1.0, 2.0, 4.0, 8.0]
    faster = [value * 0.9 for value in drifting]
    pairs = paired_ratio(drifting, faster)
    assert pairs is not None
    assert pairs.estimate == pytest.approx(0.9)
    assert not pairs.crosses(1)
    unpaired = welch_ratio(drifting, faster)
    assert unpaired is not None
    assert unpaired.crosses(1)


def test_welch_has_the_degrees_of_freedom_of_welch_and_satterthwaite() -> None:
    """Variances 1 and 20/3: (1/3 + 5/3)² / ((1/3)²/2 + (5/3)²/3) = 4.0755."""
    found = welch([1, 2, 3], [2, 4, 6, 8])
    assert found is not None
    assert found.estimate == 3
    assert found.high == pytest.approx(3 + t_quantile(4.0755) * math.sqrt(2), abs=1e-4)
    assert found.low == pytest.approx(3 - t_quantile(4.0755) * math.sqrt(2), abs=1e-4)


def test_one_round_has_no_interval_and_shows_no_difference() -> None:
    for found in (paired_ratio([1.0], [3.0]), welch_ratio([1.0], [3.0, 3.1])):
        assert found is not None
        assert found.low is None
        assert found.crosses(1)


def test_a_pair_counts_by_its_weight() -> None:
    """Differences 4, 1, 1 with the shares 1/2, 1/4, 1/4: mean 2.5, squared error 3/2 * (3/4)² * (1 + 2/4)."""
    found = paired([0, 0, 0], [4, 1, 1], [2, 1, 1])
    assert found is not None
    assert found.estimate == pytest.approx(2.5)
    assert found.high == pytest.approx(2.5 + t_quantile(2) * math.sqrt(1.5 * 0.75**2 * 1.5))
    equal, unweighted = paired([0, 1], [3, 5], [7, 7]), paired([0, 1], [3, 5])
    assert equal == unweighted


def test_there_is_no_ratio_of_nothing_or_of_zero() -> None:
    assert paired_ratio([], []) is None
    assert paired_ratio([0.0, 1.0], [1.0, 1.0]) is None
    assert welch_ratio([1.0], []) is None
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_19_of_20_intervals_hold_the_true_ratio() -> None:
    source, held = random.Random(4), 0
    for _ in range(400):
        machine = [source.uniform(0.5, 2) for _ in range(4)]
        a = [value * math.exp(source.gauss(0, 0.1)) for value in machine]
        b = [value * 1.3 * math.exp(source.gauss(0, 0.1)) for value in machine]
        found = paired_ratio(a, b)
        assert found is not None
        held += found.crosses(1.3)
    assert 0.92 <= held / 400 <= 0.98


@given(st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(0.001, 1e6)), min_size=2, max_size=20))
def test_swapping_the_sides_inverts_the_interval(values: list[tuple[float, float]]) -> None:
    a, b = [first for first, _ in values], [second for _, second in values]
    one, other = paired_ratio(a, b), paired_ratio(b, a)
    assert one is not None
    assert other is not None
    assert one.estimate == pytest.approx(1 / other.estimate, rel=1e-6)
    assert one.crosses(1) == other.crosses(1)
