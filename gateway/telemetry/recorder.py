"""The recorder of finished exchanges: counts, logs and passes them on to observers, in batches."""

import asyncio
from collections.abc import Callable, Sequence

from gateway.telemetry.exchange import Attribution, Exchange
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.metrics import Metrics

SETTLE_SECONDS = 0.2
"""Longest time from the end of an exchange to its log line. A scrape of the metrics does not wait
for it."""

Observer = Callable[[Sequence[Exchange]], None]
UsageObserver = Callable[[Sequence[tuple[Exchange, Attribution | None]]], None]


class ExchangeRecorder:
    """Collects finished exchanges and records them together, which is cheaper than one by one.

    Each exchange recorded on its own would find cold caches.
    """

    def __init__(
        self,
        metrics: Metrics,
        log: ExchangeLog,
        observers: Sequence[Observer] = (),
        usage: UsageObserver | None = None,
    ) -> None:
        self._usage = usage
        self._attributions: dict[int, Attribution] = {}
        """Attributions by the index of the exchange in `_finished`, for the few that have one."""
        self._metrics = metrics
        self._log = log
        self._observers = list(observers)
        self._loop = asyncio.get_running_loop()
        self._finished: list[Exchange] = []
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ExchangeRecorder {len(self._finished)} to record>"

    def record(self, exchange: Exchange, attribution: Attribution | None = None) -> None:
        if attribution is not None:
            self._attributions[len(self._finished)] = attribution
        self._finished.append(exchange)
        if self._timer is None:
            self._timer = self._loop.call_later(SETTLE_SECONDS, self.settle)

    def settle(self) -> None:
        """Record the exchanges that have finished since the last batch."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        finished, self._finished = self._finished, []
        attributions, self._attributions = self._attributions, {}
        for exchange in finished:
            self._metrics.record(exchange)
        self._log.write(finished)
        for observe in self._observers:
            observe(finished)
        if self._usage is not None and finished:
            self._usage([(exchange, attributions.get(index)) for index, exchange in enumerate(finished)])

    def detach_observers(self) -> None:
        """Stop informing observers, since the gateway ends the remaining exchanges itself.

        How those end says nothing about a backend.
        """
        self._observers.clear()
