"""The task that tells other replicas of the gateway where prompts went and what is in flight."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

from gateway.admission.shared_affinity import SharedAffinity
from gateway.replicas.link_down import LinkDown
from gateway.replicas.tasks import end

AFFINITY = "affinity"
"""Name of the messages, on the hub and on Redis."""


class AffinitySharing:
    """Sends the news of `shared` while it is entered (`async with`), one message at a time.

    `send` may raise `LinkDown`: the message is lost then.
    """

    def __init__(
        self, shared: SharedAffinity, send: Callable[[bytes], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self._shared = shared
        self._send = send
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="shared affinity")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            message = self._shared.step(self._clock())
            if message is not None:
                with suppress(LinkDown):
                    await self._send(message)
            await asyncio.sleep(self._shared.interval)
