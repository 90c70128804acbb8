"""A client that takes nothing is found out; one that takes a little is not."""

import pytest

from gateway.downstream.write_timeout import NEVER, WriteTimeout


def test_nothing_that_waits_needs_no_look() -> None:
    stall = WriteTimeout(60)
    stall.watch(0, 100.0)
    assert stall.deadline == NEVER


def test_client_that_takes_nothing_is_given_up_within_a_quarter_more() -> None:
    stall = WriteTimeout(60)
    stall.watch(1000, 100.0)
    looks = []
    while not stall.has_expired(1000, now := stall.deadline):
        looks.append(now)
    assert looks == [115.0, 130.0, 145.0]
    assert now == 160.0
    assert stall.deadline == NEVER


def test_client_that_takes_one_byte_gets_the_whole_time_again() -> None:
    stall = WriteTimeout(60)
    stall.watch(1000, 100.0)
    assert not stall.has_expired(1000, 145.0)
    assert not stall.has_expired(999, 159.0)
    assert not stall.has_expired(999, 218.0)
    assert stall.has_expired(999, 219.0)


def test_what_is_written_meanwhile_hides_nothing_that_was_taken() -> None:
    stall = WriteTimeout(60)
    stall.watch(1000, 100.0)
    stall.add(500)
    assert not stall.has_expired(1400, 170.0), "100 bytes were taken"


@pytest.mark.parametrize("end", ["all was taken", "little enough waits"])
def test_end_of_the_wait_ends_the_looks(end: str) -> None:
    stall = WriteTimeout(60)
    stall.watch(1000, 100.0)
    if end == "all was taken":
        assert not stall.has_expired(0, 500.0)
    else:
        stall.clear()
    assert stall.deadline == NEVER
    stall.watch(10, 600.0)
    assert not stall.has_expired(10, 615.0), "it begins anew"


def test_wait_that_is_watched_already_does_not_begin_anew() -> None:
    stall = WriteTimeout(60)
    stall.watch(1000, 100.0)
    stall.watch(1000, 114.0)
    assert stall.deadline == 115.0
