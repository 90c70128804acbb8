"""Print a Markdown table of which client programs work on which engines.

Run it with `python -m tests.e2e.client_table`. It runs `test_clients.py` as `make test` and
`make test-vllm` do. Other arguments go to pytest (`-m "not vllm"`, `-k openai`). `--direct` leaves
out the gateway, to show what the engines do themselves. `--why` lists each failure with its line.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

SIGNS = {"passed": "✓", "failed": "✗", "skipped": "–"}


class Outcomes:
    """Pytest plugin that records the outcome of each program on each engine."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}
        # In order and without repetition: a gateway that does not start is one reason, not one for
        # each program.
        self.reasons: dict[str, None] = {}
        self._cells_by_test: dict[str, tuple[str, str]] = {}

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        parser.addoption("--direct", action="store_true", dest="direct", help="leave out the gateway")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            call: Any = getattr(item, "callspec", None)
            if call is not None:
                program = call.params["program"]
                self._cells_by_test[item.nodeid] = (f"{program.client}: {program.action}", call.params["tool_engine"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a report. Of a test's up to three reports, a failure or a skip counts, else the
        call.
        """
        if report.nodeid not in self._cells_by_test or (report.when != "call" and report.passed):
            return
        program, engine = self._cells_by_test[report.nodeid]
        self.cells.setdefault(program, {})[engine] = SIGNS[report.outcome]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)
            what = f"{engine} · {program}" if report.when == "call" else engine
            self.reasons[f"{what}: {reason.splitlines()[0][:300]}"] = None

    def table(self) -> str:
        """Return the table. An engine on which every program was skipped is not available and has
        no column.
        """
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


def main(arguments: Sequence[str]) -> int:
    outcomes = Outcomes()
    options = [argument for argument in arguments if argument != "--why"]
    tests = str(Path(__file__).with_name("test_clients.py"))
    with redirect_stdout(sys.stderr):  # so that stdout has only the table
        status = pytest.main(["-q", "--tb=no", tests, *options], plugins=[outcomes])
    print(outcomes.table())
    if "--why" in arguments:
        print("", *(f"- {reason}" for reason in outcomes.reasons), sep="\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
