"""Decision whether two workloads may be compared. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.bench.results import CellValue

MISSING = "–"
_OF_THE_SIDE = frozenset({"model", "models", "url", "api", "target", "label"})
"""Fields that may differ: they are what is compared."""


@dataclass(frozen=True, slots=True)
class Unlike:
    """A field of the workload that differs."""

    field: str
    a: CellValue
    b: CellValue

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.a)} in A, {_shown(self.b)} in B"


def _shown(value: CellValue) -> str:
    return MISSING if value is None else str(value)


def differences(a: Mapping[str, CellValue], b: Mapping[str, CellValue]) -> list[Unlike]:
    """Return the fields by which the workloads differ, the ones that explain others first.

    A field that one side lacks differs too: what was not recorded cannot be shown to be equal.
    """
    names = sorted({*a, *b} - _OF_THE_SIDE, key=lambda name: (name.endswith("sha256"), name))
    return [Unlike(name, a.get(name), b.get(name)) for name in names if not _same(a.get(name), b.get(name))]


def _same(a: CellValue, b: CellValue) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return float(a) == float(b)
    return a == b
