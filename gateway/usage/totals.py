"""Totals of usage: what exchanges add up to, by key, person, tier, backend and day. Pure."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gateway.chat.answer import CachedUsage
from gateway.telemetry.exchange import NONE, Attribution, Exchange

MAX_PERSONS = 10_000
"""Maximum number of persons of a key and a day that are told apart. Further ones count as `OTHERS`."""
MAX_PERSONS_OF_ALL = 50_000
"""The same for all keys together. A single key cannot use it up, so it hides no other key's persons."""
MAX_PERSON = 128
"""Characters of a person's name that are kept."""
OTHERS = "(others)"

DIMENSIONS = ("key", "person", "tier", "backend", "day")
COUNTS = ("requests", "refused", "prompt_tokens", "completion_tokens", "cached_tokens", "images", "seconds")


class Group(NamedTuple):
    """Subject of a row of usage. Without a key, person, tier or backend the value is `none`."""

    key: str
    person: str
    tier: str
    backend: str
    day: str


Counts = list[float]
"""Sums in the order of `COUNTS`."""
Row = dict[str, Any]
"""Fields of `DIMENSIONS`, or some of them, and the sums."""


class Totals:
    """Sums that have not been written yet."""

    def __init__(self) -> None:
        self.rows: dict[Group, Counts] = {}
        self._day = ""
        self._persons: dict[str, set[str]] = {}
        """Persons of the day by their key."""
        self._person_count = 0

    def __repr__(self) -> str:
        return f"<Totals {len(self.rows)} rows>"

    def add(self, exchange: Exchange, attribution: Attribution | None, day: str) -> None:
        """Add one exchange that ended on `day`.

        A request counts if a backend began to serve it; else it was refused, unless its client left
        or it needed no backend.
        """
        is_served = exchange.attempts > 0
        is_refused = not is_served and exchange.status >= 400 and exchange.outcome != "cancelled"
        if not (is_served or is_refused):
            return
        key = exchange.key or exchange.key_id or NONE
        group = Group(
            key,
            NONE if attribution is None else self._person(key, attribution.person, day),
            exchange.tier,
            exchange.backend,
            day,
        )
        counts = self.rows.get(group)
        if counts is None:
            counts = self.rows[group] = [0] * len(COUNTS)
        counts[0 if is_served else 1] += 1
        usage = exchange.usage
        if usage is not None:
            counts[2] += usage.prompt_tokens
            counts[3] += usage.completion_tokens
            counts[4] += usage.cached_tokens if isinstance(usage, CachedUsage) else 0
        counts[3] += exchange.sent_tokens
        if attribution is not None and is_served:
            counts[5] += attribution.images
        counts[6] += exchange.upstream

    def merge(self, rows: Iterable[tuple[Group, Sequence[float]]], most: int) -> int:
        """Add rows that could not be written; return how many are lost because there are `most` already."""
        lost = 0
        for group, more in rows:
            counts = self.rows.get(group)
            if counts is not None:
                self.rows[group] = [one + other for one, other in zip(counts, more, strict=True)]
            elif len(self.rows) < most:
                self.rows[group] = list(more)
            else:
                lost += 1
        return lost

    def take(self) -> dict[Group, Counts]:
        """Return the rows, and begin anew."""
        rows, self.rows = self.rows, {}
        return rows

    def _person(self, key: str, name: str, day: str) -> str:
        if not name:
            return NONE
        if day != self._day:
            self._day = day
            self._persons.clear()
            self._person_count = 0
        name = _readable(name)
        persons = self._persons.get(key)
        if persons is None:
            persons = self._persons[key] = set()
        if name not in persons:
            if len(persons) >= MAX_PERSONS or self._person_count >= MAX_PERSONS_OF_ALL:
                return OTHERS
            persons.add(name)
            self._person_count += 1
        return name


def is_row(row: Row) -> bool:
    """Return whether a row that another program wrote has all fields and sums."""
    return all(isinstance(row.get(name), str) for name in DIMENSIONS) and all(
        isinstance(row.get(name), int | float) for name in COUNTS
    )


def summed(rows: Iterable[Row], by: Sequence[str]) -> list[Row]:
    """Return the sums of rows by the fields `by`, in their order. The rows have at least these fields."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        group = tuple(row[name] for name in by)
        total = found.get(group)
        if total is None:
            found[group] = {name: row[name] for name in (*by, *COUNTS)}
        else:
            for name in COUNTS:
                total[name] += row[name]
    for total in found.values():
        total["seconds"] = round(total["seconds"], 6)
    return [found[group] for group in sorted(found)]


def _readable(name: str) -> str:
    """Return the text of a header's value, which is UTF-8 in the headers of most programs."""
    with suppress(UnicodeError):
        name = name.encode("latin-1").decode()
    return name[:MAX_PERSON]
