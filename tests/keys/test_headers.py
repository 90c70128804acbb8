"""Header lines about limits, in OpenAI's formats."""

import re
from itertools import combinations

import pytest

from gateway.keys.headers import duration, utc_date, utc_midnight
from gateway.keys.policy import Limits
from tests.keys.fakes import NOON, Clocks, account, headers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, b"0s"), (1, b"1s"), (59, b"59s"), (60, b"1m0s"), (360, b"6m0s"), (3600, b"1h0m0s"), (86_399, b"23h59m59s")],
)
def test_times_are_written_as_openai_does(seconds: int, text: bytes) -> None:
    assert duration(seconds) == text


def test_midnight_is_that_of_the_next_day_in_utc() -> None:
    assert utc_midnight(NOON - NOON % 86_400) == utc_midnight(NOON) == utc_midnight(NOON + 43_199)
    assert utc_midnight(NOON)[:10] == utc_date(NOON + 43_200)


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({}, set()),
        ({"concurrency": 1}, set()),
        ({"requests_per_minute": 5}, {"requests"}),
        ({"tokens_per_minute": 5000}, {"tokens"}),
        ({"tokens_per_day": 5000}, {"tokens"}),
        ({"requests_per_minute": 5, "tokens_per_day": 5000}, {"requests", "tokens"}),
        ({"requests_per_minute": 5, "tokens_per_minute": 50, "tokens_per_day": 5000}, {"requests", "tokens"}),
    ],
)
def test_answers_have_the_headers_of_the_limits_that_a_key_has(limits: dict[str, int], names: set[str]) -> None:
    key = account(Clocks(), **limits)
    hold = key.begin()
    hold.reserve("standard", 0, 10)
    for lines in (hold.lines, key.lines()):
        assert {name.removeprefix("x-ratelimit-limit-") for name in headers(lines) if "-limit-" in name[11:]} == names
        assert len(headers(lines)) == 3 * len(names)
        resets = [value for name, value in headers(lines).items() if "reset" in name]
        assert all(re.fullmatch(r"(\d+h)?(\d+m)?\d+s", reset) for reset in resets)


LIMITS = {"requests_per_minute": 7, "tokens_per_minute": 900, "tokens_per_day": 120}
COMBINATIONS = [dict(some) for count in (1, 2, 3) for some in combinations(LIMITS.items(), count)]


@pytest.mark.parametrize("of_person", [None, *COMBINATIONS])
@pytest.mark.parametrize("of_key", COMBINATIONS)
def test_fast_and_slow_rendering_say_the_same(of_key: dict[str, int], of_person: dict[str, int] | None) -> None:
    """The lines of an answer are rendered from what is known; those of an error are looked up in full."""
    clocks = Clocks()
    per_person = None if of_person is None else Limits(**{name: limit - 1 for name, limit in of_person.items()})
    key = account(clocks, per_person=per_person, **of_key)
    warnings = []
    for tokens in (0, 33, 33, 33, 40):
        hold = key.begin("ada")
        hold.reserve("standard", 0, tokens)
        assert hold.lines == key.lines("ada")
        warnings.append(b"x-gateway-budget-warning" in hold.lines)
        clocks.passed += 0.1
    has_budget = "tokens_per_day" in of_key or (of_person is not None and "tokens_per_day" in of_person)
    assert warnings == [False, False, False, has_budget, has_budget]
