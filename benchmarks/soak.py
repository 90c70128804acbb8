"""Memory, descriptors and accounts of the gateway over a long run in which half of all clients leave.

`make bench-soak MINUTES=60` runs it. The real `gateway serve` stands in front of stand-ins of both
engines. Clients send streams, plain answers, small images and images of 5 MiB, embeddings, bodies of
up to 0.9 MB, and requests that are refused, at a steady rate and in bursts that fill the queues.
About half of all clients leave: while they upload, in the queue, before the first token, in
mid-stream; some close their connection, some reset it.

It prints the resident memory at steps of five minutes, its slope over the second half, descriptors,
threads, gauges, and the accounts: what the clients saw next to the gateway's log and metrics.

Exit status 1: a request is not accounted for, something is still held at the end, or (in a run of at
least half an hour) the memory grows by more than `MAX_SLOPE`.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accounting import Account, GatewayLog, MetricsSample, account, read_metrics
from benchmarks.clients import ClientRecord, Clients, get
from benchmarks.process_stats import connections_on, descriptors, family, resident_bytes, threads
from benchmarks.processes import Started, started
from benchmarks.report import mark
from benchmarks.soak_requests import ADMIN_KEY, CHAT_MODEL, EMBEDDING_MODEL, KEY, VISION_MODEL, Mixture

MAX_SLOPE = 8.0
"""MiB per hour by which the resident memory may grow in the second half of the run."""
MIN_MINUTES_FOR_SLOPE = 30.0
LEFT_SHARE = 0.5
SAMPLE_SECONDS = 5.0
CLEAN_UP_SECONDS = 15.0
KEPT = 24
"""Idle connections to the backends that the gateway may keep, and files of warm child processes."""
BURST_SECONDS, BURST_REQUESTS = 12.0, 40
MIB = 1024 * 1024


class Sample(NamedTuple):
    """State of the gateway's process at one time; memory in bytes."""

    seconds: float
    resident: int
    children: int
    descriptors: int
    threads: int
    running: float
    waiting: float


class Watch:
    """Samples of the gateway."""

    def __init__(self, gateway: Started, step_seconds: float) -> None:
        self._gateway = gateway
        self._step = step_seconds
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    async def metrics(self) -> MetricsSample:
        return read_metrics((await get(port_of(self._gateway), "/metrics", ADMIN_KEY)).decode())

    async def take(self) -> Sample:
        pid, metrics = self._gateway.pid, await self.metrics()
        children = 0
        with contextlib.suppress(OSError):  # a child may end meanwhile
            children = resident_bytes(family(pid)[1:])
        sample = Sample(
            time.monotonic() - self._began, resident_bytes([pid]), children, descriptors(pid), threads(pid),
            metrics.running, metrics.waiting,
        )  # fmt: skip
        self.samples.append(sample)
        return sample

    async def run(self, clients: "Load") -> None:
        """Sample until cancelled, and print a line at each step."""
        next_line = 0.0
        while True:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                sample = await self.take()
                if sample.seconds >= next_line:
                    next_line += self._step
                    print(_line(sample, len(clients.records), clients.left), flush=True)
            await asyncio.sleep(SAMPLE_SECONDS)


def _line(sample: Sample, requests: int, left: int) -> str:
    return (
        f"  {sample.seconds / 60:6.1f} min  {sample.resident / MIB:7.1f} MiB  children {sample.children / MIB:6.1f} MiB"
        f"  fds {sample.descriptors:4}  threads {sample.threads:3}  running {sample.running:3g}"
        f"  waiting {sample.waiting:3g}  requests {requests:6}  left {left:6}"
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through these points; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def second_half_slope(samples: list[Sample]) -> float:
    """Return the growth of the resident memory in the second half, in MiB per hour."""
    middle = samples[-1].seconds / 2
    return slope([(s.seconds / 3600, s.resident / MIB) for s in samples if s.seconds >= middle])


class Load:
    """The clients, and what they saw."""

    def __init__(self, port: int, rate: float, seed: int) -> None:
        self._clients = Clients(port)
        self._rate = rate
        self._mixture = Mixture(seed)
        self.records: list[ClientRecord] = []
        self.left = 0

    async def run(self, seconds: float) -> None:
        """Send requests for `seconds`, then wait for those in flight."""
        deadline = time.monotonic() + seconds
        dice = random.Random(1)
        next_burst = time.monotonic() + BURST_SECONDS
        async with asyncio.TaskGroup() as group:
            while (now := time.monotonic()) < deadline:
                burst = now >= next_burst
                next_burst += BURST_SECONDS * burst
                for _ in range(BURST_REQUESTS if burst else 1):
                    group.create_task(self._send())
                await asyncio.sleep(dice.expovariate(self._rate))
        self._clients.close()

    async def _send(self) -> None:
        sent = max(1, len(self.records))
        plan = self._mixture.plan(leaves_more=self.left < LEFT_SHARE * sent)
        record = await self._clients.send(plan)
        self.left += record.seen == "left"
        self.records.append(record)


def port_of(program: Started) -> int:
    return int(program.url.rpartition(":")[2])


@contextlib.contextmanager
def running() -> Iterator[tuple[Started, Path, list[Started]]]:
    """Run the stand-ins and the gateway; yields the gateway, its log, and the stand-ins."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        url = r"(http://[\d.:]+)"
        ollama = stack.enter_context(started(_OLLAMA, folder / "ollama.log", url))
        vllm = stack.enter_context(started(_VLLM, folder / "vllm.log", url))
        (folder / "gateway.json").write_text(json.dumps(_settings(ollama.url, vllm.url)))
        command, log = ["serve", "--config", str(folder / "gateway.json")], folder / "gateway.log"
        gateway = stack.enter_context(
            started(
                command,
                log,
                r"serving (http://[\d.:]+)",
                GATEWAY_PORT="0",
                GATEWAY_STATE_FILE="",
                GATEWAY_USAGE_FILE="",
            )
        )
        yield gateway, log, [ollama, vllm]


_PACE = ["--tokens-per-second", "40", "--set", "time_to_first_token=0.1"]
_OLLAMA = [
    "simulate", "--kind", "ollama", "--parallel", "4", *_PACE,
    "--model", f"{CHAT_MODEL},context=500000", "--model", f"{VISION_MODEL},vision",
    "--model", f"{EMBEDDING_MODEL},embedding=64",
]  # fmt: skip
_VLLM = [
    "simulate",
    "--kind",
    "vllm",
    "--max-num-seqs",
    "6",
    *_PACE,
    "--model",
    f"{VISION_MODEL},vision,context=500000",
]


def _settings(ollama: str, vllm: str) -> dict[str, Any]:
    return {
        "llm_backend": "vllm",
        "backends": {
            "ollama": {"kind": "ollama", "base_url": ollama, "max_queue": 64, "queue_timeout": 20},
            "vllm": {
                "kind": "vllm", "base_url": vllm, "max_concurrency": 6, "max_queue": 48, "queue_timeout": 20,
            },
        },
        "tiers": {
            "server": {"models": {"vllm": VISION_MODEL, "ollama": VISION_MODEL}},
            "local": {"models": {"ollama": CHAT_MODEL}, "backend": "ollama"},
            "pictures": {"models": {"ollama": VISION_MODEL}, "backend": "ollama"},
        },
        "embeddings": {"vectors": {"backend": "ollama", "model": EMBEDDING_MODEL}},
        "ollama_num_parallel": 4,
        "api_keys": [KEY, f"{KEY}-2"],
        "admin_key": ADMIN_KEY,
        "log_format": "json",
    }  # fmt: skip


async def soak(seconds: float, rate: float, seed: int, step_seconds: float) -> bool:
    with running() as (gateway, log_path, engines):
        log = GatewayLog(log_path)
        load = Load(port_of(gateway), rate, seed)
        watch = Watch(gateway, step_seconds)
        first = await watch.take()
        watching = asyncio.create_task(watch.run(load))
        await load.run(seconds)
        watching.cancel()
        last, is_clean = await _cleaned(watch, port_of(gateway), first)
        engines_idle = [await _is_idle(engine) for engine in engines]
        counted = (await watch.metrics()).outcomes
        await asyncio.sleep(0.5)  # the log's thread writes the last lines
        log.read()
        print(_line(last, len(load.records), load.left) + "  (all clients gone)\n")
        result = account(load.records, log.exchanges, counted)
        connections = connections_on(port_of(gateway))
    is_accounted = _print_account(load.records, log, result, counted)
    growth = second_half_slope(watch.samples)
    is_flat = seconds < 60 * MIN_MINUTES_FOR_SLOPE or growth <= MAX_SLOPE
    print(f"  memory in the second half: {growth:+.1f} MiB/h   target <= {MAX_SLOPE:g}: {mark(is_flat)}")
    print(
        f"  at the end: running {last.running:g}, waiting {last.waiting:g}, client connections {connections}, "
        f"descriptors {last.descriptors} ({first.descriptors} at the start, up to {KEPT} more are kept), "
        f"engines idle {all(engines_idle)}: {mark(is_clean and all(engines_idle))}"
    )
    return is_accounted and is_flat and is_clean and all(engines_idle)


async def _cleaned(watch: Watch, port: int, first: Sample) -> tuple[Sample, bool]:
    """Wait until the gateway holds nothing more than at the start; return the last sample."""
    deadline = time.monotonic() + CLEAN_UP_SECONDS
    while True:
        sample = await watch.take()
        is_clean = not sample.running and not sample.waiting and not connections_on(port)
        is_clean = is_clean and sample.descriptors <= first.descriptors + KEPT
        if is_clean or time.monotonic() > deadline:
            return sample, is_clean
        await asyncio.sleep(0.1)


async def _is_idle(engine: Started) -> bool:
    state = json.loads(await get(port_of(engine), "/simulate/state"))
    return not state["running"] and not state["waiting"]


def _print_account(records: list[ClientRecord], log: GatewayLog, result: Account, counted: Counter[str]) -> bool:
    kinds = Counter(record.kind for record in records)
    codes = Counter(f"{record.status} {record.code}" for record in records if record.seen == "error")
    moments = Counter(record.note for record in records if record.seen == "left")
    phases = Counter(lines[0].phase for lines in log.exchanges.values() if lines[0].outcome == "cancelled")
    seconds = max((record.seconds for record in records), default=0.0)
    print(f"  requests {len(records)}: {_counts(kinds)}")
    print(f"  clients saw: {_counts(result.seen)}; longest {seconds:.1f} s")
    print(f"  clients left {result.seen['left'] / max(1, len(records)):.1%}: {_counts(moments)}")
    print(f"  the gateway saw {result.outcomes['cancelled']} of them leave: {_counts(phases)}; unread: {result.unread}")
    print(f"  errors with a code: {_counts(codes)}")
    print(f"  outcomes in the log: {_counts(result.outcomes)}; in the metrics: {_counts(counted)}")
    for event, count in log.crashes.most_common(20):
        print(f"  the log has {count} x {event}")
    for problem in result.problems[:30]:
        print(f"  NOT ACCOUNTED FOR: {problem}")
    is_accounted = not result.problems and not log.crashes
    print(f"  not accounted for: {len(result.problems)}; crashes: {log.crashes.total()}: {mark(is_accounted)}")
    return is_accounted


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second, besides the bursts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step", type=float, default=5.0, help="minutes between two lines")
    given = parser.parse_args(arguments)
    print(
        f"Soak: {given.minutes:g} min, {given.rate:g} requests/s and {BURST_REQUESTS} at once every "
        f"{BURST_SECONDS:g} s (seed {given.seed})",
        flush=True,
    )
    return 0 if asyncio.run(soak(60 * given.minutes, given.rate, given.seed, 60 * given.step)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
