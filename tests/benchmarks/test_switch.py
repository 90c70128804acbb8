"""The bench of switching: one small run, and what it counts as astray."""

import pytest

from benchmarks.switch import ObservedRequest, Report, SwitchCall, main

CALLS = [SwitchCall(10.0, 10.1, "vllm"), SwitchCall(20.0, 20.1, "ollama")]


@pytest.mark.parametrize(
    ("sent", "headers", "side", "is_astray"),
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
def test_request_is_astray_that_was_sent_after_an_answer_and_served_by_the_other(
    sent: float, headers: float, side: str, is_astray: bool
) -> None:
    assert Report(CALLS, seen=[ObservedRequest(sent, headers, side, True)]).astray() == is_astray


@pytest.mark.parametrize(("queued", "is_astray"), [(0.0, False), (4.9, False), (5.2, True), (14.9, True), (15.2, True)])
def test_request_is_astray_that_got_its_slot_after_an_answer_on_the_side_that_was_left(
    queued: float, is_astray: bool
) -> None:
    assert Report(CALLS[:1], seen=[ObservedRequest(5.0, 30.0, "ollama", True, queued)]).astray() == is_astray


@pytest.mark.parametrize(("moved", "passed"), [([], True), ([3, 1], True), ([3, 0], False)])
def test_run_in_which_nobody_moved_along_is_no_good_one(moved: list[int], passed: bool) -> None:
    assert Report(CALLS, [0.1, 0.1], moved=moved).passed == passed


def test_small_run_loses_nothing_and_moves_who_waits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--streams", "6", "--rate", "20", "--switches", "4", "--pause", "0.2", "--waiting", "24"]) == 0
    told = capsys.readouterr().out
    assert "failed: 0\n" in told
    assert "moved along:" in told
