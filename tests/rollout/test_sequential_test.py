"""The stake does not grow on average while nothing is wrong, and grows if something is."""

from itertools import product
from math import comb
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.rollout.sequential_test import LONGEST_ROUND, SequentialTest

SHARES = (0.0, 0.001, 0.02, 0.3, 0.9, 1.0)


def with_history(margin: float, history: list[tuple[bool, bool]]) -> SequentialTest:
    found = SequentialTest(margin, 0.01)
    for is_tested, hit in history:
        (found.add_tested if is_tested else found.add_other)(hit)
    return found


def after_round(margin: float, history: list[tuple[bool, bool]], others: list[bool], hit: bool) -> float:
    """Return the stake after `history` and a round of `others` and one sample under test."""
    found = with_history(margin, history)
    for other in others:
        found.add_other(other)
    found.add_tested(hit)
    return found.evidence


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.005, 0.1]),
    st.sampled_from(SHARES),
    st.sampled_from(SHARES),
)
def test_stake_does_not_grow_on_average_while_nothing_is_wrong(
    history: list[tuple[bool, bool]], m: int, margin: float, p: float, q: float
) -> None:
    """The guarantee on false alarms rests on this; all outcomes of a round are added up."""
    p = min(p, q + margin)
    history = [*history, (True, False), (False, False)]  # both sides have samples, so no round is open
    if with_history(margin, history)._open_other.count:
        history = [*history, (True, False)]
    if with_history(margin, history)._open_tested.count:
        history = [*history, (False, False)]
    before = with_history(margin, history).evidence
    expected = 0.0
    for hit, hits in product((False, True), range(m + 1)):
        chance = (p if hit else 1 - p) * comb(m, hits) * q**hits * (1 - q) ** (m - hits)
        expected += (
            chance * after_round(margin, history, [number < hits for number in range(m)], hit) if chance else 0.0
        )
    assert expected <= before * (1 + 1e-9)


@pytest.mark.parametrize(
    ("p", "q", "margin"), [(0.05, 0.05, 0.0), (0.03, 0.02, 0.01), (0.0, 0.5, 0.0), (1.0, 1.0, 0.0)]
)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_evaluation_after_each_sample_keeps_the_false_alarm_rate(
    p: float, q: float, margin: float, part: float
) -> None:
    random, alarms, runs, alpha = Random(7), 0, 200, 0.1
    for _ in range(runs):
        found = SequentialTest(margin, 0.01)
        for _ in range(600):
            (found.add_tested if (tested := random.random() < part) else found.add_other)(
                random.random() < (p if tested else q)
            )
            if found.evidence >= 1 / alpha:
                alarms += 1
                break
    assert alarms <= alpha * runs


@pytest.mark.parametrize(("p", "most"), [(1.0, 30), (0.3, 150), (0.06, 2000)])
def test_difference_is_found_and_a_larger_one_sooner(p: float, most: int) -> None:
    random, found = Random(3), SequentialTest(0.005, 0.01)
    while found.evidence < 500:
        tested = random.random() < 0.1
        (found.add_tested if tested else found.add_other)(random.random() < (p if tested else 0.01))
    assert found.tested.count <= most


def test_difference_that_begins_late_is_found() -> None:
    random, found = Random(3), SequentialTest(0.005, 0.01)
    while found.tested.count < 1000:
        (found.add_tested if random.random() < 0.1 else found.add_other)(random.random() < 0.01)
    assert found.evidence < 1
    while found.evidence < 500:
        if random.random() < 0.1:
            found.add_tested(True)
        else:
            found.add_other(random.random() < 0.01)
        assert found.tested.count < 1100


def test_samples_of_one_side_alone_say_nothing_and_are_bounded() -> None:
    found = SequentialTest(0.0, 0.01)
    for _ in range(100_000):
        found.add_tested(True)
    assert (found.evidence, found.tested.count) == (1.0, 0)
    found.add_other(False)
    assert found.tested.count == LONGEST_ROUND
    assert found.evidence > 1


def test_long_runs_of_equal_samples_do_not_overflow() -> None:
    for tested, other in product((False, True), repeat=2):
        found = SequentialTest(0.0, 0.01)
        for _ in range(20_000):
            found.add_other(other)
            found.add_tested(tested)
        assert found.evidence >= 0
        assert found.evidence > 1e300 if tested > other else found.evidence <= 1
    assert (found.tested.share, SequentialTest(0.0, 0.01).tested.share) == (1.0, None)


def test_share_that_cannot_be_exceeded_by_the_margin_gives_no_evidence() -> None:
    found = SequentialTest(0.5, 0.01)
    for _ in range(200):
        found.add_other(True)
        found.add_tested(True)
    assert found.evidence <= 1
