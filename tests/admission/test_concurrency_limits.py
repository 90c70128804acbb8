"""Learning how many requests an Ollama runs in parallel."""

import pytest

from gateway.admission.concurrency_limits import (
    REQUESTS_BEFORE_LOWERING,
    TRY_AGAIN_SECONDS,
    AdaptiveLimit,
    ConcurrencyLimit,
    LoadSample,
)


def admit(adaptive: AdaptiveLimit) -> LoadSample:
    adaptive.count += 1
    return adaptive.began()


def finish(adaptive: AdaptiveLimit, sample: LoadSample, now: float = 0.0) -> bool:
    adaptive.count -= 1
    return adaptive.ended(sample, now)


def test_limit_is_full_when_its_count_reaches_it() -> None:
    limit = ConcurrencyLimit(1)
    assert not limit.is_full
    limit.count = 1
    assert limit.is_full
    assert repr(limit) == "<ConcurrencyLimit 1/1>"


def test_one_request_at_a_time_is_on_trial_and_only_at_the_limit() -> None:
    adaptive = AdaptiveLimit(1)
    assert not adaptive.may_try(0)
    admit(adaptive)
    assert adaptive.may_try(0)
    admit(adaptive)
    assert not adaptive.may_try(0)


def test_limit_is_raised_when_more_answers_stream_at_once_for_a_while() -> None:
    adaptive = AdaptiveLimit(1)
    first, trial = admit(adaptive), admit(adaptive)
    assert not adaptive.first_token(first)
    assert adaptive.first_token(trial)
    assert adaptive.limit == 1
    assert adaptive.confirm()
    assert adaptive.limit == 2
    assert adaptive.may_try(0)


def test_end_that_was_seen_late_proves_nothing() -> None:
    """An end and a first token arrived together and were processed in the wrong order."""
    adaptive = AdaptiveLimit(1)
    first, trial = admit(adaptive), admit(adaptive)
    adaptive.first_token(first)
    assert adaptive.first_token(trial)
    finish(adaptive, first)
    assert not adaptive.confirm()
    assert adaptive.limit == 1


def test_answer_that_streams_before_the_other_has_started_proves_nothing() -> None:
    """After a load, an Ollama may start requests in another order."""
    adaptive = AdaptiveLimit(1)
    admit(adaptive)
    assert not adaptive.first_token(admit(adaptive))


def test_failed_trial_is_repeated_after_a_minute() -> None:
    adaptive = AdaptiveLimit(1)
    first, trial = admit(adaptive), admit(adaptive)
    adaptive.first_token(first)
    assert not finish(adaptive, first, 100.0)
    adaptive.first_token(trial)
    assert adaptive.limit == 1
    assert not adaptive.may_try(100.0 + TRY_AGAIN_SECONDS - 1)
    assert adaptive.may_try(100.0 + TRY_AGAIN_SECONDS)


@pytest.mark.parametrize("parallel", [1, 2])
def test_limit_that_is_too_high_is_lowered_to_the_observed_parallelism(parallel: int) -> None:
    adaptive = AdaptiveLimit(4)
    samples = [admit(adaptive) for _ in range(4)]
    for sample in samples[:parallel]:
        adaptive.first_token(sample)
    changes = 0
    while not finish(
        adaptive, samples.pop(0)
    ):  # one ends, the next one in the server's own queue streams, and another arrives
        adaptive.first_token(samples[parallel - 1])
        samples.append(admit(adaptive))
        changes += 1
    assert adaptive.limit == parallel
    assert REQUESTS_BEFORE_LOWERING <= changes <= REQUESTS_BEFORE_LOWERING + 4


def test_limit_that_is_reached_stays() -> None:
    adaptive = AdaptiveLimit(3)
    for _ in range(3 * REQUESTS_BEFORE_LOWERING):
        samples = [admit(adaptive) for _ in range(3)]
        for sample in samples:
            assert not adaptive.first_token(sample)
        assert not any(finish(adaptive, sample) for sample in samples)
    assert adaptive.limit == 3


def test_fixed_limit_learns_nothing() -> None:
    adaptive = AdaptiveLimit(1, is_held=True)
    samples = [admit(adaptive)]
    assert not adaptive.may_try(0)
    samples.append(admit(adaptive))
    for sample in samples:
        adaptive.first_token(sample)
    assert not adaptive.confirm()


def test_fixed_limit_is_not_lowered_either() -> None:
    """The operator may know better, for example during a load of the machine by others."""
    adaptive = AdaptiveLimit(4, is_held=True)
    samples = [admit(adaptive) for _ in range(4)]
    adaptive.first_token(samples[0])
    for _ in range(3 * REQUESTS_BEFORE_LOWERING):  # one streams at a time
        assert not finish(adaptive, samples.pop(0))
        adaptive.first_token(samples[0])
        samples.append(admit(adaptive))
    assert adaptive.limit == 4
