"""A channel on which replicas tell each other what may be lost."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from gateway.replicas.link import LinkDown, RedisLink

MOST_PENDING = 100
"""Messages that are being sent. Further ones are dropped."""


class Channel:
    """The channel `name`. Build it, and call `listen`, before the link is entered, and enter it inside the link."""

    def __init__(self, link: RedisLink, name: str) -> None:
        self._link = link
        self._name = name
        self._pending: set[asyncio.Task[None]] = set()

    def listen(self, on_message: Callable[[bytes], None]) -> None:
        """Have `on_message` called with each message, also with those of this replica."""
        self._link.subscribe(self._name, on_message)

    def send(self, message: bytes) -> None:
        """Send a message soon, unless Redis cannot be reached."""
        if self._link.is_up and len(self._pending) < MOST_PENDING:
            task = asyncio.create_task(self._publish(message))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drop what has not been sent."""
        for task in self._pending:
            task.cancel()
        if self._pending:
            await asyncio.wait(self._pending)

    async def _publish(self, message: bytes) -> None:
        with suppress(LinkDown):
            await self._link.publish(self._name, message)
