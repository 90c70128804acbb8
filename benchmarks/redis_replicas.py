"""Three gateways that share one backend's limits through Redis.

`make bench-redis` runs it; it needs a `redis-server`. The backend takes the same time for every
answer and counts the requests in flight. It shows:

- the most that the backend ever saw, and the rate, with one gateway and with three, with Redis and
  without;
- how long it takes until the slots of a replica are used again that was killed (SIGKILL), or stopped
  (SIGTERM);
- how long the one slot for images is idle when it moves to another replica;
- what clients notice when Redis hangs, and when it is killed and comes back empty.

Exit status 1: the backend saw more than the limit where replicas share it, or a request failed.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from benchmarks.counting_backend import MODEL, CountingBackend, Served, serving
from benchmarks.processes import Started, started
from benchmarks.report import percentile

LIMIT = 24
ANSWER_SECONDS = 0.1
CLIENTS = 2 * LIMIT
"""Clients in a closed loop at each gateway, more than the limit."""
WINDOW = 4.0
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)
TEXT: Any = "Hello?"
IMAGE: Any = [{"type": "image_url", "image_url": {"url": PIXEL}}]


@dataclass
class Answers:
    """Answers of the clients by status; 0 for a connection that failed."""

    by_status: dict[int, int] = field(default_factory=dict)

    def add(self, status: int) -> None:
        self.by_status[status] = self.by_status.get(status, 0) + 1

    @property
    def failed(self) -> int:
        return sum(number for status, number in self.by_status.items() if status != 200)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a redis-server without persistence on a socket in `folder`; yield it and its URL."""
    program = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        sys.exit("bench-redis needs redis-server")
    socket = folder / "redis.sock"
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""],
        stdout=subprocess.DEVNULL,
    )
    try:
        with contextlib.closing(Redis(unix_socket_path=str(socket))) as client:
            while not _answers(client):
                time.sleep(0.01)
        yield process, f"unix://{socket}"
    finally:
        process.kill()
        process.wait()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


@contextlib.asynccontextmanager
async def gateways(number: int, backend_url: str, folder: Path, **more: str) -> AsyncIterator[list[Started]]:
    """Run gateways in front of the backend, each without keys, a state file or a record of the usage."""
    settings = {
        "LLM_BACKEND": "vllm",
        "VLLM_BASE_URL": backend_url,
        "VLLM_MODEL": MODEL,
        "GATEWAY_PORT": "0",
        "GATEWAY_STATE_FILE": "",
        "GATEWAY_USAGE_FILE": "",
        "GATEWAY_LOG_LEVEL": "info",
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(LIMIT),
        "GATEWAY__DRAIN_DELAY": "0",
        **more,
    }
    processes = [
        started(["serve"], folder / f"gateway{place}.log", r"serving (http://\S+);", **settings)
        for place in range(number)
    ]
    async with contextlib.AsyncExitStack() as stack:
        found = await asyncio.gather(*(asyncio.to_thread(process.__enter__) for process in processes))
        for process in processes:
            stack.push(process)
        await asyncio.sleep(3.5 if "GATEWAY_REDIS_URL" in more else 0.5)  # all are members, and no one recovers
        yield found


async def ask_for_ever(gateway: Started, content: Any, answers: Answers) -> None:
    """Send requests on one connection, one after the other."""
    host, port = gateway.url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 2}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        while True:
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            answers.add(int(answer.split()[1]))
    except (OSError, asyncio.IncompleteReadError):
        answers.add(0)
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def load(several: Sequence[Started], clients: int, content: Any = TEXT) -> AsyncIterator[Answers]:
    answers = Answers()
    tasks = [
        asyncio.create_task(ask_for_ever(gateway, content, answers)) for gateway in several for _ in range(clients)
    ]
    try:
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Report:
    """Lines of the result, and whether a target was missed."""

    def __init__(self) -> None:
        self.table = Table("case", "requests/s", "most at the backend", "failed", "calls of Redis/s", "further")
        self.is_missed = False

    def add(self, case: str, rate: float | None, most: int, failed: int, calls: float | None, more: str = "") -> None:
        cells = ("" if value is None else f"{value:.1f}" for value in (rate, calls))
        first, last = cells
        self.table.add_row(case, first, f"{most} (limit {LIMIT})", str(failed), last, more)

    def check(self, most: int, failed: int, limit: int = LIMIT) -> None:
        self.is_missed |= most > limit or failed > 0


async def throughput(
    report: Report, case: str, several: Sequence[Started], backend: CountingBackend, redis: str
) -> None:
    """Measure the rate with all gateways saturated."""
    client = Redis.from_url(redis) if redis else None
    async with load(several, CLIENTS) as answers:
        await asyncio.sleep(1.5)
        backend.reset()
        before, began = _calls(client), time.monotonic()
        await asyncio.sleep(WINDOW)
        seconds = time.monotonic() - began
        calls = (_calls(client) - before) / seconds if client is not None else None
        rate, most, failed = len(backend.served) / seconds, backend.most, answers.failed
    report.add(case, rate, most, failed, calls)
    if client is not None:
        client.close()
        report.check(most, failed)


def _calls(client: Redis | None) -> int:
    found: Any = {} if client is None else client.info("commandstats")
    return int(found.get("cmdstat_evalsha", {}).get("calls", 0))


async def lost(report: Report, backend: CountingBackend, url: str, folder: Path, redis: str, number: int) -> None:
    """Measure the time until the slots of a replica that ends are used by the others."""
    async with gateways(3, url, folder, GATEWAY_REDIS_URL=redis) as (*others, ending):
        async with load([ending], CLIENTS), load(others, CLIENTS) as answers:
            await asyncio.sleep(2)
            backend.reset()
            os.kill(ending.pid, number)
            ended = time.monotonic()
            await asyncio.sleep(10)
            served, most, failed = list(backend.served), backend.most, answers.failed
        seconds = filled_at(served, after=ended) - ended
    name = signal.Signals(number).name
    report.add(f"one of three ends by {name}", None, most, failed, None, f"slots in use again after {seconds:.2f} s")
    report.check(most, failed)


def filled_at(served: Sequence[Served], after: float) -> float:
    """Return when all slots were in use by the gateways that still served 5 seconds later."""
    staying = {one.gateway for one in served if one.began > after + 5}
    events = sorted(event for one in served if one.gateway in staying for event in ((one.began, 1), (one.ended, -1)))
    running = 0
    for at, change in events:
        running += change
        if running >= LIMIT and at > after:
            return at
    return float("inf")


async def vision(report: Report, several: Sequence[Started], backend: CountingBackend) -> None:
    """Measure how long the slot for images is idle when it moves to another replica."""
    backend.reset()
    async with load(several, 2, IMAGE) as answers:
        await asyncio.sleep(WINDOW)
        served, most, failed = list(backend.served), backend.most, answers.failed
    gaps = [
        (after.began - before.ended) * 1000 for before, after in pairwise(served) if before.gateway != after.gateway
    ]
    moves = f"{len(gaps)} moves, idle {median(gaps):.1f} ms (p95 {percentile(gaps, 0.95):.1f})" if gaps else "no move"
    report.add("images at three, one slot", len(served) / WINDOW, most, failed, None, moves)
    report.check(most, failed, 1)


async def redis_fails(report: Report, several: Sequence[Started], backend: CountingBackend, server: int) -> None:
    """Have Redis hang for some seconds under load."""
    backend.reset()
    async with load(several, CLIENTS) as answers:
        await asyncio.sleep(1)
        os.kill(server, signal.SIGSTOP)
        await asyncio.sleep(8)
        os.kill(server, signal.SIGCONT)
        await asyncio.sleep(6)
        rate, most, failed = len(backend.served) / 15, backend.most, answers.failed
    report.add("Redis hangs for 8 s", rate, most, failed, None)
    report.check(most, failed)


async def redis_killed(report: Report, backend: CountingBackend, url: str, folder: Path) -> None:
    """Kill Redis under load, and start it again without its data."""
    with contextlib.ExitStack() as stack:
        server, redis = stack.enter_context(redis_server(folder))
        async with gateways(3, url, folder, GATEWAY_REDIS_URL=redis) as several, load(several, CLIENTS) as answers:
            await asyncio.sleep(2)
            backend.reset()
            server.kill()
            server.wait()
            (folder / "redis.sock").unlink(missing_ok=True)
            await asyncio.sleep(8)
            stack.enter_context(redis_server(folder))
            await asyncio.sleep(6)
            rate, most, failed = len(backend.served) / 14, backend.most, answers.failed
    report.add("Redis killed, 8 s later back and empty", rate, most, failed, None)
    report.check(most, failed)


async def measure(folder: Path) -> Report:
    report = Report()
    async with serving(ANSWER_SECONDS) as (backend, url):
        async with gateways(1, url, folder) as several:
            await throughput(report, "one, without Redis", several, backend, "")
        async with gateways(3, url, folder) as several:
            await throughput(report, "three, without Redis", several, backend, "")
        with redis_server(folder) as (server, redis):
            async with gateways(1, url, folder, GATEWAY_REDIS_URL=redis) as several:
                await throughput(report, "one, with Redis", several, backend, redis)
            async with gateways(3, url, folder, GATEWAY_REDIS_URL=redis) as several:
                await throughput(report, "three, with Redis", several, backend, redis)
                await throughput(report, "one of three busy", several[:1], backend, redis)
                await redis_fails(report, several, backend, server.pid)
            lane = {"GATEWAY_REDIS_URL": redis, "GATEWAY__BACKENDS__VLLM__VISION_CONCURRENCY": "1"}
            async with gateways(3, url, folder, **lane) as several:
                await vision(report, several, backend)
            for number in (signal.SIGTERM, signal.SIGKILL):
                await lost(report, backend, url, folder, redis, number)
        await redis_killed(report, backend, url, folder)
    return report


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
        report = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(measure(Path(folder)))
    Console(width=150).print(report.table)
    sys.exit(1 if report.is_missed else 0)


if __name__ == "__main__":
    main()
