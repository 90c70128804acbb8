"""The switch benchmark: which requests count as misrouted, and a small run."""

import pytest

from benchmarks import switch
from benchmarks.switch import ObservedRequest, Report, SwitchCall, main

CALLS = [SwitchCall(10.0, 10.1, "vllm"), SwitchCall(20.0, 20.1, "ollama")]


@pytest.mark.parametrize(
    ("sent", "headers", "backend", "is_misrouted"),
    [
        (1.0, 2.0, "ollama", False),
        (1.0, 2.0, "vllm", True),
        (9.9, 10.05, "vllm", False),
        (10.05, 10.2, "ollama", False),
        (10.1, 10.2, "ollama", True),
        (15.0, 15.1, "vllm", False),
        (19.9, 25.0, "ollama", False),
        (20.2, 20.3, "vllm", True),
    ],
)
def test_request_sent_after_a_switch_and_served_by_the_previous_backend_is_misrouted(
    sent: float, headers: float, backend: str, is_misrouted: bool
) -> None:
    assert Report(CALLS, seen=[ObservedRequest(sent, headers, backend, True)]).misrouted() == is_misrouted


@pytest.mark.parametrize(
    ("queued", "is_misrouted"), [(0.0, False), (4.9, False), (5.2, True), (14.9, True), (15.2, True)]
)
def test_request_admitted_after_a_switch_on_the_previous_backend_is_misrouted(
    queued: float, is_misrouted: bool
) -> None:
    assert Report(CALLS[:1], seen=[ObservedRequest(5.0, 30.0, "ollama", True, queued)]).misrouted() == is_misrouted


@pytest.mark.parametrize(("moved", "passed"), [([], True), ([3, 1], True), ([3, 0], False)])
def test_switch_that_moves_no_queued_request_fails(moved: list[int], passed: bool) -> None:
    assert Report(CALLS, [0.1, 0.1], moved=moved).passed == passed


def test_small_run_loses_no_request_and_moves_queued_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "_TOKENS_PER_SECOND", 6.0)  # streams of 1.7 s instead of 5 s
    assert main(["--streams", "6", "--rate", "20", "--switches", "4", "--pause", "0.2", "--waiting", "24"]) == 0
    report = capsys.readouterr().out
    assert "failed: 0\n" in report
    assert "queued requests moved by a switch:" in report
