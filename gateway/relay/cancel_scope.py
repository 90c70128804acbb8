"""A cancel scope with a reason: the client left, a deadline passed, or the gateway is stopping."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from gateway.errors import ClientLeft, GatewayError


class LeavingClient(Protocol):
    """A client that can leave. When it does, `gone` becomes true and `on_leave` is called once."""

    gone: bool
    on_leave: Callable[[], None] | None


class ErrorScope:
    """Context manager whose block `end` interrupts with an error. It may be inside another one."""

    __slots__ = ("_cancels", "_error", "_loop", "_task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._error: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None
        self._cancels = self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._error is not None and task is not None:
            # Another cancellation, from outside or of an outer scope, takes precedence.
            is_last = task.uncancel() <= self._cancels
            if is_last and kind is asyncio.CancelledError:
                raise self._error from None

    def end(self, error: GatewayError) -> None:
        """Raise `error` in the block at its next await. Only the first call counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()


class CancelScope:
    """Context manager that interrupts what its body awaits; `asyncio.timeout` with more reasons.

        with CancelScope(client, loop) as scope:
            ...

    The block raises the error that `end` was given, or `ClientLeft` when the client leaves. A part of
    the block that catches `asyncio.CancelledError` and calls `absorb` can be ended alone, by `interrupt`.
    """

    __slots__ = ("_cancels", "_client", "_error", "_interruption", "_loop", "_task")

    def __init__(self, client: LeavingClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._error: GatewayError | None = None
        self._interruption: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        if self._client.gone:
            raise ClientLeft
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None
        self._cancels = self._task.cancelling()
        self._client.on_leave = self._client_left
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.on_leave = None
        reason, task = self._error, self._task
        # Kept, either would hold a traceback, and with it the frames of the request, in a reference cycle.
        self._error = self._task = None
        if reason is None or kind is not asyncio.CancelledError:
            return
        assert task is not None
        try:
            # A cancellation from outside takes precedence.
            if task.uncancel() <= self._cancels:
                raise reason from None
        finally:
            del reason

    def end(self, error: GatewayError) -> None:
        """Raise `error` in the body at its next await. Only the first call counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    @property
    def is_ending(self) -> bool:
        """True once the body was told to end."""
        return self._error is not None

    def interrupt(self, error: GatewayError) -> None:
        """Cancel what the body awaits, which has to call `absorb`. Does nothing once the body is to end."""
        if self._error is None and self._interruption is None and self._task is not None:
            self._interruption = error
            self._task.cancel()

    def absorb(self) -> GatewayError | None:
        """Return the error of `interrupt`, and take its cancellation back.

        Return None if there was no interruption, or if the whole body is to end as well: the caller then
        raises its `asyncio.CancelledError` again.
        """
        error, self._interruption = self._interruption, None
        if error is None or self._task is None:
            return None
        remaining = self._task.uncancel()
        return None if self._error is not None or remaining > self._cancels else error

    def _client_left(self) -> None:
        self.end(ClientLeft())
