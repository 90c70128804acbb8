"""Cost of a key with a name, in microseconds a request: without limits, with them, and with limits of persons.

`make bench-saturation` prints it. The calls are those of an endpoint: a place among the requests of
the minute and those in flight, a reservation of tokens, the header lines with what is left, and at
the end what was really used. A key of `GATEWAY_API_KEYS` makes none of them. The kinds take turns, so
a busy machine costs all of them the same.
"""

import time
from collections.abc import Iterator

from gateway.keys.account import Account
from gateway.keys.policy import KeyPolicy, Limits

ALL = Limits(requests_per_minute=10**7, tokens_per_minute=10**10, tokens_per_day=10**12, concurrency=8192)
KINDS: dict[str, tuple[Limits, Limits | None]] = {
    "no limits": (Limits(), None),
    "all limits": (ALL, None),
    "requests per minute": (Limits(requests_per_minute=10**7), None),
    "tokens per minute": (Limits(tokens_per_minute=10**10), None),
    "tokens per day": (Limits(tokens_per_day=10**12), None),
    "all limits, of each person too": (ALL, ALL),
}
"""Limits of the key and of each person behind it."""


def cost_of_keys(rounds: int = 100, requests: int = 100) -> dict[str, float]:
    """Return the microseconds of a request in the fastest round, for each kind of key."""
    accounts = {
        kind: Account(
            KeyPolicy(name="bench", digest=b"", limits=limits, per_person=of_person, is_trusted=of_person is not None),
            time.monotonic,
            time.time,
        )
        for kind, (limits, of_person) in KINDS.items()
    }
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(rounds):
        for kind, account in accounts.items():
            best[kind] = min(best[kind], _seconds(account, requests) / requests * 1e6)
    return best


def _seconds(account: Account, requests: int) -> float:
    person = "" if account.policy.per_person is None else "ada"
    lines = b""
    began = time.perf_counter()
    for _ in range(requests):
        hold = account.begin(person)
        if account.allows("standard"):
            hold.reserve("standard", 700, 100)
        lines = b"" + hold.lines
        hold.count(40, 100)
        hold.end()
    seconds = time.perf_counter() - began
    assert bool(lines) == account.has_lines
    return seconds


def report() -> Iterator[str]:
    """Yield a line for each kind of key."""
    for kind, cost in cost_of_keys().items():
        yield f"a key with {kind}: {cost:.2f} µs a request"


if __name__ == "__main__":
    print("\n".join(report()))
