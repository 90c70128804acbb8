import itertools
import random

import pytest

from gateway.bench.arrivals import arrivals
from gateway.bench.quantiles import deviation, mean


def test_without_a_rate_all_are_due_at_once() -> None:
    assert arrivals(3, None, 1.0, random.Random(1)) == [0.0, 0.0, 0.0]
    assert arrivals(0, 5.0, 1.0, random.Random(1)) == []


def test_infinite_burstiness_spaces_evenly() -> None:
    assert arrivals(4, 2.0, float("inf"), random.Random(1)) == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_intervals_have_the_rate_and_the_spread_of_the_gamma_distribution(burstiness: float) -> None:
    """The deviation of a gamma distribution is its mean divided by the root of its shape."""
    times = arrivals(20_000, 10.0, burstiness, random.Random(1))
    assert times[-1] == pytest.approx(2000.0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert mean(gaps) == pytest.approx(0.1, rel=0.01)
    assert deviation(gaps) == pytest.approx(0.1 / burstiness**0.5, rel=0.05)


def test_the_same_seed_gives_the_same_times() -> None:
    assert arrivals(9, 3.0, 1.0, random.Random(7)) == arrivals(9, 3.0, 1.0, random.Random(7))
