"""The chaos run, with a stand-in in place of vLLM and short faults.

Covers: benchmarks/chaos.py, benchmarks/chaos_client_process.py
"""

import pytest

from benchmarks import chaos


@pytest.mark.timeout(180)  # it starts six processes, and some of them again
def test_every_request_of_a_short_run_is_accounted_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "STOP_SECONDS", (0.2, 0.5))
    monkeypatch.setattr(chaos, "DOWN_SECONDS", 0.5)
    monkeypatch.setattr(chaos, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(chaos, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(chaos, "STEADY_RATE", 5.0)
    assert chaos.main(["--stand-in", "--minutes", "0"]) == 0
    report = capsys.readouterr().out
    assert "not accounted for: 0; later than the deadline: 0; crashes: 0: PASS" in report
    assert "left over: nothing" in report
    assert all(kind in report for kind in ("kill -9 vLLM", "SIGSTOP vLLM", "SIGTERM vLLM", "kill -9 a client"))
