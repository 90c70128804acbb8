"""What the waiting line costs and what it is worth: a step with few and with many waiting, and crowds before an Ollama, straight and through it.

`make bench-admission` starts it. The Ollama is a stand-in that slows down with each further image as one was measured to do
(`simulate.SEED_SLOWDOWN`: one image takes 51 s, five at once 397 s). Its time is scaled, and so are the client's and the gateway's
times; what is printed is unscaled seconds. The client is openai's, with its own 600 s and its own two retries. Exit status 1: a target was missed.
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
from gateway.admission.queues import AdmissionLimits, LaneLimits, Queue, QueueEntry, ServerSlots
from gateway.admission.scheduler import Admission
from gateway.simulate import SEED_SLOWDOWN

FEW, MANY = 10, 10_000
STEPS = 3_000
STEP_RATIO = 1.2
IMAGE_SECONDS = 51.0
READ_TIMEOUT = 600.0
CROWDS = (1, 5, 10, 20)
RATE = 0.98
SPEED_UP = 2.7
BESIDE = 1.2
TEXT_TOKENS = 60
VISION, TEXT = "qwen3-vl:8b", "llama"


# A step


class _Server(ServerSlots):
    def serves(self, model: str) -> bool:
        return True

    def is_up(self) -> bool:
        return True


class _Request(QueueEntry):
    __slots__ = ("_let_in",)

    def __init__(self, queue: Queue, claim: Claim, let_in: list["_Request"]) -> None:
        super().__init__(queue, claim)
        self._let_in = let_in

    def admitted(self) -> None:
        self._let_in.append(self)


def step_cost(waiting: int) -> float:
    """CPU microseconds for one that ends, one that is let in for it, and one that comes to the end of the line. The crowds are of one make:
    two models, so that two queues are asked, and two keys."""
    lanes = {"text": LaneLimits(None, 2 * MANY, 60)}
    admission = Admission([_Server()], AdmissionLimits(4, 4, lanes), time.monotonic, lambda seconds, callback: None)
    queues = [admission.queue(model, "text") for model in ("a", "b")]
    claims = [Claim(f"key {number}") for number in range(2)]
    running: list[_Request] = []

    def come(number: int) -> None:
        request = _Request(queues[number % len(queues)], claims[number // 2 % len(claims)], running)
        admission.enter(request)
        if request.placement is not None:
            running.append(request)

    for number in range(waiting + 4):
        come(number)
    gc.collect()
    gc.freeze()  # as the gateway does
    began = time.thread_time()
    for number in range(STEPS):
        admission.leave(running.pop(0))
        come(number)
    spent = time.thread_time() - began
    gc.unfreeze()
    return spent / STEPS * 1e6


def steps(rounds: int) -> bool:
    """Print both costs and their ratio, by the minima of rounds in turns."""
    costs: dict[int, list[float]] = {FEW: [], MANY: []}
    for _ in range(rounds):
        for waiting, found in costs.items():
            found.append(step_cost(waiting))
    few, many = min(costs[FEW]), min(costs[MANY])
    is_reached = many / few <= STEP_RATIO
    print("A step: one ends, one is let in, one comes")
    print(f"  {FEW:6} waiting {few:8.2f} µs\n  {MANY:6} waiting {many:8.2f} µs")
    print(f"  ratio {many / few:.2f}   target <= {STEP_RATIO}: {mark(is_reached)}\n")
    return is_reached


# Crowds


@dataclass(frozen=True, slots=True)
class CrowdOutcome:
    """Of requests that were sent: seconds of the stand-in's time, from the first to the last."""

    total: float
    each: list[float]
    failures: int


class AdmissionBench:
    """The stand-in, the gateway before it, and a client for each; `scale` is real seconds for one of theirs."""

    def __init__(self, scale: float, ollama: str, gateway: str) -> None:
        self.scale = scale
        self._ollama = ollama
        self.gateway = gateway

    def client(self, is_straight: bool) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{self._ollama if is_straight else self.gateway}/v1",
            api_key="any",
            timeout=READ_TIMEOUT * self.scale,
        )

    async def send(self, client: AsyncOpenAI, requests: list[dict[str, Any]], at_once: int) -> CrowdOutcome:
        """All of them, `at_once` at a time."""
        begun = time.monotonic()
        each: list[float] = []
        failures = 0
        left = iter(requests)

        async def work() -> None:
            nonlocal failures
            for request in left:
                began = time.monotonic()
                try:
                    await client.chat.completions.create(**request)
                    each.append((time.monotonic() - began) / self.scale)
                except OpenAIError:
                    failures += 1

        await asyncio.gather(*(work() for _ in range(at_once)))
        return CrowdOutcome((time.monotonic() - begun) / self.scale, each, failures)

    async def limits(self) -> dict[str, int]:
        """The limit of each model, as the gateway has it now."""
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


async def crowds(bench: AdmissionBench, sizes: tuple[int, ...]) -> bool:
    """Images all at once, straight and through the gateway; the measure is sending five one by one."""
    async with bench.client(True) as straight, bench.client(False) as through:
        alone = await bench.send(straight, [image_request(number) for number in range(5)], 1)
        print(f"Images sent at once (seconds; one by one: {alone.total / 5:.1f} s each)")
        print(f"  {'':8}{'straight':^32}{'through the gateway':^32}")
        print(f"  {'images':8}" + f"{'total':>10}{'each':>10}{'failed':>10}  " * 2)
        last = alone
        for size in sizes:
            requests = [image_request(number) for number in range(size)]
            direct = await bench.send(straight, requests, size)
            last = await bench.send(through, requests, size)
            print(f"  {size:<8}" + "  ".join(_columns(outcome, size) for outcome in (direct, last)))
        rate = (alone.total / 5) / (last.total / sizes[-1])
        is_reached = rate >= RATE and last.failures == 0
        print(
            f"  rate with {sizes[-1]} to that one by one: {rate:.3f}   target >= {RATE}, none failed: {mark(is_reached)}\n"
        )
        return is_reached


def _columns(outcome: CrowdOutcome, size: int) -> str:
    done = size - outcome.failures
    each = f"{outcome.total / done:10.1f}" if done else f"{'-':>10}"
    return f"{outcome.total:10.1f}{each}{outcome.failures:>10}"


async def learning(bench: AdmissionBench) -> bool:
    """Three texts at once to one model, after the limit was learned."""
    async with bench.client(False) as client:
        texts = [text_request(TEXT)] * 3
        alone = await bench.send(client, texts, 1)
        await bench.send(client, [text_request(TEXT)] * 4, 4)
        together = await bench.send(client, texts, 3)
        await bench.send(client, [text_request(VISION)] * 4, 4)
    limits = await bench.limits()
    gain = alone.total / together.total
    is_reached = gain >= SPEED_UP and limits[VISION] == 1
    print(
        "Three texts at once to one text model, an Ollama with OLLAMA_NUM_PARALLEL=4 that the gateway was not told of"
    )
    print(f"  one by one {alone.total:.1f} s, at once {together.total:.1f} s: {gain:.2f} x; learned: {limits}")
    print(f"  target >= {SPEED_UP} x, and 1 for the vision model: {mark(is_reached)}\n")
    return is_reached


async def beside(bench: AdmissionBench, texts: int) -> bool:
    """Texts to another model while images wait in line."""
    async with bench.client(False) as client:
        requests = [text_request(TEXT, 20)] * texts
        alone = await bench.send(client, requests, 2)
        crowd = asyncio.create_task(bench.send(client, [image_request(number) for number in range(20)], 20))
        among = await bench.send(client, requests, 2)
        images_left = not crowd.done()
        crowd.cancel()
        await asyncio.gather(crowd, return_exceptions=True)
    ratio = percentile(among.each, 0.99) / percentile(alone.each, 0.99)
    is_reached = ratio <= BESIDE and images_left and not among.failures
    print(f"{texts} texts to a second model beside a crowd of images")
    print(
        f"  p99 alone {percentile(alone.each, 0.99):.2f} s, beside it {percentile(among.each, 0.99):.2f} s: {ratio:.2f} x"
    )
    print(f"  target <= {BESIDE} x: {mark(is_reached)}\n")
    return is_reached


# What runs


@contextlib.asynccontextmanager
async def running(scale: float, slowdown: float) -> AsyncIterator[AdmissionBench]:
    """A stand-in and a gateway, each a process of its own."""
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
            started(command, log, r"serving (http://[\d.:]+)", GATEWAY_PORT="0", GATEWAY_STATE_FILE=state)
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
    given = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    return ["simulate", "--kind", "ollama", "--model", f"{VISION},vision", "--model", TEXT, *given]


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


async def _on(scale: float, slowdown: float, part: Callable[[AdmissionBench], Awaitable[bool]]) -> bool:
    async with running(scale, slowdown) as bench:
        return await part(bench)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.02, help="real seconds for one of the stand-in's")
    parser.add_argument("--rounds", type=int, default=40, help="of the steps")
    parser.add_argument("--parts", default="steps,crowds,learning,beside")
    given = parser.parse_args()
    parts = given.parts.split(",")
    reached = [steps(given.rounds)] if "steps" in parts else []
    if "crowds" in parts:
        reached.append(asyncio.run(_on(given.scale, SEED_SLOWDOWN, lambda bench: crowds(bench, CROWDS))))
    if "learning" in parts:
        reached.append(asyncio.run(_on(given.scale, 0, learning)))
    if "beside" in parts:
        reached.append(asyncio.run(_on(given.scale, 0, lambda bench: beside(bench, 100))))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
