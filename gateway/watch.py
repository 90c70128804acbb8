"""Ends waiting for a reason: a client left, a deadline passed, the gateway is stopping."""

import asyncio
import logging
import math
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from gateway.errors import ClientLeft, GatewayError

SWEEP_SECONDS = 0.05
"""How late a deadline may be noticed."""

_log = logging.getLogger("gateway.watch")


class Leaver(Protocol):
    """A client that can leave: `on_leave` is called once, when it does; `gone` tells that it has."""

    gone: bool
    on_leave: Callable[[], None] | None


class Watch:
    """`with Watch(client, loop) as watch:` raises, out of whatever the body awaits, the error that `end` was given; `ClientLeft` when the
    client leaves. `asyncio.timeout` with more reasons than time."""

    __slots__ = ("_cancels", "_client", "_error", "_loop", "_task")

    def __init__(self, client: Leaver, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._error: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        if self._client.gone:
            raise ClientLeft
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None
        self._cancels = self._task.cancelling()
        self._client.on_leave = self._left
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.on_leave = None
        if self._error is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            if self._task.uncancel() <= self._cancels:  # else somebody cancels from outside too, and comes first
                raise self._error from None

    def end(self, error: GatewayError) -> None:
        """Raise `error` in the body, at its next await. Only the first call counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    def _left(self) -> None:
        self.end(ClientLeft())


class Watched(Protocol):
    """Something under way that has deadlines."""

    look_at: float
    """When `look` is next worth calling, on the sweep's clock."""

    def look(self, now: float) -> None: ...


class Sweep:
    """Looks after all that is under way, twenty times a second: one timer for any number of deadlines, and none while nothing is."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self.live: set[Watched] = set()

    def add(self, watched: Watched) -> None:
        self.live.add(watched)
        if self._timer is None:
            self._timer = self._loop.call_later(SWEEP_SECONDS, self._run)

    def _run(self) -> None:
        now = self._clock()
        for watched in [watched for watched in self.live if watched.look_at <= now]:
            try:
                watched.look(now)
            except Exception:  # the deadlines of all others hang on this timer
                _log.exception("a look at an exchange failed; its deadlines are not kept any more")
                watched.look_at = math.inf
        self._timer = self._loop.call_later(SWEEP_SECONDS, self._run) if self.live else None
