"""What a gateway shares with its replicas, as the composition root sees it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Self

from gateway.admission.hub_limits import HubLimits
from gateway.admission.shared_limits import SharedLimits
from gateway.api.named_keys import NamedKeys
from gateway.replicas.shared_document import SharedDocument
from gateway.upstream.backend import Backend
from gateway.upstream.restraints import OnEvent
from gateway.usage.recorder import UsageRecorder


class Sharing:
    """What a gateway without replicas shares: nothing. `async with` it while the gateway serves."""

    limits: SharedLimits | HubLimits | None = None
    """Concurrency limits, of which each replica has a part."""
    document: SharedDocument | None = None
    """Document with the roll-out."""

    def __init__(self) -> None:
        self.parts: list[AbstractAsyncContextManager[object]] = []
        """What is entered with this object, in this order."""
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.parts}>"

    def add(self, part: AbstractAsyncContextManager[object]) -> None:
        """Enter `part` after those that were added before it, and leave it before them."""
        self.parts.append(part)

    def share_hints(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> OnEvent | None:
        """Share hints about servers, and return what sends them."""
        return None

    def share_affinity(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> None:
        """Have replicas choose among servers as one."""

    def share_usage(self, usage: UsageRecorder, days: int) -> None:
        """Have the usage of `days` days answered for all replicas."""

    def share_keys(self, keys: NamedKeys) -> None:
        """Share the limits of keys."""

    def view(self) -> dict[str, Any] | None:
        """Return the state for `/ops/status`."""
        return None

    def begin_leaving(self) -> None:
        """Hold no more than needed from now on, because the gateway stops."""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as entered:
            for part in self.parts:
                await entered.enter_async_context(part)
            self._stack = entered.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
