"""Measured times, and what they let expect."""

from gateway.rollout.gpu_times import KEPT, NOTHING, UNKNOWN, Expected, GpuTimes


def test_the_median_of_the_last_times_is_expected() -> None:
    times = GpuTimes()
    assert times.expected("wake", "vllm", {}) == UNKNOWN
    assert times.expected("wake", "vllm", {"vllm": 30.0}) == Expected(30.0, "estimated")
    for seconds in (90.0, 91.0, 92.0, *[7.0] * (KEPT - 1), 8.0):
        times.record("wake", "vllm", seconds)
    assert times.expected("wake", "vllm", {"vllm": 30.0}) == Expected(7.0, "measured")
    assert times.expected("free", "vllm", {}) == UNKNOWN


def test_times_outlive_a_restart() -> None:
    times = GpuTimes()
    times.record("free", "ollama", 1.5)
    assert GpuTimes(times.to_persist()).expected("free", "ollama", {}) == Expected(1.5, "measured")
    assert GpuTimes({"free": 3}).expected("free", "ollama", {}) == UNKNOWN


def test_a_sum_is_as_uncertain_as_its_worst_part() -> None:
    measured, estimated = Expected(2.0, "measured"), Expected(3.0, "estimated")
    assert NOTHING + measured == measured
    assert measured + estimated == Expected(5.0, "estimated")
    assert estimated + UNKNOWN == UNKNOWN
