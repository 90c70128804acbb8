"""The arithmetic and the print of `cost.py`: series of rounds, ratios, targets. Pure: no I/O, no clock."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

OURS = "gateway"
THEIRS = "vllm-router"
_LOAD_TOLERANCE = 0.02
_BATCH_TOLERANCE = 0.15


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` (0 to 1) of all do not exceed. ValueError for no values."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def cost_per(cpu_seconds: float, count: int) -> float:
    """CPU microseconds for each of `count` things. ValueError when nothing was counted: that is a failed run, not a free one."""
    if count <= 0:
        raise ValueError("nothing was counted in the window")
    return cpu_seconds / count * 1e6


def within_load(rate: float, wanted: float) -> bool:
    """Whether a load came within 2 % of what it should be: what is done at once gets cheaper with the load, so it must be the same."""
    return abs(rate - wanted) <= _LOAD_TOLERANCE * wanted


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be reached: at most `limit`, by our ratio to the other contestant, or by our own value where `ratio` is false."""

    limit: float
    ratio: bool = True


@dataclass(slots=True)
class Comparison:
    """One question, asked in rounds: each contestant's values in the order of the rounds, and the load that each was under."""

    title: str
    unit: str
    target: Target | None = None
    nominal_rate: float | None = None
    """The load a second that each contestant must have been under, within 2 %; None where the load follows the contestant."""
    values: dict[str, list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    batches: dict[str, list[float]] = field(default_factory=dict)
    """Tokens that came together, on average: what is held back and sent together is cheaper, and no merit."""

    def add(self, contestant: str, value: float, rate: float | None = None, batch: float | None = None) -> None:
        self.values.setdefault(contestant, []).append(value)
        if rate is not None:
            self.rates.setdefault(contestant, []).append(rate)
        if batch is not None:
            self.batches.setdefault(contestant, []).append(batch)

    def ratios(self) -> tuple[float, float] | None:
        """Ours to theirs: of the minima, of the medians; None when one did not run."""
        if not self.values.get(OURS) or not self.values.get(THEIRS):
            return None
        ours, theirs = self.values[OURS], self.values[THEIRS]
        return min(ours) / min(theirs), median(ours) / median(theirs)

    def uneven(self) -> list[str]:
        """Contestants whose load was not what it should have been: their figures cannot be compared."""
        if self.nominal_rate is None:
            return []
        wanted = self.nominal_rate
        return [name for name, rates in self.rates.items() if not within_load(median(rates), wanted)]

    def comparable(self) -> bool:
        """Whether all were under the load that was meant, and sent about as many tokens at a time."""
        batches = [median(values) for values in self.batches.values()]
        return not self.uneven() and (not batches or max(batches) <= (1 + _BATCH_TOLERANCE) * min(batches))

    def passed(self) -> bool | None:
        """Whether the target is reached, by medians; None without a target or without the figures to tell."""
        if self.target is None or OURS not in self.values:
            return None
        if not self.target.ratio:
            return median(self.values[OURS]) <= self.target.limit
        ratios = self.ratios()
        return None if ratios is None or not self.comparable() else ratios[1] <= self.target.limit

    def lines(self) -> list[str]:
        """The table that a person reads."""
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
        if self.uneven():
            shown.append(
                f"  NOT COMPARABLE: the load of {', '.join(self.uneven())} was not {self.nominal_rate:,.0f}/s within 2 %"
            )
        elif not self.comparable():
            shown.append(
                "  NOT COMPARABLE: one sent more tokens at a time than the other, which is cheaper (too busy a machine does that)"
            )
        if self.target is not None:
            what = "ratio of medians" if self.target.ratio else f"{OURS}'s median"
            shown.append(f"  target: {what} <= {self.target.limit:g}: {mark(self.passed())}")
        return shown

    def as_json(self) -> Mapping[str, object]:
        """The same for programs: raw values, ratios, verdict."""
        return {
            "title": self.title,
            "unit": self.unit,
            "values": self.values,
            "rates": self.rates,
            "batches": self.batches,
            "ratio_of_minima_and_medians": self.ratios(),
            "target": self.target.limit if self.target else None,
            "passed": self.passed(),
        }


def mark(passed: bool | None) -> str:
    """A verdict in one word."""
    return {True: "PASS", False: "FAIL", None: "not measured"}[passed]
