"""Header lines about limits, in OpenAI's formats."""

import re

import pytest

from gateway.keys.headers import duration, utc_date, utc_midnight
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


def test_fast_and_slow_rendering_say_the_same() -> None:
    """The lines of an answer have a template; those of an error are rendered in full."""
    key = account(Clocks(), requests_per_minute=7, tokens_per_minute=900, tokens_per_day=100)
    for _ in range(3):
        hold = key.begin()
        hold.reserve("standard", 0, 33)
        assert hold.lines == key.lines()
    assert "x-gateway-budget-warning" in headers(hold.lines)
