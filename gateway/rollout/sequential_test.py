"""A sequential test of whether a share is larger on one side than on the other.

It may be evaluated after every sample. Pure: no I/O, no clock.

Theory of operation. There are two streams of yes and no: `p` is the share of yes on the side under
test, `q` that on the other side. The null hypothesis is `p <= q + margin`. A gambler starts with a
stake of 1 and bets against it, round by round. Nobody can expect to win a fair game, so if the null
hypothesis is true, the stake ever reaches 1/alpha with a probability of at most alpha, however
often one looks and whenever one stops (Ville 1939). This is testing by betting: Shafer 2021 (arXiv
1903.06991), Ramdas and others 2023 (arXiv 2210.01948), and for two streams of yes and no Turner, Ly
and Grünwald 2021 (arXiv 2106.02693), whose bets are close to these. A test with a fixed number of
samples gives no such guarantee: evaluated after each of 1,000 samples, a test at 1 % raises a false
alarm in a tenth of all cases or more.

1. A round closes as soon as both sides have samples: `k` of the side under test, `m` of the other.
2. Each yes under test multiplies the stake by `1 + a (1 - c)`, each no by `1 - a c`. Each yes on
   the other side multiplies it by `1 - b (1 - o)`, each no by `1 + b o`. Here `c = o + margin` and
   `b = a k / m`. On average, the factors are `1 + a (p - c)` and `1 - b (q - o)`. Since `k a (p -
   c) - m b (q - o) = k a (p - q - margin) <= 0`, the inequality of the arithmetic and geometric
   means bounds their product by 1. This holds for every `o` and every `a > 0` that leave the
   factors positive, provided that they are chosen before the round's outcomes are known.
3. The choice only decides how fast the stake grows if something is wrong. `o` is where the null
   hypothesis is hardest to tell from the alternative (the nearest point in the Kullback-Leibler
   sense), and `a` is what the likelihood ratio there gives.
4. The size of the difference is not known in advance. The stake is divided among `EXCESSES`, and
   each part bets on its own. The average of fair games is a fair game.

The test treats samples as independent. An incident that hits many requests at once, on one side
only, counts once for each of them.
"""

from math import exp, log

EXCESSES = (0.03, 0.12, 0.5)
"""Alternatives: how far the share under test exceeds the other share plus the margin, as a fraction
of what is left up to 1."""
PRIOR_SAMPLES = 20
"""Weight, in samples, of the first guess of the other side's share."""
LONGEST_ROUND = 200
"""Samples of one side in a round. More are dropped until the other side has a sample."""
GROWTH = 1.2
"""Growth of the number of samples after which the bets are tuned again."""
_STEPS = 20
"""Steps of the bisection that finds `o`."""
_MAX_STAKE = 0.98
"""Largest part of the stake that one sample of the other side may cost: it never reaches zero."""
_MAX_LOG = 700.0
"""Largest logarithm that is exponentiated: `exp` overflows at about 709.8."""


class Tally:
    """Number of samples of one side, and how many of them were a yes."""

    __slots__ = ("count", "hits")

    def __init__(self) -> None:
        self.count = self.hits = 0

    def __repr__(self) -> str:
        return f"<Tally {self.hits} of {self.count}>"

    @property
    def share(self) -> float | None:
        return self.hits / self.count if self.count else None


class SequentialTest:
    """Evidence that the share under test exceeds the other one by more than `margin`.

    `expected` is a first guess of the other share.
    """

    __slots__ = (
        "_bets",
        "_expected",
        "_logs",
        "_margin",
        "_next_tuning",
        "_open_other",
        "_open_tested",
        "evidence",
        "other",
        "tested",
    )

    def __init__(self, margin: float, expected: float) -> None:
        self._margin = margin
        self._expected = expected
        self.tested, self.other = Tally(), Tally()
        self._open_tested, self._open_other = Tally(), Tally()
        self._bets: list[tuple[float, float]] = []
        """`o` and `a` of each alternative."""
        self._logs = [0.0] * len(EXCESSES)
        self._next_tuning = 0.0
        self.evidence = 1.0
        """The stake. If nothing is wrong, it ever reaches 1/alpha with a probability of at most
        alpha."""

    def __repr__(self) -> str:
        return f"<SequentialTest {self.tested} against {self.other}: {self.evidence:.3g}>"

    def add_tested(self, hit: bool) -> None:
        tally = self._open_tested
        if tally.count < LONGEST_ROUND:
            tally.count += 1
            tally.hits += hit
            if self._open_other.count:
                self._close()

    def add_other(self, hit: bool) -> None:
        self.add_others(1, int(hit))

    def add_others(self, count: int, hits: int) -> None:
        """Add several samples at once, at most `LONGEST_ROUND`."""
        tally = self._open_other
        if tally.count + count <= LONGEST_ROUND:
            tally.count += count
            tally.hits += hits
            if self._open_tested.count and tally.count:
                self._close()

    def _close(self) -> None:
        """Settle the bets of this round."""
        if self.tested.count >= self._next_tuning:
            self._tune()
        tested, other = self._open_tested, self._open_other
        k, m = tested.count, other.count
        for number, (o, a) in enumerate(self._bets):
            c = o + self._margin
            a = min(a, _MAX_STAKE * m / (k * (1 - o)))
            b = a * k / m
            self._logs[number] += (
                (tested.hits and tested.hits * log(1 + a * (1 - c)))
                + (k - tested.hits) * log(1 - a * c)
                + (other.hits and other.hits * log(1 - b * (1 - o)))
                + (m - other.hits) * log(1 + b * o)
            )
        self.evidence = sum(exp(min(value, _MAX_LOG)) for value in self._logs) / len(self._logs)
        for whole, part in ((self.tested, tested), (self.other, other)):
            whole.count += part.count
            whole.hits += part.hits
            part.count = part.hits = 0

    def _tune(self) -> None:
        """Choose the bets by the outcomes of earlier rounds."""
        self._next_tuning = self.tested.count * GROWTH
        k, m = self.tested.count or 1, self.other.count or 1
        guess = (self.other.hits + self._expected * PRIOR_SAMPLES) / (self.other.count + PRIOR_SAMPLES)
        left = 1 - self._margin - guess
        if left <= 0:  # the other share cannot be exceeded by the margin
            self._bets = []
            return
        self._bets = [_bet(k, m, guess, guess + self._margin + excess * left, self._margin) for excess in EXCESSES]


def _bet(k: int, m: int, other: float, tested: float, margin: float) -> tuple[float, float]:
    """Return `o` and `a` for the alternative `tested` and `other`, with `k` samples to `m`."""
    low, high = other, tested - margin
    for _ in range(_STEPS):
        o = (low + high) / 2
        c = o + margin
        if k * (c - tested) / (c * (1 - c)) + m * (o - other) / (o * (1 - o)) < 0:
            low = o
        else:
            high = o
    o = (low + high) / 2
    c = o + margin
    return o, (tested - c) / (c * (1 - c))
