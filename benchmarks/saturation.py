"""Cost of a request and of a token at saturation: this gateway, vllm-router, SMG and nginx in turn.

`make bench-saturation` runs it. 32 clients keep one core of each subject busy, with openai-python's
headers, in a closed loop: each sends its next request when it has its answer. wrk and the upstream
share the other cores, and the table shows how busy they are: they must not be the bottleneck. A
request's cost is that of a plain answer, or of a stream with one token. A token's cost is the
difference between streams of many tokens and of one.

The gateway runs as in `cost.py`, and once more with a limited key, usage records, and two servers
between which affinity chooses ("full"). vllm-router runs with its defaults, and once more with its
cheapest settings ("round robin"). nginx forwards bytes and is the floor. `--also NAME=COMMAND` adds
gateways that are started otherwise, such as by another Python. A ratio is the median, over the rounds,
of a subject's value divided by vllm-router's in the same round. Exit status 0: everything
ran; 1: something did not run or, with `--strict`, a target was missed.
"""

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import key_cost, requests, subjects
from benchmarks.affinity import cost_of_a_choice
from benchmarks.cost import bench_setup, machine
from benchmarks.process_stats import cpu_seconds
from benchmarks.report import OURS, THEIRS, Comparison, Target, cost_per
from benchmarks.subjects import BenchSetup, DidNotRun, Subject
from benchmarks.wrk import run_wrk

REQUEST_RATIO = 0.6
TOKEN_RATIO = 0.9
CLIENTS = 32
PLAIN_TOKENS = 16
CHEAPEST = "round robin"
"""vllm-router with its cheapest settings. The targets are about its defaults, which choose servers by
their caches and write a log, as the gateway does."""
BUSY = 0.95
"""Share of its core from which a subject counts as saturated."""
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))


@dataclass(frozen=True, slots=True)
class SaturationOptions:
    """Validated command line."""

    programs: dict[str, str]
    """Paths of wrk and of the other subjects' programs; empty for one that is not installed."""
    gateway_command: list[str]
    others: dict[str, list[str]]
    """Commands of further gateways, by the names of their rows."""
    rounds: int
    seconds: float
    tokens: int
    pin: bool
    strict: bool
    json_file: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one subject."""

    answers: float
    """Answers a second."""
    microseconds: float
    """CPU time of the subject for one answer."""
    busy: float
    """Share of one core that the subject used."""
    helpers: float
    """Share of one core that wrk and the upstream used together."""
    tokens_a_read: float
    """Tokens that arrived at wrk in one read, on average."""


class SaturationBench:
    """The running upstream and subjects."""

    def __init__(self, options: SaturationOptions, setup: BenchSetup, direct: Subject) -> None:
        self.options = options
        self.setup = setup
        self.direct = direct
        self.subjects: list[Subject] = []

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Run the subjects whose programs are installed."""
        programs, port = self.options.programs, self.direct.port
        with contextlib.ExitStack() as stack:
            command = self.options.gateway_command
            ours = subjects.gateway(self.setup, port, command), subjects.full_gateway(self.setup, port, command)
            self.subjects = [stack.enter_context(each) for each in ours]
            for name, other in self.options.others.items():
                self.subjects.append(stack.enter_context(subjects.gateway(self.setup, port, other, name)))
                full = subjects.full_gateway(self.setup, port, other, f"{name}, full")
                self.subjects.append(stack.enter_context(full))
            if programs[THEIRS]:
                for name, has_defaults in ((THEIRS, True), (CHEAPEST, False)):
                    router = subjects.vllm_router(self.setup, port, programs[THEIRS], name, has_defaults=has_defaults)
                    self.subjects.append(stack.enter_context(router))
            if programs["SMG"]:
                self.subjects.append(stack.enter_context(subjects.smg(self.setup, port, programs["SMG"])))
            if programs["nginx"]:
                self.subjects.append(stack.enter_context(subjects.nginx(self.setup, port, programs["nginx"])))
            yield

    def pace(self, interval_ms: float) -> None:
        """Set the pace of later streams; 0: as fast as the upstream can."""
        if subjects.get(self.direct.port, f"/pace?interval_ms={interval_ms:g}&hold=0&think_ms=0") != 200:
            raise DidNotRun("the upstream rejected its pace")

    def load(self, subject: Subject, request: bytes) -> Sample:
        """Load one subject, and measure it while the load is steady.

        Raises:
            DidNotRun: wrk failed, or a request did.
        """
        watched, helpers = subject.processes(), self.direct.processes()

        def during(pid: int) -> tuple["_Reading", "_Reading"]:
            began = _read(watched, [*helpers, pid], self.direct.port, pid)
            time.sleep(self.options.seconds)
            return began, _read(watched, [*helpers, pid], self.direct.port, pid)

        _, (began, ended) = run_wrk(
            self.options.programs["wrk"],
            subject.port,
            request,
            CLIENTS,
            self.options.seconds,
            self.setup.helper_cores,
            self.setup.scratch,
            during,
        )
        seconds, used = ended.at - began.at, ended.subject - began.subject
        answers, tokens = ended.sent.answers - began.sent.answers, ended.sent.tokens - began.sent.tokens
        if answers <= 0:
            raise DidNotRun(f"{subject.name} completed no answer in {seconds:.1f} s: allow more --seconds")
        return Sample(
            answers / seconds,
            cost_per(used, answers),
            used / seconds,
            (ended.helpers - began.helpers) / seconds,
            tokens / max(1, ended.reads - began.reads),
        )


class _Reading(NamedTuple):
    """The clock, the CPU times of the subject and of the helpers, what was sent, and how often wrk has read."""

    at: float
    subject: float
    helpers: float
    sent: subjects.Counts
    reads: int


def _read(subject: list[int], helpers: list[int], upstream_port: int, wrk: int) -> _Reading:
    return _Reading(
        time.perf_counter(), cpu_seconds(subject), cpu_seconds(helpers), subjects.counts(upstream_port), _reads(wrk)
    )


def _reads(pid: int) -> int:
    """Return how often a process has called read(2)."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("syscr:"):
            return int(line.split()[1])
    return 0


class Table:
    """Values of one question, with the share of the cores that the subjects and the helpers used."""

    def __init__(self, title: str, target: Target | None) -> None:
        self.comparison = Comparison(title, "µs", target)
        self._samples: dict[str, list[Sample]] = {}

    def add(self, subject: str, value: float, sample: Sample) -> None:
        self.comparison.add(subject, value)
        self._samples.setdefault(subject, []).append(sample)

    def lines(self, *, has_tokens: bool = False) -> list[str]:
        """Return the table as text."""
        shown = [self.comparison.title, f"  {'':14}{'min':>8}{'median':>8}{'max':>8} µs   ratio  answers/s per core"]
        for name, values in self.comparison.values.items():
            samples = self._samples[name]
            found = self.comparison.ratio_in_rounds(name)
            ratio = " " * 8 if found is None else f"{found:8.2f}"
            per_core = median(sample.answers / sample.busy for sample in samples)
            busy, helpers = (median(getattr(sample, each) for sample in samples) for each in ("busy", "helpers"))
            line = f"  {name:14}{min(values):8.1f}{median(values):8.1f}{max(values):8.1f}   {ratio}  {per_core:12,.0f}"
            line += f"   {busy:.0%} of its core, wrk and upstream {helpers:.0%} of theirs"
            if has_tokens:
                line += f", {median(sample.tokens_a_read for sample in samples):.1f} tokens a read"
            shown.append(line + ("" if busy >= BUSY else ", NOT SATURATED"))
        target = self.comparison.target
        if target is not None and self.comparison.ratio_in_rounds() is not None:
            verdict = "FAIL" if self.is_missed else "PASS"
            shown.append(f"  target: {OURS} / {THEIRS} <= {target.limit:g}: {verdict}")
        return shown

    @property
    def is_missed(self) -> bool:
        target, ratio = self.comparison.target, self.comparison.ratio_in_rounds()
        return target is not None and ratio is not None and ratio > target.limit


def in_turns(bench: SaturationBench, run_once: Callable[[Subject], None]) -> None:
    """Let the subjects take turns; the order rotates, so none always follows the same other."""
    for number in range(bench.options.rounds):
        turn = number % len(bench.subjects)
        for subject in bench.subjects[turn:] + bench.subjects[:turn]:
            run_once(subject)


def plain(bench: SaturationBench) -> Table:
    """Measure plain answers."""
    table = Table("CPU of a plain request", Target(REQUEST_RATIO))

    def run_once(subject: Subject) -> None:
        sample = bench.load(subject, requests.chat(subject.model, max_tokens=PLAIN_TOKENS))
        table.add(subject.name, sample.microseconds, sample)

    in_turns(bench, run_once)
    return table


def streamed(bench: SaturationBench, interval_ms: float) -> tuple[Table, Table]:
    """Measure streams of one token and of many."""
    tokens = bench.options.tokens
    pace = f"one every {interval_ms:g} ms in each stream" if interval_ms else "as fast as the upstream can"
    short = Table("CPU of a streamed answer with one token", None)
    long = Table(f"CPU of a further token, {tokens} in each stream, {pace}", Target(TOKEN_RATIO))
    bench.pace(interval_ms)

    def run_once(subject: Subject) -> None:
        one = bench.load(subject, requests.chat(subject.model, max_tokens=1, stream=True))
        many = bench.load(subject, requests.chat(subject.model, max_tokens=tokens, stream=True))
        short.add(subject.name, one.microseconds, one)
        long.add(subject.name, (many.microseconds - one.microseconds) / (tokens - 1), many)

    in_turns(bench, run_once)
    return short, long


def run(options: SaturationOptions) -> list[Table]:
    """Measure, and print each table when it is complete."""
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as scratch:
        setup = bench_setup(Path(scratch), pin=options.pin)
        missing = [name for name, program in options.programs.items() if not program]
        print(
            f"{CLIENTS} clients in a closed loop, {options.rounds} rounds of {options.seconds:g} s in turn\n"
            f"{machine(setup)}; {options.gateway_command[0]}: {sys.implementation.cache_tag}"
            + (f"\nnot installed: {', '.join(missing)}" if missing else ""),
            flush=True,
        )
        with subjects.upstream(setup) as direct:
            bench = SaturationBench(options, setup, direct)
            with bench.started():
                tables.append(plain(bench))
                print("\n" + "\n".join(tables[-1].lines()), flush=True)
                for interval_ms in (0.0, 1.0):
                    short, long = streamed(bench, interval_ms)
                    print("\n" + "\n".join([*short.lines(), "", *long.lines(has_tokens=True)]), flush=True)
                    tables += [short, long]
    print("\n" + "\n".join(key_cost.report()), flush=True)
    for what, microseconds in cost_of_a_choice().items():
        print(f"the choice among four servers: {microseconds:.1f} µs for {what}", flush=True)
    return tables


def parse(arguments: list[str]) -> SaturationOptions:
    """Parse the command line.

    Raises:
        SystemExit: with status 2: an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saturation", description=__doc__)
    venv = os.environ.get("BENCH_VENV")
    installed = {
        name: (shutil.which(name.lower(), path=str(Path(venv, "bin").absolute())) or "") if venv else ""
        for name in (THEIRS, "SMG")
    }
    installed |= {name: shutil.which(name, path=_PATH) or "" for name in ("nginx", "wrk")}
    for name, program in installed.items():
        parser.add_argument(f"--{name.lower()}", default=program, help="path of the program; empty: without it")
    parser.add_argument(
        "--gateway-command", default=f"{sys.executable} -m gateway serve", help="command that starts the gateway"
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=COMMAND", help="a further gateway, as on another Python"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each measurement")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of a long stream")
    parser.add_argument("--no-pin", action="store_true", help="do not pin processes to cores")
    parser.add_argument("--strict", action="store_true", help="also exit with status 1 if a target is missed")
    parser.add_argument("--json", default="", metavar="FILE", help="also write all values to this file")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds <= 0 or given.tokens < 2:
        parser.error("--rounds must be 1 or more, --seconds more than 0, --tokens 2 or more")
    programs = {name: getattr(given, name.lower().replace("-", "_")) for name in installed}
    others = {name: shlex.split(command) for name, _, command in (text.partition("=") for text in given.also)}
    if not all(others.values()):
        parser.error("--also must be NAME=COMMAND")
    return SaturationOptions(
        programs,
        shlex.split(given.gateway_command),
        others,
        given.rounds,
        given.seconds,
        given.tokens,
        not given.no_pin,
        given.strict,
        given.json,
    )


def main(arguments: list[str]) -> int:
    """Run the benchmark; the module docstring has the exit status."""
    options = parse(arguments)
    if not options.programs["wrk"]:
        print("did not run: wrk is not installed (Debian: apt-get install wrk)", file=sys.stderr)
        return 1
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        tables = run(options)
    except DidNotRun as error:
        print(f"\ndid not run: {error}", file=sys.stderr)
        return 1
    if options.json_file:
        Path(options.json_file).write_text(
            json.dumps([table.comparison.as_json() for table in tables], indent=1) + "\n"
        )
    return 1 if options.strict and any(table.is_missed for table in tables) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
