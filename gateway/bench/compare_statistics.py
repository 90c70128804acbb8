"""Confidence intervals of a difference or a ratio. Pure.

The unit is the round: both sides ran it one after the other, so what drifts slowly acts on both and
cancels in the pair. Within a round the requests share a batch and are not independent, which is why
they are not counted singly. Ratios are compared through their logarithms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        low, high: None where one observation on a side leaves the spread unknown.
        method: `paired` (Student's t over paired rounds) or `welch` (Welch's t, unpaired).
        n: pairs, or the observations of the smaller side.
    """

    estimate: float
    low: float | None
    high: float | None
    method: str
    n: int

    def crosses(self, value: float) -> bool:
        """Return whether no difference from `value` was seen: the interval holds it, or there is none."""
        return self.low is None or self.high is None or self.low <= value <= self.high


def paired(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> Interval | None:
    """Return the interval of the mean of `b - a`, pair by pair; None without pairs.

    The mean is weighted by `weights`; None: all weigh the same.

    Raises:
        ValueError: the numbers of values differ.
    """
    differences = [second - first for first, second in zip(a, b, strict=True)]
    count = len(differences)
    if not count:
        return None
    whole = math.fsum(weights or [1.0] * count)
    shares = [weight / whole for weight in weights or [1.0] * count]
    estimate = math.fsum(share * one for share, one in zip(shares, differences, strict=True))
    if count < 2:
        return Interval(estimate, None, None, "paired", 1)
    spread = math.fsum((share * (one - estimate)) ** 2 for share, one in zip(shares, differences, strict=True))
    half = t_quantile(count - 1) * math.sqrt(spread * count / (count - 1))
    return Interval(estimate, estimate - half, estimate + half, "paired", count)


def welch(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Return the interval of `mean(b) - mean(a)` of independent samples; None if one is empty."""
    if not a or not b:
        return None
    estimate = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    smaller = min(len(a), len(b))
    if smaller < 2:
        return Interval(estimate, None, None, "welch", smaller)
    shares = [_variance(values) / len(values) for values in (a, b)]
    if not sum(shares):
        return Interval(estimate, estimate, estimate, "welch", smaller)
    freedom = sum(shares) ** 2 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (a, b), strict=True))
    half = t_quantile(freedom) * math.sqrt(sum(shares))
    return Interval(estimate, estimate - half, estimate + half, "welch", smaller)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Return the interval of `b / a`, pair by pair, around the geometric mean; None unless all are positive."""
    if not a or min(*a, *b) <= 0:
        return None
    return _exponential(paired([math.log(value) for value in a], [math.log(value) for value in b]))


def welch_ratio(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """Return the interval of `b / a` as the ratio of the geometric means; None unless all are positive."""
    if not a or not b or min(*a, *b) <= 0:
        return None
    return _exponential(welch([math.log(value) for value in a], [math.log(value) for value in b]))


def _exponential(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    low, high = (None if bound is None else math.exp(min(bound, 700.0)) for bound in (interval.low, interval.high))
    return Interval(math.exp(interval.estimate), low, high, interval.method, interval.n)


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t, by bisection of its distribution function."""
    if freedom > 1e6:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: float) -> float:
    """Return the probability that |T| < t: the regularised incomplete beta function."""
    return 1 - _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front * _continued_fraction(a, b, x) / a


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Evaluate the fraction of DLMF 8.17.22 by the modified Lentz method."""
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return result
