"""When requests are due at a request rate. Pure."""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

RampUpStrategy = Literal["linear", "exponential"]
RAMP_UP_STRATEGIES: tuple[RampUpStrategy, ...] = get_args(RampUpStrategy)


@dataclass(frozen=True, slots=True)
class RampUp:
    """A request rate that grows over a run, in requests per second.

    As in `vllm bench serve`, the rate depends on a request's place among all, not on the time: the
    first request has `start_rps` and the last one `end_rps`; in between the rate grows by the same
    difference (`linear`) or by the same factor (`exponential`) from one request to the next.
    """

    strategy: RampUpStrategy
    start_rps: float
    end_rps: float

    def rate(self, place: int, count: int) -> float:
        """Return the rate at request number `place`, from 0, of `count`."""
        progress = place / max(count - 1, 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return float(self.start_rps * (self.end_rps / self.start_rps) ** progress)

    def changes(self, count: int) -> dict[int, list[int]]:
        """Return the whole numbers that the rate reaches, by the place of the first request with it."""
        reached = math.floor(self.start_rps)
        found = {0: [reached]} if count else {}
        for place in range(count):
            rate = math.floor(self.rate(place, count) + 1e-9)
            if rate > reached:
                found.setdefault(place, []).extend(range(reached + 1, rate + 1))
                reached = rate
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the fields under vLLM's names."""
        return {f"ramp_up_{name}": value for name, value in asdict(self).items()}


def arrivals(count: int, rate: float | None, burstiness: float, rng: random.Random) -> list[float]:
    """Return the due times of `count` requests in seconds from the start of the run.

    The intervals follow a gamma distribution with the shape `burstiness`: 1 is a Poisson process, less
    is more bursty, and infinity spaces requests evenly. As in `vllm bench serve`, the first interval
    comes before the first request, and all are scaled so that the last request is due at `count / rate`.
    Without a rate all are due at once.
    """
    if rate is None or count == 0:
        return [0.0] * count
    intervals = [_interval(rate, burstiness, rng) for _ in range(count)]
    total = math.fsum(intervals)
    return _summed(intervals, count / rate / total if total > 0 else 1.0)


def ramped_arrivals(count: int, ramp_up: RampUp, burstiness: float, rng: random.Random) -> list[float]:
    """Return the due times of `count` requests whose rate grows; as in vLLM, these are not scaled."""
    return _summed([_interval(ramp_up.rate(place, count), burstiness, rng) for place in range(count)], 1.0)


def _interval(rate: float, burstiness: float, rng: random.Random) -> float:
    return 1.0 / rate if math.isinf(burstiness) else rng.gammavariate(burstiness, 1.0 / (rate * burstiness))


def _summed(intervals: list[float], scale: float) -> list[float]:
    due, times = 0.0, []
    for interval in intervals:
        due += interval * scale
        times.append(due)
    return times
