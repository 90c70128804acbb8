"""Accounts of the requests of a run: what clients saw, next to the gateway's log and metrics.

Every request has to be in the log once, with the status and the code that its client saw, and the
metrics have to count what the log has. Does not use the network.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.clients import ClientRecord


class Logged(NamedTuple):
    """One line of the request log."""

    outcome: str
    status: int
    code: str | None
    reason: str | None
    phase: str
    backend: str
    chosen: str
    duration: float
    attempts: int


class GatewayLog:
    """The gateway's JSON log, read as it grows.

    Attributes:
        exchanges: lines of the request log by request id.
        crashes: other lines at level error, or with an exception, and how often each appeared.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.exchanges: dict[str, list[Logged]] = {}
        self.crashes: Counter[str] = Counter()

    def read(self) -> None:
        """Read the lines that are complete and new."""
        with self._path.open("rb") as log:
            log.seek(self._offset)
            while (line := log.readline()).endswith(b"\n"):
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            self.crashes[f"not JSON: {line[:200]!r}"] += 1
            return
        if found["event"] == "exchange":
            logged = Logged(*(found[name] for name in Logged._fields))
            self.exchanges.setdefault(found["request_id"], []).append(logged)
        elif found["level"] == "error" or "exception" in found:
            where = f" [{found['exception']} at {', '.join(found['at'])}]" if "exception" in found else ""
            self.crashes[found["event"][:2000] + where] += 1


class MetricsSample(NamedTuple):
    """The metrics that an account needs: requests by outcome, and those that run and wait."""

    outcomes: Counter[str]
    running: float
    waiting: float


def read_metrics(text: str) -> MetricsSample:
    """Parse Prometheus text."""
    outcomes: Counter[str] = Counter()
    gauges = {"gateway_requests_running": 0.0, "gateway_requests_waiting": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "gateway_requests_total":
                outcomes[sample.labels["outcome"]] += round(sample.value)
            elif sample.name in gauges:
                gauges[sample.name] += sample.value
    return MetricsSample(outcomes, *gauges.values())


@dataclass(slots=True)
class Account:
    """Result of a comparison.

    Attributes:
        seen: number of requests by what their clients saw.
        outcomes: number of requests by their outcome in the log.
        unread: clients that left while they sent the first bytes, and of which the log has no line.
        problems: one line for each request that is not accounted for, and for each difference.
    """

    seen: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    problems: list[str] = field(default_factory=list)


def account(
    records: Iterable[ClientRecord], exchanges: Mapping[str, Sequence[Logged]], counted: Mapping[str, int]
) -> Account:
    """Compare what clients saw with the log, and the log with the metrics."""
    found = Account()
    sent = set()
    for record in records:
        sent.add(record.id)
        found.seen[record.seen] += 1
        lines = exchanges.get(record.id, ())
        if not lines and record.seen == "left" and record.note == "uploading":
            found.unread += 1
        elif problem := _mismatch(record, lines):
            found.problems.append(f"{record.id} ({record.kind}): {problem}")
    for request_id, lines in exchanges.items():
        found.outcomes.update(line.outcome for line in lines)
        if request_id not in sent:
            found.problems.append(f"{request_id}: in the log, but no client sent it")
    for outcome in sorted(set(found.outcomes) | set(counted)):
        if found.outcomes[outcome] != counted.get(outcome, 0):
            found.problems.append(
                f"outcome {outcome}: the log has {found.outcomes[outcome]}, the metrics {counted.get(outcome, 0)}"
            )
    return found


def _mismatch(record: ClientRecord, lines: Sequence[Logged]) -> str:
    """Return why the request is not accounted for, empty if it is."""
    saw = f"the client saw {record.seen} {record.status} {record.code or ''}".rstrip()
    if record.seen in ("lost", "wrong", "hung"):
        return f"{saw} after {record.seconds:.2f} s ({record.note}); the log has {list(lines)}"
    if len(lines) != 1:
        return f"{saw} ({record.note}), and the log has {len(lines)} lines"
    line = lines[0]
    fits = {
        "ok": line.outcome == "ok" and line.backend == record.backend,
        "error": (line.status, line.code) == (record.status, record.code),
        "cut": line.status >= 500 and line.code == record.code,
        "left": True,  # a client may leave at the moment at which its request ends in any way
    }
    return "" if fits[record.seen] else f"{saw} from {record.backend or 'no backend'}, and the log has {line}"
