"""When requests are due at a request rate. Pure."""

import math
import random


def arrivals(count: int, rate: float | None, burstiness: float, rng: random.Random) -> list[float]:
    """Return the due times of `count` requests in seconds from the start of the run.

    The intervals follow a gamma distribution with the shape `burstiness`: 1 is a Poisson process, less
    is more bursty, and infinity spaces requests evenly. As in `vllm bench serve`, the first interval
    comes before the first request, and all are scaled so that the last request is due at `count / rate`.
    Without a rate all are due at once.
    """
    if rate is None or count == 0:
        return [0.0] * count
    if math.isinf(burstiness):
        intervals = [1.0 / rate] * count
    else:
        intervals = [rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(count)]
    total = math.fsum(intervals)
    scale = count / rate / total if total > 0 else 1.0
    due, times = 0.0, []
    for interval in intervals:
        due += interval * scale
        times.append(due)
    return times
