"""Cost and benefit of admission: CPU of a step with short and long queues, and bursts on an Ollama
with and without the gateway.

`make bench-admission` runs it. The Ollama is a stand-in that slows down with each concurrent image
as measured on a real one (`simulate.SEED_SLOWDOWN`: one image takes 51 s, five at once 397 s). Its
time is scaled, as are the client's and the gateway's timeouts; the printed seconds are unscaled.
The client is openai-python with its own timeout of 600 s and its own two retries. Exit status 1: a
target was missed.
"""

import argparse
import asyncio
import base64
import contextlib
import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAIError
from PIL import Image

from benchmarks.processes import started
from benchmarks.report import mark, percentile
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import AdmissionLimits, LaneLimits
from gateway.admission.queues import Queue, QueueEntry
from gateway.admission.scheduler import Admission
from gateway.admission.server_slots import ServerSlots
from gateway.simulate import SEED_SLOWDOWN

FEW, MANY = 10, 10_000
STEPS = 3_000
STEP_RATIO = 1.2
IMAGE_SECONDS = 51.0
READ_TIMEOUT = 600.0
BURSTS = (1, 5, 10, 20)
RATE = 0.98
SPEED_UP = 2.7
MIXED_RATIO = 1.2
TEXT_TOKENS = 60
VISION, TEXT = "qwen3-vl:8b", "llama"


# Cost of a step


class _Server(ServerSlots):
    def serves(self, model: str) -> bool:
        return True

    def is_up(self) -> bool:
        return True


class _Request(QueueEntry):
    __slots__ = ("_running",)

    def __init__(self, queue: Queue, claim: Claim, running: list["_Request"]) -> None:
        super().__init__(queue, claim)
        self._running = running

    def admitted(self) -> None:
        self._running.append(self)


def step_cost(waiting: int) -> float:
    """Return the CPU microseconds for one request that ends, one that is admitted in its place, and
    one that is queued.

    The requests are for two models, so there are two queues, and have two keys.
    """
    lanes = {"text": LaneLimits(None, 2 * MANY, 60)}
    admission = Admission([_Server()], AdmissionLimits(4, 4, lanes), time.monotonic, lambda seconds, callback: None)
    queues = [admission.queue(model, "text") for model in ("a", "b")]
    claims = [Claim(f"key {number}") for number in range(2)]
    running: list[_Request] = []

    def arrive(number: int) -> None:
        request = _Request(queues[number % len(queues)], claims[number // 2 % len(claims)], running)
        admission.enter(request)
        if request.placement is not None:
            running.append(request)

    for number in range(waiting + 4):
        arrive(number)
    gc.collect()
    gc.freeze()  # as the gateway does
    began = time.thread_time()
    for number in range(STEPS):
        admission.leave(running.pop(0))
        arrive(number)
    spent = time.thread_time() - began
    gc.unfreeze()
    return spent / STEPS * 1e6


def steps(rounds: int) -> bool:
    """Print both costs and their ratio, using the minima of alternating rounds."""
    costs: dict[int, list[float]] = {FEW: [], MANY: []}
    for _ in range(rounds):
        for waiting, found in costs.items():
            found.append(step_cost(waiting))
    few, many = min(costs[FEW]), min(costs[MANY])
    is_reached = many / few <= STEP_RATIO
    print("A step: one request ends, one is admitted, one arrives")
    print(f"  {FEW:6} queued {few:8.2f} µs\n  {MANY:6} queued {many:8.2f} µs")
    print(f"  ratio {many / few:.2f}   target <= {STEP_RATIO}: {mark(is_reached)}\n")
    return is_reached


# Bursts


@dataclass(frozen=True, slots=True)
class BurstOutcome:
    """Outcome of a number of requests, in seconds of the stand-in's time: `total` from the first
    request to the last answer, `each` of every answer.
    """

    total: float
    each: list[float]
    failures: int


class AdmissionBench:
    """The stand-in, the gateway in front of it, and clients; `scale` is real seconds per simulated
    second.
    """

    def __init__(self, scale: float, ollama: str, gateway: str) -> None:
        self.scale = scale
        self._ollama = ollama
        self.gateway = gateway

    def client(self, is_direct: bool) -> AsyncOpenAI:
        """Return a client of the stand-in (`is_direct`) or of the gateway."""
        return AsyncOpenAI(
            base_url=f"{self._ollama if is_direct else self.gateway}/v1",
            api_key="any",
            timeout=READ_TIMEOUT * self.scale,
        )

    async def send(self, client: AsyncOpenAI, requests: list[dict[str, Any]], at_once: int) -> BurstOutcome:
        """Send all requests, `at_once` at a time."""
        begun = time.monotonic()
        each: list[float] = []
        failures = 0
        remaining = iter(requests)

        async def work() -> None:
            nonlocal failures
            for request in remaining:
                began = time.monotonic()
                try:
                    await client.chat.completions.create(**request)
                    each.append((time.monotonic() - began) / self.scale)
                except OpenAIError:
                    failures += 1

        await asyncio.gather(*(work() for _ in range(at_once)))
        return BurstOutcome((time.monotonic() - begun) / self.scale, each, failures)

    async def limits(self) -> dict[str, int]:
        """Return the gateway's current concurrency limit of each model."""
        async with httpx2.AsyncClient(trust_env=False) as http:
            status = (await http.get(f"{self.gateway}/ops/status")).json()
        return {
            model: slots["limit"] for model, slots in status["backends"]["ollama"]["servers"][0]["model_slots"].items()
        }


def image_request(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (number % 256, 0, 0)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "text", "text": "1 words What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": VISION, "messages": [{"role": "user", "content": content}], "max_tokens": 1}


def text_request(model: str, tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"{tokens} words"}], "max_tokens": tokens}


async def bursts(bench: AdmissionBench, sizes: tuple[int, ...]) -> bool:
    """Send bursts of images directly and through the gateway, compared with five sequential
    images.
    """
    async with bench.client(True) as direct, bench.client(False) as through:
        alone = await bench.send(direct, [image_request(number) for number in range(5)], 1)
        print(f"Images sent at once (seconds; sequentially: {alone.total / 5:.1f} s each)")
        print(f"  {'':8}{'direct':^32}{'through the gateway':^32}")
        print(f"  {'images':8}" + f"{'total':>10}{'each':>10}{'failed':>10}  " * 2)
        last = alone
        for size in sizes:
            requests = [image_request(number) for number in range(size)]
            first = await bench.send(direct, requests, size)
            last = await bench.send(through, requests, size)
            print(f"  {size:<8}" + "  ".join(_columns(outcome, size) for outcome in (first, last)))
        rate = (alone.total / 5) / (last.total / sizes[-1])
        is_reached = rate >= RATE and last.failures == 0
        print(
            f"  rate with {sizes[-1]} relative to the sequential rate: {rate:.3f}   "
            f"target >= {RATE}, none failed: {mark(is_reached)}\n"
        )
        return is_reached


def _columns(outcome: BurstOutcome, size: int) -> str:
    done = size - outcome.failures
    each = f"{outcome.total / done:10.1f}" if done else f"{'-':>10}"
    return f"{outcome.total:10.1f}{each}{outcome.failures:>10}"


async def learning(bench: AdmissionBench) -> bool:
    """Send three concurrent text requests to one model after the gateway has learned its limit."""
    async with bench.client(False) as client:
        texts = [text_request(TEXT)] * 3
        alone = await bench.send(client, texts, 1)
        await bench.send(client, [text_request(TEXT)] * 4, 4)
        together = await bench.send(client, texts, 3)
        await bench.send(client, [text_request(VISION)] * 4, 4)
    limits = await bench.limits()
    gain = alone.total / together.total
    is_reached = gain >= SPEED_UP and limits[VISION] == 1
    print("Three texts at once to one model of an Ollama with OLLAMA_NUM_PARALLEL=4, unknown to the gateway")
    print(f"  sequential {alone.total:.1f} s, concurrent {together.total:.1f} s: {gain:.2f} x; learned: {limits}")
    print(f"  target >= {SPEED_UP} x, and 1 for the vision model: {mark(is_reached)}\n")
    return is_reached


async def mixed(bench: AdmissionBench, texts: int) -> bool:
    """Send text requests to another model while images are queued."""
    async with bench.client(False) as client:
        requests = [text_request(TEXT, 20)] * texts
        alone = await bench.send(client, requests, 2)
        burst = asyncio.create_task(bench.send(client, [image_request(number) for number in range(20)], 20))
        among = await bench.send(client, requests, 2)
        images_left = not burst.done()
        burst.cancel()
        await asyncio.gather(burst, return_exceptions=True)
    p99_alone, p99_among = percentile(alone.each, 0.99), percentile(among.each, 0.99)
    ratio = p99_among / p99_alone
    is_reached = ratio <= MIXED_RATIO and images_left and not among.failures
    print(f"{texts} texts to a second model during a burst of images")
    print(f"  p99 without images {p99_alone:.2f} s, with images {p99_among:.2f} s: {ratio:.2f} x")
    print(f"  target <= {MIXED_RATIO} x: {mark(is_reached)}\n")
    return is_reached


# Processes and command line


@contextlib.asynccontextmanager
async def running(scale: float, slowdown: float) -> AsyncIterator[AdmissionBench]:
    """Run a stand-in and a gateway, each in its own process."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ollama = stack.enter_context(
            started(_stand_in(scale, slowdown), Path(folder) / "ollama", r"(http://[\d.:]+)")
        ).url
        settings = Path(folder) / "gateway.json"
        settings.write_text(json.dumps(_settings(ollama, scale)))
        command = ["serve", "--config", str(settings)]
        state = str(Path(folder) / "state.json")
        log = Path(folder) / "gateway"
        gateway = stack.enter_context(
            started(
                command,
                log,
                r"serving (http://[\d.:]+)",
                GATEWAY_PORT="0",
                GATEWAY_STATE_FILE=state,
                GATEWAY_USAGE_FILE="",
            )
        )
        yield AdmissionBench(scale, ollama, gateway.url)


def _stand_in(scale: float, slowdown: float) -> list[str]:
    options = {
        "time_scale": scale,
        "image_seconds": IMAGE_SECONDS,
        "image_slowdown": slowdown,
        "tokens_per_second": 1,
        "parallel": 4,
    }
    arguments = [argument for name, value in options.items() for argument in ("--set", f"{name}={value}")]
    return ["simulate", "--kind", "ollama", "--model", f"{VISION},vision", "--model", TEXT, *arguments]


def _settings(ollama: str, scale: float) -> dict[str, Any]:
    times = {
        "queue_timeout": 300,
        "vision_queue_timeout": 3600,
        "first_token_timeout": 300,
        "idle_timeout": 300,
        "total_timeout": 3600,
    }
    return {
        "llm_backend": "ollama",
        "backends": {
            "ollama": {
                "kind": "ollama",
                "base_url": ollama,
                **{name: seconds * scale for name, seconds in times.items()},
            }
        },
        "tiers": {"vision": {"models": {"ollama": VISION}}, "text": {"models": {"ollama": TEXT}}},
        "commit_after": 45 * scale,
        "heartbeat": 15 * scale,
        "log_format": "text",
    }


async def _run_part(scale: float, slowdown: float, part: Callable[[AdmissionBench], Awaitable[bool]]) -> bool:
    async with running(scale, slowdown) as bench:
        return await part(bench)


def main() -> int:
    """Run the parts selected on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.02, help="real seconds per simulated second")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of the part `steps`")
    parser.add_argument("--parts", default="steps,bursts,learning,mixed")
    given = parser.parse_args()
    parts = given.parts.split(",")
    reached = [steps(given.rounds)] if "steps" in parts else []
    if "bursts" in parts:
        reached.append(asyncio.run(_run_part(given.scale, SEED_SLOWDOWN, lambda bench: bursts(bench, BURSTS))))
    if "learning" in parts:
        reached.append(asyncio.run(_run_part(given.scale, 0, learning)))
    if "mixed" in parts:
        reached.append(asyncio.run(_run_part(given.scale, 0, lambda bench: mixed(bench, 100))))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
