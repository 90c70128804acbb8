"""Windows of a minute: nothing gets past a limit, whatever the times of the requests."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.keys.windows import SECONDS, SlidingWindow


def test_limit_holds_from_the_first_request_and_is_free_again_after_a_minute() -> None:
    window = SlidingWindow(2)
    assert window.take(1, 100) is not None
    assert window.take(1, 130) is not None
    assert window.take(1, 160) is None
    assert window.seconds_until_fits(1, 160) == 1
    assert window.take(1, 161) is not None  # the first second has been over for 60 seconds
    assert (window.take(1, 161), window.used, window.remaining()) == (None, 2, 0)


def test_amount_over_the_limit_fits_into_an_empty_window_alone() -> None:
    window = SlidingWindow(100)
    assert window.take(500, 10) is not None
    assert window.take(1, 10) is None
    assert window.seconds_until_fits(1, 10) == SECONDS + 1
    assert window.take(1, 10 + SECONDS + 1) is not None


def test_what_is_taken_back_is_free_at_once_unless_it_is_too_old_to_count() -> None:
    window = SlidingWindow(10)
    slot = window.take(10, 5)
    assert slot is not None
    window.take_back(4, slot, 5)
    assert window.used == 6
    window.advance(5 + SECONDS + 1)
    assert window.used == 0
    window.take_back(6, slot, 5 + SECONDS + 1)
    assert window.used == 0


def test_reset_is_the_age_of_the_newest_count() -> None:
    window = SlidingWindow(10)
    assert window.seconds_until_empty(5) == 0
    window.add(1, 5)
    slot = window.add(1, 25)
    assert window.seconds_until_empty(30) == 56
    window.take_back(1, slot, 30)
    assert window.seconds_until_empty(30) == 36


@given(
    limit=st.integers(1, 50),
    hits=st.lists(st.tuples(st.floats(0, 400), st.integers(1, 12)), min_size=1, max_size=150),
)
def test_no_minute_has_more_than_the_limit(limit: int, hits: list[tuple[float, int]]) -> None:
    """The most that got through in any 60 seconds, by the exact times of the requests."""
    window, through = SlidingWindow(limit), []
    for at, amount in sorted(hits):
        amount = min(amount, limit)
        if window.take(amount, int(at)) is not None:
            through.append((at, amount))
        assert window.used <= limit
    for start, _ in through:
        assert sum(amount for at, amount in through if start <= at <= start + SECONDS) <= limit


@given(hits=st.lists(st.floats(0, 300), min_size=1, max_size=100), limit=st.integers(1, 20))
def test_promised_time_admits_and_no_earlier_second_does(hits: list[float], limit: int) -> None:
    window = SlidingWindow(limit)
    for at in sorted(hits):
        window.take(1, int(at))
    now = int(max(hits))
    wait = window.seconds_until_fits(1, now)
    if wait > 1:
        assert window.seconds_until_fits(1, now + wait - 1) == 1
    assert window.take(1, now + wait) is not None
