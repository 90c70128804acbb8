"""The body timeout: it expires for a body that is too slow, counted without the pauses of the server."""

import pytest

from gateway.downstream.body_timeout import BodyTimeout

KIB = 1024


def begun(received: int = 0) -> BodyTimeout:
    timeout = BodyTimeout(30, 5)
    assert timeout.begin(received, 100.0) == 5
    return timeout


def test_first_check_is_no_later_than_the_end() -> None:
    assert BodyTimeout(2, 5).begin(0, 100.0) == 2


def test_body_that_does_not_grow_times_out_after_its_seconds() -> None:
    timeout, checks, now = begun(10), [], 105.0
    while (check := timeout.next_check(10, False, now)) is not None:
        checks.append(now)
        now = check
    assert checks == [105.0, 110.0, 115.0, 120.0, 125.0, 130.0]  # the last check is at the end, a moment later
    assert now == pytest.approx(130.0, abs=0.001)


def test_every_64_kib_bring_another_second() -> None:
    timeout = begun()
    assert timeout.next_check(10 * 64 * KIB, False, 139.0) == 140.0
    assert timeout.next_check(10 * 64 * KIB, False, 140.0) is None


def test_time_in_which_the_server_does_not_read_does_not_count() -> None:
    timeout = begun()
    timeout.extend(50.0)
    assert timeout.next_check(0, False, 179.0) == 180.0
    assert timeout.next_check(0, False, 180.0) is None


def test_next_body_has_its_own_time() -> None:
    timeout = begun()
    assert timeout.next_check(0, False, 129.0) == 130.0
    timeout.begin(0, 200.0)
    assert timeout.next_check(0, False, 225.0) == 230.0


def test_body_that_hardly_grows_while_memory_is_tight_times_out_at_the_next_check() -> None:
    timeout = begun(1000)
    fast, slow = 5 * 16 * KIB, 5 * 16 * KIB - 1
    assert timeout.next_check(1000 + fast, True, 105.0) == 110.0
    assert timeout.next_check(1000 + fast + slow, True, 110.0) is None


def test_progress_counts_from_the_last_check_even_if_memory_was_not_tight_then() -> None:
    timeout = begun()
    assert timeout.next_check(5 * 16 * KIB, False, 105.0) == 110.0
    assert timeout.next_check(5 * 16 * KIB, True, 110.0) is None
