"""The cost benchmark: its command line, and a small run against the cheap upstream alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import cost, requests
from benchmarks.load import LoadOutcome
from benchmarks.subjects import BenchSetup, DidNotRun, upstream
from benchmarks.upstream import MODEL
from tests.benchmarks.comparisons import comparison


def test_missed_target_sets_the_exit_status_only_if_strict() -> None:
    missed = [comparison([10], [10])]
    assert cost.verdict(missed, strict=False) == 0
    assert cost.verdict(missed, strict=True) == 1
    assert cost.verdict([comparison([1], [10])], strict=True) == 0


def test_invalid_arguments_exit_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "request,speed"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as ended:
            cost.parse(arguments)
        assert ended.value.code == 2
    assert "unknown speed" in capsys.readouterr().err


def test_default_router_is_in_the_benchmark_virtualenv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_VENV", ".venv-bench")
    assert cost.parse([]).vllm_router.endswith("/.venv-bench/bin/vllm-router")
    monkeypatch.delenv("BENCH_VENV")
    assert cost.parse([]).vllm_router == ""


@contextmanager
def bench_alone(tmp_path: Path) -> Iterator[cost.CostBench]:
    """Return a benchmark whose only subject is the cheap upstream itself."""
    setup = BenchSetup(frozenset(), frozenset(), tmp_path)
    options = cost.parse(["--rounds", "1", "--seconds", "0.3", "--no-pin"])
    with upstream(setup) as direct:
        bench = cost.CostBench(options, setup, direct)
        bench.subjects = [direct]
        yield bench


def test_small_run_against_the_upstream_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of load, each in its own process, directly on the upstream."""
    monkeypatch.setattr(cost, "_IMAGE_BYTES", 1_000_000)
    with bench_alone(tmp_path) as bench:
        for table in (
            cost.request_cost(bench, 0),
            cost.request_cost(bench, 0, split=True),
            cost.token_cost(bench, 10),
            cost.first_token_time(bench, 32),
            cost.image_block(bench),
        ):
            assert table.values["direct"][0] > 0, table.title
        bench.pace(hold=1)
        held: LoadOutcome = bench.load(bench.direct, "idle", requests.chat(MODEL, max_tokens=5, stream=True), 20, 0.05)
        assert held.answers == 20


def test_load_on_a_closed_port_did_not_run(tmp_path: Path) -> None:
    with bench_alone(tmp_path) as bench:
        stopped = bench.direct
    started = time.monotonic()
    with pytest.raises(DidNotRun):
        bench.load(stopped, "plain", b"request", 1, 0.1)
    assert time.monotonic() - started < 20
