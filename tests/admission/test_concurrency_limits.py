"""What an Ollama does at once, learned from what is seen."""

import pytest

from gateway.admission.concurrency_limits import ENOUGH, TRY_AGAIN_SECONDS, AdaptiveLimit, ConcurrencyLimit, LoadSample


def let_in(bound: AdaptiveLimit) -> LoadSample:
    bound.count += 1
    return bound.began()


def out(bound: AdaptiveLimit, part: LoadSample, now: float = 0.0) -> bool:
    bound.count -= 1
    return bound.ended(part, now)


def test_bound_is_full_at_its_limit() -> None:
    bound = ConcurrencyLimit(1)
    assert not bound.is_full
    bound.count = 1
    assert bound.is_full
    assert repr(bound) == "<ConcurrencyLimit 1/1>"


def test_only_one_is_on_trial_and_only_when_the_limit_is_reached() -> None:
    bound = AdaptiveLimit(1)
    assert not bound.may_try(0)
    let_in(bound)
    assert bound.may_try(0)
    let_in(bound)
    assert not bound.may_try(0)


def test_limit_is_raised_when_more_speak_at_once_for_a_while() -> None:
    bound = AdaptiveLimit(1)
    first, trial = let_in(bound), let_in(bound)
    assert not bound.first_token(first)
    assert bound.first_token(trial)
    assert bound.limit == 1
    assert bound.confirm()
    assert bound.limit == 2
    assert bound.may_try(0)


def test_end_that_was_seen_late_proves_nothing() -> None:
    """The first piece of the one and the end of the other were there together, and were looked at in the wrong order."""
    bound = AdaptiveLimit(1)
    first, trial = let_in(bound), let_in(bound)
    bound.first_token(first)
    assert bound.first_token(trial)
    out(bound, first)
    assert not bound.confirm()
    assert bound.limit == 1


def test_one_that_speaks_while_the_other_has_not_begun_proves_nothing() -> None:
    """After a load an Ollama may take them in another order."""
    bound = AdaptiveLimit(1)
    let_in(bound)
    assert not bound.first_token(let_in(bound))


def test_failed_trial_is_made_again_after_a_minute() -> None:
    bound = AdaptiveLimit(1)
    first, trial = let_in(bound), let_in(bound)
    bound.first_token(first)
    assert not out(bound, first, 100.0)
    bound.first_token(trial)
    assert bound.limit == 1
    assert not bound.may_try(100.0 + TRY_AGAIN_SECONDS - 1)
    assert bound.may_try(100.0 + TRY_AGAIN_SECONDS)


@pytest.mark.parametrize("really", [1, 2])
def test_limit_that_is_too_high_is_lowered_to_what_is_seen(really: int) -> None:
    bound = AdaptiveLimit(4)
    parts = [let_in(bound) for _ in range(4)]
    for part in parts[:really]:
        bound.first_token(part)
    changes = 0
    while not out(bound, parts.pop(0)):  # one ends, the next in the server's own line speaks, another comes
        bound.first_token(parts[really - 1])
        parts.append(let_in(bound))
        changes += 1
    assert bound.limit == really
    assert ENOUGH <= changes <= ENOUGH + 4


def test_limit_that_is_reached_is_kept() -> None:
    bound = AdaptiveLimit(3)
    for _ in range(3 * ENOUGH):
        parts = [let_in(bound) for _ in range(3)]
        for part in parts:
            assert not bound.first_token(part)
        assert not any(out(bound, part) for part in parts)
    assert bound.limit == 3


def test_held_limit_learns_nothing() -> None:
    bound = AdaptiveLimit(1, is_held=True)
    parts = [let_in(bound)]
    assert not bound.may_try(0)
    parts.append(let_in(bound))
    for part in parts:
        bound.first_token(part)
    assert not bound.confirm()
