"""`--fail-if`: conditions on the figures of a result, such as `p99_ttft_ms>500`. Pure."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_CONDITION = re.compile(
    r"\s*([a-z][a-z0-9_.]*)\s*(<=|>=|==|!=|<|>)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*", re.IGNORECASE
)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_PERCENTILE = re.compile(r"p(\d{1,2}(?:\.\d+)?)_(.+)")


class InvalidCondition(ValueError):
    """A condition cannot be understood."""


class UnknownFigure(InvalidCondition):
    """A result has no figure of that name."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A failure, if the figure `name` compares so with `limit`."""

    name: str
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse `NAME OPERATOR NUMBER`.

        Raises:
            InvalidCondition: it has another form.
        """
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise InvalidCondition(f"{text!r}: expected a figure, one of < <= > >= == !=, and a number")
        return cls(found[1].lower(), found[2], float(found[3]))

    @property
    def percentile(self) -> float | None:
        """The percentile that the figure is, None if it is another figure."""
        found = _PERCENTILE.fullmatch(self.name)
        return float(found[1]) if found else None

    def problem(self, figures: Mapping[str, Any]) -> str | None:
        """Return why the result fails, None if it does not.

        A figure without a value fails too: nothing was shown.

        Raises:
            UnknownFigure: there is no such figure.
        """
        if self.name not in figures:
            numbers = sorted(key for key, value in figures.items() if not isinstance(value, (str, dict, list)))
            raise UnknownFigure(f"{self.name!r} is not a figure of this result; it has {', '.join(numbers)}")
        value = figures[self.name]
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise UnknownFigure(f"{self.name!r} is not a number")
        if value is None:
            few = (figures.get("too_few") or {}).get(self.name)
            reason = f": it needs {few['needs']} values and there are {few['has']}" if few else ""
            return f"{self.name} has no value{reason}"
        if _OPERATORS[self.operator](value, self.limit):
            return f"{self.name} is {value:.6g} ({self.operator} {self.limit:g})"
        return None
