"""Covers: gateway/bench/results.py
Covers: gateway/bench/target.py"""

import json
from dataclasses import replace

import pytest

from gateway.bench.arrivals import RampUp
from gateway.bench.result_json import LISTS, from_json, run_to_json, to_json
from gateway.bench.results import CANCELLED, Cell, ClientLoad, Column, RateChange, ScenarioResult, Table, Verdict
from tests.bench.records import record, run

VLLM_KEYS = (
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens",
    "ttfts", "itls", "latencies", "start_times", "queue_times", "errors", "max_output_tokens_per_s",
    "max_concurrent_requests", "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
    "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms",
    "mean_e2el_ms", "p99_e2el_ms", "mean_client_queue_time_ms", "mean_e2el_including_client_queue_ms",
)  # fmt: skip
"""Keys of a result of vLLM 0.32, but for the answers' texts and audio."""


def result() -> ScenarioResult:
    failed = record(1, start=101.0, ttft=None, itl=(), error="http_503 queue_full")
    one = replace(run([record(0), failed], label="all"), client=ClientLoad(0.2, 1.0, 2.0, warnings=("busy_client",)))
    return ScenarioResult(
        scenario="load", date="20261129-050000", target="gw", url="http://127.0.0.1:1", api="openai",
        endpoint="/v1/chat/completions", model="m", workload={"requests_sha256": "00"}, runs=(one,), headline="all",
        tables=(Table("t", (Column("c", "s", lower_is_better=True),), ((Cell(255.0, "computed"),),)),),
        verdicts=(Verdict("batched", "rule", {"ratio": 1.0}),), figures={"speedup": 3.0}, notes=("n",),
    )  # fmt: skip


def test_the_json_has_every_key_of_vllm() -> None:
    value = to_json(result())
    assert [key for key in VLLM_KEYS if key not in value] == []


def test_a_result_survives_a_file() -> None:
    assert from_json(json.loads(json.dumps(to_json(result())))) == result()


def test_a_ramp_up_probes_and_metadata_survive_a_file() -> None:
    changes = (RateChange(1, "2026-11-29T05:00:00+09:00"), RateChange(2, "2026-11-29T05:00:01+09:00"))
    whole = replace(
        result().runs[0], ramp_up=RampUp("exponential", 1.0, 2.0), rate_changes=changes, probes=(record(0, itl=()),)
    )
    other = run([record(0)], label="other")
    given = replace(result(), runs=(whole, other), metadata={"version": "0.32"})
    value = json.loads(json.dumps(to_json(given)))
    assert from_json(value) == given
    assert (value["version"], value["ramp_up_strategy"], value["probe_completed"]) == ("0.32", "exponential", 1)
    assert json.dumps(value).count('"probes"') == 1


def test_an_interrupted_run_survives_a_file() -> None:
    """A request in flight has a record and no place in vLLM's lists."""
    records = [record(0, itl=(0.1,)), record(1, ttft=None, itl=(), error=CANCELLED), record(2, itl=(0.2, 0.3))]
    whole = replace(result(), runs=(run(records, label="all"),))
    read = from_json(json.loads(json.dumps(to_json(whole))))
    assert [item.itl for item in read.runs[0].records] == [(0.1,), (), (0.2, 0.3)]
    assert read == whole


def test_no_list_is_written_twice() -> None:
    other = run([record(0, itl=(0.125,))], label="other")
    value = to_json(replace(result(), runs=(*result().runs, other)))
    assert [sorted(set(LISTS) & set(item)) for item in value["runs"]] == [[], sorted(LISTS)]
    assert json.dumps(value["runs"][1]).count("0.125") == 1


def test_the_text_of_an_answer_is_never_written() -> None:
    kept = replace(record(0), text="a secret answer")
    assert "secret" not in json.dumps(run_to_json(run([kept])))


def test_a_result_of_vllm_is_read() -> None:
    """Only the keys that vLLM writes, as `vllm bench serve --save-detailed` names them."""
    ours = to_json(result())
    theirs = {key: ours[key] for key in VLLM_KEYS} | {"generated_texts": ["x", ""], "rtfx": 0.0}
    read = from_json(theirs)
    assert [item.error for item in read.runs[0].records] == ["", "failed"]
    assert run_to_json(read.runs[0])["mean_ttft_ms"] == pytest.approx(ours["mean_ttft_ms"])


@pytest.mark.parametrize("value", [[], {}, {"duration": 1, "num_prompts": 2}, {"runs": [{}]}])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a result"):
        from_json(value)  # type: ignore[arg-type]
