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


class CancelScope:
    """Context manager that interrupts what its body awaits; `asyncio.timeout` with more reasons.

        with CancelScope(client, loop) as scope:
            ...

    The block raises the error that `end` was given, or `ClientLeft` when the client leaves. `interrupt`
    ends only a part of the block:

        scope.may_interrupt = True
        try:
            ...
        except asyncio.CancelledError:
            raise scope.absorbed() from None
        finally:
            scope.may_interrupt = False

    Of several reasons, the one that ends the most counts: a cancellation from outside, then `end`.
    """

    __slots__ = ("_cancels", "_client", "_error", "_interruption", "_loop", "_task", "may_interrupt")

    def __init__(self, client: LeavingClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._error: GatewayError | None = None
        self._interruption: GatewayError | None = None
        self._task: asyncio.Task[object] | None = None
        self.may_interrupt = False
        """True while the task awaits a part of the block that can be ended alone."""

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

    def interrupt(self, error: GatewayError) -> bool:
        """End the present part of the block with `error`. Return False if nothing can be interrupted."""
        if not self.may_interrupt or self._error is not None or self._task is None:
            return False
        self.may_interrupt = False
        self._interruption = error
        self._task.cancel()
        return True

    def absorbed(self) -> BaseException:
        """Return the error of `interrupt`, and take its cancellation back.

        If there was no interruption, or the whole block is to end as well, return another
        `asyncio.CancelledError`, which has to be raised.
        """
        error, self._interruption = self._interruption, None
        if error is None or self._task is None:
            return asyncio.CancelledError()
        remaining = self._task.uncancel()
        return asyncio.CancelledError() if self._error is not None or remaining > self._cancels else error

    def _client_left(self) -> None:
        self.end(ClientLeft())
