"""Is a share larger on one side than on the other? A test that may be looked at after every sample. Pure.

Theory of operation. Two streams of yes and no: `p` is the share of yes on the side under test, `q` on the other. Nothing is to be said while
`p <= q + margin`. A gambler starts with 1 and bets against that, round by round; nobody can expect to win from a fair game, so the chance that
the stake ever reaches 1/alpha while there is nothing wrong is at most alpha, however often one looks and whenever one stops (Ville 1939). That is
testing by betting: Shafer 2021 (arXiv 1903.06991), Ramdas and others 2023 (arXiv 2210.01948), and for two streams of yes and no Turner, Ly and
Grünwald 2021 (arXiv 2106.02693), whose bets these come near. A test with a fixed number of samples has no such promise: looked
at after each of 1,000 samples, one of 1 % cries wolf in every tenth case and more.

1. A round closes as soon as both sides have brought something: `k` samples of the side under test, `m` of the other.
2. Each yes under test multiplies the stake by `1 + a (1 - c)`, each no by `1 - a c`; each yes of the other side by `1 - b (1 - o)`, each no by
   `1 + b o`, where `c = o + margin` and `b = a k / m`. On average the factors are `1 + a (p - c)` and `1 - b (q - o)`. For these
   `k a (p - c) - m b (q - o) = k a (p - q - margin) <= 0`, so by the inequality of the arithmetic and the geometric mean their product is at
   most 1. This holds for every `o` and every `a > 0` that leave the factors positive, as long as they are chosen before the round's outcomes.
3. What is chosen decides only how fast the stake grows when something is wrong. `o` lies where it is hardest to tell from the alternative
   (the nearest point in the sense of Kullback and Leibler), `a` as the ratio of likelihoods there has it.
4. How much is wrong is not known before. The stake is divided among `EXCESSES`, each bets on its own; the average of fair games is one.

It takes samples for independent of each other. What hits many at once, on one side alone, counts as many.
"""

from math import exp, log

EXCESSES = (0.03, 0.12, 0.5)
"""Alternatives: by how much of what is left to 1 the share under test exceeds the other one's and the margin."""
PRIOR_SAMPLES = 20
LONGEST_ROUND = 200
"""Samples of a side; what comes beyond is left out until the other side brings something."""
GROWTH = 1.2
"""Factor of samples after which the bets are made anew."""
_STEPS = 20
_NEVER_BROKE = 0.98
_LOG_MOST = 700.0


class Tally:
    """Samples of one side, and how many of them were a yes."""

    __slots__ = ("count", "hits")

    def __init__(self) -> None:
        self.count = self.hits = 0

    def __repr__(self) -> str:
        return f"<Tally {self.hits} of {self.count}>"

    @property
    def share(self) -> float | None:
        return self.hits / self.count if self.count else None


class SequentialTest:
    """Gathers what speaks for the share under test being more than `margin` above the other. `expected` is a first guess of the other."""

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
        """Of each alternative: `o` and `a`."""
        self._logs = [0.0] * len(EXCESSES)
        self._next_tuning = 0.0
        self.evidence = 1.0
        """The stake. With nothing wrong it ever reaches 1/alpha with a chance of at most alpha."""

    def __repr__(self) -> str:
        return f"<Comparison {self.tested} beside {self.other}: {self.evidence:.3g}>"

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
        """Several at once, `LONGEST_ROUND` at most."""
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
            a = min(a, _NEVER_BROKE * m / (k * (1 - o)))
            b = a * k / m
            self._logs[number] += (
                (tested.hits and tested.hits * log(1 + a * (1 - c)))
                + (k - tested.hits) * log(1 - a * c)
                + (other.hits and other.hits * log(1 - b * (1 - o)))
                + (m - other.hits) * log(1 + b * o)
            )
        self.evidence = sum(exp(min(value, _LOG_MOST)) for value in self._logs) / len(self._logs)
        for whole, part in ((self.tested, tested), (self.other, other)):
            whole.count += part.count
            whole.hits += part.hits
            part.count = part.hits = 0

    def _tune(self) -> None:
        """Choose the bets by what came in earlier rounds."""
        self._next_tuning = self.tested.count * GROWTH
        k, m = self.tested.count or 1, self.other.count or 1
        guess = (self.other.hits + self._expected * PRIOR_SAMPLES) / (self.other.count + PRIOR_SAMPLES)
        left = 1 - self._margin - guess
        if left <= 0:  # the other side cannot be exceeded by so much
            self._bets = []
            return
        self._bets = [_bet(k, m, guess, guess + self._margin + excess * left, self._margin) for excess in EXCESSES]


def _bet(k: int, m: int, other: float, tested: float, margin: float) -> tuple[float, float]:
    """`o` and `a` for the alternative that the shares are `tested` and `other`, with `k` samples to `m`."""
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
