import json

import pytest

from gateway.bench.compare_result import Side, side_of_file
from gateway.bench.result_json import run_to_json, to_json
from gateway.bench.results import ScenarioResult
from tests.bench.comparisons import cold, quality, side
from tests.bench.records import record, run


def test_a_side_survives_json() -> None:
    one = side("A", cold=(cold(3.0, gpu_percent=5.0),), quality=quality(0.5), figures={"x": 1.0})
    again = Side.from_json(json.loads(json.dumps(one.to_json())))
    value, expected = again.to_json(), one.to_json()
    runs, expected_runs = value.pop("rounds"), expected.pop("rounds")
    assert value == expected
    for found, wanted in zip(runs, expected_runs, strict=True):
        assert found["latencies"] == pytest.approx(wanted["latencies"], abs=2e-6)
        assert found["output_lens"] == wanted["output_lens"]
    assert again.quality == one.quality
    assert again.cold == one.cold


def test_a_scenarios_result_is_a_side_with_its_headline_run() -> None:
    runs = (run([record(0)], label="1"), run([record(0), record(1)], label="5"))
    result = ScenarioResult(
        "concurrency", "20261129-050000", "gw", "http://127.0.0.1:1", "openai", "/v1/chat/completions", "m",
        {"requests": 3}, runs, "5", figures={"speedup": 2.0},
    )  # fmt: skip
    found = side_of_file(json.loads(json.dumps(to_json(result))))
    assert [len(one.records) for one in found.rounds] == [2]
    assert (found.scenario, found.workload, found.figures) == ("concurrency", {"requests": 3}, {"speedup": 2.0})


def test_a_result_of_vllm_is_a_side_with_what_it_tells_about_its_workload() -> None:
    value = run_to_json(run([record(0), record(1)]))
    vllm = {key: item for key, item in value.items() if key not in ("records", "run_start", "client", "label")}
    found = side_of_file(json.loads(json.dumps({**vllm, "backend": "vllm", "date": "20261129-050000"})))
    assert found.workload["num_prompts"] == 2
    assert found.workload["total_input_tokens"] == 14
    assert len(found.rounds[0].good) == 2


def test_a_comparison_of_two_sides_is_not_a_side() -> None:
    with pytest.raises(ValueError, match="two sides already"):
        side_of_file({"sides": [side("A").to_json(), side("B").to_json()]})


@pytest.mark.parametrize("value", [{}, {"sides": [{}]}, {"duration": 1}])
def test_something_else_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a"):
        side_of_file(value)
