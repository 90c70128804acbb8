"""Quotas of a key: asked for in blocks, lowered before they are reported, and divided without the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.keys.account import Account
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY
from gateway.replicas.shared_allowance import DECAY_SECONDS, DRY_SECONDS, REPEAT_SECONDS, Answer, SharedAllowance
from tests.keys.fakes import Clocks, account


class Key:
    """A key, whose limits are shared, and its quotas."""

    def __init__(self, **limits: int) -> None:
        self.clocks = Clocks()
        self.account: Account = account(self.clocks, **limits)
        self.account.allowance.share()
        self.shared = SharedAllowance(self.account, None, self.account.allowance)

    def exchange(self, limit: str, answer: Answer) -> None:
        """Report, and apply the answer for one limit."""
        now = self.clocks.clock()
        (report,) = (report for report in self.shared.report(now, 1) if report.limit == limit)
        self.shared.apply(report, answer, now)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 2000), st.integers(0, 500), st.integers(1, 10))
def test_block_is_a_small_part_of_what_is_free(free: int, used: int, need: int, replicas: int) -> None:
    each = SharedAllowance(account(Clocks(), requests_per_minute=10_000), None, None)  # type: ignore[arg-type]
    each.free = {REQUESTS_PER_MINUTE: free}
    each.need({REQUESTS_PER_MINUTE: need})
    block = each.wanted(REQUESTS_PER_MINUTE, used, replicas) - used - need
    assert 0 <= block <= free // (4 * replicas)


def test_name_does_not_tell_who_the_person_is() -> None:
    key = Key(requests_per_minute=10)
    assert key.shared.name == "web"
    assert "ann" not in SharedAllowance(key.account, "ann@example.org", key.account.allowance).name


def test_nothing_is_reported_twice_before_it_is_due() -> None:
    key = Key(requests_per_minute=10)
    now = key.clocks.clock()
    assert [report.limit for report in key.shared.report(now, 1)] == [REQUESTS_PER_MINUTE]
    assert key.shared.report(now + REPEAT_SECONDS - 0.1, 1) == []
    assert len(key.shared.report(now + REPEAT_SECONDS, 1)) == 1


def test_report_has_what_requests_wait_for_once() -> None:
    key = Key(requests_per_minute=10)
    key.shared.need({REQUESTS_PER_MINUTE: 1})
    key.shared.need({REQUESTS_PER_MINUTE: 3})
    (report,) = key.shared.report(key.clocks.clock(), 1)
    assert (report.total, report.used, report.wanted, report.largest) == (10, 0, 4, 3)
    assert key.shared.reports == 1
    (report,) = key.shared.report(key.clocks.clock() + REPEAT_SECONDS, 1)
    assert (report.wanted, report.largest) == (0, 0)


def test_quota_is_lowered_before_it_is_reported_and_raised_after_the_answer() -> None:
    key = Key(requests_per_minute=100)
    allowance = key.account.allowance
    key.shared.need({REQUESTS_PER_MINUTE: 20})
    (report,) = key.shared.report(key.clocks.clock(), 1)
    assert allowance.quota(REQUESTS_PER_MINUTE) == 0
    key.shared.apply(report, Answer(20, 0, 80, 0), key.clocks.clock())
    assert allowance.quota(REQUESTS_PER_MINUTE) == 20
    (report,) = key.shared.report(key.clocks.clock(), 1)
    assert report.wanted == allowance.quota(REQUESTS_PER_MINUTE) == 0


@pytest.mark.parametrize(("quota", "is_dry"), [(4, False), (3, True)])
def test_limit_that_gives_less_than_asked_is_dry_for_a_moment(quota: int, is_dry: bool) -> None:
    key = Key(requests_per_minute=10)
    key.shared.need({REQUESTS_PER_MINUTE: 4})
    key.exchange(REQUESTS_PER_MINUTE, Answer(quota, 0, 0, 0))
    assert key.shared.dry_until == (key.clocks.clock() + DRY_SECONDS if is_dry else 0.0)


def test_use_of_the_predecessor_counts_and_is_not_reported_again() -> None:
    key = Key(tokens_per_day=1000)
    key.exchange(TOKENS_PER_DAY, Answer(300, 100, 0, 300))
    assert key.account.allowance.day_tokens == 300
    assert key.shared.report(key.clocks.clock(), 1) == []
    assert key.shared.free == {TOKENS_PER_DAY: 700}


def test_answer_about_a_day_that_has_ended_is_ignored() -> None:
    key = Key(tokens_per_day=1000)
    (report,) = key.shared.report(key.clocks.clock(), 1)
    key.clocks.passed += 86_400
    key.account.look_at_clock()
    key.shared.apply(report, Answer(300, 100, 0, 300), key.clocks.clock())
    assert (key.account.allowance.quota(TOKENS_PER_DAY), key.account.allowance.day_tokens) == (0, 0)


def test_share_without_the_others_is_part_of_the_limit_and_at_least_one() -> None:
    key = Key(requests_per_minute=10, concurrency=2)
    key.shared.go_alone(3)
    assert [key.account.allowance.quota(limit) for limit in (REQUESTS_PER_MINUTE, CONCURRENCY)] == [3, 1]


def test_rest_of_the_day_is_divided_once() -> None:
    key = Key(tokens_per_day=900)
    allowance = key.account.allowance
    allowance.day_tokens, allowance.day_others = 100, 200
    for _ in range(3):
        key.shared.go_alone(3)
        assert allowance.quota(TOKENS_PER_DAY) == 100 + 200
        allowance.day_tokens += 50


def test_nothing_may_be_used_after_joining_until_a_quota_is_told() -> None:
    key = Key(requests_per_minute=10)
    key.shared.go_alone(1)
    key.account.begin()
    key.shared.join()
    assert key.account.allowance.quota(REQUESTS_PER_MINUTE) == 1
    assert len(key.shared.report(key.clocks.clock(), 1)) == 1


def test_key_that_gives_back_asks_for_what_it_has_used() -> None:
    key = Key(requests_per_minute=100)
    key.shared.need({REQUESTS_PER_MINUTE: 20})
    key.exchange(REQUESTS_PER_MINUTE, Answer(20, 0, 0, 0))
    key.account.begin().end()
    key.shared.need({REQUESTS_PER_MINUTE: 5})
    key.shared.give_back()
    (report,) = key.shared.report(key.clocks.clock(), 1)
    assert report.used == report.wanted == key.account.allowance.quota(REQUESTS_PER_MINUTE) == 1


def test_key_is_looked_at_again_while_it_holds_or_has_used_something() -> None:
    key = Key(requests_per_minute=10)
    key.exchange(REQUESTS_PER_MINUTE, Answer(1, 0, 0, 0))
    assert key.shared.next_look(key.clocks.clock()) == 0.0
    hold = key.account.begin()
    assert key.shared.next_look(key.clocks.clock()) == 0.0
    hold.end()
    assert key.shared.next_look(key.clocks.clock()) == DECAY_SECONDS
    key.clocks.passed += 62
    key.account.allowance.advance(key.account.second())
    key.account.allowance.set_quota(REQUESTS_PER_MINUTE, 0)
    assert key.shared.next_look(key.clocks.clock()) is None
