"""The other replicas of this machine, in the answers to the operator that cover all of them.

Each replica tells the others once a second what has changed: its status, and the counts from which
live figures and latencies are derived. An answer that has to be exact asks them at once.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from gateway.telemetry.live import Counts, LiveFigures, Side
from gateway.telemetry.metrics import Metrics

REPORT_SECONDS = 1.0
REPORT, METRICS = "report", "metrics"

LATENCIES = ("time_to_first_token", "inter_token_latency", "duration")


class PeerChannel(Protocol):
    """Connection to the other replicas."""

    respond: dict[str, Callable[[Any], Awaitable[Any]]]
    on_told: dict[str, Callable[[int, Any], None]]

    @property
    def number(self) -> int:
        """Number of this replica, from 1 on."""

    @property
    def serving(self) -> frozenset[int]:
        """Numbers of the replicas that serve now."""

    async def ask(self, subject: str, argument: Any = None) -> dict[int, Any]:
        """Return the answers of the other replicas; those that do not answer in time are missing."""

    def tell(self, subject: str, content: Any) -> None:
        """Tell all other replicas something, also those that start later."""


class Report(Struct):
    """Report of one replica to the others. `run` is a new text after each start of the replica."""

    run: str
    pid: int
    status: dict[str, Any]
    loads: dict[str, tuple[int, int]]
    """Running and waiting requests by backend."""
    counts: list[tuple[str, str, Counts]]
    """Counts by tier and backend."""
    latencies: dict[str, list[tuple[str, str, list[int]]]]
    """Counts of the buckets by latency, tier and backend."""


class Peers:
    """Reports of the other replicas. `status` returns this replica's own."""

    def __init__(
        self,
        channel: PeerChannel,
        run: str,
        metrics: Metrics,
        live: LiveFigures,
        status: Callable[[], dict[str, Any]],
        loads: Callable[[], Mapping[str, tuple[int, int]]],
    ) -> None:
        self._channel = channel
        self._run = run
        self._metrics = metrics
        self._live = live
        self._status = status
        self._loads = loads
        self._reports: dict[int, Report] = {}
        self._ended: dict[Side, Counts] = {}
        """Counts of replicas that have ended."""
        self._last: bytes = b""
        self._task: asyncio.Task[None] | None = None
        channel.on_told[REPORT] = self._told
        channel.respond[REPORT] = self._respond
        live.others = self

    def __repr__(self) -> str:
        return f"<Peers of replica {self.number}: {sorted(self._reports)}>"

    @property
    def number(self) -> int:
        """Number of this replica."""
        return self._channel.number

    @property
    def replicas(self) -> int:
        """Number of replicas that serve now."""
        return len(self._channel.serving | {self.number})

    def start(self) -> None:
        """Report to the others from now on."""
        self._task = asyncio.get_running_loop().create_task(self._report_regularly())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # Reports

    async def refresh(self) -> None:
        """Ask the others for their reports now."""
        for number, content in (await self._channel.ask(REPORT)).items():
            self._told(number, content)

    async def metrics_pages(self, accept: str) -> list[bytes]:
        """Return the pages with the metrics of the others."""
        answers = await self._channel.ask(METRICS, accept)
        return [answers[number] for number in sorted(answers)]

    def answer_metrics(self, page: Callable[[str], Awaitable[bytes]]) -> None:
        """Have others get the metrics of this replica from `page`."""
        self._channel.respond[METRICS] = page

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            report = await self._respond(None)
            encoded = msgspec.msgpack.encode(report)
            if encoded != self._last:
                self._last = encoded
                self._channel.tell(REPORT, report)

    async def _respond(self, argument: object) -> Any:
        histograms = (self._metrics.time_to_first_token, self._metrics.gaps, self._metrics.duration)
        latencies = {
            name: [
                (tier, backend, list(found.counts))
                for tier, backend in list(of_all.keys())
                if (found := of_all.find((tier, backend))) is not None
            ]
            for name, of_all in zip(LATENCIES, histograms, strict=True)
        }
        counts = [(tier, backend, count) for (tier, backend), count in self._live.own_counts().items()]
        return msgspec.to_builtins(
            Report(self._run, os.getpid(), self._status(), dict(self._loads()), counts, latencies)
        )

    def _told(self, number: int, content: Any) -> None:
        report = msgspec.convert(content, Report)
        before = self._reports.get(number)
        if before is not None and before.run != report.run:
            for tier, backend, counts in before.counts:
                side = (tier, backend)
                self._ended[side] = counts.plus(self._ended[side]) if side in self._ended else counts
        self._reports[number] = report
        if before is None or before.counts != report.counts:
            self._live.want()

    def serving(self) -> Iterator[tuple[int, Report]]:
        """Yield the reports of the other replicas that serve now, by number."""
        for number in sorted(self._reports):
            if number in self._channel.serving:
                yield number, self._reports[number]

    # For live figures and latencies

    def counts(self) -> dict[Side, Counts]:
        """Return the counts of the other replicas, those that have ended included."""
        found = dict(self._ended)
        for report in self._reports.values():
            for tier, backend, counts in report.counts:
                side = (tier, backend)
                found[side] = counts.plus(found[side]) if side in found else counts
        return found

    def loads(self) -> dict[str, tuple[int, int]]:
        """Return how many requests run and wait at the other replicas, by backend."""
        found: dict[str, tuple[int, int]] = {}
        for _, report in self.serving():
            for backend, (running, waiting) in report.loads.items():
                before = found.get(backend, (0, 0))
                found[backend] = before[0] + running, before[1] + waiting
        return found

    def latency_counts(self, latency: str, side: Side) -> Iterator[list[int]]:
        """Yield the counts of the buckets of a latency at the other replicas."""
        for _, report in self.serving():
            for tier, backend, counts in report.latencies.get(latency, ()):
                if (tier, backend) == side:
                    yield counts

    # For the status

    def whole_status(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return `own` with what the others have added to it, and an overview of the replicas."""
        reports = dict(self.serving())
        others = {number: report.status for number, report in reports.items()}
        every = {**others, self.number: own}
        pids = {self.number: os.getpid()} | {number: report.pid for number, report in reports.items()}
        return {
            **own,
            "backends": {name: _backend(name, own, others) for name in own["backends"]},
            "tiers": {name: _tier(name, own, others) for name in own["tiers"]},
            "errors": sorted(
                (error for status in every.values() for error in status["errors"]),
                key=lambda error: str(error["at"]),
                reverse=True,
            )[: max(40, len(own["errors"]))],
            "processes": [_overview(number, pids[number], every[number]) for number in sorted(every)],
        }


def _overview(number: int, pid: int, status: dict[str, Any]) -> dict[str, Any]:
    return {
        "replica": number,
        "pid": pid,
        "status": status["ready"]["status"],
        "running": {name: sum(backend["running"].values()) for name, backend in status["backends"].items()},
        "waiting": {name: sum(backend["waiting"].values()) for name, backend in status["backends"].items()},
    }


def _backend(name: str, own: dict[str, Any], others: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return a backend with the requests of all replicas. It is up if it is for one of them."""
    backend = own["backends"][name]
    same = [found for status in others.values() if (found := status["backends"].get(name)) is not None]
    return {
        **backend,
        "up": backend["up"] or any(other["up"] for other in same),
        "running": _sum_by_lane("running", [backend, *same]),
        "waiting": _sum_by_lane("waiting", [backend, *same]),
        "servers": [_server(server, same) for server in backend["servers"]],
        "leaving": _leaving([backend, *same]),
    }


def _leaving(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the servers that leave at one replica or more, with the requests that still run there."""
    running: dict[str, int] = {}
    for backend in backends:
        for server in backend["leaving"]:
            running[server["name"]] = running.get(server["name"], 0) + server["running"]
    return [{"name": name, "running": number} for name, number in running.items()]


def _sum_by_lane(field: str, backends: list[dict[str, Any]]) -> dict[str, int]:
    return {lane: sum(backend[field].get(lane, 0) for backend in backends) for lane in backends[0][field]}


def _server(server: dict[str, Any], backends: list[dict[str, Any]]) -> dict[str, Any]:
    same = [other for backend in backends for other in backend["servers"] if other["name"] == server["name"]]
    model_slots = {
        model: {**slots, "running": slots["running"] + sum(_running(other, model) for other in same)}
        for model, slots in server["model_slots"].items()
    }
    return {
        **server,
        "up": True if any(other["up"] for other in same) else server["up"],
        "gets_requests": server["gets_requests"] or any(other["gets_requests"] for other in same),
        "running": server["running"] + sum(other["running"] for other in same),
        "connections": server["connections"] + sum(other["connections"] for other in same),
        "model_slots": model_slots,
    }


def _running(server: dict[str, Any], model: str) -> int:
    slots = server["model_slots"].get(model)
    return 0 if slots is None else int(slots["running"])


def _tier(name: str, own: dict[str, Any], others: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return a tier whose canary share counts the requests of all replicas."""
    tier = own["tiers"][name]
    if tier["share"] is None:
        return dict(tier)
    same = [found["share"] for status in others.values() if (found := status["tiers"].get(name)) and found["share"]]
    requests = tier["share"]["requests"] + sum(share["requests"] for share in same)
    canary = tier["share"]["canary_requests"] + sum(share["canary_requests"] for share in same)
    percent = round(100 * canary / requests, 2) if requests else None
    return {**tier, "share": {"requests": requests, "canary_requests": canary, "percent": percent}}
