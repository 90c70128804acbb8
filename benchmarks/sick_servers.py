"""Requests lost to a server that answers its probes and fails its requests.

`make bench-sick` runs it. For each fault, the gateway gets 1,000 requests, half of them streams, from
16 clients at once, once with the sick vLLM stand-in and another one behind the same backend, and once
with an Ollama stand-in as the fallback. The table shows how many requests failed and how many waited
longer than `LONG_SECONDS`.

With `--tree FOLDER`, the gateway of another source tree is measured.

Exit status 1: more than `TARGET` of the requests failed for some fault.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.overload import PATIENCE, port_of, request_bytes
from benchmarks.processes import Started, started
from benchmarks.report import mark

MODEL = "bench-model"
REQUESTS, CLIENTS = 1000, 16
ANSWER_SECONDS = 0.05
FIRST_TOKEN_TIMEOUT = 2.0
LONG_SECONDS = 1.0
TARGET = 0.01
FLAP_SECONDS = 1.0
SETUPS = ("another server", "fallback")

FAULTS: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "status": 500},
    "404": {"kind": "status", "status": 404},
    "502": {"kind": "status", "status": 502},
    "500 for half": {"kind": "status", "status": 500, "every": 2},
    "reset before the first piece": {"kind": "reset"},
    "close after the head": {"kind": "die"},
    "answer that is not JSON": {"kind": "garbage"},
    "error in the stream": {"kind": "error", "after": 0},
    "hang": {"kind": "stall"},
    "500, flapping": {"kind": "status", "status": 500},
}


class Result(NamedTuple):
    """Outcome of one fault."""

    failed: int
    long: int
    seconds: float


async def inject(server: Started, fault: dict[str, Any] | None) -> None:
    """Set the fault of a stand-in; None clears it."""
    body = json.dumps({"kind": None} if fault is None else {**fault, "times": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    head = f"POST /simulate/fault HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await reader.read()
    writer.close()


async def is_served(port: int, request: bytes) -> bool:
    """Send `request` on a new connection, and return whether the whole answer came."""
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return answer.startswith(b"HTTP/1.1 200") and b'"finish_reason":"' in answer


@contextlib.asynccontextmanager
async def sick(server: Started, name: str) -> AsyncIterator[None]:
    """Apply a fault during the block; a flapping one comes and goes."""

    async def flap() -> None:
        while True:
            await inject(server, FAULTS[name])
            await asyncio.sleep(FLAP_SECONDS)
            await inject(server, None)
            await asyncio.sleep(FLAP_SECONDS)

    await inject(server, FAULTS[name])
    flapping = asyncio.create_task(flap()) if name.endswith("flapping") else None
    try:
        yield
    finally:
        if flapping is not None:
            flapping.cancel()


async def measure(gateway: Started, server: Started, name: str, requests: int) -> Result:
    """Send a few requests to the healthy server, then all others to the sick one."""
    port = port_of(gateway)
    bodies = [request_bytes(port, "standard", stream=stream) for stream in (True, False)]
    failed = long = 0

    async def client(numbers: Iterator[int]) -> None:
        nonlocal failed, long
        for number in numbers:
            begun = time.perf_counter()
            served = await is_served(port, bodies[number % 2])
            failed += not served
            long += time.perf_counter() - begun > LONG_SECONDS

    async def load(count: int) -> None:
        numbers = iter(random.Random(1).sample(range(count), count))
        await asyncio.gather(*(client(numbers) for _ in range(CLIENTS)))

    await load(2 * CLIENTS)
    if failed:
        raise RuntimeError(f"{failed} requests failed before the fault")
    long = 0
    begun = time.perf_counter()
    async with sick(server, name):
        await load(requests)
    return Result(failed, long, time.perf_counter() - begun)


@contextlib.contextmanager
def running(setup: str, tree: Path) -> Iterator[tuple[Started, Started]]:
    """Run two stand-ins and the gateway of `tree` in front of them. Yield the sick one and the gateway."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        kinds = ("vllm", "vllm" if setup == "another server" else "ollama")
        speed = ["--model", MODEL, "--set", f"time_to_first_token={ANSWER_SECONDS}"]
        first, second = (
            stack.enter_context(
                started(
                    ["simulate", "--kind", kind, *speed, *(["--parallel", "64"] if kind == "ollama" else [])],
                    folder / f"{number}.log",
                    r"(http://[\d.:]+)",
                )
            )
            for number, kind in enumerate(kinds)
        )
        times = {"first_token_timeout": FIRST_TOKEN_TIMEOUT, "probe_interval": 1}
        urls = [first.url, second.url] if setup == "another server" else [first.url]
        backends: dict[str, Any] = {"vllm": {"kind": "vllm", "servers": [{"base_url": url} for url in urls], **times}}
        if setup == "fallback":
            backends["ollama"] = {
                "kind": "ollama", "base_url": second.url, "max_concurrency": 64, "model_concurrency": 64
            }  # fmt: skip
        settings = {
            "llm_backend": "vllm",
            "backends": backends,
            "tiers": {"standard": {"models": dict.fromkeys(backends, MODEL), "fallback": setup == "fallback"}},
            "log_format": "text",
        }
        (folder / "gateway.json").write_text(json.dumps(settings))
        arguments = ["serve", "--config", str(folder / "gateway.json")]
        environment = {"GATEWAY_PORT": "0", "GATEWAY_STATE_FILE": "", "GATEWAY_USAGE_FILE": "", "PYTHONPATH": str(tree)}
        gateway = stack.enter_context(
            started(arguments, folder / "gateway.log", r"serving (http://[\d.:]+)", **environment)
        )
        yield first, gateway


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests for each fault")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="source tree of the gateway")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this fault; may be repeated")
    given = parser.parse_args(arguments)
    print(f"{given.requests} requests for each fault, {CLIENTS} clients; 'long' took over {LONG_SECONDS:g} s")
    print(f"{'setup':<16}{'fault':<30}{'failed':>8}{'long':>8}{'seconds':>9}")
    all_reached = True
    for setup in SETUPS:
        for name in given.fault or FAULTS:
            with running(setup, given.tree) as (server, gateway):
                result = asyncio.run(measure(gateway, server, name, given.requests))
            is_reached = result.failed <= TARGET * given.requests
            all_reached &= is_reached
            print(
                f"{setup:<16}{name:<30}{result.failed:>8}{result.long:>8}{result.seconds:>9.1f}   {mark(is_reached)}",
                flush=True,
            )
    print(f"target: at most {TARGET:.0%} fail: {mark(all_reached)}")
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main())
