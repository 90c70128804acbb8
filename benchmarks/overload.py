"""Behaviour under overload and with disconnecting clients.

`make bench-overload` runs it. The backend is a vLLM stand-in that takes the same time for every
answer, so its capacity is known.

1. Overload: measure the backend's own rate, with all its slots in use and without the gateway. Then
   send four times that rate through the gateway, whether or not answers arrive. The goodput must
   stay near the backend's own rate, and refusals must be immediate.
2. Disconnects: of 10,000 requests, half of them streams, at least 60 % disconnect at a random
   moment: in the queue, before the first token, during the stream. Some more intend to, but get
   their answer before. Afterwards no request may run or wait, and the gateway may not have more
   open descriptors than at the start, except for the connections that it keeps to the backend.

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
SLOTS = 16
ANSWER_SECONDS = 0.2
ANSWER_TOKENS = 10
OVERLOAD = 4
GOODPUT = 0.95
REFUSAL_MILLISECONDS = 50.0
DISCONNECTED, INTEND_TO_DISCONNECT = 0.6, 0.85
PHASES = ("queued", "waiting", "streaming")
AT_ONCE = 256
SHORT_QUEUE, LONG_QUEUE = 64, AT_ONCE
"""Queue limits: the short one causes refusals under overload, the long one holds all disconnecting
requests.
"""
PATIENCE = 30.0
CLEAN_UP_SECONDS = 5.0
KEPT = SLOTS
"""Idle connections to the backend that the gateway may keep."""


@dataclass(slots=True)
class ResponseCounts:
    """Results of the clients: seconds of each response by its status, and the number of others.

    Attributes:
        left: clients that disconnected before the end of their response.
        lost: responses that did not arrive or were cut off.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    left: int = 0
    lost: int = 0

    def add(self, status: int, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    def count(self, status: int) -> int:
        return len(self.seconds.get(status, ()))


def request_bytes(port: int, model: str, *, stream: bool) -> bytes:
    """Return a complete request for `ANSWER_TOKENS` tokens, on a connection that closes after
    it.
    """
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
class Disconnect:
    """When a client disconnects: after a time, or after a number of pieces of its stream."""

    seconds: float = PATIENCE
    pieces: int = 0


async def ask(port: int, request: bytes, seen: ResponseCounts, disconnect: Disconnect | None = None) -> None:
    """Send `request` and read its response to the end, or disconnect before."""
    began = time.perf_counter()
    try:
        async with asyncio.timeout(PATIENCE if disconnect is None else disconnect.seconds):
            status, answer = await _answer(port, request, 0 if disconnect is None else disconnect.pieces)
    except TimeoutError:
        if disconnect is None or disconnect.pieces:
            seen.lost += 1
        else:
            seen.left += 1
    except (OSError, EOFError):
        seen.lost += 1
    else:
        if disconnect is not None and disconnect.pieces and status == 200:
            seen.left += 1
            return
        is_whole = status != 200 or b'"finish_reason":"' in answer
        seen.lost += not is_whole
        seen.add(status, time.perf_counter() - began)


async def _answer(port: int, request: bytes, pieces: int = 0) -> tuple[int, bytes]:
    """Return the status and the body; with `pieces`, a stream is read only until it has so many."""
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
    """Return the answers per second of the backend itself, with all its slots in use."""
    request = request_bytes(port, MODEL, stream=False)
    seen = ResponseCounts()
    deadline = time.perf_counter() + seconds

    async def work() -> None:
        while time.perf_counter() < deadline:
            await ask(port, request, seen)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(SLOTS)))
    return seen.count(200) / (time.perf_counter() - began)


async def send_at_rate(port: int, rate: float, seconds: float) -> tuple[ResponseCounts, float]:
    """Send `rate` requests per second, whether or not answers arrive.

    Returns the results and the seconds from the first request to the last response.
    """
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
    seen, took = await send_at_rate(port_of(gateway), OVERLOAD * own, seconds)
    goodput = seen.count(200) / took
    refused = [1000 * value for value in seen.seconds.get(503, [])]
    p99 = percentile(refused, 0.99) if refused else float("inf")
    others = {status: len(found) for status, found in seen.seconds.items() if status not in (200, 503)}
    print(
        f"Overload: {OVERLOAD} times the backend's capacity for {seconds:g} s; "
        f"{SLOTS} slots, up to {SHORT_QUEUE} queued"
    )
    print(f"  the backend itself {own:8.1f} answers/s\n  sent               {OVERLOAD * own:8.1f} requests/s")
    is_served = goodput >= GOODPUT * own
    print(
        f"  served             {goodput:8.1f} answers/s: {goodput / own:.3f} of the backend's own rate   "
        f"target >= {GOODPUT}: {mark(is_served)}"
    )
    is_prompt = p99 <= REFUSAL_MILLISECONDS
    print(
        f"  refused            {len(refused):8} (503), p99 {p99:.1f} ms   "
        f"target <= {REFUSAL_MILLISECONDS:g} ms: {mark(is_prompt)}"
    )
    print(f"  lost or cut off    {seen.lost:8}; other responses: {others or 'none'}\n")
    return is_served and is_prompt and not seen.lost and not others


# Disconnects


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def send_and_disconnect(port: int, count: int, seed: int) -> ResponseCounts:
    """Send `count` requests, `AT_ONCE` at a time, most of which disconnect.

    Half of the disconnecting streams do so after some pieces. The others do so within the time of
    an answer or within the time of a full queue.
    """
    dice = random.Random(seed)
    requests = {stream: request_bytes(port, "standard", stream=stream) for stream in (True, False)}
    plans = iter([_plan(dice) for _ in range(count)])
    seen = ResponseCounts()

    async def work() -> None:
        for stream, disconnect in plans:
            await ask(port, requests[stream], seen, disconnect)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return seen


def _plan(dice: random.Random) -> tuple[bool, Disconnect | None]:
    """Return whether the request is a stream, and when it disconnects."""
    stream = dice.random() < 0.5
    if dice.random() >= INTEND_TO_DISCONNECT:
        return stream, None
    if stream and dice.random() < 0.5:
        return stream, Disconnect(pieces=dice.randrange(1, ANSWER_TOKENS))
    return stream, Disconnect(dice.uniform(0, dice.choice((ANSWER_SECONDS, ANSWER_SECONDS * AT_ONCE / SLOTS))))


async def gauges(port: int) -> dict[str, float]:
    """Read the metrics: running and waiting requests, requests by outcome, disconnects by phase."""
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


async def disconnects(gateway: Started, count: int, seed: int) -> bool:
    port = port_of(gateway)
    before, held = await gauges(port), descriptors(gateway.pid)
    seen = await send_and_disconnect(port, count, seed)
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
        f"Disconnects: {count} requests, {AT_ONCE} at once, "
        f"{INTEND_TO_DISCONNECT:.0%} intend to disconnect at a random moment (seed {seed})"
    )
    print(
        f"  disconnected {seen.left}, complete {seen.count(200)}, refused {seen.count(503)}, "
        f"lost or cut off {seen.lost}; the gateway counted {counted}"
    )
    print(
        f"  running {after['running']:g}, waiting {after['waiting']:g}; "
        f"descriptors {held} before, {holds} after (up to {KEPT} connections are kept)"
    )
    is_reached = (
        is_clean
        and not seen.lost
        and seen.left >= DISCONNECTED * count
        and all(counted.get(f"left {phase}") for phase in PHASES)
    )
    print(
        f"  target: {DISCONNECTED:.0%} disconnected, in every phase; none lost, "
        f"nothing running or waiting, no more descriptors: {mark(is_reached)}\n"
    )
    return is_reached


# Processes and command line


@contextlib.contextmanager
def running(max_queue: int) -> Iterator[tuple[Started, Started]]:
    """Run the stand-in and the gateway in front of it."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        rate = ANSWER_TOKENS / ANSWER_SECONDS
        arguments = [
            "simulate",
            "--kind",
            "vllm",
            "--model",
            MODEL,
            "--max-num-seqs",
            str(SLOTS),
            "--tokens-per-second",
            f"{rate:g}",
        ]
        backend = stack.enter_context(started(arguments, folder / "vllm", r"(http://[\d.:]+)"))
        settings: dict[str, Any] = {
            "llm_backend": "vllm",
            "backends": {
                "vllm": {"kind": "vllm", "base_url": backend.url, "max_concurrency": SLOTS, "max_queue": max_queue}
            },
            "tiers": {"standard": {"models": {"vllm": MODEL}}},
            "log_format": "text",
        }
        (folder / "gateway.json").write_text(json.dumps(settings))
        command = ["serve", "--config", str(folder / "gateway.json")]
        gateway = stack.enter_context(
            started(
                command,
                folder / "gateway",
                r"serving (http://[\d.:]+)",
                GATEWAY_PORT="0",
                GATEWAY_STATE_FILE="",
                GATEWAY_USAGE_FILE="",
            )
        )
        yield backend, gateway


def main(arguments: list[str]) -> int:
    """Run the parts selected on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each half of the overload")
    parser.add_argument("--requests", type=int, default=10_000, help="number of disconnecting requests")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments of disconnection")
    parser.add_argument("--parts", default="overload,disconnects")
    given = parser.parse_args(arguments)
    parts, reached = given.parts.split(","), []
    if "overload" in parts:
        with running(SHORT_QUEUE) as (backend, gateway):
            reached.append(asyncio.run(overload(backend, gateway, given.seconds)))
    if "disconnects" in parts:
        with running(LONG_QUEUE) as (_, gateway):
            reached.append(asyncio.run(disconnects(gateway, given.requests, given.seed)))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
