"""Samples and rules of the guard: what an exchange says about its side, and what is bad."""

from collections import deque
from typing import Any

import pytest

from gateway.chat.answer import Usage
from gateway.rollout.guard_rules import Sample, ShareRule, TimeRule, Trial, p95, sample_of
from tests.fakes.exchanges import exchange, failed


def took(seconds: float | None, arrived: float = 100.0, **more: Any) -> Sample:
    return Sample(arrived, False, False, False, seconds, None, **more)


def rule(bound: float | None = 1.0) -> TimeRule:
    found = TimeRule("time_to_first_token", 1.5, 50.0, 20)
    found.bound = bound
    return found


def test_good_answer_has_both_times() -> None:
    assert sample_of(exchange(), 7.0) == Sample(7.0, False, False, False, 0.25, 0.01)
    assert sample_of(exchange(empty=True), 7.0) == Sample(7.0, False, False, True, 0.25, 0.01)


def test_plain_and_short_answers_have_no_comparable_times() -> None:
    """A plain answer from vLLM has no first token, one from Ollama has."""
    assert sample_of(exchange(stream=False), 7.0) == Sample(7.0, False, False, False, None, None)
    assert sample_of(exchange(usage=Usage(10, 3)), 7.0) == Sample(7.0, False, False, False, 0.25, None)
    assert sample_of(exchange(usage=None), 7.0) == Sample(7.0, False, False, False, 0.25, None)


def test_migrated_request_says_nothing_about_its_time_to_first_token() -> None:
    """That time includes the wait in the queue of the side that was left."""
    assert sample_of(exchange(moved=True), 7.0) == Sample(7.0, False, False, False, None, 0.01)
    assert sample_of(failed(moved=True), 7.0) == Sample(7.0, True, False, None, None, None)
    assert sample_of(exchange(moved=True, outcome="cancelled", status=499), 7.0) is None


@pytest.mark.parametrize(
    ("changes", "truncated"),
    [
        ({}, False),
        ({"outcome": "timeout", "code": "upstream_timeout", "reason": None}, False),
        ({"outcome": "rejected", "code": "backend_unavailable", "reason": None, "phase": "queued"}, False),
        ({"outcome": "client_error", "code": "model_not_found", "reason": None}, False),
        ({"reason": "truncated", "phase": "streaming"}, True),
        ({"outcome": "timeout", "code": "upstream_timeout", "reason": None, "phase": "streaming"}, True),
    ],
    ids=["5xx", "timeout", "unavailable", "model-missing", "truncated", "timeout-in-the-stream"],
)
def test_failure_of_the_backend_is_an_error_sample(changes: dict[str, Any], truncated: bool) -> None:
    assert sample_of(failed(**changes), 7.0) == Sample(7.0, True, truncated, None, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "client_error", "code": "invalid_value"},
        {"outcome": "client_error", "code": "context_length_exceeded"},
        {"outcome": "rejected", "code": "queue_full"},
        {"outcome": "rejected", "code": "queue_timeout"},
        {"outcome": "rejected", "code": "shutting_down"},
        {"outcome": "cancelled", "code": None, "stream": False},
    ],
    ids=["invalid", "too-long", "queue-full", "queue-timeout", "shutdown", "client-left"],
)
def test_failure_without_the_backends_fault_is_not_a_sample(changes: dict[str, Any]) -> None:
    assert sample_of(failed(**changes), 7.0) is None


def test_request_served_by_a_fallback_is_a_failure_of_the_chosen_side() -> None:
    assert sample_of(exchange("ollama", chosen="vllm"), 7.0) == Sample(7.0, True, False, None, None, None)


def test_client_that_left_is_not_a_failure_but_may_have_waited_too_long() -> None:
    left = sample_of(failed(outcome="cancelled", code=None, duration=3.0), 7.0)
    assert left == Sample(7.0, None, None, None, 3.0, None, has_left=True)
    assert ShareRule("errors", 0.01).judge(left) is None
    assert rule().judge(took(3.0, has_left=True)) is True
    assert rule().judge(took(1.2, has_left=True)) is None
    assert p95([took(3.0, has_left=True), took(1.0)], "time_to_first_token") == 1.0
    in_the_middle = sample_of(exchange(outcome="cancelled", usage=None), 7.0)
    assert in_the_middle == Sample(7.0, None, None, None, 0.25, None)


def test_time_counts_above_the_other_sides_p95_and_under_test_above_the_ratio() -> None:
    found = rule(1.0)
    assert found.count([took(0.9), took(1.1), took(None), took(0.5, has_left=True)]) == (2, 1)
    assert [found.judge(took(seconds)) for seconds in (1.1, 1.4, 1.6)] == [False, False, True]
    assert found.judge(took(None)) is None


def test_few_milliseconds_never_count() -> None:
    assert [rule(0.01).judge(took(seconds)) for seconds in (0.02, 0.055, 0.07)] == [False, False, True]


def test_times_within_the_grace_do_not_count() -> None:
    assert rule().judge(took(9.0, arrived=49.0)) is None


def test_bound_follows_the_other_side() -> None:
    found, past = rule(None), deque([took(1.0)] * 10)
    found.learn_from(past)
    assert found.bound is None
    past.extend([took(1.0)] * 30)
    for _ in range(20):
        assert found.count([took(9.0)]) == (0, 0)
        assert found.judge(took(9.0)) is None
    assert found.bound == 1.0
    past.extend([took(2.0)] * 100)
    for _ in range(200):
        found.count([took(2.0)])
        found.judge(took(2.0))
    assert found.bound == 2.0


def test_each_sample_from_before_a_switch_is_used_once() -> None:
    trial = Trial(ShareRule("errors", 0.0), deque([False] * 2000))
    for _ in range(999):
        trial.take(took(1.0), [])
    assert not trial.is_over
    for _ in range(50):
        trial.take(took(1.0), [])
    assert trial.is_over
    assert (trial.test.tested.count, trial.test.other.count) == (1000, 2000)
