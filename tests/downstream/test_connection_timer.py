"""The timer of a connection: no deadline is missed, and a deadline that is put off costs nothing."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.downstream.connection_timer import ConnectionTimer
from gateway.downstream.write_timeout import NEVER, WriteTimeout
from tests.downstream.virtual_connection import Transport, VirtualLoop


class CountingLoop(VirtualLoop):
    """`VirtualLoop` that counts the timers which are set."""

    timers = 0

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        self.timers += 1
        return super().call_at(when, callback, *args, context=context)


class FakeConnection:
    """Records the seconds after which its deadlines came, and then sets those of `next_deadlines`."""

    def __init__(self, loop: CountingLoop) -> None:
        self.loop = loop
        self.transport = Transport()
        self.timer = ConnectionTimer(loop, WriteTimeout(8), self)
        self.begun = loop.time()
        self.next_deadlines: list[float] = []
        self.reached: list[float] = []

    def on_deadline(self, now: float) -> None:
        assert self.timer.deadline == NEVER
        self.reached.append(now - self.begun)
        if self.next_deadlines:
            self.timer.arm(self.next_deadlines.pop(0))


@pytest.fixture
def connection() -> Iterator[FakeConnection]:
    loop = CountingLoop()
    connection = FakeConnection(loop)
    yield connection
    connection.timer.stop()
    loop.close()


def test_deadline_is_reached_once(connection: FakeConnection) -> None:
    connection.timer.arm(10)
    connection.loop.advance(9)
    assert connection.reached == []
    connection.loop.advance(50)
    assert connection.reached == [10.0]
    assert not connection.loop.has_timer


def test_deadline_may_set_the_next_one(connection: FakeConnection) -> None:
    connection.next_deadlines = [5, 7]
    connection.timer.arm(10)
    connection.loop.advance(60)
    assert connection.reached == [10.0, 15.0, 22.0]


def test_deadline_that_is_put_off_again_and_again_sets_few_timers(connection: FakeConnection) -> None:
    for _ in range(100):
        connection.timer.arm(20)
        connection.loop.advance(1)
    assert connection.loop.timers <= 1 + 100 // 19
    connection.loop.advance(50)
    assert connection.reached == [119.0]


def test_earlier_deadline_replaces_a_later_one(connection: FakeConnection) -> None:
    connection.timer.arm(50)
    connection.timer.arm(5)
    connection.loop.advance(100)
    assert connection.reached == [5.0]


def test_deadline_that_is_taken_back_is_not_reached(connection: FakeConnection) -> None:
    connection.timer.arm(5)
    connection.timer.deadline = NEVER
    connection.loop.advance(10)
    assert connection.reached == []
    assert not connection.loop.has_timer


def test_client_that_takes_no_byte_is_cut_off_long_before_the_deadline(connection: FakeConnection) -> None:
    connection.timer.arm(100)
    connection.transport.unsent = 10
    connection.timer.watch_unsent()
    connection.loop.advance(7)
    assert not connection.transport.is_aborted
    connection.loop.advance(1)
    assert connection.transport.is_aborted
    assert connection.reached == []


def test_deadline_is_reached_while_unsent_bytes_are_watched(connection: FakeConnection) -> None:
    connection.transport.unsent = 10
    connection.timer.watch_unsent()
    connection.timer.arm(3)
    connection.loop.advance(5)
    assert connection.reached == [3.0]
    connection.loop.advance(3)
    assert connection.transport.is_aborted


def test_deadline_before_the_next_check_of_unsent_bytes_is_reached_in_time(connection: FakeConnection) -> None:
    connection.timer.arm(1)
    connection.transport.unsent = 10
    connection.timer.watch_unsent()
    connection.loop.advance(1)
    assert connection.reached == [1.0]


def test_timer_is_not_set_again_once_there_is_no_deadline_and_nothing_unsent(connection: FakeConnection) -> None:
    connection.timer.arm(1)
    connection.transport.unsent = 10
    connection.timer.watch_unsent()
    connection.timer.deadline = NEVER
    connection.transport.unsent = 0
    connection.loop.advance(1)
    assert not connection.loop.has_timer


def test_watching_ends_when_the_client_has_taken_all(connection: FakeConnection) -> None:
    connection.transport.unsent = 10
    connection.timer.watch_unsent()
    connection.transport.unsent = 0
    connection.loop.advance(50)
    assert not connection.transport.is_aborted
    assert not connection.loop.has_timer


def test_stopped_timer_does_not_fire_and_lets_go_of_its_connection() -> None:
    """Connections are freed without a garbage collection."""
    loop = CountingLoop()
    connection = FakeConnection(loop)
    connection.timer.arm(5)
    connection.timer.stop()
    assert not loop.has_timer
    freed = weakref.ref(connection)
    gc.disable()
    try:
        loop.settle()  # the loop drops the timer that was cancelled
        del connection
        loop.advance(10)
        assert freed() is None
    finally:
        gc.enable()
        loop.close()
