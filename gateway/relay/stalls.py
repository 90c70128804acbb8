"""Stalls: finds servers that hang before the first-token timeouts of their requests show it. Pure.

A server is stalled if `WITNESSES` requests for the same model in the same lane have waited long for
their first tokens, and nothing at all has come from the server meanwhile. What is long depends on
what is usual there: `FACTOR` times the longest recent time to the first token of requests that were
at least as large, and at least `LEAST_SECONDS` or `LEAST_SHARE` of the first-token timeout. So a
prompt that is longer than those before is no evidence, nor is a server that has not answered enough
requests to judge by. An answer that is not streamed shows nothing until its end, so it is no evidence
either, and there have to be at least as many witnesses as such answers. Of a server that was ejected
because it hangs, the request on trial is witness enough. Servers that load models on
demand (Ollama) are left out: a load by another program looks the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gateway.admission.fair_queue import Claim
from gateway.upstream.outlier_detection import STALL, OutlierDetector, party_of
from gateway.upstream.server import Server

WITNESSES = 3
FACTOR = 8.0
LEAST_SECONDS = 15.0
LEAST_SHARE = 0.25


class Attempt(NamedTuple):
    """A request at a server, as far as it tells whether the server hangs.

    `since` is the time at which it was sent, or at which the last piece of its answer came. `size` is
    in bytes.
    """

    server: Server
    detector: OutlierDetector
    is_streamed: bool
    """True if the server was asked for a stream."""
    is_waiting: bool
    """True until the first piece of the answer."""
    is_trial: bool
    """True if it is the request that an ejected server gets on trial."""
    since: float
    size: int
    first_token_timeout: float
    claim: Claim
    has_alternative: Callable[[], bool]
    """Returns whether another server or backend could serve the request now."""


def eject_stalled(attempts: Iterable[Attempt], now: float) -> None:
    """Eject the servers that are stalled at the time `now` and whose requests could be served elsewhere."""
    waiting: defaultdict[OutlierDetector, list[Attempt]] = defaultdict(list)
    signs: dict[Server, float] = {}
    unstreamed: Counter[Server] = Counter()
    for attempt in attempts:
        if not attempt.is_streamed:
            unstreamed[attempt.server] += 1
        elif attempt.is_waiting:
            waiting[attempt.detector].append(attempt)
        else:
            signs[attempt.server] = max(attempt.since, signs.get(attempt.server, attempt.since))
    for detector, found in waiting.items():
        server = found[0].server
        sign = max((other.last_success for other in server.detectors.values()), default=0.0)
        sign = max(sign, signs.get(server, sign))
        witnesses = [attempt for attempt in found if _waits_too_long(attempt, now - max(attempt.since, sign))]
        if detector.restrains:
            for attempt in witnesses:
                if attempt.is_trial and detector.is_hung and attempt.has_alternative():
                    detector.fail(STALL, attempt.since, attempt.claim, is_trial=True)
        elif len(witnesses) >= max(WITNESSES, unstreamed[server]) and any(
            attempt.has_alternative() for attempt in witnesses
        ):
            detector.stall({party_of(attempt.claim) for attempt in witnesses})


def _waits_too_long(attempt: Attempt, seconds: float) -> bool:
    """Return whether no piece has come for far longer than usual before one."""
    least = min(LEAST_SECONDS, LEAST_SHARE * attempt.first_token_timeout)
    if seconds < least:
        return False
    usual = attempt.detector.usual_seconds(attempt.size)
    return usual is not None and seconds >= FACTOR * usual
