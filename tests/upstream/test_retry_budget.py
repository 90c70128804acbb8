"""Retry budget: how many requests may be sent a second time."""

import pytest

from gateway.upstream.retry_budget import LEAST, SECONDS, SHARE, RetryBudget


def spend_all(budget: RetryBudget, now: float) -> int:
    """Spend all retries that the budget has left, and return their number."""
    count = 0
    while budget.has_room(now):
        budget.spend(now)
        count += 1
    return count


def test_few_retries_are_always_allowed() -> None:
    assert spend_all(RetryBudget(), 5.0) == LEAST


def test_share_of_the_recent_requests_may_be_retried() -> None:
    budget = RetryBudget()
    for number in range(200):
        budget.count(1000 + number * SECONDS / 200)
    assert spend_all(budget, 1000 + SECONDS - 0.01) == int(200 * SHARE)


def test_requests_older_than_ten_seconds_do_not_count() -> None:
    budget = RetryBudget()
    for _ in range(200):
        budget.count(1000.5)
    spend_all(budget, 1000.9)
    assert spend_all(budget, 1000.5 + SECONDS) == LEAST
    assert spend_all(budget, 1000.5 + SECONDS) == 0


@pytest.mark.parametrize("gap", [1, SECONDS, 1000])
def test_budget_works_after_a_time_without_requests(gap: float) -> None:
    budget = RetryBudget()
    budget.count(1.0)
    budget.count(1.0 + gap)
    assert budget.allowed() == LEAST
    assert repr(budget) == f"<RetryBudget 0 of {LEAST} used>"


def test_retries_stay_limited_when_every_request_fails() -> None:
    """A hundred requests a second arrive for a minute, and each of them would be retried."""
    budget, retries = RetryBudget(), 0
    for number in range(6000):
        now = 50 + number / 100
        budget.count(now)
        if budget.has_room(now):
            budget.spend(now)
            retries += 1
    assert retries <= 6000 * SHARE + LEAST
