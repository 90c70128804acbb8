"""The write timeout: it expires for a client that takes no byte, and only then."""

import pytest

from gateway.downstream.write_timeout import NEVER, WriteTimeout


def test_no_check_is_due_while_nothing_waits() -> None:
    timeout = WriteTimeout(60)
    timeout.watch(0, 100.0)
    assert timeout.deadline == NEVER


def test_client_that_takes_nothing_times_out_within_a_quarter_more() -> None:
    timeout = WriteTimeout(60)
    timeout.watch(1000, 100.0)
    checks = []
    while not timeout.has_expired(1000, now := timeout.deadline):
        checks.append(now)
    assert checks == [115.0, 130.0, 145.0]
    assert now == 160.0
    assert timeout.deadline == NEVER


def test_timeout_starts_again_when_the_client_takes_one_byte() -> None:
    timeout = WriteTimeout(60)
    timeout.watch(1000, 100.0)
    assert not timeout.has_expired(1000, 145.0)
    assert not timeout.has_expired(999, 159.0)
    assert not timeout.has_expired(999, 218.0)
    assert timeout.has_expired(999, 219.0)


def test_progress_is_noticed_although_more_was_written() -> None:
    timeout = WriteTimeout(60)
    timeout.watch(1000, 100.0)
    timeout.add(500)
    assert not timeout.has_expired(1400, 170.0), "100 bytes were taken"


@pytest.mark.parametrize("end", ["all bytes taken", "few bytes unsent"])
def test_checks_end_when_nothing_waits_any_more(end: str) -> None:
    timeout = WriteTimeout(60)
    timeout.watch(1000, 100.0)
    if end == "all bytes taken":
        assert not timeout.has_expired(0, 500.0)
    else:
        timeout.clear()
    assert timeout.deadline == NEVER
    timeout.watch(10, 600.0)
    assert not timeout.has_expired(10, 615.0), "the timeout starts again"


def test_watching_again_does_not_restart_the_timeout() -> None:
    timeout = WriteTimeout(60)
    timeout.watch(1000, 100.0)
    timeout.watch(1000, 114.0)
    assert timeout.deadline == 115.0
