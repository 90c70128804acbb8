"""What replicas of one machine use of the limits of keys: the part of `operations.lua` that shares them.

Pure; the clock is passed in. `key_limits.py` describes what a replica does with the answers.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

LIFE_SECONDS = {"requests": 61.0, "tokens": 61.0, "running": 1.0, "day": 172_800.0}
"""Time for which the use of a replica counts that has ended."""
FORGOTTEN_SECONDS = max(LIFE_SECONDS.values())
"""Time after which a limit is forgotten that no replica has reported: those of a day have its date in their names."""


class _Use(NamedTuple):
    held: int
    used: int


class KeyQuotas:
    """Quotas and use of each limit, by the names of replicas."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, dict[str, _Use]] = {}
        self._reported: OrderedDict[str, float] = OrderedDict()
        """Times of the last reports of these limits, the latest last."""
        self._ended: dict[str, float] = {}
        """Times at which replicas have ended."""

    def __repr__(self) -> str:
        return f"<KeyQuotas of {len(self._uses)} limits>"

    def end(self, replica: str) -> None:
        """Record that a replica has ended. It loses what it held and has not used."""
        now = self._clock()
        self._ended = {name: at for name, at in self._ended.items() if now - at < 2 * FORGOTTEN_SECONDS}
        self._ended[replica] = now

    def share(self, replica: str, names: Sequence[str], arguments: Sequence[Any]) -> list[int]:
        """Record the use of limits, and return four numbers for each.

        `arguments` are kind, limit, use, wanted quota and the largest amount that one request waits for,
        of each of the limits `names`. The numbers are the quota, what the others have used, what they
        hold, and 0.
        """
        answer: list[int] = []
        now = self._clock()
        self._forget_old(now)
        for place, name in enumerate(names):
            kind, limit, used, wanted, largest = arguments[5 * place : 5 * place + 5]
            others = list(self._others(name, kind, replica))
            held = sum(use.held for use in others)
            quota = max(used, min(wanted, limit - held))
            if held == 0 and used == 0:
                quota = max(quota, largest)  # a request that exceeds the limit by itself, or it would never be admitted
            if quota:
                self._uses.setdefault(name, {})[replica] = _Use(quota, used)
                self._reported[name] = now
                self._reported.move_to_end(name)
            else:
                self._forget(name, replica)
            answer += [quota, sum(use.used for use in others), held, 0]
        return answer

    def _others(self, name: str, kind: str, replica: str) -> Iterator[_Use]:
        now = self._clock()
        for other, use in list(self._uses.get(name, {}).items()):
            if other == replica:
                continue
            ended = self._ended.get(other)
            if ended is None:
                yield use
            elif now - ended >= LIFE_SECONDS[kind]:
                self._forget(name, other)
            else:
                yield _Use(use.used, use.used)

    def _forget(self, name: str, replica: str) -> None:
        uses = self._uses.get(name)
        if uses is not None:
            uses.pop(replica, None)
            if not uses:
                del self._uses[name], self._reported[name]

    def _forget_old(self, now: float) -> None:
        while self._reported and now - next(iter(self._reported.values())) >= FORGOTTEN_SECONDS:
            name, _ = self._reported.popitem(last=False)
            del self._uses[name]


class SavedTokens:
    """Section `keys` of the state file: the sums of what all replicas have used of the day's tokens."""

    def __init__(self) -> None:
        self._day = ""
        self._parts: dict[str, dict[str, Any]] = {}
        self._tokens: dict[str, int] = {}
        self._persons: dict[str, dict[str, int]] = {}
        """Sums of the parts."""

    def merged(self, replica: str, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the section, after `replica` has saved its own part of it."""
        if saved["day"] != self._day:
            self._day, self._parts, self._tokens, self._persons = saved["day"], {}, {}, {}
        before = self._parts.get(replica)
        self._parts[replica] = saved
        if before is not None:
            self._count(before, -1)
        self._count(saved, 1)
        persons = {key: dict(of_key) for key, of_key in self._persons.items() if of_key}
        return {"day": self._day, "tokens": dict(self._tokens), "persons": persons}

    def _count(self, part: dict[str, Any], sign: int) -> None:
        _count(self._tokens, part["tokens"], sign)
        for key, of_key in part["persons"].items():
            _count(self._persons.setdefault(key, {}), of_key, sign)


def _count(sums: dict[str, int], counts: Mapping[str, int], sign: int) -> None:
    """Add counts, or take them away again; a sum of 0 is left out."""
    for name, count in counts.items():
        total = sums.get(name, 0) + sign * count
        if total:
            sums[name] = total
        else:
            sums.pop(name, None)
