"""The bench of the guard: a small run of it."""

import pytest

from benchmarks.guard import main


def test_small_run_takes_back_what_is_bad_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "2", "--hours", "0.3", "--only", "canary"]) in (0, 1)
    lines = {line[:38].strip(): line[38:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["canary, equal"][:3] == ["0", "of", "2"]
    assert lines["canary, fails everything"][:3] == ["2", "of", "2"]
