import itertools
import random

import pytest

from gateway.bench.arrivals import RampUp, arrivals, ramped_arrivals
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


def test_a_linear_ramp_up_gives_each_request_its_own_rate() -> None:
    """As in vLLM: the rate at request i of n is start + (end - start) * i / (n - 1), and nothing is scaled."""
    times = ramped_arrivals(5, RampUp("linear", 2, 10), float("inf"), random.Random(1))
    assert times == pytest.approx(list(itertools.accumulate(1 / rate for rate in (2, 4, 6, 8, 10))))


def test_an_exponential_ramp_up_multiplies_the_rate() -> None:
    times = ramped_arrivals(4, RampUp("exponential", 1, 8), float("inf"), random.Random(1))
    assert times == pytest.approx([1, 1.5, 1.75, 1.875])


def test_a_ramp_up_of_one_request_has_the_rate_of_its_start() -> None:
    assert ramped_arrivals(1, RampUp("linear", 4, 8), float("inf"), random.Random(1)) == [0.25]
    assert ramped_arrivals(0, RampUp("linear", 4, 8), 1.0, random.Random(1)) == []


def test_the_intervals_of_a_ramp_up_follow_the_gamma_distribution() -> None:
    times = ramped_arrivals(20_000, RampUp("linear", 10, 10), 4.0, random.Random(1))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert mean(gaps) == pytest.approx(0.1, rel=0.02)
    assert deviation(gaps) == pytest.approx(0.05, rel=0.05)


def test_changes_of_the_rate_are_whole_numbers_each_once() -> None:
    """Of a jump over several, each is listed, as vLLM does."""
    assert RampUp("linear", 2, 10).changes(3) == {0: [2], 1: [3, 4, 5, 6], 2: [7, 8, 9, 10]}
    assert RampUp("exponential", 1, 3).changes(4) == {0: [1], 2: [2], 3: [3]}
    assert RampUp("linear", 2.5, 2.75).changes(3) == {0: [2]}
    assert RampUp("linear", 1, 2).changes(0) == {}
