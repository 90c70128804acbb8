"""Silence on one connection: when it begins, and when nobody can tell. `test_lost_requests.py` has real servers."""

import asyncio

import pytest

from gateway.upstream.connection import Connection
from gateway.upstream.silence import Silence
from tests.upstream.test_connection import CHUNKED, FakePool, run_loop

pytestmark = pytest.mark.both_loops


async def asked(pool: FakePool, answer: bytes = b"") -> tuple[Connection, Silence, asyncio.Task[Connection]]:
    """Send a request, receive a part of its answer, and look at the connection at the time 0."""
    task = asyncio.create_task(pool.ask())
    await run_loop()
    if answer:
        pool.feed(answer)
        await run_loop()
    connection = pool.transport.connection
    assert connection is not None
    silence = Silence(connection)
    silence.take_sign_of_life(0)
    return connection, silence, task


async def end(pool: FakePool, task: asyncio.Task[Connection]) -> None:
    task.cancel()
    pool.close()
    await asyncio.wait([task])
    await run_loop()


async def test_silence_begins_with_the_first_look_that_finds_no_sign_of_life() -> None:
    pool = FakePool()
    _, silence, task = await asked(pool)
    assert [silence.take_sign_of_life(now) for now in (1, 2)] == [False, False]
    assert silence.has_lasted_since(0, has_begun=False)
    pool.feed(b"HTTP/1.1 200")
    assert silence.take_sign_of_life(3)
    assert not silence.has_lasted_since(3, has_begun=False)
    assert not silence.take_sign_of_life(4)
    assert (silence.has_lasted_since(3, has_begun=False), silence.has_lasted_since(4, has_begun=False)) == (False, True)
    await end(pool, task)


async def test_server_that_takes_more_of_the_request_is_alive() -> None:
    pool = FakePool()
    _, silence, task = await asked(pool)
    pool.transport.unsent = 10
    assert not silence.take_sign_of_life(1)
    pool.transport.unsent = 9
    assert silence.take_sign_of_life(2)
    assert not silence.take_sign_of_life(3)
    await end(pool, task)


async def test_idle_connection_is_not_silent() -> None:
    pool = FakePool()
    connection = await pool.connect()
    silence = Silence(connection)
    assert not silence.take_sign_of_life(1)
    assert not silence.has_lasted_since(2, has_begun=False)
    pool.close()
    await run_loop()


async def test_nobody_can_tell_while_the_caller_has_paused_the_connection() -> None:
    pool = FakePool()
    connection, silence, task = await asked(pool, CHUNKED + b"5\r\nhello\r\n")
    assert not silence.take_sign_of_life(1)
    connection.pause()
    assert not silence.has_lasted_since(1, has_begun=False)
    assert not silence.take_sign_of_life(2)
    connection.resume()
    assert not silence.has_lasted_since(2, has_begun=False), "it begins anew"
    assert not silence.take_sign_of_life(3)
    assert silence.has_lasted_since(3, has_begun=False)
    await end(pool, task)


@pytest.mark.parametrize(
    ("answer", "has_begun"),
    [(b"", False), (CHUNKED, False), (CHUNKED + b"5\r\nhel", True)],
    ids=["nothing", "head", "body"],
)
async def test_answer_has_begun_with_the_first_part_of_its_body(answer: bytes, has_begun: bool) -> None:
    pool = FakePool()
    _, silence, task = await asked(pool, answer)
    assert not silence.take_sign_of_life(1)
    assert silence.has_lasted_since(1, has_begun=True) is has_begun
    assert silence.has_lasted_since(1, has_begun=False)
    await end(pool, task)


async def test_closed_connection_is_not_silent() -> None:
    pool = FakePool()
    connection, silence, task = await asked(pool)
    connection.abort()
    assert not silence.has_lasted_since(1, has_begun=False)
    await end(pool, task)
