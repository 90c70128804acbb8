"""Targets such as `p95_ttft_ms<1000`. Pure."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

_TARGET = re.compile(r"\s*((?:p(\d{1,2}(?:\.\d+)?)|mean|median)_(ttft|tpot|itl|e2el)_ms)\s*(<=|<)\s*(\d+(?:\.\d+)?)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le}


class Target(Struct, frozen=True):
    """A figure of a benchmark that has to stay below a limit, in milliseconds.

    `name` is its name in a result, `metric` one of ttft, tpot, itl and e2el.
    """

    name: str
    metric: str
    percentile: float | None
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parse `FIGURE < MILLISECONDS`.

        Raises:
            ValueError: it has another form.
        """
        found = _TARGET.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r}: expected a latency in milliseconds and its limit, such as p95_ttft_ms<1000; the latency is "
                "ttft, tpot, itl or e2el with p50 to p99, mean or median"
            )
        name, percentile, metric, sign, limit = found.groups()
        return cls(name, metric, float(percentile) if percentile else None, sign, float(limit))

    @property
    def share(self) -> float:
        """Share of the requests that have to be as fast: the mean counts as the half."""
        return 0.5 if self.percentile is None else self.percentile / 100

    def value(self, figures: Mapping[str, Any]) -> float | None:
        """Return the figure, None if the result has no value for it."""
        value = figures.get(self.name)
        return value if isinstance(value, float) else None

    def holds(self, value: float | None) -> bool:
        """Return whether the target is met; a missing value does not meet it."""
        return value is not None and _OPERATORS[self.operator](value, self.limit)

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.limit:g}"
