"""Load of the load client itself: its processor time and the lateness of its event loop."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Self

from gateway.bench.quantiles import quantile
from gateway.bench.results import ClientLoad

INTERVAL = 0.02
"""Seconds between two checks of the event loop."""
MAX_CPU_SHARE = 0.8
"""Share of one core above which the client may be the bottleneck: it runs on one thread."""
MAX_LAG_MS = 10.0
"""Lateness (p99) above which the client's times are off by more than a short gap between two tokens."""


class ClientWatch:
    """Measures the client during an `async with` block."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
        interval: float = INTERVAL,
    ) -> None:
        self._clock = clock
        self._interval = interval
        self._cpu_clock = cpu_clock
        self._lags: list[float] = []
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._began = self._clock()
        self._cpu = self._cpu_clock()
        self._schedule()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._seconds = self._clock() - self._began
        self._cpu = self._cpu_clock() - self._cpu

    def _schedule(self) -> None:
        self._due = self._clock() + self._interval
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._lags.append(max(0.0, self._clock() - self._due))
        self._schedule()

    def load(self, start_delays: Sequence[float] = ()) -> ClientLoad:
        """Return what was measured; `start_delays` are the latenesses of requests that had a due time."""
        share = self._cpu / self._seconds if self._seconds > 0 else 0.0
        lag = (quantile(self._lags, 99) or 0.0) * 1000
        delay = quantile(start_delays, 99)
        delay_ms = None if delay is None else delay * 1000
        found = {
            "client_busy": share > MAX_CPU_SHARE,
            "client_lagging": lag > MAX_LAG_MS,
            "client_late": delay_ms is not None and delay_ms > MAX_LAG_MS,
        }
        return ClientLoad(
            cpu_share=share,
            lag_p99_ms=lag,
            lag_max_ms=max(self._lags, default=0.0) * 1000,
            start_delay_p99_ms=delay_ms,
            warnings=tuple(key for key, is_true in found.items() if is_true),
        )
