"""Cost of this gateway next to vllm-router: CPU of a request and a token, time to first token,
blocking, memory.

`make bench-cost` runs it. All subjects use the same cheap upstream and take turns in short rounds,
so a noisy machine affects them alike. Exit status 0: everything ran; 1: something did not run or,
with `--strict`, a target was missed.
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

from benchmarks import requests, subjects
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
    """Validated command line."""

    vllm_router: str
    gateway_command: list[str]
    rounds: int
    seconds: float
    parts: tuple[str, ...]
    pin: bool
    strict: bool
    json_file: str


class CostBench:
    """The running upstream and subjects, and the way to put load on them."""

    def __init__(self, options: CostOptions, setup: BenchSetup, direct: Subject) -> None:
        self.options = options
        self.setup = setup
        self.direct = direct
        self.subjects: list[Subject] = []

    def start(self) -> contextlib.ExitStack:
        """Start all subjects; closing the returned stack stops them."""
        with contextlib.ExitStack() as stack:
            options, port = self.options, self.direct.port
            self.subjects = [stack.enter_context(subjects.gateway(self.setup, port, options.gateway_command))]
            if options.vllm_router:
                self.subjects.append(stack.enter_context(subjects.vllm_router(self.setup, port, options.vllm_router)))
            return stack.pop_all()

    def pace(self, *, interval_ms: float = 10, hold: int = 0, think_ms: float = 0) -> None:
        """Set the pace of the upstream's later answers."""
        query = f"/pace?interval_ms={interval_ms:g}&hold={hold}&think_ms={think_ms:g}"
        if subjects.get(self.direct.port, query) != 200:
            raise DidNotRun("the upstream rejected its pace")

    def load(
        self,
        subject: Subject,
        kind: str,
        request: bytes,
        connections: int,
        seconds: float,
        spread: float = 0.0,
        *,
        split: bool = False,
    ) -> LoadOutcome:
        """Run one load job against one subject, in a process of its own.

        Raises:
            DidNotRun: the job did not end in time, or something failed in it.
        """
        file = self.setup.scratch / "request"
        file.write_bytes(request)
        watch = subject.processes()
        result = self.setup.scratch / "outcome.json"
        job = LoadJob(
            kind,
            subject.port,
            str(file),
            str(result),
            connections,
            seconds,
            watch=watch,
            spread=spread,
            ping=subject.ping,
            split=split,
        )
        command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
        root = str(Path(__file__).resolve().parents[1])
        with pinned(set(self.setup.helper_cores)):
            try:
                done = subprocess.run(command, cwd=root, capture_output=True, timeout=_LOAD_SECONDS, check=False)
            except subprocess.TimeoutExpired as exc:
                raise DidNotRun(
                    f"the load {kind!r} on {subject.name} did not end within {_LOAD_SECONDS:.0f} s"
                ) from exc
        if done.returncode != 0:
            raise DidNotRun(
                f"the load {kind!r} on {subject.name} failed:\n{done.stderr.decode(errors='replace')[-2000:]}"
            )
        outcome = LoadOutcome(**json.loads(result.read_text()))
        if outcome.failures:
            raise DidNotRun(
                f"{outcome.failures} failures of {kind!r} on {subject.name}, the first: {outcome.first_failure}"
            )
        return outcome

    def rounds(self, participants: list[Subject], run_once: Callable[[Subject], None]) -> None:
        """Let the participants take turns; the order rotates, so none always follows the same
        other.
        """
        for number in range(self.options.rounds):
            turn = number % len(participants)
            for subject in participants[turn:] + participants[:turn]:
                run_once(subject)


def request_cost(bench: CostBench, think_ms: float, *, split: bool = False) -> Comparison:
    """Measure the CPU of a plain answer with 32 keep-alive clients.

    With `think_ms` the upstream takes that long, so the load is the same for all subjects. With
    `split` the clients send head and body separately.
    """
    mode = f"the upstream takes {think_ms:g} ms" if think_ms else "as fast as possible"
    mode += ", head and body in two writes, as openai-python sends them" if split else ""
    target = None if think_ms or split else Target(REQUEST_RATIO)
    table = Comparison(f"CPU of a plain request: 32 clients, keep-alive, {mode}", "µs", target)
    bench.pace(think_ms=think_ms)

    def run_once(subject: Subject) -> None:
        outcome = bench.load(
            subject, "plain", requests.chat(subject.model, max_tokens=100), 32, bench.options.seconds, split=split
        )
        table.add(subject.name, cost_per(outcome.cpu_seconds, outcome.answers), outcome.answers / outcome.seconds)

    bench.rounds(bench.subjects, run_once)
    return table


def token_cost(bench: CostBench, interval_ms: float) -> Comparison:
    """Measure the CPU of a streamed token with 32 streams, which are open before and after the
    window.
    """
    rate = 32 * 1000 / interval_ms
    title = f"CPU of a streamed token: 32 streams, one token every {interval_ms:g} ms"
    table = Comparison(title, "µs", Target(TOKEN_RATIO), nominal_rate=rate)
    bench.pace(interval_ms=interval_ms)
    spread = 0.32
    tokens = int((bench.options.seconds + spread + 1.0) * 1000 / interval_ms)

    def run_once(subject: Subject) -> None:
        request = requests.chat(subject.model, max_tokens=tokens, stream=True)
        for _ in range(_TRIES_FOR_LOAD):
            outcome = bench.load(subject, "streams", request, 32, bench.options.seconds, spread=spread)
            if within_load(outcome.tokens / outcome.seconds, rate):
                break
        batch = outcome.tokens / max(outcome.reads, 1)
        table.add(subject.name, cost_per(outcome.cpu_seconds, outcome.tokens), outcome.tokens / outcome.seconds, batch)

    bench.rounds(bench.subjects, run_once)
    return table


def first_token_time(bench: CostBench, streams: int) -> Comparison:
    """Measure the p99 of the time to first token with `streams` short streams at any time, directly
    and through each subject.
    """
    interval_ms, tokens = (10.0, 16) if streams <= 32 else (50.0, 16)
    table = Comparison(f"Time to first token, p99: {streams} streams, one token every {interval_ms:g} ms", "ms")
    bench.pace(interval_ms=interval_ms)

    def run_once(subject: Subject) -> None:
        request = requests.chat(subject.model, max_tokens=tokens, stream=True)
        spread = tokens * interval_ms / 1000
        outcome = bench.load(subject, "ttft", request, streams, bench.options.seconds, spread=spread)
        table.add(subject.name, percentile(outcome.latencies, 0.99) * 1000, len(outcome.latencies) / outcome.seconds)

    bench.rounds([*bench.subjects, bench.direct], run_once)
    return table


def image_block(bench: CostBench) -> Comparison:
    """Measure the longest ping, sent every millisecond on another connection, during one request
    with a 10 MB image.
    """
    table = Comparison(
        "Longest ping during a request with a 10 MB image", "ms", Target(BLOCKED_MILLISECONDS, ratio=False)
    )
    image = requests.noise_png(_IMAGE_BYTES)
    bench.pace()

    def run_once(subject: Subject) -> None:
        small = bench.load(subject, "pings", requests.chat(subject.model, max_tokens=16), 1, 0.2)
        large = bench.load(subject, "pings", requests.chat(subject.model, max_tokens=16, image=image), 1, 0.2)
        table.add(subject.name, max(large.latencies) * 1000)
        table.add(f"{subject.name}, small", max(small.latencies) * 1000)

    bench.rounds(bench.subjects, run_once)
    return table


def idle_memory(bench: CostBench) -> Comparison:
    """Measure the growth of resident memory per open stream that waits for its next token, in
    subjects freshly started and warmed up.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    streams = _IDLE_STREAMS if soft == resource.RLIM_INFINITY else min(_IDLE_STREAMS, (soft - 100) // 2)
    table = Comparison(
        f"Memory of an open idle stream, with {streams} streams", "KiB", Target(IDLE_STREAM_KIB, ratio=False)
    )
    for _ in range(min(3, bench.options.rounds)):
        with bench.start():
            for subject in bench.subjects:
                bench.pace()
                bench.load(subject, "ttft", requests.chat(subject.model, max_tokens=8, stream=True), 16, 0.3)
                bench.pace(hold=1)
                outcome = bench.load(
                    subject, "idle", requests.chat(subject.model, max_tokens=8, stream=True), streams, 0.5
                )
                table.add(subject.name, (outcome.resident_after - outcome.resident_before) / outcome.answers / 1024)
    bench.pace()
    return table


def comparisons(bench: CostBench) -> Iterator[Comparison]:
    """Measure the selected parts one after the other."""
    parts = bench.options.parts
    if set(parts) - {"memory"}:
        with bench.start():
            if "request" in parts:
                yield request_cost(bench, 0)
                yield request_cost(bench, 30)
                yield request_cost(bench, 30, split=True)
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


def bench_setup(scratch: Path, *, pin: bool) -> BenchSetup:
    """Reserve one core for the subject and the others for load and upstream, if there are at least
    two.
    """
    usable = cores()
    if not pin or len(usable) < 2:
        return BenchSetup(frozenset(), frozenset(), scratch)
    return BenchSetup(frozenset(usable[-1:]), frozenset(usable[:-1]), scratch)


def machine(setup: BenchSetup) -> str:
    """Describe the machine and how busy it is in one line."""
    busy = ""
    with contextlib.suppress(OSError):
        some = float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
        busy = f"; tasks waited for a core in {some:.0f} % of the last 10 s"
        busy += " (BUSY: trust the ratios, not the absolute values)" if some > 20 else ""
    pinned_to = "not pinned"
    if setup.subject_cores:
        subject_cores, helper_cores = sorted(setup.subject_cores), sorted(setup.helper_cores)
        pinned_to = f"subjects on core {subject_cores}, load and upstream on {helper_cores}"
    return f"{os.cpu_count()} cores, {pinned_to}, load average {os.getloadavg()[0]:.1f}{busy}"


def parse(arguments: list[str]) -> CostOptions:
    """Parse the command line.

    Raises:
        SystemExit: with status 2: an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    venv = os.environ.get("BENCH_VENV")
    router = str(Path(venv, "bin", "vllm-router").absolute()) if venv else ""
    parser.add_argument(
        "--vllm-router",
        default=router,
        help="path of vllm-router (default: in $BENCH_VENV); empty: measure the gateway alone",
    )
    parser.add_argument(
        "--gateway-command", default=f"{sys.executable} -m gateway serve", help="command that starts the gateway"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--only", default=",".join(_PARTS), help=f"comma-separated list of {', '.join(_PARTS)}")
    parser.add_argument("--no-pin", action="store_true", help="do not pin processes to cores")
    parser.add_argument("--strict", action="store_true", help="also exit with status 1 if a target is missed")
    parser.add_argument("--json", default="", metavar="FILE", help="also write all values to this file")
    given = parser.parse_args(arguments)
    parts = tuple(given.only.split(","))
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}")
    if given.rounds < 1 or given.seconds <= 0:
        parser.error("--rounds must be 1 or more, --seconds more than 0")
    command = shlex.split(given.gateway_command)
    return CostOptions(
        given.vllm_router, command, given.rounds, given.seconds, parts, not given.no_pin, given.strict, given.json
    )


def verdict(tables: list[Comparison], *, strict: bool) -> int:
    """Return the exit status after everything ran."""
    return 1 if strict and any(table.target is not None and not table.passed() for table in tables) else 0


def run(options: CostOptions) -> list[Comparison]:
    """Measure, and print each table when it is complete."""
    tables: list[Comparison] = []
    with tempfile.TemporaryDirectory() as scratch:
        setup = bench_setup(Path(scratch), pin=options.pin)
        print(
            f"{OURS} next to vllm-router, same cheap upstream, {options.rounds} alternating rounds\n{machine(setup)}",
            flush=True,
        )
        with subjects.upstream(setup) as direct:
            for table in comparisons(CostBench(options, setup, direct)):
                tables.append(table)
                print("\n" + "\n".join(table.lines()), flush=True)
    return tables


def main(arguments: list[str]) -> int:
    """Run the benchmark; the module docstring has the exit status."""
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
