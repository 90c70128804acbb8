"""The short ways of an answer give the bytes of the long ones."""

import asyncio
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from gateway.downstream.cycle import RequestResponseCycle


class FakeDoor:
    def __init__(self) -> None:
        self.sent = b""
        self.events: list[str] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def resume_body(self) -> None:
        self.events.append("resume_body")

    def add_unsent(self, size: int) -> None:
        self.events.append("add_unsent")

    def answered(self) -> None:
        self.events.append("answered")

    def close_after_flush(self) -> None:
        self.events.append("give_up")


def begun(
    is_head: bool, http11: bool, keep_alive: bool, body: bytes | None, *, whole: bool
) -> tuple[FakeDoor, RequestResponseCycle]:
    """A cycle whose request's body came with its head, or in a call of its own."""
    door = FakeDoor()
    fields = {b"host": b"gateway"}
    cycle = RequestResponseCycle(
        door, cast("asyncio.Transport", door), fields, {}, is_head, http11, keep_alive, False, body if whole else None
    )
    if body is not None and not whole:
        cycle.add_body(body)
        cycle.end_body()
    return door, cycle


def state(door: FakeDoor, cycle: RequestResponseCycle) -> tuple[Any, ...]:
    return (
        door.sent,
        door.events,
        cycle.started,
        cycle.complete,
        cycle.keep_alive,
        cycle.gone,
        cycle.more_body,
        cycle.unread,
        cycle.body_bytes,
    )


@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.binary(max_size=20),
    st.binary(max_size=300),
    st.sampled_from([200, 404, 503]),
)
def test_whole_answer_in_one_call_is_that_in_two(
    is_head: bool, http11: bool, keep_alive: bool, asked: bytes | None, body: bytes, status: int
) -> None:
    door, cycle = begun(is_head, http11, keep_alive and http11, asked, whole=True)
    assert cycle.whole_body() == asked
    cycle.answer(status, b"x-a: b\r\n", body)

    other_door, other = begun(is_head, http11, keep_alive and http11, asked, whole=False)
    assert other.whole_body() == asked
    other.open(status, b"x-a: b\r\n")
    asyncio.run(other.send({"type": "http.response.body", "body": body}))
    assert state(door, cycle) == state(other_door, other)
    assert door.sent
