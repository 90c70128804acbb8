"""Chaos in front of and behind the gateway, with every request accounted for.

`make bench-chaos MINUTES=60` runs it. A real vLLM with a tiny model on the CPU is the first
backend, a stand-in of Ollama the fallback of one tier; a second tier has none. Two client
processes send streams and plain requests, and a quarter of the clients leave. One fault follows the
other: the vLLM, or its engine core alone, is killed, stopped for 5 to 40 s and continued, or
terminated, and started again after up to 20 s; the same happens to one of the client processes.

A request must end in one of these ways, and the gateway's log and metrics must agree: a whole and
right answer (text, number of tokens, number of prompt tokens), an error status with a defined code,
an answer that ends with an error event, or its client left. None may take longer than its deadline.
Afterwards nothing runs or waits, at the gateway or at an engine, and no connection is left.

Exit status 1: a request is not accounted for, or something is left.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.accounting import GatewayLog, account, read_metrics
from benchmarks.chaos_client_process import ClientProcess
from benchmarks.chaos_clients import (
    CONNECT_SECONDS,
    FALLBACK_TIER,
    FIRST_TOKEN_SECONDS,
    LONE_TIER,
    QUEUE_SECONDS,
    TOTAL_SECONDS,
    Reference,
    prompts,
)
from benchmarks.chaos_engines import MODEL, ChaosEngine, RealVllm, StandIn, send_signal
from benchmarks.chaos_report import PRIMARY, Fault, rows, table
from benchmarks.clients import ClientRecord, get
from benchmarks.process_stats import connections_on, descriptors, resident_bytes
from benchmarks.processes import Started, started
from benchmarks.report import mark

_ROOT = Path(__file__).parents[1]
STOP_SECONDS = (5.0, 40.0)
DOWN_SECONDS = 20.0
SETTLE_SECONDS = 5.0
PROBE_SECONDS = 5.0
RECOVERY_SECONDS = 60.0
END_SECONDS = 30.0
"""Seconds in which a vLLM ends after SIGTERM, or after its engine core has died."""
STEADY_RATE, VICTIM_RATE = 1.0, 0.5
GRACE_SECONDS = 45.0
KEPT = 12
MIB = 1024 * 1024


class Chaos:
    """The faults, one after the other."""

    def __init__(self, engine: ChaosEngine, victim: ClientProcess, gateway: Started, seed: int) -> None:
        self._engine = engine
        self._victim = victim
        self._gateway = gateway
        self._dice = random.Random(seed)
        self.faults: list[Fault] = []
        self.stubborn = 0
        """Servers that had to be killed because they did not end by themselves."""

    async def run(self, seconds: float) -> None:
        """Go through all kinds of faults, once or until `seconds` have passed."""
        deadline = time.monotonic() + seconds
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill -9 vLLM": self._kill,
            "SIGSTOP a client": self._stop_client,
            "SIGTERM vLLM": self._terminate,
            "kill -9 a client": lambda: self._end_client(signal.SIGKILL),
            "SIGSTOP vLLM": lambda: self._stop(self._engine.processes()),
            "SIGTERM a client": lambda: self._end_client(signal.SIGTERM),
        }
        if self._engine.has_core:
            kinds["kill -9 engine core"] = self._kill_core
            kinds["SIGSTOP engine core"] = lambda: self._stop(self._engine.core())
        await asyncio.sleep(SETTLE_SECONDS)
        while True:
            for kind, fault in kinds.items():
                if len(self.faults) >= len(kinds) and time.monotonic() > deadline:
                    return
                began = time.monotonic()
                await fault()
                is_recovered = await self._recovered()
                self.faults.append(Fault(kind, began, time.monotonic(), is_recovered))
                await asyncio.sleep(SETTLE_SECONDS)

    async def _kill(self) -> None:
        send_signal(self._engine.processes(), signal.SIGKILL)
        await self._restart()

    async def _terminate(self) -> None:
        send_signal([self._engine.pid], signal.SIGTERM)
        await self._restart()

    async def _kill_core(self) -> None:
        send_signal(self._engine.core(), signal.SIGKILL)
        await self._restart()

    async def _restart(self) -> None:
        self.stubborn += not await asyncio.to_thread(self._engine.wait_until_ended, END_SECONDS)
        await asyncio.sleep(self._dice.uniform(0.0, DOWN_SECONDS))
        await _start(self._engine)

    async def _stop(self, pids: list[int]) -> None:
        send_signal(pids, signal.SIGSTOP)
        await asyncio.sleep(self._dice.uniform(*STOP_SECONDS))
        send_signal(pids, signal.SIGCONT)

    async def _stop_client(self) -> None:
        self._victim.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._dice.uniform(*STOP_SECONDS))
        self._victim.send_signal(signal.SIGCONT)

    async def _end_client(self, number: signal.Signals) -> None:
        self._victim.send_signal(number)
        await self._victim.wait()
        await self._victim.start()

    async def _recovered(self) -> bool:
        """Wait until the engine answers and the gateway sends it requests again."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError, EOFError, TimeoutError):
                status = json.loads(await get(port_of(self._gateway), "/ops/status"))
                server = status["backends"][PRIMARY]["servers"][0]
                is_used = server["circuit"] == "closed" and not server["ejections"]
                if is_used and await asyncio.to_thread(self._engine.is_ready):
                    return True
            await asyncio.sleep(0.3)
        return False


async def _start(engine: ChaosEngine) -> None:
    """Start the engine, a second time if the first one fails.

    Raises:
        RuntimeError: it did not start.
    """
    engine.start()
    try:
        await asyncio.to_thread(engine.wait_until_ready)
    except RuntimeError as failure:
        print(f"  {failure}; once more", flush=True)
        await asyncio.to_thread(engine.wait_until_ended, 0.0)
        engine.start()
        await asyncio.to_thread(engine.wait_until_ready)


def port_of(program: Started) -> int:
    return int(program.url.rpartition(":")[2])


def _settings(vllm: str, ollama: str) -> dict[str, Any]:
    limits = {
        "connect_timeout": CONNECT_SECONDS,
        "queue_timeout": QUEUE_SECONDS,
        "first_token_timeout": FIRST_TOKEN_SECONDS,
        "idle_timeout": FIRST_TOKEN_SECONDS,
        "total_timeout": TOTAL_SECONDS,
        "probe_interval": PROBE_SECONDS,
    }
    return {
        "llm_backend": PRIMARY,
        "backends": {
            PRIMARY: {"kind": "vllm", "base_url": vllm, **limits},
            "ollama": {"kind": "ollama", "base_url": ollama, **limits},
        },
        "tiers": {
            FALLBACK_TIER: {"models": {PRIMARY: MODEL, "ollama": MODEL}, "fallback": True},
            LONE_TIER: {"models": {PRIMARY: MODEL}},
        },
        "ollama_num_parallel": 4,
        "log_format": "json",
    }


def _references(url: str) -> dict[str, Reference]:
    """Ask the engine itself each prompt, so that later answers can be compared."""
    found = {}
    with httpx2.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        for prompt in prompts():
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 8,
                "temperature": 0,
            }
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            text = answer["choices"][0]["message"]["content"]
            found[prompt] = Reference(answer["usage"]["prompt_tokens"], text)
    return found


async def chaos(seconds: float, seed: int, venv: Path | None, folder: Path) -> bool:
    """Run everything, print the report, and return whether all requests are accounted for."""
    with ExitStack() as stack:
        engine: ChaosEngine
        if venv is None:
            engine = StandIn(folder / "vllm.log", ["--tokens-per-second", "200", "--max-num-seqs", "64"])
        else:
            engine = await asyncio.to_thread(RealVllm, venv, folder / "vllm.log")
        stack.callback(engine.close)
        await _start(engine)
        references = await asyncio.to_thread(_references, engine.url)
        (folder / "references.json").write_text(json.dumps(references))
        ollama = stack.enter_context(
            started(
                ["simulate", "--kind", "ollama", "--model", MODEL, "--parallel", "4", "--tokens-per-second", "150"],
                folder / "ollama.log",
                r"(http://[\d.:]+)",
            )
        )
        (folder / "gateway.json").write_text(json.dumps(_settings(engine.url, ollama.url)))
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
        return await _observe(seconds, seed, Subjects(engine, ollama, gateway, log), folder)


@dataclass(frozen=True, slots=True)
class Subjects:
    """Processes of a run: the engine, the stand-in of Ollama, and the gateway with its log."""

    engine: ChaosEngine
    ollama: Started
    gateway: Started
    log: Path

    @property
    def port(self) -> int:
        return port_of(self.gateway)


async def _observe(seconds: float, seed: int, subjects: Subjects, folder: Path) -> bool:
    gateway = subjects.gateway
    descriptors_before, resident_before = descriptors(gateway.pid), resident_bytes([gateway.pid])
    steady = ClientProcess("steady", subjects.port, STEADY_RATE, folder)
    victim = ClientProcess("victim", subjects.port, VICTIM_RATE, folder, GRACE_SECONDS)
    run = Chaos(subjects.engine, victim, gateway, seed)
    await asyncio.gather(steady.start(), victim.start())
    progress = asyncio.create_task(_print_progress(run))
    failure = ""
    try:
        await run.run(seconds)
    except (RuntimeError, OSError) as error:  # the requests until then are accounted for nevertheless
        failure = f"the run ended early: {error!r}"
    finally:
        progress.cancel()
        await asyncio.gather(steady.finish(), victim.finish())
    left_over = await _left_over(subjects, descriptors_before)
    counted = read_metrics((await get(subjects.port, "/metrics")).decode()).outcomes
    await asyncio.sleep(0.5)  # the log's thread writes the last lines
    log = GatewayLog(subjects.log)
    log.read()
    is_accounted = _print_report(steady.records() + victim.records(), run.faults, log, counted)
    print(
        f"  resident memory {resident_before / MIB:.1f} MiB before, {resident_bytes([gateway.pid]) / MIB:.1f} after; "
        f"engines that had to be killed because they did not end: {run.stubborn}"
    )
    print(f"  left over: {', '.join(left_over) or 'nothing'}: {mark(not left_over)}")
    if failure:
        print(f"  {failure}: {mark(False)}")
    return is_accounted and not left_over and not failure


def _print_report(records: list[ClientRecord], faults: list[Fault], log: GatewayLog, counted: Counter[str]) -> bool:
    """Print the table and the accounts, and return whether every request is accounted for."""
    result = account(records, log.exchanges, counted)
    late = [record for record in records if record.note != "process ended" and record.seconds > record.deadline]
    print(table(rows(records, faults, log.exchanges)))
    print(f"\n  requests {len(records)}; clients saw {_counts(result.seen)}; unread {result.unread}")
    print(f"  outcomes in the log: {_counts(result.outcomes)}; in the metrics: {_counts(counted)}")
    for event, count in log.crashes.most_common(20):
        print(f"  the log has {count} x {event}")
    for problem in result.problems[:40]:
        print(f"  NOT ACCOUNTED FOR: {problem}")
    is_accounted = not (result.problems or log.crashes or late)
    print(
        f"  not accounted for: {len(result.problems)}; later than the deadline: {len(late)}; "
        f"crashes: {log.crashes.total()}: {mark(is_accounted)}"
    )
    return is_accounted


async def _print_progress(run: Chaos) -> None:
    while True:
        await asyncio.sleep(300.0)
        counts = Counter(fault.kind for fault in run.faults)
        print(f"  {time.strftime('%H:%M:%S')} {_counts(counts)}", flush=True)


async def _left_over(subjects: Subjects, descriptors_before: int) -> list[str]:
    """Wait until nothing is left of the requests, and return what is."""
    port = subjects.port
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        metrics = read_metrics((await get(port, "/metrics")).decode())
        state = json.loads(await get(port_of(subjects.ollama), "/simulate/state"))
        held = {
            "requests running": metrics.running,
            "requests waiting": metrics.waiting,
            "client connections": connections_on(port),
            "descriptors": max(0, descriptors(subjects.gateway.pid) - descriptors_before - KEPT),
            "requests at vLLM": await asyncio.to_thread(subjects.engine.load),
            "requests at Ollama": state["running"] + state["waiting"],
        }
        found = [f"{name} {count:g}" for name, count in held.items() if count]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stand-in", action="store_true", help="a stand-in in place of the real vLLM")
    parser.add_argument("--folder", type=Path, help="folder for the logs; default: a temporary one")
    given = parser.parse_args(arguments)
    venv = None if given.stand_in else _ROOT / os.environ.get("TEST_VLLM_VENV", ".venv-vllm")
    if venv is not None and not (venv / "bin" / "python").exists():
        parser.error(f"no vLLM in {venv}; set TEST_VLLM_VENV, or use --stand-in")
    print(
        f"Chaos: {given.minutes:g} min, {'a stand-in' if venv is None else 'a real vLLM'} (seed {given.seed})",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if asyncio.run(chaos(60 * given.minutes, given.seed, venv, folder.resolve())) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
