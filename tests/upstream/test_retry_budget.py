"""How many requests may be sent a second time."""

import pytest

from gateway.upstream.retry_budget import LEAST, SECONDS, SHARE, RetryBudget


def spent(budget: RetryBudget, now: float) -> int:
    """As many as there are."""
    count = 0
    while budget.has_room(now):
        budget.spend(now)
        count += 1
    return count


def test_few_retries_are_always_allowed() -> None:
    assert spent(RetryBudget(), 5.0) == LEAST


def test_share_of_the_requests_of_late_is_allowed() -> None:
    budget = RetryBudget()
    for number in range(200):
        budget.count(1000 + number * SECONDS / 200)
    assert spent(budget, 1000 + SECONDS - 0.01) == int(200 * SHARE)


def test_what_is_older_than_ten_seconds_does_not_count() -> None:
    budget = RetryBudget()
    for _ in range(200):
        budget.count(1000.5)
    spent(budget, 1000.9)
    assert spent(budget, 1000.5 + SECONDS) == LEAST
    assert spent(budget, 1000.5 + SECONDS) == 0


@pytest.mark.parametrize("gap", [1, SECONDS, 1000])
def test_budget_survives_silence(gap: float) -> None:
    budget = RetryBudget()
    budget.count(1.0)
    budget.count(1.0 + gap)
    assert budget.allowed() == LEAST
    assert repr(budget) == f"<RetryBudget 0 of {LEAST} used>"


def test_everything_failing_makes_no_storm() -> None:
    """A hundred requests a second for a minute, each of which would be repeated."""
    budget, repeated = RetryBudget(), 0
    for number in range(6000):
        now = 50 + number / 100
        budget.count(now)
        if budget.has_room(now):
            budget.spend(now)
            repeated += 1
    assert repeated <= 6000 * SHARE + LEAST
