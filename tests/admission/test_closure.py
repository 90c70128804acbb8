"""A closed backend: the time for which it admits nothing."""

from gateway.admission.closure import Closure


def test_the_times_of_all_closures_add_up() -> None:
    closure = Closure()
    closure.close(10.0)
    assert (closure.is_closed, closure.seconds(14.0)) == (True, 4.0)
    closure.close(15.0, 3.0)  # goes on
    closure.open(16.0)
    closure.open(20.0)
    assert (closure.is_closed, closure.seconds(30.0)) == (False, 6.0)
    closure.close(30.0)
    assert closure.seconds(31.0) == 7.0


def test_the_time_left_is_what_was_expected() -> None:
    closure = Closure()
    assert closure.seconds_left(0.0) == 0.0
    closure.close(0.0)
    assert closure.seconds_left(1.0) is None
    closure.close(1.0, 5.0)
    assert [closure.seconds_left(now) for now in (1.0, 4.0, 9.0)] == [5.0, 2.0, 0.0]
    closure.open(9.0)
    assert closure.seconds_left(9.0) == 0.0
