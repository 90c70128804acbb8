"""Switches between two stand-ins under load, with open streams, short requests and queued requests.

`make bench-switch` runs it. Exit status 1: a request failed; or a request that was sent, or got its
slot, after a switch had been answered was served by the previous backend; or a switch found no
queued request to move.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import percentile

MODEL = "bench-model"
_ROOT = Path(__file__).resolve().parents[1]
_TOKENS_PER_SECOND = 2.0
_STREAM_TOKENS = 10
_PLENTY = 4096
_FIRST = "ollama"
_PATIENCE = 60.0
_SETTINGS = ("GATEWAY", "LLM_", "OLLAMA", "VLLM")
_TARGET_MILLISECONDS = 100.0
_LIMITED_SLOTS = 8
"""Slots of the tier with a queue, on each backend."""
_LIMITED_TOKENS = 2


@dataclass(frozen=True, slots=True)
class SwitchOptions:
    """Load and number of switches.

    Attributes:
        rate: short requests per second.
        pause: seconds between two switches.
        waiting: requests for the tier with few slots at any time, most of which are queued.
    """

    streams: int
    rate: float
    switches: int
    pause: float
    waiting: int = 40


@dataclass(frozen=True, slots=True)
class SwitchCall:
    """One switch or rollback: when it was sent and answered, by the clock that all processes share,
    and the backend that serves from then on.
    """

    sent: float
    answered: float
    backend: str


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One request: when it was sent, when its response headers arrived, the backend that served it,
    whether it ended normally, and the seconds that it was queued.
    """

    sent: float
    headers: float
    backend: str
    is_complete: bool
    queued: float = 0.0

    @property
    def began(self) -> float:
        """Earliest time at which it got its slot."""
        return self.sent + self.queued


@dataclass(slots=True)
class Report:
    """Results.

    Attributes:
        pings: seconds of a request for `/healthz` before each switch, as a measure of the machine
            and the load.
        moved: requests that each switch moved from one queue to the other.
    """

    calls: list[SwitchCall] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)
    seen: list[ObservedRequest] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    most_open: int = 0
    open_now: int = 0

    def misrouted(self) -> int:
        """Count the requests served by a backend that a switch had left before they were sent or
        got a slot.
        """
        return sum(request.backend not in self._possible(request) for request in self.seen)

    def _possible(self, request: ObservedRequest) -> set[str]:
        backends = {_FIRST}
        for call in self.calls:
            if call.answered <= request.began:
                backends = {call.backend}
            elif call.sent <= request.headers:
                backends.add(call.backend)
        return backends

    def lines(self) -> list[str]:
        """Return the report as text."""
        times = [(call.answered - call.sent) * 1000 for call in self.calls]
        pings = [seconds * 1000 for seconds in self.pings]
        counts = Counter(request.backend for request in self.seen)
        by_backend = ", ".join(f"{count} on {backend}" for backend, count in sorted(counts.items()))
        moved = "no queued requests"
        if self.moved:
            moved = (
                f"queued requests moved by a switch: {percentile(self.moved, 0.5):.0f} (median), "
                f"{min(self.moved)} (minimum), {sum(self.moved)} in total"
            )
        return [
            f"switches: {len(times)}; {_median_and_maximum(times)}; target: {_TARGET_MILLISECONDS:g} ms",
            f"a request for /healthz before each: {_median_and_maximum(pings)}",
            f"requests: {len(self.seen)} ({by_backend}); up to {self.most_open} streams open",
            moved,
            f"failed: {len(self.failures)}" + (f", the first: {self.failures[0]}" if self.failures else ""),
            f"sent, or admitted, after a switch but served by the previous backend: {self.misrouted()}",
        ]

    @property
    def passed(self) -> bool:
        return not self.failures and not self.misrouted() and all(self.moved)


def _median_and_maximum(milliseconds: list[float]) -> str:
    return f"{percentile(milliseconds, 0.5):.1f} ms (median), {max(milliseconds):.1f} ms (maximum)"


class Clients:
    """The load: open streams, short requests at a fixed rate, and requests for the tier with few
    slots.
    """

    def __init__(self, port: int, options: SwitchOptions, report: Report) -> None:
        self._port = port
        self._options = options
        self._report = report
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Run until `stop`, then wait for the requests in flight."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._options.streams):
                group.create_task(
                    self._streams(number / max(1, self._options.streams) * _STREAM_TOKENS / _TOKENS_PER_SECOND)
                )
            for _ in range(self._options.waiting):
                group.create_task(self._keep_queued())
            while not self._over.is_set():
                group.create_task(self._ask(1, stream=False))
                await self._wait(1 / self._options.rate)

    def stop(self) -> None:
        self._over.set()

    async def _streams(self, delay: float) -> None:
        await self._wait(delay)
        while not self._over.is_set():
            self._report.open_now += 1
            self._report.most_open = max(self._report.most_open, self._report.open_now)
            await self._ask(_STREAM_TOKENS, stream=True)
            self._report.open_now -= 1

    async def _keep_queued(self) -> None:
        while not self._over.is_set():
            await self._ask(_LIMITED_TOKENS, stream=False, tier="limited")

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return

    async def _ask(self, tokens: int, *, stream: bool, tier: str = "standard") -> None:
        body = {
            "model": tier,
            "stream": stream,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": "repeat la"}],
        }
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(_PATIENCE):
                status, headers, content, at = await _exchange(self._port, "POST", "/v1/chat/completions", body)
        except (OSError, EOFError, TimeoutError) as error:
            self._report.failures.append(repr(error))
            return
        is_complete = b"data: [DONE]" in content[-64:] if stream else b'"choices"' in content
        if status != 200 or not is_complete:
            self._report.failures.append(f"{status} {content[-200:]!r}")
        queued = int(headers.get("x-gateway-queue-ms", 0)) / 1000
        backend = headers.get("x-gateway-backend", "")
        self._report.seen.append(ObservedRequest(sent, at, backend, is_complete, queued))


async def _exchange(port: int, method: str, path: str, body: Any) -> tuple[int, dict[str, str], bytes, float]:
    """Send a request on a new connection; return status, headers, raw body, and when the headers
    arrived.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        fields = (
            f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
        )
        writer.write(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        at = time.perf_counter()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        return int(lines[0].split()[1]), headers, await reader.read(), at
    finally:
        writer.close()


async def _operate(port: int, options: SwitchOptions) -> dict[str, Any]:
    """Run the operator in a process of its own, because a busy client would measure itself."""
    arguments = [f"--{name}={getattr(options, name)}" for name in ("switches", "pause")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.switch",
        f"--operate={port}",
        *arguments,
        stdout=PIPE,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


async def _switch_and_roll_back(port: int, options: SwitchOptions) -> dict[str, Any]:
    """Switch and roll back alternately, and return the times, the moved requests and the
    failures.
    """
    found: dict[str, Any] = {"calls": [], "pings": [], "moved": [], "failures": []}
    for number in range(options.switches):
        await asyncio.sleep(options.pause)
        is_switch = number % 2 == 0
        began = time.perf_counter()
        await _exchange(port, "GET", "/healthz", {})
        sent = time.perf_counter()
        method, path, body = ("POST", "/ops/rollback", {})
        if is_switch:
            method, path, body = ("PUT", "/ops/rollout", {"backend": "vllm"})
        status, _, content, _ = await _exchange(port, method, path, body)
        if status != 200 or b'"changed":true' not in content:
            found["failures"].append(f"{path}: {status} {content[-200:]!r}")
        else:
            found["moved"].append(json.loads(content)["moved"])
        found["pings"].append(sent - began)
        found["calls"].append((sent, time.perf_counter(), "vllm" if is_switch else _FIRST))
    return found


@asynccontextmanager
async def _command(*arguments: str, folder: Path, log: str) -> AsyncIterator[Process]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)} | {
        "PYTHONPATH": str(_ROOT)
    }
    with (folder / log).open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *arguments, stdout=PIPE, stderr=err, env=environment, cwd=folder
        )
    try:
        yield process
    finally:
        process.terminate()
        await process.communicate()


async def _stand_in(stack: AsyncExitStack, folder: Path, kind: str, *more: str) -> str:
    arguments = ("simulate", "--kind", kind, "--model", MODEL, "--tokens-per-second", str(_TOKENS_PER_SECOND), *more)
    process = await stack.enter_async_context(_command(*arguments, folder=folder, log=f"{kind}.log"))
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def _gateway(stack: AsyncExitStack, folder: Path, ollama: str, vllm: str) -> int:
    """Start a gateway in front of both, wait until it is ready, and return its port."""
    limits = dict.fromkeys(("max_concurrency", "model_concurrency", "max_queue"), _PLENTY)
    backends = {
        "ollama": {"kind": "ollama", "base_url": ollama, **limits},
        "vllm": {"kind": "vllm", "base_url": vllm, **limits},
    }
    models = dict.fromkeys(backends, MODEL)
    limited = {"models": models, "limits": {name: {"concurrency": _LIMITED_SLOTS} for name in backends}}
    document = {
        "port": 0,
        "log_format": "json",
        "backends": backends,
        "tiers": {"standard": {"models": models}, "limited": limited},
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(document))
    await stack.enter_async_context(_command("serve", "--config", "gateway.yaml", folder=folder, log="gateway.log"))
    async with asyncio.timeout(_PATIENCE):
        while True:
            for line in (folder / "gateway.log").read_text().splitlines():
                event = json.loads(line)["event"] if line.endswith("}") else ""
                if event.startswith("serving "):
                    port = int(event.split()[1].rstrip(";").rpartition(":")[2])
                    with suppress(ConnectionRefusedError):  # it logs this a moment before it listens
                        if (await _exchange(port, "GET", "/readyz", {}))[0] == 200:
                            return port
            await asyncio.sleep(0.05)


async def run(options: SwitchOptions) -> Report:
    """Run all processes and the load, and return the report."""
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            ollama, vllm = await asyncio.gather(
                _stand_in(stack, folder, "ollama", "--parallel", str(_PLENTY), "--set", "repeat_limit=0"),
                _stand_in(stack, folder, "vllm", "--max-num-seqs", str(_PLENTY)),
            )
            port = await _gateway(stack, folder, ollama, vllm)
            clients = Clients(port, options, report)
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run())
                await asyncio.sleep(_STREAM_TOKENS / _TOKENS_PER_SECOND)  # until all streams are open
                found = await _operate(port, options)
                clients.stop()
            report.calls = [SwitchCall(*call) for call in found["calls"]]
            report.pings = found["pings"]
            report.moved = found["moved"] if options.waiting else []
            report.failures += found["failures"]
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switch", description=__doc__)
    parser.add_argument("--streams", type=int, default=500, help="streams open at any time")
    parser.add_argument("--rate", type=float, default=50.0, help="short requests per second")
    parser.add_argument("--switches", type=int, default=20, help="number of switches and rollbacks")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two switches")
    parser.add_argument(
        "--waiting",
        type=int,
        default=40,
        help=f"requests at any time for the tier with {_LIMITED_SLOTS} slots; 0: no queue",
    )
    parser.add_argument("--operate", type=int, default=0, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    options = SwitchOptions(given.streams, given.rate, given.switches, given.pause, given.waiting)
    if given.operate:
        print(json.dumps(asyncio.run(_switch_and_roll_back(given.operate, options))))
        return 0
    report = asyncio.run(run(options))
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
