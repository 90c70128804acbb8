"""The relays in flight, and the one timer that checks their deadlines."""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

SWEEP_SECONDS = 0.05
"""How late a deadline may be noticed."""

_log = logging.getLogger("gateway.watch")


class Watched(Protocol):
    """Something under way that has deadlines."""

    check_at: float
    """When `look` is next worth calling, on the sweep's clock."""

    def check_deadlines(self, now: float) -> None: ...


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
        for watched in [watched for watched in self.live if watched.check_at <= now]:
            try:
                watched.check_deadlines(now)
            except Exception:  # the deadlines of all others hang on this timer
                _log.exception("a look at an exchange failed; its deadlines are not kept any more")
                watched.check_at = math.inf
        self._timer = self._loop.call_later(SWEEP_SECONDS, self._run) if self.live else None
