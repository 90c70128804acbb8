from pathlib import Path

import pytest

from benchmarks.scenarios import Report, ratio, sixteen


def test_times_are_shown_at_the_scale_of_the_report() -> None:
    assert Report(0.05).seconds(2.55) == "51.0 s"
    assert Report(0.05).seconds(None) == "–"
    assert (ratio(0.642), ratio(None)) == ("0.64x", "–")


def test_a_missed_target_is_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(1.0)
    report.target("a", True)
    report.target("b", False)
    assert not report.passed
    assert capsys.readouterr().out.split() == ["a:", "PASS", "b:", "FAIL"]
    report.table("T", ("x", "y"), [("1", "2")])
    assert "| x | y |\n|---|---|\n| 1 | 2 |" in capsys.readouterr().out


def test_sixteen_requests_are_judged_on_both_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On stand-ins in processes of their own, as the program runs them."""
    report = Report(1.0)
    sixteen(tmp_path, report)
    shown = capsys.readouterr().out
    assert "| serial |" in shown
    assert "| batched |" in shown
    assert report.passed
