"""Signs of life of a model, and how long it may be silent."""

from math import inf

import pytest

from gateway.admission.model_activity import LEAST_PATIENCE, SAMPLES, SLOWNESS, ModelActivity


def test_nothing_is_to_be_expected_of_a_lane_without_recent_requests() -> None:
    activity = ModelActivity()
    activity.first_token("text", 1.0, 100, now=5.0)
    assert activity.patience("vision", 100) == inf
    assert activity.patience("text", 100) < inf


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        (0.1, 100, LEAST_PATIENCE),
        (20.0, 100, SLOWNESS * 20.0),
        (20.0, 10, SLOWNESS * 20.0),
        (20.0, 1000, SLOWNESS * 200.0),
    ],
    ids=["fast", "as long", "shorter", "ten times as long"],
)
def test_patience_grows_with_the_slowest_request_and_the_length_of_the_prompt(
    seconds: float, size: int, expected: float
) -> None:
    activity = ModelActivity()
    activity.first_token("text", 0.01, 100, now=0.0)
    activity.first_token("text", seconds, 100, now=0.0)
    activity.first_token("text", 0.01, 100, now=0.0)
    assert activity.patience("text", size) == pytest.approx(expected)


def test_only_recent_requests_count() -> None:
    activity = ModelActivity()
    activity.first_token("text", 1000.0, 100, now=0.0)
    for _ in range(SAMPLES):
        activity.first_token("text", 0.1, 100, now=0.0)
    assert activity.patience("text", 100) == LEAST_PATIENCE


def test_sign_of_life_allows_another_unload_and_time_does_not_run_backwards() -> None:
    activity = ModelActivity()
    activity.was_unloaded = True
    activity.hear(7.0)
    activity.hear(3.0)
    assert (activity.last_heard, activity.was_unloaded) == (7.0, False)


def test_request_without_a_size_is_no_division_by_zero() -> None:
    activity = ModelActivity()
    activity.first_token("text", 1.0, 0, now=0.0)
    assert activity.patience("text", 0) == LEAST_PATIENCE
