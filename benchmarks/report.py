"""Results of `cost.py`: values of several rounds, ratios, targets, tables. Pure: no I/O, no
clock.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

OURS = "gateway"
THEIRS = "vllm-router"
_LOAD_TOLERANCE = 0.02
_BATCH_TOLERANCE = 0.15


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile: the smallest value that at least `share` (0 to 1) of all
    values do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def cost_per(cpu_seconds: float, count: int) -> float:
    """Return the CPU microseconds for each of `count` items.

    Raises:
        ValueError: the count is 0. Such a run has failed; it is not free.
    """
    if count <= 0:
        raise ValueError("nothing was counted in the window")
    return cpu_seconds / count * 1e6


def within_load(rate: float, wanted: float) -> bool:
    """Return whether a load is within 2 % of the intended one.

    Work in batches becomes cheaper with more load, so all subjects need the same load.
    """
    return abs(rate - wanted) <= _LOAD_TOLERANCE * wanted


@dataclass(frozen=True, slots=True)
class Target:
    """Upper limit for the ratio of our value to the other subject's, or for our own value if
    `ratio` is false.
    """

    limit: float
    ratio: bool = True


@dataclass(slots=True)
class Comparison:
    """One question, measured in rounds: the values and loads of each subject, in the order of the
    rounds.
    """

    title: str
    unit: str
    target: Target | None = None
    nominal_rate: float | None = None
    """Load per second that each subject must be under, within 2 %; None if the load depends on the
    subject.
    """
    values: dict[str, list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    batches: dict[str, list[float]] = field(default_factory=dict)
    """Tokens per read, on average: to hold tokens back and send them together is cheaper, but not
    better.
    """

    def add(self, subject: str, value: float, rate: float | None = None, batch: float | None = None) -> None:
        self.values.setdefault(subject, []).append(value)
        if rate is not None:
            self.rates.setdefault(subject, []).append(rate)
        if batch is not None:
            self.batches.setdefault(subject, []).append(batch)

    def ratios(self) -> tuple[float, float] | None:
        """Return our values divided by theirs, of the minima and of the medians; None if one is
        missing.
        """
        if not self.values.get(OURS) or not self.values.get(THEIRS):
            return None
        ours, theirs = self.values[OURS], self.values[THEIRS]
        return min(ours) / min(theirs), median(ours) / median(theirs)

    def ratio_in_rounds(self, subject: str = OURS) -> float | None:
        """Return the median, over the rounds, of a subject's value divided by theirs; None if one is missing.

        A machine's speed changes within minutes, and the values of one round are seconds apart. So this ratio
        repeats better than that of the medians.
        """
        ours, theirs = self.values.get(subject), self.values.get(THEIRS)
        if not ours or not theirs:
            return None
        return median(one / other for one, other in zip(ours, theirs, strict=True))

    def with_wrong_load(self) -> list[str]:
        """Return the subjects whose load was not the intended one, so their values are not
        comparable.
        """
        if self.nominal_rate is None:
            return []
        wanted = self.nominal_rate
        return [name for name, rates in self.rates.items() if not within_load(median(rates), wanted)]

    def comparable(self) -> bool:
        """Return whether all subjects had the intended load and about the same number of tokens per
        read.
        """
        batches = [median(values) for values in self.batches.values()]
        return not self.with_wrong_load() and (not batches or max(batches) <= (1 + _BATCH_TOLERANCE) * min(batches))

    def passed(self) -> bool | None:
        """Return whether the medians meet the target; None without a target or without comparable
        values.
        """
        if self.target is None or OURS not in self.values:
            return None
        if not self.target.ratio:
            return median(self.values[OURS]) <= self.target.limit
        ratios = self.ratios()
        return None if ratios is None or not self.comparable() else ratios[1] <= self.target.limit

    def lines(self) -> list[str]:
        """Return the table as text."""
        shown = [f"{self.title}", f"  {'':14}{'min':>9}{'median':>9}{'max':>9}  {self.unit}"]
        for name, values in self.values.items():
            rates = self.rates.get(name)
            load = f"   at {median(rates):,.0f}/s" if rates else ""
            if name in self.batches:
                load += f", {median(self.batches[name]):.2f} at a time"
            shown.append(f"  {name:14}{min(values):9.1f}{median(values):9.1f}{max(values):9.1f}{load}")
        ratios = self.ratios()
        if ratios is not None:
            shown.append(f"  {'ratio':14}{ratios[0]:9.2f}{ratios[1]:9.2f}{'':9}   {OURS} / {THEIRS}")
        if self.with_wrong_load():
            names = ", ".join(self.with_wrong_load())
            shown.append(f"  NOT COMPARABLE: the load of {names} was not within 2 % of {self.nominal_rate:,.0f}/s")
        elif not self.comparable():
            shown.append(
                "  NOT COMPARABLE: one sent more tokens at a time than the other, which is cheaper "
                "(a busy machine can cause this)"
            )
        if self.target is not None:
            quantity = "ratio of medians" if self.target.ratio else f"{OURS}'s median"
            shown.append(f"  target: {quantity} <= {self.target.limit:g}: {mark(self.passed())}")
        return shown

    def as_json(self) -> Mapping[str, object]:
        """Return the raw values, ratios and verdict for programs."""
        return {
            "title": self.title,
            "unit": self.unit,
            "values": self.values,
            "rates": self.rates,
            "batches": self.batches,
            "ratio_of_minima_and_medians": self.ratios(),
            "ratios_in_rounds": {name: self.ratio_in_rounds(name) for name in self.values},
            "target": self.target.limit if self.target else None,
            "passed": self.passed(),
        }


def mark(passed: bool | None) -> str:
    """Return a verdict as text."""
    return {True: "PASS", False: "FAIL", None: "not measured"}[passed]
