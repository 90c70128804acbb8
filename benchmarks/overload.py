"""More than the backend can serve, and clients that do not stay: what is served and refused then, and what is left afterwards.

`make bench-overload` starts it. The backend is a stand-in for a vLLM whose every answer takes the same time, so that what it can serve is known.

1. Overload: first as many requests at once as the backend has lanes, straight to it, one after the other: its own rate. Then four times that
   rate through the gateway, whether answers come or not. What is served a second must stay near the backend's own; who is refused must
   learn it at once.
2. Leaving: 10,000 requests, half of them streams, of which at least 60 % leave at a random moment: in line, before the first piece, in the stream.
   Some more mean to, and are answered before. Afterwards nothing may run or wait, and the gateway may hold no more descriptors than at the
   start, but for the connections that it keeps to the backend.

Exit status 1: a target was missed.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Started, started
from benchmarks.report import mark, percentile

MODEL = "bench-model"
LANES = 16
ANSWER_SECONDS = 0.2
ANSWER_TOKENS = 10
OVERLOAD = 4
GOODPUT = 0.95
REFUSAL_MILLISECONDS = 50.0
LEAVING, MEAN_TO_LEAVE = 0.6, 0.85
PHASES = ("queued", "waiting", "streaming")
AT_ONCE = 256
SHORT_LINE, LONG_LINE = 64, AT_ONCE
"""Who is refused at once in the overload; nobody of those who come and go."""
PATIENCE = 30.0
CLEAN_UP_SECONDS = 5.0
KEPT = LANES
"""Idle connections that the gateway may keep to the backend."""


@dataclass(slots=True)
class ResponseCounts:
    """What clients saw: seconds of each answer by its status, and how many left."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    left: int = 0
    """Before the end of their answers."""
    lost: int = 0
    """Answers that did not come, or broke off."""

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    def count(self, status: int) -> int:
        return len(self.seconds.get(status, ()))


def request_bytes(port: int, model: str, *, stream: bool) -> bytes:
    """One whole request for an answer of `ANSWER_TOKENS`, on a connection that ends with it."""
    prompt = f"{ANSWER_TOKENS} words"
    body = {
        "model": model,
        "stream": stream,
        "max_tokens": ANSWER_TOKENS,
        "messages": [{"role": "user", "content": prompt}],
    }
    data = json.dumps(body).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: application/json",
        "Connection: close",
    ]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes: after so many seconds, or when its stream has so many pieces."""

    seconds: float = PATIENCE
    pieces: int = 0


async def ask(port: int, request: bytes, seen: ResponseCounts, leave: Leave | None = None) -> None:
    """Send `request` and read its answer to the end, or leave before."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE if leave is None else leave.seconds):
            status, answer = await _answer(port, request, 0 if leave is None else leave.pieces)
    except TimeoutError:
        if leave is None or leave.pieces:
            seen.lost += 1
        else:
            seen.left += 1
    except (OSError, EOFError):
        seen.lost += 1
    else:
        if leave is not None and leave.pieces and status == 200:
            seen.left += 1
            return
        is_whole = status != 200 or b'"finish_reason":"' in answer
        seen.lost += not is_whole
        seen.add(status, time.perf_counter() - began)


async def _answer(port: int, request: bytes, pieces: int = 0) -> tuple[int, bytes]:
    """Status and body; with `pieces`, of a stream only the beginning that has so many."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status, body = int(head.split()[1]), b""
        while pieces and status == 200 and body.count(b'"content":"') < pieces:
            body += await reader.readuntil(b"\n\n")
        return status, body if pieces and status == 200 else await reader.read()
    finally:
        writer.transport.abort() if not reader.at_eof() else writer.close()


async def get(port: int, path: str) -> bytes:
    _, body = await _answer(
        port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
    )
    return body


def port_of(program: Started) -> int:
    return int(program.url.rpartition(":")[2])


# Overload


async def own_rate(port: int, seconds: float) -> float:
    """Answers a second of the backend itself, with all of its lanes taken."""
    request = request_bytes(port, MODEL, stream=False)
    seen = ResponseCounts()
    deadline = time.perf_counter() + seconds

    async def work() -> None:
        while time.perf_counter() < deadline:
            await ask(port, request, seen)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(LANES)))
    return seen.count(200) / (time.perf_counter() - began)


async def flood(port: int, rate: float, seconds: float) -> tuple[ResponseCounts, float]:
    """`rate` requests a second, whether answers come or not; what was seen, and the seconds from the first request to the last answer."""
    request = request_bytes(port, "standard", stream=False)
    seen = ResponseCounts()
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(round(rate * seconds)):
            await asyncio.sleep(began + number / rate - time.perf_counter())
            group.create_task(ask(port, request, seen))
    return seen, time.perf_counter() - began


async def overload(backend: Started, gateway: Started, seconds: float) -> bool:
    own = await own_rate(port_of(backend), seconds)
    seen, took = await flood(port_of(gateway), OVERLOAD * own, seconds)
    goodput = seen.count(200) / took
    refused = [1000 * value for value in seen.seconds.get(503, [])]
    p99 = percentile(refused, 0.99) if refused else float("inf")
    others = {status: len(found) for status, found in seen.seconds.items() if status not in (200, 503)}
    print(
        f"Overload: {OVERLOAD} times what the backend serves, for {seconds:g} s; {LANES} lanes, up to {SHORT_LINE} waiting"
    )
    print(f"  the backend itself {own:8.1f} answers/s\n  sent               {OVERLOAD * own:8.1f} requests/s")
    is_served = goodput >= GOODPUT * own
    print(
        f"  served             {goodput:8.1f} answers/s: {goodput / own:.3f} of the backend's own   target >= {GOODPUT}: {mark(is_served)}"
    )
    is_prompt = p99 <= REFUSAL_MILLISECONDS
    print(
        f"  refused            {len(refused):8} (503), p99 {p99:.1f} ms   target <= {REFUSAL_MILLISECONDS:g} ms: {mark(is_prompt)}"
    )
    print(f"  lost or cut off    {seen.lost:8}; other answers: {others or 'none'}\n")
    return is_served and is_prompt and not seen.lost and not others


# Leaving


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def come_and_go(port: int, count: int, seed: int) -> ResponseCounts:
    """`count` requests, `AT_ONCE` at a time. Of those who leave, half of the streams go with some pieces, the others within the time that an
    answer takes, or within that of a full line."""
    dice = random.Random(seed)
    requests = {stream: request_bytes(port, "standard", stream=stream) for stream in (True, False)}
    plans = iter([_plan(dice) for _ in range(count)])
    seen = ResponseCounts()

    async def work() -> None:
        for stream, leave in plans:
            await ask(port, requests[stream], seen, leave)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return seen


def _plan(dice: random.Random) -> tuple[bool, Leave | None]:
    """Whether it is a stream, and when it is left."""
    stream = dice.random() < 0.5
    if dice.random() >= MEAN_TO_LEAVE:
        return stream, None
    if stream and dice.random() < 0.5:
        return stream, Leave(pieces=dice.randrange(1, ANSWER_TOKENS))
    return stream, Leave(dice.uniform(0, dice.choice((ANSWER_SECONDS, ANSWER_SECONDS * AT_ONCE / LANES))))


async def gauges(port: int) -> dict[str, float]:
    """What runs and waits, the requests counted, by outcome, and those who left, by phase."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in (await get(port, "/metrics")).decode().splitlines():
        if (
            sample := re.match(r"gateway_(requests|client_disconnects)_(running|waiting|total)\{(.*)\} (\S+)$", line)
        ) is not None:
            label = re.search(r'(?:outcome|phase)="(\w+)"', sample[3])
            found[(f"left {label[1]}" if sample[1] == "client_disconnects" else label[1]) if label else sample[2]] += (
                float(sample[4])
            )
    return found


async def leaving(gateway: Started, count: int, seed: int) -> bool:
    port = port_of(gateway)
    before, held = await gauges(port), descriptors(gateway.pid)
    seen = await come_and_go(port, count, seed)
    deadline = time.perf_counter() + CLEAN_UP_SECONDS
    while True:
        after, holds = await gauges(port), descriptors(gateway.pid)
        is_clean = not after["running"] and not after["waiting"] and holds <= held + KEPT
        if is_clean or time.perf_counter() > deadline:
            break
        await asyncio.sleep(0.05)
    counted = {
        name: round(after[name] - before[name])
        for name in after
        if name not in ("running", "waiting") and after[name] > before[name]
    }
    print(
        f"Leaving: {count} requests, {AT_ONCE} at once, {MEAN_TO_LEAVE:.0%} mean to leave at a random moment (seed {seed})"
    )
    print(
        f"  left {seen.left}, answered whole {seen.count(200)}, refused {seen.count(503)}, lost or cut off {seen.lost}; the gateway counted {counted}"
    )
    print(
        f"  running {after['running']:g}, waiting {after['waiting']:g}; descriptors {held} before, {holds} after (up to {KEPT} connections are kept)"
    )
    is_reached = (
        is_clean
        and not seen.lost
        and seen.left >= LEAVING * count
        and all(counted.get(f"left {phase}") for phase in PHASES)
    )
    print(
        f"  target: {LEAVING:.0%} left, in every phase; none lost, all slots and places free, no descriptor more: {mark(is_reached)}\n"
    )
    return is_reached


# What runs


@contextlib.contextmanager
def running(max_queue: int) -> Iterator[tuple[Started, Started]]:
    """The stand-in and the gateway before it."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        rate = ANSWER_TOKENS / ANSWER_SECONDS
        words = [
            "simulate",
            "--kind",
            "vllm",
            "--model",
            MODEL,
            "--max-num-seqs",
            str(LANES),
            "--tokens-per-second",
            f"{rate:g}",
        ]
        backend = stack.enter_context(started(words, folder / "vllm", r"(http://[\d.:]+)"))
        settings: dict[str, Any] = {
            "llm_backend": "vllm",
            "backends": {
                "vllm": {"kind": "vllm", "base_url": backend.url, "max_concurrency": LANES, "max_queue": max_queue}
            },
            "tiers": {"standard": {"models": {"vllm": MODEL}}},
            "log_format": "text",
        }
        (folder / "gateway.json").write_text(json.dumps(settings))
        command = ["serve", "--config", str(folder / "gateway.json")]
        gateway = stack.enter_context(
            started(command, folder / "gateway", r"serving (http://[\d.:]+)", GATEWAY_PORT="0", GATEWAY_STATE_FILE="")
        )
        yield backend, gateway


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of the overload")
    parser.add_argument("--requests", type=int, default=10_000, help="that come and go")
    parser.add_argument("--seed", type=int, default=1, help="of the moments at which they go")
    parser.add_argument("--parts", default="overload,leaving")
    given = parser.parse_args(arguments)
    parts, reached = given.parts.split(","), []
    if "overload" in parts:
        with running(SHORT_LINE) as (backend, gateway):
            reached.append(asyncio.run(overload(backend, gateway, given.seconds)))
    if "leaving" in parts:
        with running(LONG_LINE) as (_, gateway):
            reached.append(asyncio.run(leaving(gateway, given.requests, given.seed)))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
