"""Instruction counts: the cost of a plain chat request and of a streamed token, within 0.2 %.

`make bench-instructions` measures this checkout. To compare two, name their roots:
`python -m benchmarks.instructions --tree OLD --tree NEW`. valgrind counts the instructions of a
process in which the gateway serves in memory (`in_memory.py`). A cost is the difference between two
such counts, the second with three times the requests or tokens, so the start and the end of the
process cancel out. The harness is measured in the same way, with a pipe in the gateway's place, and
subtracted.

Exit status 0: done; 1: it did not run; 2: invalid arguments.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.in_memory import PIPE, Work, environment
from benchmarks.subjects import DidNotRun

WORK = Work(plain=1000, streams=8, tokens=1500)
"""Large enough that the addresses of Python's objects, which differ from run to run, move the figures by
less than 0.2 %."""
TIMES = 3
"""Factor between the requests, or the tokens, of the two counts."""

_ROOT = Path(__file__).resolve().parents[1]
_COUNT = re.compile(r"I +refs: +([\d,]+)")
_LIMIT = 1200.0  # seconds


class Cost(NamedTuple):
    """The instructions of one plain request and of one streamed token."""

    request: float
    token: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.request - other.request, self.token - other.token)


@dataclass(frozen=True, slots=True)
class Tally:
    """Whole answers that the client received, and the tokens in them."""

    answers: int
    tokens: int


def drive(tree: str, work: Work, scratch: Path, counter: Sequence[str] = ()) -> Tally:
    """Run the gateway of `tree` in memory, under the command `counter` if there is one.

    Raises:
        DidNotRun: the process failed; with the end of its log.
    """
    command = [*counter, sys.executable, "-P", "-m", "benchmarks.in_memory", tree, *map(str, work)]
    try:
        done = subprocess.run(command, cwd=scratch, env=environment(), capture_output=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise DidNotRun(f"the gateway of {tree} was not done after {_LIMIT:.0f} s") from error
    if done.returncode or not done.stdout:
        log = done.stderr.decode(errors="replace")[-2000:]
        raise DidNotRun(f"the gateway of {tree} ended with status {done.returncode}:\n{log}")
    return Tally(**json.loads(done.stdout))


def count(tree: str, work: Work, scratch: Path) -> int:
    """Return the instructions of a whole process that does `work`."""
    log = scratch / "valgrind.log"
    counter = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    drive(tree, work, scratch, [*counter, f"--log-file={log}"])
    return read_count(log.read_text())


def read_count(log: str) -> int:
    """Find the count in what valgrind logged."""
    found = _COUNT.search(log)
    if found is None:
        raise DidNotRun(f"valgrind counted nothing; its log ends with:\n{log[-2000:]}")
    return int(found[1].replace(",", ""))


def measure(tree: str, scratch: Path, work: Work = WORK) -> Cost:
    """Return the cost of a request and of a token, those of the harness included."""
    less = count(tree, work, scratch)
    more_requests = count(tree, work._replace(plain=TIMES * work.plain), scratch)
    more_tokens = count(tree, work._replace(tokens=TIMES * work.tokens), scratch)
    requests, tokens = (TIMES - 1) * work.plain, (TIMES - 1) * work.streams * work.tokens
    return Cost((more_requests - less) / requests, (more_tokens - less) / tokens)


def table(pipe: Cost, costs: dict[str, list[Cost]]) -> list[str]:
    """Return the table for people.

    It has each tree's median, the ratio to the first tree, and the spread: the distance between the
    lowest and the highest run. `pipe` is the cost of the harness, which is subtracted.
    """
    width = max(len(tree) for tree in [*costs, "harness"])
    lines = [
        f"{'':{width}} {'plain request':>26} {'streamed token':>26}",
        f"{'harness':{width}} {pipe.request:>10,.0f} {'':15} {pipe.token:>10,.0f}",
    ]
    first: list[float] = []
    for tree, runs in costs.items():
        own = list(zip(*(run - pipe for run in runs), strict=True))
        medians = [statistics.median(values) for values in own]
        first = first or medians
        cells = [
            f"{median:>10,.0f} ×{median / base:.4f} {(max(values) - min(values)) / median:>6.2%}"
            for values, median, base in zip(own, medians, first, strict=True)
        ]
        lines.append(f"{tree:{width}} {' '.join(cells)}")
    return lines


def run(trees: list[str], runs: int) -> list[str]:
    """Measure every tree `runs` times, in turn, and return the lines of the table."""
    costs: dict[str, list[Cost]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for tree in trees:
            drive(tree, WORK, scratch)  # so that no counted run has to compile its modules
        pipe = measure(PIPE, scratch)
        for _ in range(runs):
            for tree in trees:
                cost = measure(tree, scratch)
                costs[tree].append(cost)
                figures = f"request {cost.request:,.0f}, token {cost.token:,.0f}, harness included"
                print(f"{tree}: {figures}", file=sys.stderr, flush=True)
    return table(pipe, costs)


def main(arguments: list[str]) -> int:
    """Run the benchmark; the exit status is in the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--tree", action="append", help="the root of a checkout; may be repeated. Default: this one")
    parser.add_argument("--runs", type=int, default=1, help="runs of each tree; the median counts")
    words = parser.parse_args(arguments)
    trees = [str(Path(tree).resolve()) for tree in words.tree or [_ROOT]]
    if words.runs < 1 or not all(Path(tree, "gateway", "__main__.py").is_file() for tree in trees):
        parser.error("--runs must be 1 or more, --tree the root of a checkout")
    if shutil.which("valgrind") is None:
        print("did not run: valgrind is not installed", file=sys.stderr)
        return 1
    try:
        print("\n".join(run(trees, words.runs)))
    except DidNotRun as error:
        print(f"did not run: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
