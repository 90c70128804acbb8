"""Accounts: admission, reservation and settlement of a key's requests.

Covers: gateway/keys/allowance.py
Covers: gateway/keys/hold.py
Covers: gateway/keys/policy.py
"""

import pytest

from gateway.errors import BudgetSpent, ConcurrencyExceeded, ExpiredApiKey, RateLimited
from gateway.keys import account as module
from gateway.keys.account import Account
from gateway.keys.allowance import Allowance
from gateway.keys.hold import MAX_COMPLETION, Hold
from gateway.keys.policy import Limits
from tests.keys.fakes import NOON, Clocks, account, headers, policy


def used(key: Account) -> dict[str, int]:
    found: dict[str, int] = key.view()["used"]
    return found


def ran(key: Account, tokens: int, *, tier: str = "standard", max_tokens: int = 0, person: str = "") -> str:
    """Run a request that takes `tokens`; return the tier that served it."""
    hold = key.begin(person)
    try:
        served = hold.reserve(tier, 0, max_tokens)
        hold.count(0, tokens)
    finally:
        hold.end()
    return served


# Requests


def test_requests_of_a_minute_are_limited_and_refused_ones_do_not_count() -> None:
    clocks = Clocks()
    key = account(clocks, requests_per_minute=3)
    for _ in range(3):
        ran(key, 1)
    for _ in range(5):
        with pytest.raises(RateLimited) as caught:
            key.begin()
        assert (caught.value.limit, caught.value.retry_after, caught.value.status) == ("requests_per_minute", 61, 429)
        assert caught.value.code == "rate_limit_exceeded"
    clocks.passed += 61
    ran(key, 1)
    assert used(key)["requests_per_minute"] == 1


def test_concurrency_counts_from_the_beginning_to_the_end_however_it_ends() -> None:
    key = account(Clocks(), concurrency=2, tokens_per_minute=10)
    one, two = key.begin(), key.begin()
    with pytest.raises(ConcurrencyExceeded) as caught:
        key.begin()
    assert (caught.value.limit, caught.value.code, caught.value.retry_after) == (
        "concurrency",
        "concurrency_exceeded",
        1,
    )
    one.end()
    one.end()  # a second time changes nothing
    three = key.begin()
    with pytest.raises(ConcurrencyExceeded):
        key.begin()
    two.reserve("standard", 0, 10)
    with pytest.raises(RateLimited):
        three.reserve("standard", 0, 1)
    three.end()
    two.end()
    assert used(key) == {"tokens_per_day": 0, "concurrency": 0, "tokens_per_minute": 0}


def test_expired_key_is_refused_from_its_second_on() -> None:
    clocks = Clocks()
    key = account(clocks, expires=NOON + 100.5)
    for clocks.passed in (0, 61, 100.4):
        ran(key, 1)
    clocks.passed = 101.0
    with pytest.raises(ExpiredApiKey, match="expired"):
        key.begin()
    with pytest.raises(ExpiredApiKey):
        key.check_expiry()
    key.change(policy(expires=NOON + 1000))
    ran(key, 1)


# Tokens


def test_estimate_is_reserved_and_replaced_by_the_count() -> None:
    key = account(Clocks(), tokens_per_minute=1000)
    hold = key.begin()
    hold.reserve("standard", 400, 200)
    assert used(key)["tokens_per_minute"] == 300
    assert headers(hold.lines)["x-ratelimit-remaining-tokens"] == "700"
    hold.count(90, 20)
    hold.end()
    assert used(key) == {"tokens_per_day": 110, "concurrency": 0, "tokens_per_minute": 110}


def test_request_that_took_more_than_estimated_makes_later_ones_wait() -> None:
    clocks = Clocks()
    key = account(clocks, tokens_per_minute=1000)
    hold = key.begin()
    hold.reserve("standard", 0, 10)
    clocks.passed += 30
    hold.count(0, 1500)
    hold.end()
    clocks.passed += 40  # what was reserved is too old to count, what was counted at the end is not
    with pytest.raises(RateLimited) as caught:
        ran(key, 1, max_tokens=1)
    assert (caught.value.limit, caught.value.retry_after) == ("tokens_per_minute", 21)
    clocks.passed += 21
    ran(key, 1, max_tokens=1)


def test_attack_with_large_max_tokens_never_gets_more_than_the_limit_through_in_a_minute() -> None:
    """A client sends as fast as it can for ten minutes, with requests that use all that they ask for."""
    clocks, through = Clocks(), []
    key = account(clocks, tokens_per_minute=10_000, requests_per_minute=50)
    running: list[tuple[float, Hold, int]] = []
    requests, sizes = [], (700, 1900, 3, 5000, 250)
    for step in range(6_000):
        clocks.passed = step / 10
        for ends, hold, tokens in [each for each in running if each[0] <= clocks.passed]:
            hold.count(0, tokens)
            hold.end()
            running.remove((ends, hold, tokens))
        tokens = sizes[step % len(sizes)]
        hold = None
        try:
            hold = key.begin()
            hold.reserve("standard", 0, tokens)
        except RateLimited:
            if hold is not None:
                hold.end()
            continue
        requests.append(clocks.passed)
        through.append((clocks.passed, tokens))
        running.append((clocks.passed + 2 + step % 7, hold, tokens))
    most_tokens = max(sum(n for at, n in through if start <= at <= start + 60) for start, _ in through)
    most_requests = max(sum(1 for at in requests if start <= at <= start + 60) for start in requests)
    assert 9_000 < most_tokens <= 10_000
    assert 40 < most_requests <= 50


def test_answer_without_a_limit_reserves_what_such_answers_took_on_average() -> None:
    key = account(Clocks(), tokens_per_minute=1_000_000)
    first = key.begin()
    first.reserve("standard", 0, None)
    assert used(key)["tokens_per_minute"] == 256
    first.count(0, 2256)
    first.end()
    second = key.begin()
    second.reserve("standard", 0, None)
    assert used(key)["tokens_per_minute"] == 2256 + 506
    second.end()
    small = account(Clocks(), tokens_per_minute=100)
    small.begin().reserve("standard", 0, None)
    assert used(small)["tokens_per_minute"] == 10


def test_absurd_max_tokens_images_and_several_answers_are_estimated_within_bounds() -> None:
    key = account(Clocks(), tokens_per_minute=10**9)
    key.begin().reserve("standard", 0, 10**12)
    assert used(key)["tokens_per_minute"] == MAX_COMPLETION
    key.begin().reserve("standard", 40, 100, images=2, answers=3)
    assert used(key)["tokens_per_minute"] == MAX_COMPLETION + 10 + 2 * 512 + 300


def test_answer_that_broke_off_counts_what_was_sent_and_the_estimated_prompt() -> None:
    key = account(Clocks(), tokens_per_minute=1000)
    hold = key.begin()
    hold.reserve("standard", 400, 500)
    hold.count(None, 7)
    hold.end()
    assert used(key)["tokens_per_minute"] == 107


def test_prompt_of_several_exchanges_counts_once() -> None:
    """Each choice and each prompt of a request is an exchange of its own."""
    for told, are_all_told, expected in ((7, True, 7), (7, False, 10), (0, False, 10), (30, False, 20)):
        key = account(Clocks())
        hold = key.begin()
        hold.reserve("standard", 40, 5, answers=2)
        hold.count(None, 1)
        hold.count(None, 1)
        hold.count_prompts_once(told, are_all_told=are_all_told)
        hold.end()
        assert used(key)["tokens_per_day"] == expected + 2


def test_request_that_no_backend_began_counts_no_tokens() -> None:
    key = account(Clocks(), tokens_per_minute=1000, tokens_per_day=1000)
    hold = key.begin()
    hold.reserve("standard", 400, 500)
    hold.end()
    assert used(key) == {"tokens_per_day": 0, "concurrency": 0, "tokens_per_minute": 0}


def test_second_reservation_replaces_the_first() -> None:
    """The settings may change while images are fetched."""
    key = account(Clocks(), tokens_per_minute=1000)
    hold = key.begin()
    hold.reserve("standard", 0, 900)
    hold.reserve("standard", 0, 800)
    assert used(key) == {"tokens_per_day": 800, "concurrency": 1, "tokens_per_minute": 800}
    hold.end()
    assert used(key) == {"tokens_per_day": 0, "concurrency": 0, "tokens_per_minute": 0}


def test_limit_that_is_removed_and_set_again_under_a_running_request_begins_anew() -> None:
    key = account(Clocks(), tokens_per_minute=1000)
    hold = key.begin()
    hold.reserve("standard", 0, 900)
    key.change(policy())
    key.change(policy(tokens_per_minute=500))
    hold.count(0, 5)
    hold.end()
    assert used(key)["tokens_per_minute"] == 0


# Budgets


def test_budget_of_the_day_ends_at_midnight_in_utc_and_says_so() -> None:
    clocks = Clocks()
    key = account(clocks, tokens_per_day=1000)
    assert headers(key.lines())["x-ratelimit-reset-tokens"] == "0s"
    ran(key, 799)
    assert "x-gateway-budget-warning" not in headers(key.lines())
    ran(key, 1)
    warned = headers(key.lines())
    assert warned["x-gateway-budget-warning"].startswith(
        "800 of 1000 tokens a day are used; the budget is renewed at 2"
    )
    assert warned["x-gateway-budget-warning"].endswith("T00:00:00Z")
    assert (warned["x-ratelimit-remaining-tokens"], warned["x-ratelimit-reset-tokens"]) == ("200", "12h0m0s")
    ran(key, 900)  # the last one is served to its end
    with pytest.raises(BudgetSpent, match=r"budget of 1000 tokens for today.*T00:00:00Z \(midnight UTC\)") as caught:
        ran(key, 1)
    assert (caught.value.limit, caught.value.retry_after) == ("tokens_per_day", 43_200)
    assert (b"x-should-retry", b"false") in caught.value.answer_headers()
    clocks.passed = 43_200
    ran(key, 1)
    assert used(key)["tokens_per_day"] == 1


def test_running_requests_hold_their_share_of_the_budget() -> None:
    """A hundred requests at once do not get a hundred times the budget."""
    key = account(Clocks(), tokens_per_day=1000)
    holds = [key.begin() for _ in range(100)]
    admitted = 0
    for hold in holds:
        try:
            hold.reserve("standard", 0, 300)
        except BudgetSpent:
            continue
        admitted += 1
    assert admitted == 4


def test_request_over_midnight_does_not_give_back_yesterdays_tokens() -> None:
    clocks = Clocks()
    key = account(clocks, tokens_per_day=1000)
    hold = key.begin()
    hold.reserve("standard", 0, 500)
    clocks.passed = 43_201
    ran(key, 30)
    hold.count(0, 100)
    hold.end()
    assert used(key)["tokens_per_day"] == 30


def test_smaller_tier_serves_when_the_budget_is_spent_and_other_limits_still_hold() -> None:
    clocks = Clocks()
    key = account(clocks, tokens_per_day=100, requests_per_minute=4, downgrade="standard")
    assert ran(key, 100, tier="ultra") == "ultra"
    hold = key.begin()
    assert hold.reserve("ultra", 0, 1) == "standard"
    assert headers(hold.lines)["x-gateway-downgraded-from"] == "ultra"
    hold.end()
    hold = key.begin()
    assert hold.reserve("standard", 0, 1) == "standard"
    assert "x-gateway-downgraded-from" not in headers(hold.lines)
    hold.end()
    hold = key.begin()
    with pytest.raises(BudgetSpent):
        hold.reserve("bge-m3", 0, 0, has_tiers=False)
    hold.end()
    assert ran(key, 1, tier="ultra") == "standard"  # the refused one did not count
    with pytest.raises(RateLimited):
        key.begin()


# Persons

PER_PERSON = Limits(requests_per_minute=2, tokens_per_day=100, concurrency=1, tokens_per_minute=60)


def test_each_person_behind_a_trusted_key_has_limits_of_their_own() -> None:
    key = account(Clocks(), per_person=PER_PERSON, requests_per_minute=100)
    ran(key, 30, person="ada")
    ran(key, 30, person="ada")
    with pytest.raises(RateLimited) as caught:
        key.begin("ada")
    assert caught.value.limit == "person_requests_per_minute"
    assert "This person" in caught.value.message
    ran(key, 1, person="bob")
    assert used(key)["requests_per_minute"] == 3  # what a person's limit refuses does not count for the key
    assert used(key)["concurrency"] == 0


def test_requests_without_a_name_share_one_allowance() -> None:
    key = account(Clocks(), per_person=PER_PERSON)
    ran(key, 1)
    ran(key, 1)
    with pytest.raises(RateLimited):
        key.begin("")


def test_tokens_of_a_person_are_limited_by_the_minute_and_by_the_day() -> None:
    clocks = Clocks()
    key = account(clocks, per_person=PER_PERSON, tokens_per_minute=1000)
    ran(key, 60, person="ada")
    hold = key.begin("ada")
    with pytest.raises(RateLimited) as caught:
        hold.reserve("standard", 0, 1)
    hold.end()
    assert caught.value.limit == "person_tokens_per_minute"
    assert used(key)["tokens_per_minute"] == 60  # the key's share was given back
    clocks.passed += 61
    ran(key, 40, person="ada")
    clocks.passed += 61
    with pytest.raises(BudgetSpent) as spent:
        ran(key, 1, person="ada")
    assert (spent.value.limit, "This person" in spent.value.message) == ("person_tokens_per_day", True)
    ran(key, 1, person="bob")


def test_header_of_an_untrusted_key_changes_nothing_about_its_limits() -> None:
    key = account(Clocks(), requests_per_minute=2)
    ran(key, 1, person="ada")
    ran(key, 1, person="bob")
    with pytest.raises(RateLimited):
        key.begin("carol")
    assert key.persons == {}


def test_persons_are_bounded_and_no_flood_of_names_resets_a_persons_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PERSONS", 10)
    clocks = Clocks()
    key = account(clocks, per_person=PER_PERSON)
    ran(key, 1, person="ada")
    ran(key, 1, person="ada")
    admitted = 0
    for number in range(1000):
        try:
            ran(key, 1, person=f"p{number}")
        except RateLimited:
            continue
        admitted += 1
    assert (len(key.persons), admitted) == (11, 9 + 2)  # nine more persons, and two requests of all others
    with pytest.raises(RateLimited):
        key.begin("ada")
    clocks.passed += 86_400 + 61
    ran(key, 1, person="late")
    assert len(key.persons) == 1


def test_headers_of_an_error_show_the_allowance_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a person who has not asked before is whole, and those beyond the bound share one."""
    monkeypatch.setattr(module, "MAX_PERSONS", 1)
    key = account(Clocks(), per_person=Limits(requests_per_minute=5))
    left = "x-ratelimit-remaining-requests"
    assert headers(key.lines("ada"))[left] == "5"
    assert not key.persons
    key.begin("ada").end()
    assert (headers(key.lines("ada"))[left], headers(key.lines("bob"))[left]) == ("4", "5")
    for _ in range(2):
        key.begin("bob").end()
    assert (headers(key.lines("bob"))[left], headers(key.lines("eve"))[left]) == ("3", "3")


def test_long_name_is_kept_as_a_digest() -> None:
    key = account(Clocks(), per_person=PER_PERSON)
    for _ in range(2):
        ran(key, 1, person="x" * 60_000)
    with pytest.raises(RateLimited):
        key.begin("x" * 60_000)
    assert [len(name) for name in key.persons] == [64]


def test_headers_show_the_person_if_less_is_left_there() -> None:
    key = account(Clocks(), per_person=PER_PERSON, requests_per_minute=100, tokens_per_minute=50)
    hold = key.begin("ada")
    hold.reserve("standard", 0, 10)
    shown = headers(hold.lines)
    assert (shown["x-ratelimit-limit-requests"], shown["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert (shown["x-ratelimit-limit-tokens"], shown["x-ratelimit-remaining-tokens"]) == ("50", "40")
    hold.end()
    assert headers(key.lines("ada"))["x-ratelimit-remaining-requests"] == "1"


# Changes


def test_changed_limits_apply_to_what_is_already_used() -> None:
    key = account(Clocks(), requests_per_minute=10, per_person=PER_PERSON)
    for _ in range(2):
        ran(key, 1, person="ada")
    key.change(policy(requests_per_minute=2, per_person=Limits(requests_per_minute=50)))
    with pytest.raises(RateLimited):
        key.begin("ada")
    key.change(policy(requests_per_minute=3, per_person=Limits(requests_per_minute=50)))
    ran(key, 1, person="ada")
    key.change(policy())
    assert key.persons == {}
    assert key.lines() == b""


def test_limits_of_persons_are_changed_only_if_they_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reread that changed another limit of a key with 10,000 persons was one step of 30 ms."""
    clocks = Clocks()
    key = account(clocks, per_person=Limits(requests_per_minute=5))
    for number in range(20):
        key.begin(f"person-{number}").end()
    changed: list[Allowance] = []
    change = Allowance.change

    def noting(allowance: Allowance, limits: Limits) -> None:
        changed.append(allowance)
        change(allowance, limits)

    monkeypatch.setattr(Allowance, "change", noting)
    key.change(policy(per_person=Limits(requests_per_minute=5), concurrency=3))
    assert changed == [key.allowance]
    key.change(policy(per_person=Limits(requests_per_minute=7)))
    assert {allowance.limits.requests_per_minute for allowance in key.persons.values()} == {7}
