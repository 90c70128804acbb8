"""The table of a chaos run: for each kind of fault, what its clients saw meanwhile. No I/O."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.accounting import Logged
from benchmarks.clients import ClientRecord

PRIMARY = "vllm"
NO_FAULT = "no fault"


class Fault(NamedTuple):
    """One fault, from its beginning to the end of the recovery, on the monotonic clock.

    `is_recovered`: the engine answered again, and the gateway sent it requests, within the time
    that the run waits for it.
    """

    kind: str
    began: float
    ended: float
    is_recovered: bool = True


@dataclass(slots=True)
class Row:
    """Outcome of the requests during the faults of one kind.

    Attributes:
        errors: error answers by tier, status, code and the reason in the log.
        cuts: answers that ended with an error after they had begun, by tier, code and reason.
        bad: requests that are lost, wrong or hung.
    """

    kind: str
    faults: int = 0
    unrecovered: int = 0
    requests: int = 0
    served: int = 0
    by_fallback: int = 0
    left: int = 0
    bad: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    longest_recovery: float = 0.0

    def take(self, record: ClientRecord, line: Logged | None) -> None:
        self.requests += 1
        self.longest = max(self.longest, record.seconds)
        reason = f" ({line.reason})" if line is not None and line.reason else ""
        tier = record.kind.rpartition(" ")[2]
        match record.seen:
            case "ok":
                self.served += record.backend == PRIMARY
                self.by_fallback += record.backend != PRIMARY
            case "error":
                self.errors[f"{tier} {record.status} {record.code}{reason}"] += 1
            case "cut":
                self.cuts[f"{tier} {record.code}{reason}"] += 1
            case "left":
                self.left += 1
            case _:
                self.bad += 1


def rows(
    records: Iterable[ClientRecord], faults: Sequence[Fault], exchanges: Mapping[str, Sequence[Logged]]
) -> list[Row]:
    """Return a row for each kind of fault, and one for the time without any.

    A request belongs to the fault during which it ended, else to the first during which it was under
    way.
    """
    found: dict[str, Row] = {}
    for fault in faults:
        row = found.setdefault(fault.kind, Row(fault.kind))
        row.faults += 1
        row.unrecovered += not fault.is_recovered
        row.longest_recovery = max(row.longest_recovery, fault.ended - fault.began)
    found[NO_FAULT] = Row(NO_FAULT)
    for record in records:
        lines = exchanges.get(record.id)
        found[_kind_of(record, faults)].take(record, lines[0] if lines else None)
    return list(found.values())


def _kind_of(record: ClientRecord, faults: Sequence[Fault]) -> str:
    end = record.sent + record.seconds
    met = [fault for fault in faults if record.sent < fault.ended and end > fault.began]
    return next((fault for fault in met if end < fault.ended), met[0]).kind if met else NO_FAULT


def table(found: Sequence[Row]) -> str:
    """Return the table as text, with the errors of each row below it."""
    head = (
        f"  {'fault':26} {'n':>4} {'requests':>8} {'ok':>6} {'fallback':>8} {'errors':>6} {'cut':>5} {'left':>5} "
        f"{'bad':>4} {'longest wait':>12} {'longest fault':>13}"
    )
    lines = [head]
    for row in found:
        lines.append(
            f"  {row.kind:26} {row.faults:4} {row.requests:8} {row.served:6} {row.by_fallback:8} "
            f"{row.errors.total():6} {row.cuts.total():5} {row.left:5} {row.bad:4} {row.longest:10.1f} s "
            f"{row.longest_recovery:11.1f} s" + (f"  not recovered {row.unrecovered}" if row.unrecovered else "")
        )
        for what, counts in (("errors", row.errors), ("cut", row.cuts)):
            if counts:
                lines.append(f"    {what}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    return "\n".join(lines)
