"""What this gateway costs: CPU for each request and token, first-token times, blocking and memory, beside vllm-router in one run.

`make bench-cost` starts it. All contestants stand before the same cheap upstream and take turns in short rounds, so that a noisy
machine treats them alike. Exit status 0 when all ran, 1 when something did not run (with `--strict`, or a target was missed).
"""

import argparse
import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import requests
from benchmarks import subjects as running
from benchmarks.load import LoadJob, LoadOutcome
from benchmarks.process_stats import cores, pinned
from benchmarks.report import OURS, Comparison, Target, cost_per, percentile, within_load
from benchmarks.subjects import BenchSetup, DidNotRun, Subject

REQUEST_RATIO = 0.8
TOKEN_RATIO = 1.1
BLOCKED_MILLISECONDS = 40.0
IDLE_STREAM_KIB = 40.0
_IMAGE_BYTES = 10 * 1024 * 1024
_IDLE_STREAMS = 1000
_LOAD_SECONDS = 120.0
_TRIES_FOR_LOAD = 3
_PARTS = ("request", "token", "ttft", "image", "memory")


@dataclass(frozen=True, slots=True)
class CostOptions:
    """The command line, checked."""

    vllm_router: str
    gateway_command: list[str]
    rounds: int
    seconds: float
    parts: tuple[str, ...]
    pin: bool
    strict: bool
    json_file: str


class CostBench:
    """The running upstream and contestants, and one way to put load on them."""

    def __init__(self, options: CostOptions, places: BenchSetup, direct: Subject) -> None:
        self.options = options
        self.places = places
        self.direct = direct
        self.contestants: list[Subject] = []

    def start(self) -> contextlib.ExitStack:
        """Start every contestant afresh; leaving the stack stops them."""
        with contextlib.ExitStack() as stack:
            options, port = self.options, self.direct.port
            self.contestants = [stack.enter_context(running.gateway(self.places, port, options.gateway_command))]
            if options.vllm_router:
                self.contestants.append(
                    stack.enter_context(running.vllm_router(self.places, port, options.vllm_router))
                )
            return stack.pop_all()

    def pace(self, *, interval_ms: float = 10, hold: int = 0, think_ms: float = 0) -> None:
        """Set how the upstream paces what it answers from now on."""
        query = f"/pace?interval_ms={interval_ms:g}&hold={hold}&think_ms={think_ms:g}"
        if running.get(self.direct.port, query) != 200:
            raise DidNotRun("the upstream did not take its pace")

    def load(
        self,
        who: Subject,
        kind: str,
        request: bytes,
        connections: int,
        seconds: float,
        spread: float = 0.0,
        *,
        cut: bool = False,
    ) -> LoadOutcome:
        """Do one job against one contestant, in a process of its own."""
        file = self.places.scratch / "request"
        file.write_bytes(request)
        watch = who.processes()
        result = self.places.scratch / "outcome.json"
        job = LoadJob(
            kind,
            who.port,
            str(file),
            str(result),
            connections,
            seconds,
            watch=watch,
            spread=spread,
            ping=who.ping,
            cut=cut,
        )
        command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
        root = str(Path(__file__).resolve().parents[1])
        with pinned(set(self.places.helpers)):
            try:
                done = subprocess.run(command, cwd=root, capture_output=True, timeout=_LOAD_SECONDS, check=False)
            except subprocess.TimeoutExpired as exc:
                raise DidNotRun(f"the load {kind!r} on {who.name} did not end in {_LOAD_SECONDS:.0f} s") from exc
        if done.returncode != 0:
            raise DidNotRun(f"the load {kind!r} on {who.name} failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
        outcome = LoadOutcome(**json.loads(result.read_text()))
        if outcome.failures:
            raise DidNotRun(
                f"{outcome.failures} failures of {kind!r} on {who.name}, the first: {outcome.first_failure}"
            )
        return outcome

    def rounds(self, entrants: list[Subject], once: Callable[[Subject], None]) -> None:
        """Let the contestants take turns; who begins changes, so that no one always follows the same other."""
        for number in range(self.options.rounds):
            turn = number % len(entrants)
            for who in entrants[turn:] + entrants[:turn]:
                once(who)


def request_cost(bench: CostBench, think_ms: float, *, cut: bool = False) -> Comparison:
    """CPU for each plain answer, 32 keep-alive clients; with `think_ms` the upstream takes that long and the load is equal for all; with `cut`
    the body comes behind its head."""
    how = f"the upstream takes {think_ms:g} ms" if think_ms else "as fast as they go"
    how += ", head and body in two writes, as openai-python sends them" if cut else ""
    target = None if think_ms or cut else Target(REQUEST_RATIO)
    table = Comparison(f"CPU of a plain request: 32 clients, keep-alive, {how}", "µs", target)
    bench.pace(think_ms=think_ms)

    def once(who: Subject) -> None:
        outcome = bench.load(who, "plain", requests.chat(who.model, max_tokens=100), 32, bench.options.seconds, cut=cut)
        table.add(who.name, cost_per(outcome.cpu_seconds, outcome.answers), outcome.answers / outcome.seconds)

    bench.rounds(bench.contestants, once)
    return table


def token_cost(bench: CostBench, interval_ms: float) -> Comparison:
    """CPU for each streamed token, 32 streams that are open before and after the window: nothing but tokens in it."""
    rate = 32 * 1000 / interval_ms
    title = f"CPU of a streamed token: 32 streams, a token each {interval_ms:g} ms"
    table = Comparison(title, "µs", Target(TOKEN_RATIO), nominal_rate=rate)
    bench.pace(interval_ms=interval_ms)
    spread = 0.32
    tokens = int((bench.options.seconds + spread + 1.0) * 1000 / interval_ms)

    def once(who: Subject) -> None:
        request = requests.chat(who.model, max_tokens=tokens, stream=True)
        for _ in range(_TRIES_FOR_LOAD):
            outcome = bench.load(who, "streams", request, 32, bench.options.seconds, spread=spread)
            if within_load(outcome.tokens / outcome.seconds, rate):
                break
        batch = outcome.tokens / max(outcome.reads, 1)
        table.add(who.name, cost_per(outcome.cpu_seconds, outcome.tokens), outcome.tokens / outcome.seconds, batch)

    bench.rounds(bench.contestants, once)
    return table


def first_token_time(bench: CostBench, streams: int) -> Comparison:
    """p99 of the time to first token while `streams` short streams run at any time, directly and through each contestant."""
    interval_ms, tokens = (10.0, 16) if streams <= 32 else (50.0, 16)
    table = Comparison(f"Time to first token, p99: {streams} streams, a token each {interval_ms:g} ms", "ms")
    bench.pace(interval_ms=interval_ms)

    def once(who: Subject) -> None:
        request = requests.chat(who.model, max_tokens=tokens, stream=True)
        spread = tokens * interval_ms / 1000
        outcome = bench.load(who, "ttft", request, streams, bench.options.seconds, spread=spread)
        table.add(who.name, percentile(outcome.latencies, 0.99) * 1000, len(outcome.latencies) / outcome.seconds)

    bench.rounds([*bench.contestants, bench.direct], once)
    return table


def image_block(bench: CostBench) -> Comparison:
    """The longest of the pings, sent each millisecond on another connection, while one request with a 10 MB image goes through."""
    table = Comparison(
        "Longest ping while a request with a 10 MB image goes through", "ms", Target(BLOCKED_MILLISECONDS, ratio=False)
    )
    image = requests.noise_png(_IMAGE_BYTES)
    bench.pace()

    def once(who: Subject) -> None:
        small = bench.load(who, "pings", requests.chat(who.model, max_tokens=16), 1, 0.2)
        large = bench.load(who, "pings", requests.chat(who.model, max_tokens=16, image=image), 1, 0.2)
        table.add(who.name, max(large.latencies) * 1000)
        table.add(f"{who.name}, small", max(small.latencies) * 1000)

    bench.rounds(bench.contestants, once)
    return table


def idle_memory(bench: CostBench) -> Comparison:
    """Growth of resident memory for each open stream that waits for its next token, in contestants started afresh and warmed up."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    streams = _IDLE_STREAMS if soft == resource.RLIM_INFINITY else min(_IDLE_STREAMS, (soft - 100) // 2)
    table = Comparison(f"Memory of an open idle stream: {streams} of them", "KiB", Target(IDLE_STREAM_KIB, ratio=False))
    for _ in range(min(3, bench.options.rounds)):
        with bench.start():
            for who in bench.contestants:
                bench.pace()
                bench.load(who, "ttft", requests.chat(who.model, max_tokens=8, stream=True), 16, 0.3)
                bench.pace(hold=1)
                outcome = bench.load(who, "idle", requests.chat(who.model, max_tokens=8, stream=True), streams, 0.5)
                table.add(who.name, (outcome.resident_after - outcome.resident_before) / outcome.answers / 1024)
    bench.pace()
    return table


def comparisons(bench: CostBench) -> Iterator[Comparison]:
    """Every question that was asked for, one after the other."""
    parts = bench.options.parts
    if set(parts) - {"memory"}:
        with bench.start():
            if "request" in parts:
                yield request_cost(bench, 0)
                yield request_cost(bench, 30)
                yield request_cost(bench, 30, cut=True)
            if "token" in parts:
                yield token_cost(bench, 10)
                yield token_cost(bench, 2)
            if "ttft" in parts:
                yield first_token_time(bench, 32)
                yield first_token_time(bench, 256)
            if "image" in parts:
                yield image_block(bench)
    if "memory" in parts:
        yield idle_memory(bench)


def places(scratch: Path, *, pin: bool) -> BenchSetup:
    """One core for the contestant, the others for load and upstream, where there are two or more."""
    usable = cores()
    if not pin or len(usable) < 2:
        return BenchSetup(frozenset(), frozenset(), scratch)
    return BenchSetup(frozenset(usable[-1:]), frozenset(usable[:-1]), scratch)


def machine(where: BenchSetup) -> str:
    """One line on the machine, and how busy it is with other things: the reader must know."""
    busy = ""
    with contextlib.suppress(OSError):
        some = float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
        busy = f"; tasks waited for a core in {some:.0f} % of the last 10 s"
        busy += " (NOT QUIET: trust ratios more than figures)" if some > 20 else ""
    pinned_to = "not pinned"
    if where.contestant:
        pinned_to = f"contestants on core {sorted(where.contestant)}, load and upstream on {sorted(where.helpers)}"
    return f"{os.cpu_count()} cores, {pinned_to}, load average {os.getloadavg()[0]:.1f}{busy}"


def parse(arguments: list[str]) -> CostOptions:
    """Read the command line; SystemExit(2) for words that are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    venv = os.environ.get("BENCH_VENV")
    router = str(Path(venv, "bin", "vllm-router").absolute()) if venv else ""
    parser.add_argument(
        "--vllm-router",
        default=router,
        help="the vllm-router program (default: in $BENCH_VENV); empty: our figures alone",
    )
    parser.add_argument(
        "--gateway-command", default=f"{sys.executable} -m gateway serve", help="what starts the gateway"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each window")
    parser.add_argument("--only", default=",".join(_PARTS), help=f"comma-separated parts of {', '.join(_PARTS)}")
    parser.add_argument("--no-pin", action="store_true", help="do not bind processes to cores")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a target is missed, too")
    parser.add_argument("--json", default="", metavar="FILE", help="write every value there as well")
    words = parser.parse_args(arguments)
    parts = tuple(words.only.split(","))
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}")
    if words.rounds < 1 or words.seconds <= 0:
        parser.error("--rounds must be 1 or more, --seconds more than 0")
    command = shlex.split(words.gateway_command)
    return CostOptions(
        words.vllm_router, command, words.rounds, words.seconds, parts, not words.no_pin, words.strict, words.json
    )


def verdict(tables: list[Comparison], *, strict: bool) -> int:
    """The exit status once all ran."""
    return 1 if strict and any(table.target is not None and not table.passed() for table in tables) else 0


def run(options: CostOptions) -> list[Comparison]:
    """Measure and print, table by table."""
    tables: list[Comparison] = []
    with tempfile.TemporaryDirectory() as scratch:
        where = places(Path(scratch), pin=options.pin)
        print(
            f"{OURS} beside vllm-router, the same cheap upstream; {options.rounds} rounds in turn\n{machine(where)}",
            flush=True,
        )
        with running.upstream(where) as direct:
            for table in comparisons(CostBench(options, where, direct)):
                tables.append(table)
                print("\n" + "\n".join(table.lines()), flush=True)
    return tables


def main(arguments: list[str]) -> int:
    """Run the bench; the exit status is in the module's docstring."""
    options = parse(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        tables = run(options)
    except DidNotRun as exc:
        print(f"\ndid not run: {exc}", file=sys.stderr)
        return 1
    if options.json_file:
        Path(options.json_file).write_text(json.dumps([table.as_json() for table in tables], indent=1) + "\n")
    return verdict(tables, strict=options.strict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
