from dataclasses import replace

from gateway.bench.report_terminal import WIDTH, summary
from tests.bench.records import record, run


def test_the_summary_has_the_lines_of_vllm_bench_serve() -> None:
    lines = summary(run([record(i) for i in range(20)], duration=2.0)).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     20"
    assert "Output token throughput (tok/s):         30.00" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "Mean TTFT (ms):                          500.00" in lines
    assert max(map(len, lines)) == WIDTH


def test_a_percentile_without_enough_requests_is_left_out() -> None:
    assert "P95 TTFT" in summary(run([record(i) for i in range(20)]))
    assert "P95 TTFT" not in summary(run([record(i) for i in range(19)]))
    assert "P99" not in summary(run([record(i, itl=[0.1]) for i in range(20)]))


def test_a_run_without_answers_has_a_summary() -> None:
    text = summary(run([record(0, error="timeout", ttft=None)]))
    assert "Failed requests:                         1" in text
    assert "TTFT" not in text


def test_probes_have_the_lines_of_vllm_bench_serve() -> None:
    lines = summary(replace(run([record(0)]), probes=(record(0, itl=()),))).splitlines()
    at = lines.index("------------------Probe Requests------------------")
    assert lines[at + 1 : at + 4] == [
        "Probe requests completed:                1",
        "Probe requests failed:                   0",
        "Median probe E2EL (ms):                  500.00",
    ]
    assert "P99 probe E2EL" not in summary(replace(run([record(0)]), probes=(record(0, itl=()),)))
