"""Cost of each client API next to the chat completions: CPU of a request and of a streamed token.

`make bench-client-apis` runs it. Each API sends the same question to the same gateway and the same
cheap upstream. They take turns in short rounds, so a noisy machine affects them alike. A streamed
token is the cost of a stream divided by its tokens.

Exit status 0: it ran; 1: it did not.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import requests, subjects
from benchmarks.cost import CostBench, CostOptions, bench_setup, machine
from benchmarks.cost import parse as parse_cost
from benchmarks.report import cost_per
from benchmarks.subjects import DidNotRun, Subject

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate")
PLAIN_TOKENS = 100
STREAM_TOKENS = 256
CLIENTS = 32
_FAST_MS = 0.1


def measure(bench: CostBench, subject: Subject, path: str, *, stream: bool) -> float:
    """Return the CPU time of a plain answer, or of a streamed token, in microseconds."""
    tokens = STREAM_TOKENS if stream else PLAIN_TOKENS
    request = requests.of_client_api(path, subject.model, max_tokens=tokens, stream=stream)
    outcome = bench.load(subject, "plain", request, CLIENTS, bench.options.seconds)
    cost = cost_per(outcome.cpu_seconds, outcome.answers)
    return cost / STREAM_TOKENS if stream else cost


def table(costs: dict[str, Sequence[Sequence[float]]]) -> list[str]:
    """Return the table for people: medians, and ratios to the first API in `costs`.

    `costs` has the values of all rounds for a request, and for a token, by path.
    """
    lines = [f"{'client API':24} {'plain request':>22} {'streamed token':>22}"]
    first: list[float] = []
    for path, values in costs.items():
        medians = [statistics.median(rounds) for rounds in values]
        first = first or medians
        cells = [f"{median:>12.2f} µs ×{median / base:.2f}" for median, base in zip(medians, first, strict=True)]
        lines.append(f"{path:24} {' '.join(f'{cell:>22}' for cell in cells)}")
    return lines


def run(options: CostOptions) -> list[str]:
    """Measure every API in turn, and return the lines of the table.

    Raises:
        DidNotRun: the gateway, the upstream or a load failed.
    """
    costs: dict[str, tuple[list[float], list[float]]] = {path: ([], []) for path in PATHS}
    with tempfile.TemporaryDirectory() as directory:
        setup = bench_setup(Path(directory), pin=options.pin)
        print(machine(setup), flush=True)
        with subjects.upstream(setup) as direct:
            bench = CostBench(options, setup, direct)
            with bench.start():
                bench.pace(interval_ms=_FAST_MS)
                for _ in range(options.rounds):
                    for path in PATHS:
                        for values, stream in zip(costs[path], (False, True), strict=True):
                            values.append(measure(bench, bench.subjects[0], path, stream=stream))
    return table(dict(costs))


def parse(arguments: list[str]) -> CostOptions:
    """Parse the command line.

    Raises:
        SystemExit: with status 2: an argument is invalid.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client_apis", description=__doc__)
    parser.add_argument("--rounds", default="5")
    parser.add_argument("--seconds", default="2.0", help="length of each measurement")
    given = parser.parse_args(arguments)
    return parse_cost(["--vllm-router", "", "--rounds", given.rounds, "--seconds", given.seconds])


def main(arguments: list[str]) -> int:
    """Run the benchmark; the module docstring has the exit status."""
    try:
        print("\n".join(run(parse(arguments))))
    except DidNotRun as error:
        print(f"did not run: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
