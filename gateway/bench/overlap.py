"""Number of answers that were generated at the same time. Pure.

An answer is being generated from its first to its last piece. A server that works on one request after
the other keeps these spans apart, whatever it says; one that batches lets them overlap.
"""

import math
from collections.abc import Sequence

from gateway.bench.results import RequestRecord

BATCHED_SHARE = 0.75
SERIAL_LIMIT = 1.5


def generating_at_once(records: Sequence[RequestRecord]) -> float | None:
    """Return the average number of answers that were generated at once, while any was.

    None if fewer than two answers have more than one piece.
    """
    spans = [
        (record.start + record.ttft, record.last_token)
        for record in records
        if record.is_ok and record.ttft is not None and record.itl
    ]
    if len(spans) < 2:
        return None
    busy, end = 0.0, -math.inf
    for begin, finish in sorted(spans):
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return sum(finish - begin for begin, finish in spans) / busy if busy > 0 else None


def classify(at_once: float | None, requests: int) -> str:
    """Return `batched`, `serial`, `limited`, or `unclear` without enough pieces."""
    if at_once is None or requests < 2:
        return "unclear"
    if at_once >= BATCHED_SHARE * requests:
        return "batched"
    return "serial" if at_once < SERIAL_LIMIT else "limited"
