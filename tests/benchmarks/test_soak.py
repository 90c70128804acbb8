"""The soak: the slope of the memory, and a short run."""

import pytest

from benchmarks.soak import MIB, Sample, main, second_half_slope


def sample(seconds: float, mebibytes: float) -> Sample:
    return Sample(seconds, round(mebibytes * MIB), 0, 0, 0, 0, 0)


def test_slope_is_that_of_the_second_half_alone() -> None:
    samples = [sample(60.0 * minute, 100 + min(minute, 30) + max(0, minute - 30) / 10) for minute in range(61)]
    assert second_half_slope(samples) == pytest.approx(6.0)


def test_every_request_of_a_short_run_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--minutes", "0.1", "--rate", "20"]) == 0
    assert "not accounted for: 0; crashes: 0: PASS" in capsys.readouterr().out
