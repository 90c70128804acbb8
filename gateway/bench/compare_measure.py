"""Measurement of one or two sides, in turn, round by round: A B A B."""

import asyncio
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gateway.bench.compare_engine import EngineWatch, after_load, cold_start, server_facts
from gateway.bench.compare_result import ColdStart, Comparison, EngineUse, Side
from gateway.bench.compare_start import StartedServer
from gateway.bench.gpu import Gpus
from gateway.bench.options import BenchOptions
from gateway.bench.quality import QualityOptions, measure
from gateway.bench.quality_scores import SideQuality
from gateway.bench.results import CellValue, RequestRecord, RunResult
from gateway.bench.runner import Progress, Runner, RunPlan, Silent
from gateway.bench.target import BenchRequest, LoadClient
from gateway.bench.workload import Prompts, describe

ROUNDS = 5
NUM_PROMPTS = 16
MAX_CONCURRENCY = 4
OUTPUT_LEN = 128


class NotMeasured(Exception):
    """Nothing could be compared; the text says why."""


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """Plan of a comparison.

    Attributes:
        load: requests and load of one round; its target is not used.
        rounds: times that each side is measured.
        cold: whether each round begins with the load of the model.
        quality: None: no quality tasks.
    """

    load: BenchOptions
    rounds: int = ROUNDS
    cold: bool = False
    quality: QualityOptions | None = None


@dataclass
class _Measured:
    """One side while it is measured."""

    client: LoadClient
    runner: Runner
    server: StartedServer | None = None
    rounds: list[RunResult] = field(default_factory=list)
    uses: list[EngineUse] = field(default_factory=list)
    cold: list[ColdStart] = field(default_factory=list)


async def compare(
    plan: ComparePlan,
    clients: Sequence[LoadClient],
    *,
    judge_client: LoadClient | None = None,
    gpus: Gpus | None = None,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    servers: Mapping[str, StartedServer] = MappingProxyType({}),
    new_runner: Callable[..., Runner] = Runner,
) -> Comparison:
    """Measure the sides; setting `stop` ends it after the rounds that are complete.

    `servers` are those that were started for it, by the label of their side: a cold start restarts them.
    `new_runner` makes the runner of a client, with the keyword arguments `progress` and `stop`.

    Raises:
        NotMeasured: a side does not answer, or no round was complete.
    """
    stop = stop or asyncio.Event()
    progress = progress or Silent()
    sides = [
        _Measured(client, new_runner(client, progress=progress, stop=stop), servers.get(client.target.label))
        for client in clients
    ]
    # The text of A's prompts is used for both: a length in tokens would give another text on B.
    prompts = await Prompts.of(plan.load, sides[0].runner, OUTPUT_LEN)
    count = plan.load.num_prompts or NUM_PROMPTS
    warm_up, requests = prompts.request(0), prompts.take(plan.rounds * count, first=1)
    for side in sides:
        await _warm_up(side, warm_up, max(1, plan.load.num_warmups))
    for number in range(plan.rounds):
        for side in sides:
            if not stop.is_set():
                await _round(plan, side, number, requests[number * count : (number + 1) * count], warm_up, gpus)
    complete = min(len(side.rounds) for side in sides)
    if not complete:
        raise NotMeasured("no round was complete")
    qualities = await _qualities(plan, clients, judge_client, progress, stop)
    workload = describe(
        plan.load, requests, rounds=plan.rounds, num_prompts=count, output_len=plan.load.output_len or OUTPUT_LEN
    )
    workload = {"scenario": "compare", **workload, "cold": "yes" if plan.cold else "no"}
    now = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    finished = [await _finished(side, quality, workload, now) for side, quality in zip(sides, qualities, strict=True)]
    notes = prompts.notes if complete == plan.rounds else (*prompts.notes, "rounds_incomplete")
    return Comparison(now, tuple(finished), in_turn=True, notes=notes)


async def _finished(side: _Measured, quality: SideQuality | None, workload: Mapping[str, CellValue], date: str) -> Side:
    target = side.client.target
    server = await server_facts(side.client)
    # A gateway says which backend served; a canary, a fallback or a switch shows as several.
    if backends := sorted({record.backend for run in side.rounds for record in run.records if record.backend}):
        server["backend"] = ", ".join(backends)
    return Side(
        name=target.label or target.url,
        url=target.url,
        model=target.model,
        api=target.api,
        endpoint=target.path,
        workload=workload,
        rounds=tuple(side.rounds),
        uses=tuple(side.uses),
        cold=tuple(side.cold),
        quality=quality,
        server=server,
        date=date,
    )


async def _warm_up(side: _Measured, request: BenchRequest, count: int) -> None:
    records = await side.runner.warm_up(request, count)
    if not records or records[-1].error:
        error = records[-1].error if records else "interrupted"
        raise NotMeasured(f"{side.client.target.name} does not answer a first request: {error}")


async def _round(
    plan: ComparePlan,
    side: _Measured,
    number: int,
    requests: Sequence[BenchRequest],
    first: BenchRequest,
    gpus: Gpus | None,
) -> None:
    cold = await _cold_start(side, gpus, first) if plan.cold else None
    async with EngineWatch(side.client, gpus) as watch:
        run = await side.runner.run(
            RunPlan(
                f"{side.client.target.label} {number + 1}/{plan.rounds}",
                requests,
                max_concurrency=plan.load.max_concurrency or MAX_CONCURRENCY,
                request_rate=plan.load.request_rate,
                burstiness=plan.load.burstiness,
                goodput=plan.load.goodput,
                seed=plan.load.seed + number,
            )
        )
    if run.interrupted:
        return
    side.rounds.append(run)
    side.uses.append(watch.use())
    if cold is not None:
        side.cold.append(cold)


async def _cold_start(side: _Measured, gpus: Gpus | None, first: BenchRequest) -> ColdStart:
    """Load the model: by a restart of a server that was started for this, else as the server's API allows."""
    if side.cold and side.cold[-1].reason:
        return side.cold[-1]  # what could not be seen once is not waited for again
    if side.server is None:
        return await cold_start(side.client, gpus, first)
    await side.server.stop()
    async with EngineWatch(side.client, gpus) as watch:
        seconds = await side.server.start(side.client)
        watch.look_again()
        record = await side.client.send(first)
    return after_load(seconds, record, watch.use())


async def _qualities(
    plan: ComparePlan,
    clients: Sequence[LoadClient],
    judge_client: LoadClient | None,
    progress: Progress,
    stop: asyncio.Event,
) -> Sequence[SideQuality | None]:
    if plan.quality is None or stop.is_set():
        return [None] * len(clients)
    progress.begin("quality", len(plan.quality.tasks) * len(clients), None)
    asked = asyncio.create_task(measure(plan.quality, clients, judge_client, lambda: progress.advance(_DONE)))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({asked, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return await asked if asked.done() else [None] * len(clients)
    finally:
        asked.cancel()
        stopped.cancel()
        await asyncio.gather(asked, stopped, return_exceptions=True)
        progress.end()


_DONE = RequestRecord(0, 0.0, 0.0, 0.0, 0.0)
"""Advances the progress bar by one task."""
