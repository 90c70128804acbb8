"""Cost of a limited key: what its limits add to a request, in microseconds.

`make bench-saturation` prints it. The calls are those of an endpoint: a place among the requests of
the minute and those in flight, a reservation of tokens, the header lines with what is left, and at
the end what was really used.
"""

import time

from gateway.keys.account import Account
from gateway.keys.policy import KeyPolicy, Limits

LIMITS = Limits(requests_per_minute=10**7, tokens_per_minute=10**10, tokens_per_day=10**12, concurrency=8192)


def cost_of_a_limited_key(rounds: int = 50, requests: int = 200) -> float:
    """Return the microseconds of the fastest round."""
    account = Account(KeyPolicy(name="bench", digest=b"", limits=LIMITS), time.monotonic, time.time)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(requests):
            hold = account.begin()
            if account.allows("standard"):
                hold.reserve("standard", 700, 100)
            lines = b"" + hold.lines
            hold.count(40, 100)
            hold.end()
            assert lines
        best = min(best, (time.perf_counter() - began) / requests * 1e6)
    return best


if __name__ == "__main__":
    print(f"a limited key: {cost_of_a_limited_key():.2f} µs a request")
