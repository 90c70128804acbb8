"""Metrics of a gateway as they were scraped: sums, gauges and histograms. Pure."""

from collections.abc import Iterable
from math import inf
from typing import Self

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families


class Observations(Struct, frozen=True):
    """A histogram: bounds in seconds, the number of observations in each bucket, and their sum.

    The last bucket has no bound.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    total: float = 0.0

    @property
    def count(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Mean of the observations, None without one."""
        return self.total / self.count if self.count else None

    def plus(self, other: Self) -> "Observations":
        """Return the observations of both, which have the same bounds unless one is empty."""
        if not self.counts or not other.counts:
            return other if not self.counts else self
        counts = tuple(one + more for one, more in zip(self.counts, other.counts, strict=True))
        return Observations(self.bounds, counts, self.total + other.total)

    def since(self, earlier: Self) -> "Observations":
        """Return what was observed after `earlier`; all of it if the gateway restarted in between."""
        before = dict(zip(earlier.bounds, earlier.counts, strict=True))
        counts = tuple(count - before.get(bound, 0) for bound, count in zip(self.bounds, self.counts, strict=True))
        if any(count < 0 for count in counts):
            return self
        return Observations(self.bounds, counts, self.total - earlier.total)

    def quantile(self, share: float) -> float | None:
        """Return the value that `share` of the observations do not exceed, linear within a bucket."""
        wanted, low = share * self.count, 0.0
        if not self.count:
            return None
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count and count >= wanted:
                return low if bound == inf else low + (bound - low) * wanted / count
            wanted, low = wanted - count, bound
        return low


class Exposition:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        """Parse Prometheus text.

        Raises:
            ValueError: it is something else.
        """
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        if not any(name.startswith("gateway_") for name in self._samples):
            raise ValueError("there are no metrics of a gateway in it")

    def values(self, name: str, **labels: str) -> list[float]:
        return [value for found, value in self._samples.get(name, ()) if labels.items() <= found.items()]

    def sum(self, name: str, **labels: str) -> float:
        return sum(self.values(name, **labels))

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Return the sums of a metric for each value of `label`."""
        sums: dict[str, float] = {}
        for found, value in self._samples.get(name, ()):
            if labels.items() <= found.items() and label in found:
                sums[found[label]] = sums.get(found[label], 0.0) + value
        return sums

    def histogram(self, name: str, **labels: str) -> Observations:
        """Return the histogram of all series with these labels together."""
        upto = {float(bound): count for bound, count in self.by("le", f"{name}_bucket", **labels).items()}
        bounds = sorted(upto)
        return Observations(
            tuple(bounds), tuple(_differences(upto[bound] for bound in bounds)), self.sum(f"{name}_sum", **labels)
        )


def _differences(values: Iterable[float]) -> Iterable[float]:
    before = 0.0
    for value in values:
        yield value - before
        before = value
