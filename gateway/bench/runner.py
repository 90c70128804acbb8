"""One run: sends planned requests under a load and collects their records."""

import asyncio
import datetime as dt
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from gateway.bench.arrivals import RampUp, arrivals, ramped_arrivals
from gateway.bench.client_watch import INTERVAL, ClientWatch
from gateway.bench.results import CANCELLED, RateChange, RequestRecord, RunResult
from gateway.bench.target import BenchRequest, LoadClient

BLOCK = 1000
"""Requests of an endless plan whose due times are drawn together."""
FAILURE_PAUSE = 1.0
"""Seconds from the start of a failed request to the next one in its place, in a closed loop over time. A server
that refuses connections would otherwise get thousands of requests a second, which hide all others."""


class Progress(Protocol):
    """Is told how far a run is."""

    def begin(self, label: str, total: int | None, seconds: float | None) -> None: ...

    def advance(self, record: RequestRecord) -> None: ...

    def end(self) -> None: ...


class Silent:
    """A `Progress` that shows nothing."""

    def begin(self, label: str, total: int | None, seconds: float | None) -> None:
        """Ignore the start of a run."""

    def advance(self, record: RequestRecord) -> None:
        """Ignore a record."""

    def end(self) -> None:
        """Ignore the end of a run."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Requests of one run, with their times.

    Attributes:
        requests: the requests in order; with `seconds` also an endless iterable.
        max_concurrency: most requests in flight; None: no limit.
        request_rate: requests per second; None: each as soon as there is a place.
        ramp_up: growth of the request rate, in place of `request_rate`; not for an endless plan.
        due: due times in seconds from the start, instead of a rate. One for each request.
        seconds: nothing is sent after this time. Without due times, the place of a failed request stays
            empty for the rest of `FAILURE_PAUSE`.
        seed: of the arrival times.
        probe: a request that is sent beside the others, `probe_rate` times a second, until all of them
            have ended: each `1 / probe_rate` seconds after the end of the one before. `max_concurrency`
            does not count it.
    """

    label: str
    requests: Iterable[BenchRequest]
    max_concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    due: Sequence[float] | None = None
    seconds: float | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    ramp_up: RampUp | None = None
    probe: BenchRequest | None = None
    probe_rate: float = 1.0


class Runner:
    """Runs plans against one target, one after the other.

    Setting `stop` ends the current run: nothing more is sent, requests in flight are cancelled, and what
    has ended stays measured.
    """

    def __init__(
        self,
        client: LoadClient,
        *,
        progress: Progress | None = None,
        stop: asyncio.Event | None = None,
        clock: Callable[[], float] = time.perf_counter,
        watch_interval: float = INTERVAL,
    ) -> None:
        self.client = client
        self._watch_interval = watch_interval
        self.stop = stop or asyncio.Event()
        self._progress = progress or Silent()
        self._clock = clock

    async def warm_up(self, request: BenchRequest, count: int) -> Sequence[RequestRecord]:
        """Send a request `count` times, one after the other, without measuring it."""
        records: list[RequestRecord] = []
        while len(records) < count and not self.stop.is_set():
            result = await self.run(RunPlan("warm-up", [request]))
            records += result.records
        return records

    async def run(self, plan: RunPlan) -> RunResult:
        """Run a plan and return its result, also if it was stopped."""
        total = len(plan.requests) if isinstance(plan.requests, Sequence) else None
        self._progress.begin(plan.label, total, plan.seconds)
        try:
            async with ClientWatch(self._clock, interval=self._watch_interval) as watch:
                run = _Run(self.client, plan, self._progress, self.stop, self._clock)
                await run.complete()
        finally:
            self._progress.end()
        records = sorted(run.records, key=lambda record: record.index)
        ends = [record.end for record in records]
        return RunResult(
            label=plan.label,
            target=self.client.target.name,
            model=self.client.target.model,
            records=tuple(records),
            start=run.origin,
            duration=max(ends, default=run.origin) - run.origin,
            num_prompts=len(records) if total is None else total,
            request_rate=plan.request_rate,
            burstiness=plan.burstiness,
            max_concurrency=plan.max_concurrency,
            interrupted=self.stop.is_set(),
            goodput=plan.goodput,
            client=watch.load(run.start_delays),
            ramp_up=plan.ramp_up,
            rate_changes=tuple(run.rate_changes),
            probes=None if plan.probe is None else tuple(run.probes),
        )


class _Run:
    """The state of one run: a task for each request in flight."""

    def __init__(
        self,
        client: LoadClient,
        plan: RunPlan,
        progress: Progress,
        stop: asyncio.Event,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._plan = plan
        self._progress = progress
        self._stop = stop
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._place = asyncio.Event()
        self._failure: BaseException | None = None
        self.records: list[RequestRecord] = []
        self._is_over = asyncio.Event()
        self.start_delays: list[float] = []
        self.rate_changes: list[RateChange] = []
        self.probes: list[RequestRecord] = []
        self.origin = clock()

    async def complete(self) -> None:
        """Send everything and wait for every answer, or for `stop`."""
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(self._stop.wait())
        probing = asyncio.create_task(self._send_probes())
        probing.add_done_callback(self._done)
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._is_over.set()
            await asyncio.wait({probing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = {sending, stopping, probing, *self._tasks}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        if not sending.cancelled():
            sending.result()

    async def _send_probes(self) -> None:
        """Send the plan's probe again and again until the run is over."""
        plan = self._plan
        while plan.probe is not None and not self._is_over.is_set():
            self.probes.append(await self._client.send(plan.probe, len(self.probes)))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), 1 / plan.probe_rate)

    async def _send_all(self) -> None:
        changes = self._rate_changes()
        for index, (request, due) in enumerate(self._due_requests()):
            if due is not None and (wait := self.origin + due - self._clock()) > 0:
                await asyncio.sleep(wait)
            if index in changes:
                moment = dt.datetime.now().astimezone().isoformat()
                self.rate_changes += [RateChange(rate, moment) for rate in changes[index]]
            was_full = await self._wait_for_place()
            now = self._clock()
            if self._plan.seconds is not None and now - self.origin >= self._plan.seconds:
                break
            arrival = self.origin + (due or 0.0)
            if self._plan.seconds is not None and due is None:
                arrival = now  # a loop over time has no requests that wait from its start
            if due is not None and not was_full:
                self.start_delays.append(now - arrival)
            task = asyncio.create_task(self._one(index, request, arrival, is_timed=due is not None))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _due_requests(self) -> Iterator[tuple[BenchRequest, float | None]]:
        plan = self._plan
        if plan.due is not None:
            yield from zip(plan.requests, plan.due, strict=True)
        elif plan.ramp_up is not None:
            times = ramped_arrivals(self._count, plan.ramp_up, plan.burstiness, random.Random(plan.seed))
            yield from zip(plan.requests, times, strict=True)
        elif plan.request_rate is None:
            yield from ((request, None) for request in plan.requests)
        else:
            yield from self._at_rate(plan.request_rate)

    def _at_rate(self, rate: float) -> Iterator[tuple[BenchRequest, float]]:
        """Yield requests with due times; an endless plan gets them in blocks."""
        plan, rng = self._plan, random.Random(self._plan.seed)
        count = len(plan.requests) if isinstance(plan.requests, Sequence) else BLOCK
        times, offset = arrivals(count, rate, plan.burstiness, rng), 0.0
        for index, request in enumerate(plan.requests):
            if index and index % count == 0:
                offset += times[-1]
                times = arrivals(count, rate, plan.burstiness, rng)
            yield request, offset + times[index % count]

    def _rate_changes(self) -> dict[int, list[int]]:
        ramp_up = self._plan.ramp_up
        return {} if ramp_up is None else ramp_up.changes(self._count)

    @property
    def _count(self) -> int:
        requests = self._plan.requests
        assert isinstance(requests, Sequence), "a ramp-up ends with the last request, so there has to be one"
        return len(requests)

    async def _wait_for_place(self) -> bool:
        """Wait until another request may be sent; return whether it had to wait."""
        limit = self._plan.max_concurrency
        was_full = limit is not None and len(self._tasks) >= limit
        while limit is not None and len(self._tasks) >= limit:
            self._place.clear()
            await self._place.wait()
        return was_full

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._place.set()
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = self._failure or failure

    async def _one(self, index: int, request: BenchRequest, arrival: float, *, is_timed: bool) -> None:
        start = self._clock()
        try:
            record = await self._client.send(request, index)
        except asyncio.CancelledError:
            now = self._clock()
            record = RequestRecord(index, arrival, start, now, now, error=CANCELLED, name=request.name)
            self.records.append(record)
            raise
        record = replace(record, arrival=arrival)
        self.records.append(record)
        self._progress.advance(record)
        if record.error and self._plan.seconds is not None and not is_timed:
            now = self._clock()
            end = min(start + FAILURE_PAUSE, self.origin + self._plan.seconds)
            await asyncio.sleep(max(0.0, end - now))
