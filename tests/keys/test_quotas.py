"""Limits of which a replica may use a quota: windows, allowances, accounts and the headers that tell of them.

Covers: gateway/keys/allowance.py
"""

import pytest

from gateway.errors import ConcurrencyExceeded, RateLimited
from gateway.keys.account import Account
from gateway.keys.allowance import Allowance
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE, Limits
from gateway.keys.windows import SlidingWindow
from tests.keys.fakes import Clocks, account, accounts, headers, policy

ALL = Limits(requests_per_minute=100, tokens_per_minute=1000, tokens_per_day=5000, concurrency=10)


class NoSharing:
    """Source of quotas that has none."""

    async def make_room(self, account: Account, person: str, requests: int, tokens: int) -> None:
        raise AssertionError


def shared(limits: Limits = ALL) -> Allowance:
    return Allowance(limits, is_shared=True)


def test_nothing_of_a_shared_limit_may_be_used_without_a_quota() -> None:
    allowance = shared()
    assert allowance.begin(0) == CONCURRENCY
    assert {limit: allowance.quota(limit) for limit in ALL.given()} == dict.fromkeys(ALL.given(), 0)
    assert allowance.lacking(1, 0, 0) == {CONCURRENCY: 1, REQUESTS_PER_MINUTE: 1}
    assert allowance.lacking(0, 50, 0) == {TOKENS_PER_MINUTE: 50, TOKENS_PER_DAY: 50}


def test_quota_admits_as_much_as_it_says() -> None:
    allowance = shared(Limits(requests_per_minute=100))
    allowance.set_quota(REQUESTS_PER_MINUTE, 2)
    assert [allowance.begin(0) for _ in range(3)] == [None, None, REQUESTS_PER_MINUTE]
    assert allowance.lacking(1, 0, 60) == {REQUESTS_PER_MINUTE: 1}
    assert allowance.lacking(1, 0, 61) == {}


def test_amount_above_the_quota_does_not_fit_into_an_empty_shared_window() -> None:
    window = SlidingWindow(100)
    window.is_shared, window.quota = True, 50
    assert window.lacks(60, 0)
    assert window.take(60, 0) is None
    assert window.take(50, 0) is not None
    assert SlidingWindow(100).take(200, 0) is not None  # as it does where the limit is not shared


def test_changed_limit_does_not_raise_a_quota() -> None:
    allowance = shared(Limits(requests_per_minute=100))
    allowance.set_quota(REQUESTS_PER_MINUTE, 40)
    allowance.change(Limits(requests_per_minute=1000, tokens_per_minute=10))
    assert allowance.quota(REQUESTS_PER_MINUTE) == 0  # until it is told
    assert allowance.quota(TOKENS_PER_MINUTE) == 0


def test_new_day_begins_without_a_quota() -> None:
    allowance = shared(Limits(tokens_per_day=100))
    allowance.set_quota(TOKENS_PER_DAY, 80, 20)
    allowance.turn_to(1)
    assert (allowance.tokens_per_day, allowance.day_others) == (0, 0)


def test_time_until_a_shared_window_fits_has_regard_to_the_others() -> None:
    window = SlidingWindow(100)
    window.is_shared = True
    window.others = 100
    assert window.seconds_until_fits(1, 0) == 1
    assert window.seconds_until_fits(100, 0) == 61
    window.others = 50
    assert window.seconds_until_fits(50, 0) == 0
    assert window.remaining() == 50


def test_headers_tell_what_is_left_for_all_replicas() -> None:
    key = account(Clocks(), requests_per_minute=100, tokens_per_minute=1000, tokens_per_day=5000)
    key.share(NoSharing())
    key.allowance.set_quota(REQUESTS_PER_MINUTE, 10, 60)
    key.allowance.set_quota(TOKENS_PER_MINUTE, 300, 400)
    key.allowance.set_quota(TOKENS_PER_DAY, 500, 4000)
    hold = key.begin()
    hold.reserve("standard", 400, 100)
    told = headers(hold.lines)
    assert told["x-ratelimit-limit-requests"] == "100"
    assert told["x-ratelimit-remaining-requests"] == "39"
    assert told["x-ratelimit-remaining-tokens"] == "400"
    assert told["x-gateway-budget-warning"].startswith("4200 of 5000 tokens a day")
    assert headers(key.lines())["x-ratelimit-remaining-requests"] == "39"


def test_refusal_names_the_whole_limit() -> None:
    key = account(Clocks(), requests_per_minute=100)
    key.share(NoSharing())
    with pytest.raises(RateLimited, match="may use 100 requests per minute"):
        key.begin()
    busy = account(Clocks(), concurrency=4)
    busy.share(NoSharing())
    with pytest.raises(ConcurrencyExceeded, match="may have 4 requests"):
        busy.begin()


def test_persons_and_new_keys_share_too() -> None:
    clocks = Clocks()
    all_keys = accounts(clocks, [policy("web", per_person=Limits(requests_per_minute=5))])
    all_keys.share(NoSharing())
    web = all_keys.named("web")
    assert web is not None
    names = dict(web.allowances("ann", 1000))
    assert names[None] is web.allowance
    assert names["ann"].is_shared
    assert dict(web.allowances("a" * 200, 1000)).keys() != {None, "a" * 200}  # long names are digests
    all_keys.change([policy("new", requests_per_minute=5)], lambda name: name)
    new = all_keys.named("new")
    assert new is not None
    assert new.sharing is not None
    assert new.allowance.quota(REQUESTS_PER_MINUTE) == 0


def test_view_shows_the_use_of_all_replicas() -> None:
    key = account(Clocks(), requests_per_minute=100, tokens_per_day=5000, concurrency=3)
    key.share(NoSharing())
    key.allowance.set_quota(REQUESTS_PER_MINUTE, 10, 60)
    key.allowance.set_quota(TOKENS_PER_DAY, 500, 4000)
    key.allowance.set_quota(CONCURRENCY, 1, 2)
    key.begin()
    assert key.view()["used"] == {"tokens_per_day": 4000, "concurrency": 3, "requests_per_minute": 61}
