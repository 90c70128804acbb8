"""The pretended time of a stand-in: real time stretched or shortened, and slowed down by the work that shares it."""

import asyncio
import contextlib
from collections.abc import Iterator


class Clock:
    """Seconds of pretended time: each takes `scale` real ones.

    Work under `sharing` shares the machine: k pieces of it at once each go k times slower, and once more by `slowdown` for each beyond the
    first. Five images of 51 s then end together after 5 · 51 · (1 + 4 · slowdown) s. Only one event loop touches it.
    """

    def __init__(self, scale: float, slowdown: float = 0.0) -> None:
        self._scale = scale
        self._slowdown = slowdown
        self._sharers = 0
        self._mark: float | None = None  # real time at which `_done` was so much
        self._done = 0.0
        self._changed = asyncio.Event()

    def now(self) -> float:
        """Pretended seconds since some moment."""
        real = asyncio.get_running_loop().time()
        passed = 0.0 if self._mark is None else real - self._mark
        self._done += passed / self._pace if self._pace else 0.0
        self._mark = real
        return self._done

    @property
    def _pace(self) -> float:
        """Real seconds for a pretended one."""
        alone = self._scale * max(1, self._sharers)
        return alone * (1 + self._slowdown * max(0, self._sharers - 1))

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Be one more piece of work that shares this clock."""
        self._share(1)
        try:
            yield
        finally:
            self._share(-1)

    def _share(self, more: int) -> None:
        self.now()
        self._sharers += more
        self._changed.set()
        self._changed = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        await self.until(self.now() + seconds)

    async def until(self, due: float) -> None:
        """Wait until `now()` is `due`. Gives way to others in any case."""
        await asyncio.sleep(0)
        while (left := due - self.now()) > 0 and self._pace:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left * self._pace)

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        """Wait for `event`, but no longer than `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), None if seconds is None else max(0.0, seconds) * self._pace)
