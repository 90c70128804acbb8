"""Simulated time of a stand-in: real time, scaled, and slowed down by work that shares it."""

import asyncio
import contextlib
from collections.abc import Iterator


class Clock:
    """Clock of simulated seconds, each of which takes `scale` real seconds.

    Work under `sharing` shares the machine: k pieces at once each run k times slower, and slower
    again by a factor of `1 + slowdown * (k - 1)`. Five images of 51 s therefore end together after
    5 · 51 · (1 + 4 · slowdown) s. Used by a single event loop only.
    """

    def __init__(self, scale: float, slowdown: float = 0.0) -> None:
        self._scale = scale
        self._slowdown = slowdown
        self._sharers = 0
        self._mark: float | None = None  # real time at which `_elapsed` was last updated
        self._elapsed = 0.0
        self._changed = asyncio.Event()

    def now(self) -> float:
        """Return the simulated seconds since an arbitrary moment."""
        real = asyncio.get_running_loop().time()
        passed = 0.0 if self._mark is None else real - self._mark
        self._elapsed += passed / self._pace if self._pace else 0.0
        self._mark = real
        return self._elapsed

    @property
    def _pace(self) -> float:
        """Real seconds for one simulated second."""
        alone = self._scale * max(1, self._sharers)
        return alone * (1 + self._slowdown * max(0, self._sharers - 1))

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Count the block as one more piece of work that shares this clock."""
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
        """Wait until `now()` is `due`. Yields to the event loop at least once."""
        await asyncio.sleep(0)
        while (left := due - self.now()) > 0 and self._pace:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left * self._pace)

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        """Wait for `event`, at most `seconds` (None: without a limit)."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), None if seconds is None else max(0.0, seconds) * self._pace)
