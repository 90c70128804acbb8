"""Prints which client programs work on which engines as a table in Markdown: `python -m tests.e2e.client_table`.

It runs `test_clients.py` as `make test` and `make test-vllm` do; further words go to pytest (`-m "not vllm"`, `-k openai`). `--direct`
leaves the gateway out, to show what the engines do by themselves; `--why` lists what failed, and by which line.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

SIGNS = {"passed": "✓", "failed": "✗", "skipped": "–"}


class Outcomes:
    """A plugin of pytest that remembers how each program went on each engine."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}
        self.reasons: dict[
            str, None
        ] = {}  # in order, each once: a gateway that does not start is one reason, not one a program
        self._places: dict[str, tuple[str, str]] = {}

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        parser.addoption("--direct", action="store_true", dest="direct", help="leave the gateway out")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            call: Any = getattr(item, "callspec", None)
            if call is not None:
                program = call.params["program"]
                self._places[item.nodeid] = (f"{program.client}: {program.does}", call.params["place"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test may be reported up to three times: what is not well counts, else the call itself."""
        if report.nodeid not in self._places or (report.when != "call" and report.passed):
            return
        program, engine = self._places[report.nodeid]
        self.cells.setdefault(program, {})[engine] = SIGNS[report.outcome]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)
            what = f"{engine} · {program}" if report.when == "call" else engine
            self.reasons[f"{what}: {reason.splitlines()[0][:300]}"] = None

    def table(self) -> str:
        """Programs by engines. An engine of which every program was skipped is not at hand and has no column."""
        engines = list(dict.fromkeys(engine for row in self.cells.values() for engine in row))
        engines = [
            engine
            for engine in engines
            if any(row.get(engine, SIGNS["skipped"]) != SIGNS["skipped"] for row in self.cells.values())
        ]
        lines = [["program", *engines], ["---"] * (len(engines) + 1)]
        lines += [
            [program, *(row.get(engine, SIGNS["skipped"]) for engine in engines)] for program, row in self.cells.items()
        ]
        counts = [
            [row[engine] for row in self.cells.values() if row.get(engine, SIGNS["skipped"]) != SIGNS["skipped"]]
            for engine in engines
        ]
        lines.append(["**work**", *(f"**{count.count(SIGNS['passed'])} of {len(count)}**" for count in counts)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: Sequence[str]) -> int:
    outcomes = Outcomes()
    options = [word for word in words if word != "--why"]
    tests = str(Path(__file__).with_name("test_clients.py"))
    with redirect_stdout(sys.stderr):  # so that a table which goes into a file is nothing but that
        status = pytest.main(["-q", "--tb=no", tests, *options], plugins=[outcomes])
    print(outcomes.table())
    if "--why" in words:
        print("", *(f"- {reason}" for reason in outcomes.reasons), sep="\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
