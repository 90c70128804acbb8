"""Ends a task's waiting for a reason: its client left, a deadline passed, the gateway is stopping. `asyncio.timeout` with more reasons."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from gateway.errors import ClientLeft, GatewayError


class Leaver(Protocol):
    """A client that can leave: `on_leave` is called once, when it does; `gone` tells that it has."""

    gone: bool
    on_leave: Callable[[], None] | None


class Watch:
    """`with Watch(client) as watch:` raises, out of whatever the body awaits, the error that `end` was given; `ClientLeft` when the client leaves.

    One timer serves all deadlines: `tick(now)` is called when it fires and returns when it wants to be called again, in the loop's time.
    """

    __slots__ = ("_client", "_error", "_loop", "_task", "_tick", "_timer")

    def __init__(self, client: Leaver, tick: Callable[[float], float]) -> None:
        self._client = client
        self._tick = tick
        self._error: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        if self._client.gone:
            raise ClientLeft
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._client.on_leave = self._left
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.on_leave = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._error is not None and kind is asyncio.CancelledError:
            assert self._task is not None
            self._task.uncancel()
            raise self._error from None

    def end(self, error: GatewayError) -> None:
        """Raise `error` in the body, at its next await. Only the first call counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    def arm(self, when: float) -> None:
        """Call `tick` at `when`, in the loop's time, or earlier if that was asked for before."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.arm(self._tick(self._loop.time()))

    def _left(self) -> None:
        self.end(ClientLeft())
