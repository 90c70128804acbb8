"""The link to the Redis or Valkey through which replicas of the gateway share what they know.

What is shared lives in Redis, and all that changes it is in `operations.lua`: one script, run by its digest,
so each operation is one atomic step and needs one round trip. Messages of a channel only tell a replica to
look sooner than it would by itself: one that is lost costs time.

Nothing waits for a Redis that does not answer. A call that gets no answer within `CALL_SECONDS` puts the link
down, and while it is down each call fails at once. A task reconnects with growing pauses.
"""

import asyncio
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any, Self
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.replicas.link_down import LinkDown, OperationFailed
from gateway.replicas.tasks import end

__all__ = ["LinkDown", "OperationFailed", "RedisLink", "address_of", "key"]

CALL_SECONDS = 1.0
"""Longest wait for an answer of Redis, and for a connection to it."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
"""Seconds between two attempts to connect. They double from the first to the longest."""
SILENCE_SECONDS = 1.0
"""Time without a message after which the subscription is tested."""
MAX_CONNECTIONS = 8
KEY_PREFIX = "{llm-gateway}:"
"""Prefix of every key and channel. The braces put them into one slot of a Redis Cluster."""

_UNUSABLE = re.compile(r"(?:^|[ -])(READONLY|OOM|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|NOPERM)(?: |$)")
"""Codes of errors that concern the server and not the operation."""

Argument = str | int | float | bytes

_log = logging.getLogger(__name__)


class RedisLink:
    """One replica's link to Redis. Enter it (`async with`) to connect; entering does not wait for Redis.

    Attributes:
        replica: id of this replica, another one for each start of the process.
        address: host, port and database, without user and password.
        is_up: whether calls are possible.
        changed: Unix time at which `is_up` last changed, or the link was built.
        failure: why the link is down; empty while it is up, and before the first attempt has ended.
    """

    def __init__(self, url: str, wall: Callable[[], float] = time.time) -> None:
        self.replica = os.urandom(8).hex()
        self.address = address_of(url)
        self.is_up = False
        self.changed = wall()
        self._wall = wall
        self._script = files("gateway.replicas").joinpath("operations.lua").read_bytes()
        self._digest = hashlib.sha1(self._script, usedforsecurity=False).hexdigest()
        self._redis = Redis.from_pool(
            BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=CALL_SECONDS,
                socket_timeout=CALL_SECONDS,
                socket_connect_timeout=CALL_SECONDS,
                retry=Retry(NoBackoff(), 0),
                client_name=f"llm-gateway-{self.replica}",
                protocol=2,
            )
        )
        self._on_up: list[Callable[[], None]] = []
        self._on_down: list[Callable[[], None]] = []
        self._channels: dict[str, Callable[[bytes], None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self.failure = ""
        self._was_reported = False

    def __repr__(self) -> str:
        return f"<RedisLink {self.address} {'up' if self.is_up else 'down'}>"

    # Set up before the link is entered

    def watch(self, on_up: Callable[[], None] | None = None, on_down: Callable[[], None] | None = None) -> None:
        """Have functions called when the link has come up or gone down. They must not raise or wait."""
        if on_up is not None:
            self._on_up.append(on_up)
        if on_down is not None:
            self._on_down.append(on_down)

    def subscribe(self, channel: str, on_message: Callable[[bytes], None]) -> None:
        """Have `on_message` called with each message of `channel`. It must not raise or wait.

        Messages sent while the link is down are lost: read what they are about in `on_up`.
        """
        self._channels[key(channel)] = on_message

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stay_connected(), name="redis link")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await end(self._task)
        if self._session is not None:
            await end(self._session)  # its end may take longer than that of the task which waits for it
        self.is_up = False
        with suppress(RedisError, OSError, TimeoutError):
            await self._redis.aclose()

    # Use

    async def call(self, operation: str, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> Any:
        """Run an operation of `operations.lua` and return its answer, whose strings are bytes.

        `keys` are without the prefix. An operation may have been run although this raises: an answer that
        is lost looks the same as a call that is lost.

        Raises:
            LinkDown: no answer; at once if the link is down, otherwise within `CALL_SECONDS`.
            OperationFailed: the operation failed; others may work.
        """
        if not self.is_up:
            raise LinkDown(self.failure or "not connected yet")
        return await self._execute(
            "EVALSHA", self._digest, len(keys), *(key(name) for name in keys), operation, *arguments
        )

    async def publish(self, channel: str, message: str | bytes) -> None:
        """Send `message` to all replicas that have subscribed to `channel`, this one included.

        Raises:
            LinkDown: as `call` does.
        """
        if not self.is_up:
            raise LinkDown(self.failure or "not connected yet")
        await self._execute("PUBLISH", key(channel), message)

    async def _execute(self, *command: Argument) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                try:
                    return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
                except NoScriptError:  # another program ran SCRIPT FLUSH, or the server was restarted
                    return await self._redis.execute_command("EVAL", self._script, *command[2:])  # type: ignore[no-untyped-call]
        except (RedisConnectionError, RedisTimeoutError, OSError, TimeoutError) as error:
            self._fail(reason_of(error))
            raise LinkDown(reason_of(error)) from None
        except RedisError as error:
            if _is_unusable(error):
                self._fail(reason_of(error))
                raise LinkDown(reason_of(error)) from None
            raise OperationFailed(reason_of(error)) from None

    # Connection

    def _fail(self, reason: str) -> None:
        """End the session, so that the link goes down and connects again."""
        if self._session is not None and not self._session.done():
            self.failure = reason
            self._go_down()
            self._session.cancel()

    def _go_up(self) -> None:
        self.is_up = True
        self.failure = ""
        self.changed = self._wall()
        self._was_reported = False
        _log.info("redis %s: connected, as replica %s", self.address, self.replica)
        for callback in self._on_up:
            callback()

    def _go_down(self) -> None:
        if not self._was_reported:
            _log.warning("redis %s: not usable (%s)", self.address, self.failure)
            self._was_reported = True
        if self.is_up:
            self.is_up = False
            self.changed = self._wall()
            for callback in self._on_down:
                callback()

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            self._session = asyncio.create_task(self._run_session(), name="redis session")
            try:
                await asyncio.wait([self._session])
            finally:
                await end(self._session)
            if not self._session.cancelled() and (error := self._session.exception()) is not None:
                self.failure = reason_of(error)
            self._go_down()
            if time.monotonic() - began > LONGEST_PAUSE + CALL_SECONDS:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _run_session(self) -> None:
        """Connect, subscribe and deliver messages until something fails."""
        await self._redis.connection_pool.disconnect(inuse_connections=False)
        pubsub = self._redis.pubsub()
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._redis.execute_command("EVAL", self._script, 1, key("check"), "check")  # type: ignore[no-untyped-call]
                await pubsub.subscribe(key("replicas"), *self._channels)
            self._go_up()
            await self._deliver(pubsub)
        finally:
            with suppress(RedisError, OSError, TimeoutError):
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _deliver(self, pubsub: PubSub) -> None:
        is_tested = False
        while not self.failure:  # `_fail` cancels this task as well, but see `end`
            message = await pubsub.get_message(timeout=SILENCE_SECONDS)
            if message is None:
                if is_tested:
                    raise TimeoutError
                is_tested = True
                await pubsub.ping()
                continue
            is_tested = False
            if message["type"] == "message":
                callback = self._channels.get(message["channel"].decode())
                if callback is not None:
                    callback(message["data"])


def key(name: str) -> str:
    """Return the key or channel in Redis with the gateway's `name`."""
    return KEY_PREFIX + name


def address_of(url: str) -> str:
    """Return the host, port and database of a URL, or the path of a socket, without user and password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = parts.hostname or "localhost"
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or 6379}{parts.path.rstrip('/')}"


def reason_of(error: BaseException) -> str:
    """Return a reason for a log line: the kind of the error, or the server's code for its state.

    Its text may quote what was sent.
    """
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return f"no answer within {CALL_SECONDS:g} s"
    code = _UNUSABLE.search(str(error)) if type(error) is ResponseError else None
    return type(error).__name__ if code is None else code[1]


def _is_unusable(error: RedisError) -> bool:
    """Return whether a server that answers cannot be used: it is read-only, full, or forbids it.

    Before version 7, Redis reports this as an error of the script, whose text has the code.
    """
    return isinstance(error, ReadOnlyError | OutOfMemoryError | NoPermissionError | ClusterDownError) or (
        _UNUSABLE.search(str(error)) is not None
    )
