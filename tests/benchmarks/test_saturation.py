"""The saturation benchmark: its command line, its tables, and a small run against the cheap upstream alone."""

import sys
from pathlib import Path

import pytest

from benchmarks import requests, saturation
from benchmarks.report import OURS, THEIRS, Target
from benchmarks.saturation import Sample, SaturationBench, Table
from benchmarks.subjects import BenchSetup, DidNotRun, counts, free_port, upstream
from benchmarks.upstream import MODEL
from benchmarks.wrk import run_wrk
from tests.programs import program

WITHOUT_OTHERS = ["--vllm-router", "", "--smg", "", "--nginx", ""]


def sample(busy: float = 1.0) -> Sample:
    return Sample(answers=4000.0, microseconds=250.0, busy=busy, helpers=0.3, tokens_a_read=1.5)


def table(ours: float, theirs: float, busy: float = 1.0) -> Table:
    made = Table("CPU of a plain request", Target(0.6))
    for name, value in ((OURS, ours), (THEIRS, theirs)):
        made.add(name, value, sample(busy))
    return made


def test_target_is_missed_above_its_ratio() -> None:
    assert not table(59, 100).is_missed
    assert table(61, 100).is_missed
    assert "PASS" in table(59, 100).lines()[-1]
    assert "FAIL" in table(61, 100).lines()[-1]


def test_ratio_is_that_within_the_rounds_since_the_machine_changes() -> None:
    made = Table("CPU of a plain request", Target(0.6))
    for ours, theirs in ((50.0, 100.0), (55.0, 100.0), (110.0, 200.0), (130.0, 200.0), (60.0, 100.0)):
        made.add(OURS, ours, sample())
        made.add(THEIRS, theirs, sample())
    assert made.comparison.ratio_in_rounds() == 0.55
    assert not made.is_missed
    assert "  0.55  " in made.lines()[2]


def test_subject_that_was_not_kept_busy_is_marked() -> None:
    assert not any("NOT SATURATED" in line for line in table(59, 100).lines())
    marked = [line for line in table(59, 100, busy=0.5).lines() if "NOT SATURATED" in line]
    assert len(marked) == 2
    assert "8,000" in marked[0]  # 4,000 answers a second on half a core


def test_invalid_arguments_exit_with_status_2() -> None:
    for arguments in (["--rounds", "0"], ["--tokens", "1"], ["--seconds", "0"], ["--also", "3.15"]):
        with pytest.raises(SystemExit) as ended:
            saturation.parse(arguments)
        assert ended.value.code == 2


def test_further_gateways_run_by_their_own_commands(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = f"sh -c 'echo once >> {started}; exec {sys.executable} -m gateway serve'"
    options = saturation.parse(["--no-pin", "--also", f"other={command}", *WITHOUT_OTHERS])
    setup = BenchSetup(frozenset(), frozenset(), tmp_path)
    with upstream(setup) as direct:
        bench = SaturationBench(options, setup, direct)
        with bench.started():
            names = [subject.name for subject in bench.subjects]
            assert names == [OURS, f"{OURS}, full", "other", "other, full"]
            assert len({subject.port for subject in bench.subjects}) == 4
            assert started.read_text() == "once\n" * 2


def test_without_wrk_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert saturation.main(["--wrk", ""]) == 1
    assert "wrk is not installed" in capsys.readouterr().err


def test_upstream_counts_answers_and_tokens(tmp_path: Path) -> None:
    with upstream(BenchSetup(frozenset(), frozenset(), tmp_path)) as direct:
        assert counts(direct.port) == (0, 0)


def test_small_run_of_wrk_against_the_upstream_itself(tmp_path: Path) -> None:
    setup = BenchSetup(frozenset(), frozenset(), tmp_path)
    options = saturation.parse(["--rounds", "1", "--seconds", "0.2", "--no-pin", "--wrk", program("wrk")])
    with upstream(setup) as direct:
        bench = SaturationBench(options, setup, direct)
        bench.pace(0)
        measured = bench.load(direct, requests.chat(MODEL, max_tokens=20, stream=True))
        assert measured.answers > 0
        assert measured.tokens_a_read > 0
        with pytest.raises(DidNotRun, match="requests of wrk failed"):
            bench.load(direct, b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")


def test_wrk_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DidNotRun, match="wrk ended with status 1"):
        run_wrk("/bin/false", free_port(), b"", 1, 0.0, frozenset(), tmp_path, lambda pid: pid)
