"""The link to Redis, with a real redis-server that ends, hangs, forgets its scripts or cannot be reached."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import ResponseError

from gateway.replicas.link import (
    CALL_SECONDS,
    LinkDown,
    OperationFailed,
    RedisLink,
    _is_unusable,
    address_of,
    reason_of,
)
from tests.fakes.redis import RedisServer, redis_server, way_to
from tests.fakes.running_gateway import until

pytestmark = pytest.mark.both_loops

SECRET = "hunter2-not-for-logs"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@asynccontextmanager
async def linked(url: str) -> AsyncIterator[RedisLink]:
    """A link that has come up."""
    async with RedisLink(url) as link:
        await until(lambda: link.is_up)
        yield link


async def test_a_call_runs_an_operation_with_the_time_of_the_server(server: RedisServer) -> None:
    async with linked(server.url) as link:
        seconds, _ = server.client.time()
        assert abs(await link.call("check", ["check"]) - seconds * 1000) < 2000


async def test_a_script_that_the_server_has_forgotten_is_sent_again(server: RedisServer) -> None:
    async with linked(server.url) as link:
        server.client.script_flush()
        assert await link.call("check", ["check"]) > 0
        assert link.is_up


async def test_an_operation_that_fails_leaves_the_link_up(server: RedisServer) -> None:
    async with linked(server.url) as link:
        with pytest.raises(OperationFailed):
            await link.call("no such operation", [])
        assert await link.call("check", ["check"]) > 0


async def test_a_message_reaches_those_who_subscribed_to_its_channel(server: RedisServer) -> None:
    received: list[bytes] = []
    link = RedisLink(server.url)
    link.subscribe("news", received.append)
    async with link, linked(server.url) as other:
        await until(lambda: link.is_up)
        await other.publish("other", "not for me")
        await other.publish("news", "hello")
        await until(lambda: bool(received))
        assert received == [b"hello"]


async def test_a_call_fails_at_once_while_the_link_is_down(server: RedisServer) -> None:
    server.kill()
    async with RedisLink(server.url) as link:
        await until(lambda: bool(link.failure))
        for attempt in (link.call("check", ["check"]), link.publish("news", "hello")):
            with pytest.raises(LinkDown):
                await attempt


async def test_the_link_comes_back_with_a_server_that_was_killed(server: RedisServer) -> None:
    changes: list[str] = []
    link = RedisLink(server.url)
    link.watch(lambda: changes.append("up"), lambda: changes.append("down"))
    async with link:
        await until(lambda: link.is_up)
        server.kill()
        await until(lambda: not link.is_up)
        server.start()
        await until(lambda: link.is_up)
        assert await link.call("check", ["check"]) > 0
    assert changes == ["up", "down", "up"]


async def test_a_call_to_a_server_that_hangs_ends_and_the_link_recovers(server: RedisServer) -> None:
    async with linked(server.url) as link:
        server.pause()
        try:
            async with asyncio.timeout(CALL_SECONDS + 4):
                with pytest.raises(LinkDown):
                    await link.call("check", ["check"])
            assert not link.is_up
        finally:
            server.resume()
        await until(lambda: link.is_up)
        assert await link.call("check", ["check"]) > 0


async def test_an_idle_link_notices_that_the_server_cannot_be_reached(server: RedisServer) -> None:
    async with way_to(server) as way, linked(way.url) as link:
        way.cut()
        await until(lambda: not link.is_up, patience=10)
        way.heal()
        await until(lambda: link.is_up)


async def test_a_server_that_is_read_only_counts_as_down(server: RedisServer) -> None:
    async with linked(server.url) as link:
        server.client.replicaof("127.0.0.1", "1")
        with pytest.raises(LinkDown):
            await link.call("check", ["check"])
        assert not link.is_up


async def test_a_server_without_enough_replicas_of_its_own_counts_as_down(server: RedisServer) -> None:
    async with linked(server.url) as link:
        server.client.config_set("min-replicas-to-write", "1")
        with pytest.raises(LinkDown):
            await link.call("check", ["check"])
        assert (link.is_up, link.failure) == (False, "NOREPLICAS")
        server.client.config_set("min-replicas-to-write", "0")
        await until(lambda: link.is_up)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # Redis 6.2, scripting.c: the error of a command is the text of an error of the script.
        (
            "Error running script (call to f_1): @user_script:13: @user_script: 13: -READONLY You can't write",
            "READONLY",
        ),
        ("Error running script (call to f_1): @user_script:13: @user_script: 13: -OOM command not allowed", "OOM"),
        ("MISCONF Redis is configured to save RDB snapshots, but it is currently not able to", "MISCONF"),
        ("Error running script (call to f_1): @user_script:13: WRONGTYPE Operation against a key", None),
        ("the script has no such operation", None),
    ],
)
async def test_errors_that_concern_the_server_are_told_from_those_of_an_operation(
    text: str, reason: str | None
) -> None:
    error = ResponseError(text)
    assert _is_unusable(error) is (reason is not None)
    assert reason_of(error) == (reason or "ResponseError")


async def test_no_password_reaches_a_log_an_error_or_the_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gateway")
    with redis_server(SECRET) as server:
        async with way_to(server) as way:
            for password in (SECRET, f"{SECRET}-wrong"):
                async with RedisLink(way.url.replace("redis://", f"redis://:{password}@")) as link:
                    await until(lambda link=link: link.is_up or bool(link.failure))  # type: ignore[misc]
                    assert link.is_up is (password == SECRET)
                    if not link.is_up:
                        with pytest.raises(LinkDown) as raised:
                            await link.call("check", ["check"])
                        assert SECRET not in repr(raised.value)
                    assert SECRET not in link.address + repr(link)
    assert "not usable" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", "host:6379"),
        ("redis://user:pass@host:7000/2", "host:7000/2"),
        ("rediss://[::1]:7000", "[::1]:7000"),
        ("unix:///run/redis.sock?password=secret", "/run/redis.sock"),
    ],
)
async def test_the_address_names_no_secret(url: str, address: str) -> None:
    assert address_of(url) == address
