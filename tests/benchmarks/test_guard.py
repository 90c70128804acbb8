"""The guard benchmark, in a small run."""

import pytest

from benchmarks.guard import main


def test_small_run_rolls_back_only_bad_canaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "2", "--hours", "0.3", "--only", "canary"]) in (0, 1)
    lines = {line[:38].strip(): line[38:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["canary, equal"][:3] == ["0", "of", "2"]
    assert lines["canary, fails everything"][:3] == ["2", "of", "2"]
