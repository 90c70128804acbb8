"""Covers: gateway/cli/bench.py
Covers: gateway/cli/bench_options.py"""

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gateway import simulate
from gateway.bench.scenarios import SCENARIOS
from gateway.cli.bench_options import InvalidOptions, check
from tests.cli.harness import command, invoke, process
from tests.fakes.stand_ins import stand_in

FAST = simulate.Options("vllm")
RAMP = ("load", "--ramp-up-strategy", "linear", "--ramp-up-start-rps")
FAST_OLLAMA = simulate.Options("ollama", (simulate.Model("llama"), simulate.Model("gemma2:2b")), parallel=4)


async def bench(options: simulate.Options, *words: str, **variables: str) -> Result:
    async with stand_in(options) as server:
        return await command("bench", *words, "--url", server.base_url, **variables)


async def test_a_result_is_printed_with_its_verdict() -> None:
    done = await bench(FAST, "concurrency", "--levels", "2")
    assert done.exit_code == 0, done.output
    assert "All requests of a level together" in done.stdout
    assert "Rule: An answer is being generated" in done.stdout


async def test_a_result_is_korean_on_demand() -> None:
    done = await bench(FAST_OLLAMA, "text-parallel", "--api", "ollama", "--lang", "ko")
    assert done.exit_code == 0, done.output
    assert "순차와 병렬" in done.stdout


async def test_json_is_the_result_and_nothing_else() -> None:
    done = await bench(FAST, "load", "--num-prompts", "3", "--json", "--label", "gw", "--temperature", "0")
    value = json.loads(done.stdout)
    assert (value["scenario"], value["completed"], value["target"]) == ("load", 3, "gw")
    assert value["model_id"] == "Qwen/Qwen3-VL-8B-Instruct"


async def test_out_gets_the_files_and_no_text_of_an_answer(tmp_path: Path) -> None:
    done = await bench(FAST, "load", "--num-prompts", "3", "--out", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names >= {"benchmark_results.json", "benchmark_summary.md", "results.csv"}
    assert not any(" saw 0 images" in path.read_text() for path in (tmp_path / "new").iterdir())


async def test_the_first_model_of_an_ollama_is_taken() -> None:
    done = await bench(FAST_OLLAMA, "load", "--api", "ollama", "--num-prompts", "2", "--json")
    assert json.loads(done.stdout)["model_id"] in ("llama:latest", "gemma2:2b")


@pytest.mark.parametrize(
    ("condition", "status"), [("mean_ttft_ms>60000", 0), ("mean_ttft_ms>=0", 1), ("p99_ttft_ms>60000", 1)]
)
async def test_fail_if_decides_the_exit_status(condition: str, status: int) -> None:
    done = await bench(FAST, "load", "--num-prompts", "3", "--fail-if", condition)
    assert done.exit_code == status, done.output


def test_a_figure_that_does_not_exist_is_refused_before_anything_is_measured() -> None:
    done = invoke("bench", "load", "--url", "http://127.0.0.1:1", "--fail-if", "p99_tftt_ms>1")
    assert done.exit_code == 2
    assert "'p99_tftt_ms' is not a figure of load; it has " in done.stderr


async def test_a_figure_of_a_level_that_was_not_measured_is_exit_status_2() -> None:
    done = await bench(FAST, "vision-batch", "--levels", "1", "--image-size", "8", "--fail-if", "speedup_5<1")
    assert done.exit_code == 2
    assert "'speedup_5' is not a figure of this result" in done.stderr


@pytest.mark.parametrize("scenario", list(SCENARIOS))
async def test_every_figure_of_a_scenario_can_be_named(scenario: str) -> None:
    """What the options accept beforehand is what the result has afterwards."""
    words = {"soak": ("--duration", "1s", "--window", "300ms"), "users": ("--levels", "1")}.get(scenario, ())
    words += ("--image-size", "8", "--levels", "1,2") if scenario == "vision-batch" else ()
    done = await bench(FAST, scenario, "--output-len", "2", "--json", *words)
    result = json.loads(done.stdout)
    names = set(result["figures"]) | {name for name, value in result.items() if isinstance(value, float)}
    names -= {"run_start", "burstiness", "format"}
    check(given(scenario=scenario, fail_if=[f"{name}>1" for name in names], metric_percentiles="50,90,95,99"), set())


async def test_a_percentile_of_a_condition_is_computed_though_it_is_not_shown() -> None:
    done = await bench(FAST, "load", "--num-prompts", "4", "--fail-if", "p75_ttft_ms>60000")
    assert done.exit_code == 0, done.output


async def test_goodput_and_headers_take_several_values_as_vllm_does() -> None:
    words = ("--goodput", "ttft:60000", "e2el:60000", "--header", "x-a=1", "x-b=2")
    async with stand_in(FAST) as server:
        done = await command("bench", "load", "--url", server.base_url, "--num-prompts", "2", "--json", *words)
        headers = server.engine.requests[-1]["headers"]
    assert json.loads(done.stdout)["goodput"] == {"ttft": 60000, "e2el": 60000}
    assert (headers["x-a"], headers["x-b"]) == ("1", "2")


async def test_each_option_keeps_its_own_values_in_any_order() -> None:
    words = ("--header", "x-a=1", "x-b=2", "--metadata", "version=0.32", "tp=1", "--goodput=ttft:60000", "e2el:60000")
    async with stand_in(FAST) as server:
        done = await command("bench", *words, "load", "--url", server.base_url, "--num-prompts", "2", "--json")
        headers = server.engine.requests[-1]["headers"]
    result = json.loads(done.stdout)
    assert (headers["x-a"], headers["x-b"], headers.get("tp")) == ("1", "2", None)
    assert (result["version"], result["tp"], result["metadata"]) == ("0.32", "1", {"version": "0.32", "tp": "1"})
    assert result["goodput"] == {"ttft": 60000, "e2el": 60000}


async def test_metadata_stands_in_what_people_read() -> None:
    done = await bench(FAST, "load", "--num-prompts", "2", "--metadata", "gpu=none", "tp=1")
    assert "Metadata: gpu=none, tp=1" in done.stdout


async def test_a_growing_rate_is_part_of_the_result() -> None:
    ramp = (*RAMP[1:], "50", "--ramp-up-end-rps", "52")
    done = await bench(FAST, "load", "--num-prompts", "9", *ramp, "--burstiness", "inf", "--json")
    result = json.loads(done.stdout)
    found = [result[f"ramp_up_{name}"] for name in ("strategy", "start_rps", "end_rps")]
    assert (found, result["request_rate"], result["completed"]) == (["linear", 50, 52], "inf", 9)
    assert [change["rps"] for change in result["rps_change_events"]] == [50, 51, 52]
    assert result["workload"]["ramp_up_strategy"] == "linear"


async def test_probes_are_counted_apart() -> None:
    words = ("--num-prompts", "3", "--probe-request-rate", "1000", "--fail-if", "probe_failed>0")
    done = await bench(FAST, "load", *words)
    assert done.exit_code == 0, done.output
    assert "Probes beside the load: successful" in done.stdout
    assert re.search(r"Successful requests +3\b", done.stdout)


async def test_a_server_that_refuses_is_exit_status_1() -> None:
    done = await bench(FAST, "load", "--model", "no-such-model")
    assert done.exit_code == 1
    assert "does not answer a first request: http_404" in done.stderr


async def test_requests_that_all_fail_are_exit_status_1() -> None:
    broken = simulate.Options("vllm", faults=(simulate.Fault("status", times=0, status=503),))
    done = await bench(broken, "load", "--num-prompts", "2", "--num-warmups", "0")
    assert done.exit_code == 1
    assert "failures: http_503" in done.stdout
    assert "no request was answered" in done.stderr


def test_nobody_listening_is_exit_status_1() -> None:
    done = invoke("bench", "load", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert "cannot be asked for a model" in done.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("load", "--levels", "5"), "--levels has no meaning for load"),
        (("users", "--request-rate", "5"), "--request-rate has no meaning for users"),
        (("load", "--model", "a", "--model", "b"), "--model: load takes one model"),
        (("concurrency", "--levels", "5,x"), "--levels: '5,x': expected positive integers"),
        (("load", "--request-rate", "0"), "--request-rate: 0: expected a positive number"),
        (("load", "--goodput", "itl:5"), "--goodput: 'itl:5': expected ttft, tpot, e2el"),
        (("load", "--percentile-metrics", "ttft,x"), "--percentile-metrics: 'ttft,x'"),
        (("load", "--metric-percentiles", "0,99"), "--metric-percentiles: '0,99'"),
        (("load", "--extra-body", "[]"), "--extra-body: expected a JSON object"),
        (("load", "--extra-body", "{"), "--extra-body: not JSON"),
        (("load", "--url", "ftp://x"), "--url: 'ftp://x' is not an address"),
        (("load", "--header", "x"), "--header: 'x': expected KEY=VALUE"),
        (("load", "--header", "x=a\r\nb: c"), "--header: only printable ASCII"),
        (("load", "--api-key", "a\nb"), "--api-key: only printable ASCII"),
        (("load", "--endpoint", "v1"), "--endpoint: 'v1' is not a path"),
        (("load", "--languages", "fr"), "--languages: 'fr': expected some of ko, en, ja"),
        (("load", "--dataset-path", "/no/such"), "--dataset-path: /no/such: No such file"),
        (("load", "--fail-if", "p99"), "--fail-if: 'p99': expected a figure"),
        (("soak", "--duration", "0"), "--duration: expected more than 0"),
        (("users", "--forecast", "x"), "--forecast: 'x': expected ROW=TEXT"),
        (("vision-batch", "--images", "/no/such"), "--images: /no/such: not a folder"),
        (("load", "stray"), "unexpected argument 'stray'"),
        (("load", "--header", "x=1", "stray", "y=2"), "unexpected argument 'y=2'"),
        (("load", "--ramp-up-end-rps", "5"), "--ramp-up-end-rps has no meaning without --ramp-up-strategy"),
        (("load", "--ramp-up-strategy", "linear", "--ramp-up-end-rps", "5"), "--ramp-up-start-rps: --ramp-up-strategy"),
        ((*RAMP, "0", "--ramp-up-end-rps", "5"), "--ramp-up-start-rps: 0: expected a positive number"),
        ((*RAMP, "6", "--ramp-up-end-rps", "5"), "--ramp-up-start-rps: 6 is more than --ramp-up-end-rps, 5"),
        ((*RAMP, "1", "--ramp-up-end-rps", "inf"), "--ramp-up-end-rps: inf: expected a finite number"),
        ((*RAMP, "1", "--ramp-up-end-rps", "5", "--request-rate", "2"), "--request-rate has no meaning with"),
        (("soak", *RAMP[1:], "1"), "--ramp-up-strategy has no meaning for soak"),
        (("load", "--probe-request-rate", "-1"), "--probe-request-rate: -1: expected a positive number, or 0"),
        (("concurrency", "--probe-request-rate", "1"), "--probe-request-rate has no meaning for concurrency"),
        (("load", "--metadata", "version"), "--metadata: 'version': expected KEY=VALUE"),
        (("load", "--metadata", "a=1", "duration=2"), "--metadata: 'duration' is a key of the result itself"),
        (("load", "--metadata", "ramp_up_strategy=x"), "--metadata: 'ramp_up_strategy' is a key of the result"),
        (("load", "--fail-if", "probe_max_e2el_ms>1"), "'probe_max_e2el_ms' is not a figure of load"),
    ],
)
async def test_wrong_words_are_exit_status_2_and_named(words: tuple[str, ...], problem: str) -> None:
    async with stand_in(FAST) as server:
        done = await command("bench", *words, GATEWAY_URL=server.base_url)
    assert done.exit_code == 2, done.output
    assert problem in done.stderr


def test_an_unknown_scenario_is_exit_status_2() -> None:
    assert invoke("bench", "nothing").exit_code == 2


def test_the_key_is_in_no_output() -> None:
    done = invoke("bench", "load", "--url", "http://127.0.0.1:1", OPENAI_API_KEY="sk-secret")
    assert "sk-secret" not in done.output


def given(**changes: Any) -> dict[str, Any]:
    """Return the parameters of a command line without options."""
    nothing = dict.fromkeys(
        ("num_prompts", "max_concurrency", "input_len", "output_len", "dataset_path", "images", "timeout", "model",
         "header", "goodput", "forecast", "metadata", "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps",
         "replay", "fail_if", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
         "presence_penalty", "repetition_penalty"),
    )  # fmt: skip
    texts = dict.fromkeys(("api_key", "endpoint", "label", "levels", "extra_body"), "")
    return {
        **nothing, **texts, "scenario": "load", "url": "http://x", "api": "openai", "insecure": False,
        "request_rate": math.inf, "burstiness": 1.0, "probe_request_rate": 0.0, "num_warmups": 1, "seed": 0,
        "languages": "ko", "no_stream": False, "ignore_eos": False, "image_size": 512,
        "speed": 1.0, "rounds": 2, "realtime_ttft": 2.0, "realtime_speed": 5.0, "wait": "30s",
        "max_users": 64, "duration": "10m", "window": "1m", "percentile_metrics": "ttft", "metric_percentiles": "99",
        "lang": "en", **changes,
    }  # fmt: skip


def test_options_become_what_scenarios_take() -> None:
    found = check(given(temperature=0.0, ignore_eos=True, extra_body='{"top_k": 3}', timeout="1m"), set())
    assert dict(found.options.parameters) == {"temperature": 0.0, "ignore_eos": True, "top_k": 3}
    assert (found.options.timeout, found.options.request_rate, found.style.percentiles) == (60.0, None, (99.0,))


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InvalidOptions) as caught:
        check(given(levels="x", url="ftp://x"), {"levels"})
    assert len(caught.value.lines) == 3


async def test_a_reader_that_leaves_early_does_not_cost_the_files(tmp_path: Path) -> None:
    """As in `gateway bench … --out report | head -1`: a long measurement would be lost."""
    async with stand_in(FAST) as server:
        words = ("load", "--url", server.base_url, "--num-prompts", "2", "--output-len", "2", "--out", str(tmp_path))
        running = process("bench", *words)
        try:
            assert running.stdout is not None
            running.stdout.close()
            while running.poll() is None:
                await _turn()
        finally:
            running.kill()
            running.wait()
            assert running.stderr is not None
            running.stderr.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"benchmark_results.json", "report.html"}


@pytest.mark.parametrize("body", ["[" * 100_000, '{"seed": NaN}', r'{"stop": "\ud800"}', "[]"])
def test_an_extra_body_that_could_not_be_sent_is_refused(body: str) -> None:
    with pytest.raises(InvalidOptions, match="--extra-body"):
        check(given(extra_body=body), set())


async def test_an_interrupted_run_reports_what_was_measured() -> None:
    """The stand-in is in this process, the command in its own, which gets SIGINT as from Ctrl-C."""
    async with stand_in(simulate.Options("vllm", time_to_first_token=0.01)) as server:
        words = ("soak", "--url", server.base_url, "--duration", "5m", "--output-len", "4", "--json")
        running = process("bench", *words)
        try:
            while server.engine.served < 20:
                assert running.poll() is None
                await _turn()
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=20)
        finally:
            running.kill()
            running.communicate()
    assert running.returncode == 130, err
    value = json.loads(out)
    assert value["interrupted"]
    assert value["completed"] >= 10
    assert value["failed"] == 0


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0.01)
