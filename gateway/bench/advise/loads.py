"""Load of each backend by a gateway's metrics and status. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from gateway.bench.advise.exposition import Exposition, Observations

LEAST_REQUESTS = 30
"""Requests below which means and shares say nothing."""


class BackendLoad(Struct, frozen=True, kw_only=True):
    """Work of one backend in a period. Times are in seconds, rates per second.

    `slots` are the requests that it runs at once by the limits in force; `learned` says that the
    gateway learned them.
    """

    name: str
    kind: str
    period: float
    requests: float
    duration: Observations
    queue_wait: Observations
    vision_wait: Observations
    time_to_first_token: Observations
    rejected: dict[str, float]
    slots: int
    learned: bool
    servers: int
    limits: dict[str, Any]

    @property
    def rate(self) -> float:
        """Requests per second that arrived and were given a place."""
        return self.requests / self.period if self.period > 0 else 0.0

    @property
    def service(self) -> float | None:
        """Mean time of a request at the backend: its duration without the queue."""
        if (whole := self.duration.mean) is None:
            return None
        return max(0.0, whole - (self.queue_wait.mean or 0.0))

    @property
    def at_once(self) -> float | None:
        """Requests that ran at the same time on average, by Little's law: rate times service time."""
        return None if self.service is None else self.rate * self.service

    @property
    def utilisation(self) -> float | None:
        return None if self.at_once is None else self.at_once / self.slots

    @property
    def own_first_token(self) -> float | None:
        """Mean time to the first token without the queue."""
        if (first := self.time_to_first_token.mean) is None:
            return None
        return max(0.0, first - (self.queue_wait.mean or 0.0))

    @property
    def is_enough(self) -> bool:
        return self.requests >= LEAST_REQUESTS and self.service is not None


def loads(status: Mapping[str, Any], now: Exposition, earlier: Exposition | None, seconds: float) -> list[BackendLoad]:
    """Return the load of each backend in the last `seconds`, or since the gateway's start without `earlier`."""
    tiers = list(status["tiers"])
    return [_load(name, backend, tiers, now, earlier, seconds) for name, backend in status["backends"].items()]


def _load(
    name: str,
    backend: Mapping[str, Any],
    tiers: Iterable[str],
    now: Exposition,
    earlier: Exposition | None,
    seconds: float,
) -> BackendLoad:
    """Return the load of chats; embeddings have a lane of their own, and no tier."""

    def observed(metric: str, label: str, values: Iterable[str]) -> Observations:
        whole = Observations()
        for value in values:
            labels = {"backend": name, label: value}
            found = now.histogram(metric, **labels)
            whole = whole.plus(found if earlier is None else found.since(earlier.histogram(metric, **labels)))
        return whole

    rejected = now.by("reason", "gateway_rejected_total", backend=name)
    if earlier is not None:
        before = earlier.by("reason", "gateway_rejected_total", backend=name)
        rejected = {reason: count - before.get(reason, 0) for reason, count in rejected.items()}
    vision = observed("gateway_queue_wait_seconds", "lane", ["vision"])
    wait = observed("gateway_queue_wait_seconds", "lane", ["text"]).plus(vision)
    slots, learned = _slots(backend)
    return BackendLoad(
        name=name,
        kind=str(backend["kind"]),
        period=seconds,
        requests=wait.count,
        duration=observed("gateway_request_duration_seconds", "tier", tiers),
        queue_wait=wait,
        vision_wait=vision,
        time_to_first_token=observed("gateway_time_to_first_token_seconds", "tier", tiers),
        rejected={reason: count for reason, count in rejected.items() if count > 0},
        slots=slots,
        learned=learned,
        servers=len(backend["servers"]),
        limits=dict(backend["limits"]),
    )


def _slots(backend: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the requests that the backend runs at once, and whether the gateway learned that number.

    Models that were used have a limit of their own at each server; the largest counts, because one
    model alone can use no more.
    """
    maximum = int(backend["limits"]["max_concurrency"])
    total, learned = 0, False
    for server in backend["servers"]:
        slots = list(server["model_slots"].values())
        best = max(slots, key=lambda slot: int(slot["limit"]), default=None)
        if best is None:
            given = backend["limits"]["model_concurrency"]
            total += maximum if given == "auto" else min(maximum, int(given))
        else:
            total += min(maximum, int(best["limit"]))
            learned = learned or bool(best["learned"])
    return max(1, total), learned
