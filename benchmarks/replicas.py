"""Throughput and CPU cost of one, two and more replicas on one port (`gateway serve --replicas`).

`make bench-replicas` runs it. All gateways use the same cheap upstream and take turns, so a noisy
machine affects them alike. Nothing is pinned: replicas, load and upstream share the cores, as on a
machine that runs all of them.

What one request costs in CPU time is measured for the gateway, the upstream and the load generator, and
bounds the throughput: N replicas use at most N cores, and all of them together the cores of the machine.
Where the load and the upstream take their part of the cores, the throughput cannot be N times that of
one replica. The column "of what is possible" compares it with that bound.

Exit status 0: everything ran; 1: something did not run.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import requests, subjects
from benchmarks.load import LoadJob, LoadOutcome
from benchmarks.process_stats import cores, cpu_seconds
from benchmarks.subjects import BenchSetup, DidNotRun, Subject

WARM_UP = 0.5
_LOAD_SECONDS = 120.0


@dataclass(slots=True)
class Measured:
    """Rounds of one number of replicas: requests a second, and CPU seconds of one request."""

    replicas: int
    rates: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """CPU seconds of the load generator and the upstream for one request."""

    def add(self, outcome: LoadOutcome, upstream_seconds: float) -> None:
        answers = outcome.answers
        self.rates.append(answers / outcome.seconds)
        self.gateway.append(outcome.cpu_seconds / answers)
        part = outcome.seconds / (outcome.seconds + WARM_UP)
        self.others.append((outcome.own_cpu_seconds + part * upstream_seconds) / answers)

    def possible(self, machine_cores: int) -> float:
        """Return the requests a second that the cores allow at this cost."""
        gateway, others = statistics.median(self.gateway), statistics.median(self.others)
        return min(self.replicas / gateway, machine_cores / (gateway + others))


@contextlib.contextmanager
def gateways(setup: BenchSetup, direct: Subject, counts: list[int]) -> Iterator[dict[int, Subject]]:
    """Run a gateway for each number of replicas."""
    with contextlib.ExitStack() as stack:
        found = {}
        for count in counts:
            command = [sys.executable, "-m", "gateway", "serve", *(["--replicas", str(count)] if count > 1 else [])]
            found[count] = stack.enter_context(subjects.gateway(setup, direct.port, command))
        yield found


def load(setup: BenchSetup, subject: Subject, request: bytes, connections: int, seconds: float) -> LoadOutcome:
    """Send requests one after the other over each connection, from a process of its own.

    Raises:
        DidNotRun: It failed, or a request did.
    """
    file, result = setup.scratch / "request", setup.scratch / "outcome.json"
    file.write_bytes(request)
    job = LoadJob(
        "plain",
        subject.port,
        str(file),
        str(result),
        connections,
        seconds,
        warm_up=WARM_UP,
        watch=subject.processes(),
    )
    command = [sys.executable, "-m", "benchmarks.load", json.dumps(asdict(job))]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=_LOAD_SECONDS, check=False)
    if done.returncode:
        raise DidNotRun(f"the load failed: {done.stderr.decode(errors='replace')[-2000:]}")
    outcome = LoadOutcome(**json.loads(result.read_text()))
    if outcome.failures or not outcome.answers:
        raise DidNotRun(f"{outcome.failures} requests failed: {outcome.first_failure}")
    return outcome


def measure(counts: list[int], connections: int, seconds: float, rounds: int) -> list[Measured]:
    """Measure all numbers of replicas, in turns."""
    found = {count: Measured(count) for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        setup = BenchSetup(frozenset(), frozenset(), Path(folder))
        with subjects.upstream(setup) as direct, gateways(setup, direct, counts) as running:
            for number in range(rounds):
                for count in counts if number % 2 == 0 else reversed(counts):
                    subject = running[count]
                    before = cpu_seconds([direct.pid])
                    outcome = load(setup, subject, requests.chat(subject.model, max_tokens=1), connections, seconds)
                    found[count].add(outcome, cpu_seconds([direct.pid]) - before)
    return list(found.values())


def table(measured: list[Measured], machine_cores: int) -> str:
    """Return the results as a table."""
    one = measured[0]
    rate, cost = statistics.median(one.rates), statistics.median(one.gateway)
    lines = [
        "replicas | requests/s | of one | CPU per request | of one | possible on these cores | reached of it",
        "---|---|---|---|---|---|---",
    ]
    for each in measured:
        own, own_cost, possible = (
            statistics.median(each.rates),
            statistics.median(each.gateway),
            each.possible(machine_cores),
        )
        lines.append(
            f"{each.replicas} | {own:,.0f} | {own / rate:.2f} x | {own_cost * 1e6:.0f} us | {own_cost / cost:.2f} x"
            f" | {possible:,.0f} | {own / possible:.0%}"
        )
    others = statistics.median(seconds for each in measured for seconds in each.others)
    costs = {each.replicas: statistics.median(each.gateway) for each in measured}
    enough = ", ".join(f"{replicas}: {replicas * cost / own:.2f} x" for replicas, own in costs.items())
    lines.append(
        f"\nThe load generator and the upstream take {others * 1e6:.0f} us a request, on the same {machine_cores} "
        f"cores. With cores enough for them, N replicas serve N / (CPU per request): {enough}."
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark; the module docstring has the exit status."""
    usable = len(cores()) or os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, *(n for n in (2, 4, 8, 16) if n <= usable)])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        measured = measure(options.replicas, options.connections, options.seconds, options.rounds)
    except DidNotRun as exc:
        print(f"\ndid not run: {exc}", file=sys.stderr)
        return 1
    print(f"{usable} cores, load average {os.getloadavg()[0]:.1f}; {options.connections} connections, medians")
    print(table(measured, usable))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
