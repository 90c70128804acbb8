"""Load generator of `cost.py`: many connections from one process, with as little work per byte as
possible.

Run it with `python -m benchmarks.load '<LoadJob as JSON>'`. It writes its outcome as JSON to the
file that the job names (through a pipe, long outcomes were truncated in about one of some hundred
runs). It reads the CPU time of the watched processes itself, at both ends of the window, so the
counts and the cost belong to the same time.
"""

import asyncio
import dataclasses
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.process_stats import cpu_seconds, resident_bytes
from benchmarks.upstream import MARK

_MARK = MARK.encode()
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_TAIL = 64
_STALL_SECONDS = 20.0
_LEAD_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class LoadJob:
    """One load job.

    Attributes:
        kind: `plain` (requests one after the other), `streams` (long streams, counted while all are
            open), `ttft` (short streams one after the other), `idle` (streams held open) or `pings`
            (small requests during one large one).
        request: path of a file with one complete HTTP request.
        outcome: path of the file for the outcome.
        watch: ids of the processes whose cost is measured.
    """

    kind: str
    port: int
    request: str
    outcome: str
    connections: int
    seconds: float
    warm_up: float = 0.5
    watch: list[int] = field(default_factory=list)
    spread: float = 0.0
    """Seconds over which the connections start, so that their tokens do not arrive in lockstep."""
    ping: str = "/healthz"
    split: bool = False
    """Write head and body separately, as httpx does, and with it openai-python."""


@dataclass(slots=True)
class LoadOutcome:
    """Counts of the window, its length, the CPU seconds of the watched processes, and latencies in
    seconds.
    """

    answers: int = 0
    tokens: int = 0
    reads: int = 0
    """Reads with tokens; if they are fewer than the tokens, the subject sent several tokens
    together.
    """
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    own_cpu_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    first_failure: str = ""
    resident_before: int = 0
    resident_after: int = 0


class Client(asyncio.Protocol):
    """One keep-alive connection that sends `request` repeatedly, or once."""

    _transport: asyncio.Transport

    def __init__(self, run: "Run", request: bytes, *, repeat: bool) -> None:
        self._run = run
        end = request.find(_HEAD_END) + len(_HEAD_END) if run.job.split else len(request)
        self._request, self._rest = request[:end], request[end:]
        self._repeat = repeat
        self._sent_at = 0.0
        self._reset()

    def _reset(self) -> None:
        self._head = b""
        self._missing = -1
        self._tail = b""
        self._tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not subclasses of it
        self._send()

    def _send(self) -> None:
        self._reset()
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)
        if self._rest:  # in the next turn of the loop: in this one it would be sent together with the head
            self._run.loop.call_soon(self._transport.write, self._rest)

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.lost(self)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._missing == -1:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            head, data = self._head[:end], self._head[end + 4 :]
            if not head.startswith(b"HTTP/1.1 200"):
                self._run.failed(f"{head[:80]!r} {data[:300]!r}")
                self._transport.abort()
                return
            length = _LENGTH.search(head)
            self._missing = int(length[1]) if length else -2
        if self._missing >= 0:
            self._missing -= len(data)
            if self._missing <= 0:
                self._finished()
            return
        self._chunked(data)

    def _chunked(self, data: bytes) -> None:
        tokens = data.count(_MARK)
        if tokens:
            if not self._tokens:
                self._run.first_token(time.perf_counter() - self._sent_at)
            self._tokens += tokens
            self._run.tokens += tokens
            self._run.reads += 1
        self._tail = (self._tail + data)[-_TAIL:] if len(data) < _TAIL else data[-_TAIL:]
        if self._tail.endswith(_LAST_CHUNK):
            if self._run.streaming and b"[DONE]" not in self._tail:
                self._run.failed(f"a stream ended without [DONE]: {self._tail!r}")
            self._finished()

    def _finished(self) -> None:
        self._run.answered(time.perf_counter() - self._sent_at)
        if self._repeat and not self._run.ending:
            self._send()
        else:
            self._transport.close()


class Run:
    """A running job: its connections and their counts so far."""

    def __init__(self, job: LoadJob) -> None:
        self.job = job
        self.loop = asyncio.get_running_loop()
        self.outcome = LoadOutcome()
        self.answers = 0
        self.tokens = 0
        self.reads = 0
        self.ending = False
        self.streaming = job.kind != "plain"
        self._measuring = False
        self._open: set[Client] = set()
        self._empty = asyncio.Event()
        self.started = 0
        self.all_started = asyncio.Event()

    def lost(self, client: Client) -> None:
        self._open.discard(client)
        if not self.ending and not self.outcome.failures:
            self.failed("a connection was closed too early")
        if not self._open:
            self._empty.set()

    def failed(self, reason: str) -> None:
        self.outcome.failures += 1
        self.outcome.first_failure = self.outcome.first_failure or reason
        self.all_started.set()

    def first_token(self, seconds: float) -> None:
        self.started += 1
        if self.started == self.job.connections:
            self.all_started.set()
        if self._measuring and self.job.kind == "ttft":
            self.outcome.latencies.append(seconds)

    def answered(self, seconds: float) -> None:
        self.answers += 1
        if self._measuring and self.job.kind == "plain":
            self.outcome.latencies.append(seconds)

    async def connect(self, request: bytes, *, repeat: bool) -> None:
        """Open the job's connections, spread over `job.spread` seconds."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number in range(self.job.connections):
            due = start + number * self.job.spread / self.job.connections
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            _, client = await loop.create_connection(
                lambda: Client(self, request, repeat=repeat), "127.0.0.1", self.job.port
            )
            self._open.add(client)

    async def measure(self) -> None:
        """Count for `job.seconds`, and read the CPU time of the watched processes at both ends."""
        outcome = self.outcome
        answers, tokens, reads = self.answers, self.tokens, self.reads
        self._measuring = True
        start, cpu, own = time.perf_counter(), cpu_seconds(self.job.watch), time.process_time()
        await asyncio.sleep(self.job.seconds)
        outcome.cpu_seconds = cpu_seconds(self.job.watch) - cpu
        outcome.seconds = time.perf_counter() - start
        outcome.answers, outcome.tokens, outcome.reads = (
            self.answers - answers,
            self.tokens - tokens,
            self.reads - reads,
        )
        outcome.own_cpu_seconds = time.process_time() - own
        self._measuring = False
        self.ending = True

    async def drain(self) -> None:
        """Wait until all open answers end; one that does not is a failure."""
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                if self._open:
                    await self._empty.wait()
        except TimeoutError:
            self.failed(f"{len(self._open)} answers did not end within {_STALL_SECONDS:.0f} s")

    def abort(self) -> None:
        self.ending = True
        for client in list(self._open):
            client.close()


async def closed_loop(job: LoadJob, request: bytes) -> LoadOutcome:
    """Run the kinds `plain`, `streams` and `ttft`: warm up, measure, drain."""
    run = Run(job)
    await run.connect(request, repeat=job.kind != "streams")
    await asyncio.sleep(job.warm_up)
    await run.measure()
    await run.drain()
    return run.outcome


async def idle(job: LoadJob, request: bytes) -> LoadOutcome:
    """Run the kind `idle`: measure the memory of the watched processes while all streams wait for
    their next token.
    """
    run = Run(job)
    before = resident_bytes(job.watch)
    await run.connect(request, repeat=False)
    async with asyncio.timeout(_STALL_SECONDS):
        await run.all_started.wait()
    await asyncio.sleep(job.seconds)
    run.outcome.resident_before, run.outcome.resident_after = before, resident_bytes(job.watch)
    run.outcome.answers = run.started
    run.abort()
    await run.drain()
    return run.outcome


async def pings(job: LoadJob, request: bytes) -> LoadOutcome:
    """Run the kind `pings`: send a small request every millisecond during one large request.

    The latencies are those of the small ones, which continue for `job.seconds` after the answer to
    the large one.
    """
    run = Run(dataclasses.replace(job, connections=1, kind="plain"))
    ping = b"GET %b HTTP/1.1\r\nhost: gateway\r\n\r\n" % job.ping.encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", job.port)
    done = asyncio.Event()

    async def large() -> None:
        await asyncio.sleep(_LEAD_SECONDS)
        await run.connect(request, repeat=False)
        await run.drain()
        if not run.answers:
            run.failed("the large request got no answer")
        await asyncio.sleep(job.seconds)
        done.set()

    async with asyncio.TaskGroup() as group:
        run.ending = True  # the connection closes after the answer, as intended
        await _ping(reader, writer, ping)
        group.create_task(large())
        while not done.is_set():
            run.outcome.latencies.append(await _ping(reader, writer, ping))
            await asyncio.sleep(0.001)
    writer.close()
    return run.outcome


async def _ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
    start = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(_HEAD_END)
    length = _LENGTH.search(head)
    if not head.startswith(b"HTTP/1.1 200") or length is None:
        raise ConnectionError(f"the response to a ping was {head[:80]!r}")
    await reader.readexactly(int(length[1]))
    return time.perf_counter() - start


def main() -> None:
    """Run the job given on the command line and write its outcome."""
    job = LoadJob(**json.loads(sys.argv[1]))
    request = Path(job.request).read_bytes()
    work = {"idle": idle, "pings": pings}.get(job.kind, closed_loop)
    outcome = uvloop.run(work(job, request))
    Path(job.outcome).write_text(json.dumps(dataclasses.asdict(outcome)))
    os._exit(0)  # skip closing thousands of sockets


if __name__ == "__main__":
    main()
