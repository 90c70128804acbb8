"""Processes of the cost benchmark."""

import sys
from pathlib import Path

import pytest

from benchmarks.subjects import BenchSetup, DidNotRun, gateway_environment
from benchmarks.subjects import gateway as started_gateway


def test_settings_of_the_callers_environment_do_not_reach_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_CONFIG", "mine.yaml")
    monkeypatch.setenv("OLLAMA_MODEL", "mine")
    environment = gateway_environment(1, 2)
    assert "GATEWAY_CONFIG" not in environment
    assert "OLLAMA_MODEL" not in environment
    assert environment["VLLM_BASE_URL"] == "http://127.0.0.1:2/v1"


def test_failed_start_is_reported_with_the_end_of_the_log(tmp_path: Path) -> None:
    setup = BenchSetup(frozenset(), frozenset(), tmp_path)
    command = [sys.executable, "-c", "raise SystemExit('no such setting')"]
    with pytest.raises(DidNotRun, match="no such setting"), started_gateway(setup, 1, command):
        pass
    with pytest.raises(DidNotRun, match="did not start"), started_gateway(setup, 1, ["/nowhere/gateway"]):
        pass
