"""Series of the keys, of which there may be 100,000: plain numbers, read in parts of a few keys each.

A counter of prometheus-client would be built as a whole at each scrape, and would have to be searched
for the series of a key that is gone.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gateway.telemetry.exchange import Exchange

PART = 50
"""Keys whose series are read in one step, which takes a few milliseconds with their text."""
MOST = 1 << 53
"""Tokens of one exchange from which the number is not counted: a float could not tell the sums apart."""

Series = tuple[dict[str, str], float, float]
"""Labels, value, and the time at which the series began."""


class KeyCounts:
    """Counts of one key."""

    __slots__ = ("began", "completion_tokens", "prompt_tokens", "refused", "requests")

    def __init__(self) -> None:
        self.began: float | None = None
        """Time of the first request that was recorded."""
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.refused: dict[str, tuple[int, float]] = {}
        """Requests that a limit refused, and the time of the first one, by the limit."""


class KeyMetrics(Collector):
    """The three counters with the label `key`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._keys: dict[str, KeyCounts] = {}
        registry.register(self)

    def __repr__(self) -> str:
        return f"<KeyMetrics of {len(self._keys)} keys>"

    def record(self, exchange: Exchange) -> None:
        """Count an exchange of a key with a name."""
        counts = self._of(exchange.key)
        if counts.began is None:
            counts.began = time.time()
        counts.requests += 1
        usage = exchange.usage
        if usage is not None:
            if 0 < usage.prompt_tokens < MOST:
                counts.prompt_tokens += usage.prompt_tokens
            if 0 < usage.completion_tokens < MOST:
                counts.completion_tokens += usage.completion_tokens
        counts.completion_tokens += exchange.sent_tokens

    def refuse(self, name: str, limit: str) -> None:
        """Count a request that a limit of the key `name`, or of a person behind it, refused."""
        refused = self._of(name).refused
        count, began = refused.get(limit) or (0, time.time())
        refused[limit] = count + 1, began

    def forget(self, name: str) -> None:
        """Drop the series of a key that is gone."""
        self._keys.pop(name, None)

    def _of(self, name: str) -> KeyCounts:
        counts = self._keys.get(name)
        if counts is None:
            counts = self._keys[name] = KeyCounts()
        return counts

    def collect(self) -> Iterator[Metric]:
        """Yield each family in parts of at most `PART` keys. It has one part at least, which may be empty.

        Keys may come and go between two parts.
        """
        yield from self._parts("gateway_key_requests", "Requests by the key that sent them.", _requests)
        yield from self._parts("gateway_key_tokens", "Tokens by key.", _tokens)
        yield from self._parts(
            "gateway_rate_limited", "Requests refused by a limit of their key, or of a person behind it.", _refused
        )

    def _parts(self, family: str, text: str, series: Callable[[str, KeyCounts], Iterator[Series]]) -> Iterator[Metric]:
        names = list(self._keys)
        for start in range(0, max(1, len(names)), PART):
            part = Metric(family, text, "counter")
            for name in names[start : start + PART]:
                if (counts := self._keys.get(name)) is not None:
                    for labels, value, began in series(name, counts):
                        part.samples.append(Sample(f"{family}_total", labels, value))
                        part.samples.append(Sample(f"{family}_created", labels, began))
            yield part


def _requests(name: str, counts: KeyCounts) -> Iterator[Series]:
    if counts.began is not None:
        yield {"key": name}, float(counts.requests), counts.began


def _tokens(name: str, counts: KeyCounts) -> Iterator[Series]:
    if counts.began is not None:
        yield {"key": name, "type": "prompt"}, float(counts.prompt_tokens), counts.began
        yield {"key": name, "type": "completion"}, float(counts.completion_tokens), counts.began


def _refused(name: str, counts: KeyCounts) -> Iterator[Series]:
    for limit, (count, began) in counts.refused.items():
        yield {"key": name, "limit": limit}, float(count), began
