"""Mean, deviation and percentiles, and the number of values that a percentile needs.

Pure. Percentiles interpolate linearly between values, as `numpy.percentile` and `vllm bench serve` do.
"""

import math
from collections.abc import Sequence


def needed(percentile: float) -> int:
    """Return how many values a percentile needs, so that one of them lies at or beyond it.

    p50 needs 2, p90 needs 10, p95 needs 20, p99 needs 100 and p99.9 needs 1000. With fewer values the
    percentile would be the maximum, or lie between the two largest values.
    """
    # The margin is for binary fractions: 1 / (1 - 0.9) is 10.000000000000002.
    return 2 if percentile <= 50 else math.ceil(100 / (100 - percentile) - 1e-6)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None without values."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of the population, None without values."""
    middle = mean(values)
    return None if middle is None else math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))


def quantile(values: Sequence[float], percentile: float) -> float | None:
    """Return the percentile whatever the number of values is, None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percentile / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def supported_quantile(values: Sequence[float], percentile: float) -> float | None:
    """Return the percentile, None if there are fewer values than it needs."""
    return quantile(values, percentile) if len(values) >= needed(percentile) else None


def percentile_word(percentile: float) -> str:
    """Return the percentile as vLLM writes it in a name: `99`, `99.9`."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)
