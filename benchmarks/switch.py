"""Moves a gateway to and fro between two stand-ins while streams are open, requests come and others wait in line, and says what the clients saw.

`make bench-switch` runs it. Exit status 1 when a request failed, when one that was sent, or got its slot, after a call's answer was served by the
side that was left, or when a call found nobody in line to move along.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
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
_NARROW_SLOTS = 8
"""Of the tier with a line, on each side."""
_NARROW_TOKENS = 2


@dataclass(frozen=True, slots=True)
class SwitchOptions:
    streams: int
    rate: float
    """Short requests a second."""
    switches: int
    pause: float
    """Seconds between two calls."""
    waiting: int = 40
    """Requests for the tier with few slots, at any time: all but those wait in line."""


@dataclass(frozen=True, slots=True)
class SwitchCall:
    """One order: when it was sent and answered, by the clock that all processes share, and the side that counts from then on."""

    sent: float
    answered: float
    side: str


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One request: when it was sent, when its headers came, who served it, whether it ended well, and how many seconds it waited in line."""

    sent: float
    headers: float
    side: str
    is_whole: bool
    queued: float = 0.0

    @property
    def began(self) -> float:
        """It got its slot then, at the earliest."""
        return self.sent + self.queued


@dataclass(slots=True)
class Report:
    calls: list[SwitchCall] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)
    """Seconds of a request for `/healthz` before each call: what this machine and this load take of any request."""
    seen: list[ObservedRequest] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    """Requests in line that moved along, by each call's answer."""
    failures: list[str] = field(default_factory=list)
    most_open: int = 0
    open_now: int = 0

    def astray(self) -> int:
        """Requests that were served by a side that had been left before they were sent, or had a slot."""
        return sum(request.side not in self._possible(request) for request in self.seen)

    def _possible(self, request: ObservedRequest) -> set[str]:
        sides = {_FIRST}
        for call in self.calls:
            if call.answered <= request.began:
                sides = {call.side}
            elif call.sent <= request.headers:
                sides.add(call.side)
        return sides

    def lines(self) -> list[str]:
        times, pings = (
            [seconds * 1000 for seconds in found]
            for found in ([call.answered - call.sent for call in self.calls], self.pings)
        )
        sides = {
            side: sum(request.side == side for request in self.seen)
            for side in sorted({request.side for request in self.seen})
        }
        return [
            f"calls: {len(times)}; {percentile(times, 0.5):.1f} ms (median), {max(times):.1f} ms (worst); target: {_TARGET_MILLISECONDS:g} ms",
            f"a request for /healthz right before each: {percentile(pings, 0.5):.1f} ms (median), {max(pings):.1f} ms (worst)",
            f"requests: {len(self.seen)} ({', '.join(f'{count} on {side}' for side, count in sides.items())}); up to {self.most_open} streams open",
            f"in line at a call, and moved along: {percentile(self.moved, 0.5):.0f} (median), {min(self.moved)} (least), {sum(self.moved)} in all"
            if self.moved
            else "nobody waits in line",
            f"failed: {len(self.failures)}" + (f", the first: {self.failures[0]}" if self.failures else ""),
            f"sent, or given a slot, after an answer and served by the side that was left: {self.astray()}",
        ]

    @property
    def passed(self) -> bool:
        return not self.failures and not self.astray() and all(self.moved)


class Clients:
    """The load: so many streams open at any time, so many short requests a second, so many requests where there are few slots."""

    def __init__(self, port: int, options: SwitchOptions, report: Report) -> None:
        self._port = port
        self._options = options
        self._report = report
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`; what is under way then is waited for."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._options.streams):
                group.create_task(
                    self._streams(number / max(1, self._options.streams) * _STREAM_TOKENS / _TOKENS_PER_SECOND)
                )
            for _ in range(self._options.waiting):
                group.create_task(self._wait_in_line())
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

    async def _wait_in_line(self) -> None:
        while not self._over.is_set():
            await self._ask(_NARROW_TOKENS, stream=False, tier="narrow")

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
                status, headers, content, came = await _exchange(self._port, "POST", "/v1/chat/completions", body)
        except (OSError, EOFError, TimeoutError) as error:
            self._report.failures.append(repr(error))
            return
        is_whole = b"data: [DONE]" in content[-64:] if stream else b'"choices"' in content
        if status != 200 or not is_whole:
            self._report.failures.append(f"{status} {content[-200:]!r}")
        queued = int(headers.get("x-gateway-queue-ms", 0)) / 1000
        self._report.seen.append(ObservedRequest(sent, came, headers.get("x-gateway-backend", ""), is_whole, queued))


async def _exchange(port: int, method: str, path: str, body: Any) -> tuple[int, dict[str, str], bytes, float]:
    """Status, headers, the body as it came, and when the headers did; on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        fields = (
            f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
        )
        writer.write(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + data)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        came = time.perf_counter()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        return int(lines[0].split()[1]), headers, await reader.read(), came
    finally:
        writer.close()


async def _steer(port: int, options: SwitchOptions) -> dict[str, Any]:
    """Switches and rollbacks in turn, from a process of their own: a busy client would measure itself."""
    words = [f"--{name}={getattr(options, name)}" for name in ("switches", "pause")]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.switch",
        f"--steer={port}",
        *words,
        stdout=PIPE,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
    )
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


async def _give_orders(port: int, options: SwitchOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"calls": [], "pings": [], "moved": [], "failures": []}
    for number in range(options.switches):
        await asyncio.sleep(options.pause)
        forth = number % 2 == 0
        began = time.perf_counter()
        await _exchange(port, "GET", "/healthz", {})
        sent = time.perf_counter()
        method, path, body = ("PUT", "/ops/rollout", {"backend": "vllm"}) if forth else ("POST", "/ops/rollback", {})
        status, _, content, _ = await _exchange(port, method, path, body)
        if status != 200 or b'"changed":true' not in content:
            found["failures"].append(f"{path}: {status} {content[-200:]!r}")
        else:
            found["moved"].append(json.loads(content)["moved"])
        found["pings"].append(sent - began)
        found["calls"].append((sent, time.perf_counter(), "vllm" if forth else _FIRST))
    return found


@asynccontextmanager
async def _program(*words: str, folder: Path, log: str) -> AsyncIterator[Process]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)} | {
        "PYTHONPATH": str(_ROOT)
    }
    with (folder / log).open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *words, stdout=PIPE, stderr=err, env=environment, cwd=folder
        )
    try:
        yield process
    finally:
        process.terminate()
        await process.communicate()


async def _stand_in(stack: AsyncExitStack, folder: Path, kind: str, *more: str) -> str:
    words = ("simulate", "--kind", kind, "--model", MODEL, "--tokens-per-second", str(_TOKENS_PER_SECOND), *more)
    process = await stack.enter_async_context(_program(*words, folder=folder, log=f"{kind}.log"))
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def _gateway(stack: AsyncExitStack, folder: Path, ollama: str, vllm: str) -> int:
    """The port of a gateway in front of the two, once it is ready."""
    limits = dict.fromkeys(("max_concurrency", "model_concurrency", "max_queue"), _PLENTY)
    backends = {
        "ollama": {"kind": "ollama", "base_url": ollama, **limits},
        "vllm": {"kind": "vllm", "base_url": vllm, **limits},
    }
    models = dict.fromkeys(backends, MODEL)
    narrow = {"models": models, "limits": {name: {"concurrency": _NARROW_SLOTS} for name in backends}}
    document = {
        "port": 0,
        "log_format": "json",
        "backends": backends,
        "tiers": {"standard": {"models": models}, "narrow": narrow},
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(document))
    await stack.enter_async_context(_program("serve", "--config", "gateway.yaml", folder=folder, log="gateway.log"))
    async with asyncio.timeout(_PATIENCE):
        while True:
            for line in (folder / "gateway.log").read_text().splitlines():
                event = json.loads(line)["event"] if line.endswith("}") else ""
                if event.startswith("serving "):
                    port = int(event.split()[1].rstrip(";").rpartition(":")[2])
                    with suppress(ConnectionRefusedError):  # it says so a moment before
                        if (await _exchange(port, "GET", "/readyz", {}))[0] == 200:
                            return port
            await asyncio.sleep(0.05)


async def run(options: SwitchOptions) -> Report:
    """All of it; the processes end with it."""
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with AsyncExitStack() as stack:
            ollama = await _stand_in(stack, folder, "ollama", "--parallel", str(_PLENTY), "--set", "repeat_limit=0")
            vllm = await _stand_in(stack, folder, "vllm", "--max-num-seqs", str(_PLENTY))
            port = await _gateway(stack, folder, ollama, vllm)
            clients = Clients(port, options, report)
            async with asyncio.TaskGroup() as group:
                group.create_task(clients.run())
                await asyncio.sleep(_STREAM_TOKENS / _TOKENS_PER_SECOND)  # until all streams are open
                found = await _steer(port, options)
                clients.stop()
            report.calls = [SwitchCall(*call) for call in found["calls"]]
            report.pings = found["pings"]
            report.moved = found["moved"] if options.waiting else []
            report.failures += found["failures"]
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switch", description=__doc__)
    parser.add_argument("--streams", type=int, default=500, help="open at any time")
    parser.add_argument("--rate", type=float, default=50.0, help="short requests a second")
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two of them")
    parser.add_argument(
        "--waiting", type=int, default=40, help=f"for the tier with {_NARROW_SLOTS} slots at any time; 0: no such line"
    )
    parser.add_argument("--steer", type=int, default=0, metavar="PORT", help=argparse.SUPPRESS)
    words = parser.parse_args(arguments)
    options = SwitchOptions(words.streams, words.rate, words.switches, words.pause, words.waiting)
    if words.steer:
        print(json.dumps(asyncio.run(_give_orders(words.steer, options))))
        return 0
    report = asyncio.run(run(options))
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
