"""Each scenario against a server in virtual time.

Covers: gateway/bench/scenarios/concurrency.py
Covers: gateway/bench/scenarios/text_parallel.py
Covers: gateway/bench/scenarios/vision_batch.py
Covers: gateway/bench/scenarios/multi_model.py
Covers: gateway/bench/scenarios/users.py
Covers: gateway/bench/scenarios/load.py
Covers: gateway/bench/scenarios/soak.py
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.bench.formatting import verdict_text
from gateway.bench.images import make_images
from gateway.bench.result_json import to_json
from gateway.bench.results import ScenarioResult, Table
from gateway.bench.scenarios import SCENARIOS
from gateway.bench.scenarios.soak import drift_of, windows
from gateway.bench.target import BenchRequest
from tests.bench.fake_client import FakeClient, options, runner
from tests.bench.records import record
from tests.bench.records import run as run_of

pytestmark = pytest.mark.virtual_time


def column(table: Table, key: str) -> list[Any]:
    place = [item.key for item in table.columns].index(key)
    return [row[place].value for row in table.rows]


async def result_of(scenario: str, client: FakeClient, **changes: Any) -> ScenarioResult:
    return await SCENARIOS[scenario].run(options(**changes), runner(client))


def shared(seconds: float) -> Any:
    """Time of a part that takes `seconds` alone and is slowed down by all that run beside it."""
    return lambda request, running: seconds * running


# concurrency


async def test_concurrency_finds_a_server_that_serves_one_after_the_other() -> None:
    result = await result_of("concurrency", FakeClient(places=1), levels=(5,), output_len=8)
    assert [verdict.key for verdict in result.verdicts] == ["serial"]
    assert result.figures["generating_at_once"] == pytest.approx(1.0, abs=0.05)
    assert result.figures["speedup"] == pytest.approx(1.0, abs=0.05)
    assert column(result.tables[0], "total") == pytest.approx([1.7, 8.5], abs=0.1)


async def test_concurrency_finds_a_server_that_batches() -> None:
    result = await result_of("concurrency", FakeClient(places=16), levels=(5, 16), output_len=8)
    assert [verdict.key for verdict in result.verdicts] == ["batched", "batched"]
    assert result.figures["speedup"] == pytest.approx(16.0, rel=0.05)


async def test_concurrency_finds_a_server_with_some_places() -> None:
    result = await result_of("concurrency", FakeClient(places=4), num_prompts=16, output_len=8)
    assert [verdict.key for verdict in result.verdicts] == ["limited"]
    assert result.figures["generating_at_once"] == pytest.approx(4.0, rel=0.1)


async def test_a_server_that_batches_without_a_gain_is_batched_and_not_faster() -> None:
    """As a small model on a processor: all are generated at once, each as much slower."""
    client = FakeClient(16, lambda request, running: 0.05, shared(0.1))
    result = await result_of("concurrency", client, levels=(8,), output_len=8)
    assert result.verdicts[0].key == "batched"
    assert result.figures["speedup"] == pytest.approx(1.0, rel=0.2)


async def test_what_one_after_the_other_would_take_is_marked_as_computed() -> None:
    result = await result_of("concurrency", FakeClient(places=16), levels=(5,), output_len=8)
    totals = result.tables[0]
    place = [item.key for item in totals.columns].index("in_turn_computed")
    assert [row[place].kind for row in totals.rows] == ["computed", "computed"]
    assert totals.rows[1][place].value == pytest.approx(5 * 1.7, abs=0.1)


async def test_the_prompts_are_those_of_the_korean_test() -> None:
    client = FakeClient(places=9)
    await result_of("concurrency", client, levels=(2,))
    assert client.requests[1].messages[0]["content"] == "Request 1: vLLM 병렬 처리 테스트."
    assert client.requests[1].max_tokens == 32


# text-parallel and multi-model


async def test_text_parallel_shows_the_speed_up_of_a_server_with_places() -> None:
    result = await result_of("text-parallel", FakeClient(places=4), output_len=8)
    assert column(result.tables[0], "mode") == ["in_turn", "together"]
    assert column(result.tables[0], "speedup") == pytest.approx([1.0, 3.0], rel=0.05)
    assert column(result.tables[0], "mean_per_request") == pytest.approx([1.7, 1.7 / 3], rel=0.05)
    assert result.verdicts[0].key == "full_gain"


async def test_text_parallel_with_failures_has_no_speed_up() -> None:
    client = FakeClient(places=4, fails=lambda request, running: "http_503" if running > 2 else "")
    result = await result_of("text-parallel", client, output_len=8)
    assert result.figures["speedup"] is None
    assert column(result.tables[0], "failures") == ["0", "1 (http_503)"]
    assert result.verdicts == ()


async def test_multi_model_sends_two_models_and_three_languages_at_once() -> None:
    client = FakeClient(places=4)
    result = await result_of("multi-model", client, models=("gemma2:2b", "llama3.1:8b"), output_len=4)
    together = client.requests[3:]
    assert [(item.model, item.language) for item in together] == [
        ("gemma2:2b", "ko"), ("llama3.1:8b", "en"), ("llama3.1:8b", "ja"),
    ]  # fmt: skip
    assert [item.messages[0]["content"].split("!")[0] for item in together] == ["안녕", "Hello", "こんにちは"]
    assert result.figures["speedup"] == pytest.approx(3.0, rel=0.05)


async def test_multi_model_loads_every_model_before() -> None:
    client = FakeClient(places=4)
    await result_of("multi-model", client, models=("a", "b", "c"), num_warmups=1, output_len=2)
    assert [item.model for item in client.requests[:3]] == ["a", "b", "c"]


# vision-batch


async def test_vision_batch_shows_that_images_at_once_get_slower() -> None:
    """A document of a user: one image takes 51 s, five at once 397.2 s, ten more than 600 s."""
    slowdown = (397.2 / 255 - 1) / 4
    client = FakeClient(
        20, lambda request, running: 0.0, lambda request, running: 51 * running * (1 + slowdown * (running - 1))
    )
    result = await result_of("vision-batch", client, output_len=2, forecasts={"5": "35"})
    shown = result.tables[0]
    assert column(shown, "files") == [1, 5, 10, 20]
    assert column(shown, "speedup")[:2] == pytest.approx([1.0, 0.64], abs=0.005)
    assert column(shown, "per_file")[:2] == pytest.approx([51.0, 79.4], abs=0.1)
    assert column(shown, "in_turn_computed")[:2] == pytest.approx([51.0, 255.0], abs=0.1)
    assert column(shown, "difference_computed")[1] == pytest.approx(142.2, abs=0.2)
    assert column(shown, "failures") == ["0", "0", "10 (timeout)", "20 (timeout)"]
    assert column(shown, "per_file")[2:] == column(shown, "speedup")[2:] == [None, None]
    assert column(shown, "forecast") == [None, "35", None, None]
    assert [row[-1].kind for row in shown.rows] == ["forecast"] * 4
    assert [verdict.key for verdict in result.verdicts] == ["slower_together", "files_failed", "files_failed"]
    assert result.figures["speedup_5"] == pytest.approx(0.64, abs=0.005)
    assert result.figures["failed_20"] == 20


async def test_vision_batch_sends_a_different_file_each_time() -> None:
    client = FakeClient(places=9)
    await result_of("vision-batch", client, levels=(1, 5), output_len=2, image_size=16, num_warmups=1)
    sent = [item.images[0].data for item in client.requests]
    assert len(set(sent)) == len(sent) == 7


async def test_vision_batch_takes_the_files_of_a_folder(tmp_path: Path) -> None:
    for number, image in enumerate(make_images(3, 16)):
        (tmp_path / f"{number}.png").write_bytes(image.data)
    client = FakeClient(places=9)
    result = await result_of("vision-batch", client, levels=(2,), output_len=2, image_folder=tmp_path)
    assert [item.name for item in client.requests] == ["0.png", "1.png"]
    assert result.notes == ()
    again = await result_of("vision-batch", client, levels=(5,), output_len=2, image_folder=tmp_path)
    assert again.notes == ("images_repeated",)


# users


async def test_users_finds_how_many_are_served_in_each_way() -> None:
    """Four places, 1 s to the first token and 9.9 s more for the other 9 tokens.

    In real time only those are served who get a place at once. Within 30 s two turns and a half fit: eight users.
    Within 60 s five turns: twenty users.
    """
    client = FakeClient(places=4, token=lambda request, running: 1.1)
    changes = {"output_len": 10, "realtime_speed": 0.5, "timeout": 60.0, "forecasts": {"realtime": "5-10"}}
    result = await result_of("users", client, **changes)
    assert column(result.tables[0], "users_at_once") == [4, 8, 20]
    assert column(result.tables[0], "forecast") == ["5-10", None, None]
    assert [result.figures[key] for key in ("users_realtime", "users_within_wait", "users_at_most")] == [4, 8, 20]
    assert result.headline == "4"


async def test_users_that_are_never_in_real_time_are_zero() -> None:
    slow = FakeClient(places=64, token=lambda request, running: 0.25)
    result = await result_of("users", slow, max_users=4, output_len=10)
    assert result.figures["users_realtime"] == 0
    assert result.tables[0].rows[2][1].note == "limit_of_search"
    conclusion, _ = verdict_text(result.verdicts[0], "en")
    assert conclusion == "Users at once: 0 in real time, ≥ 4 within 30 s, ≥ 4 at most."


async def test_users_takes_given_levels() -> None:
    result = await result_of("users", FakeClient(places=4), levels=(3, 1), output_len=2)
    assert [run.label for run in result.runs] == ["1", "3"]
    assert [row[1].note for row in result.tables[0].rows] == ["limit_of_search"] * 3


# load and soak


async def test_load_sends_the_requests_at_the_rate() -> None:
    result = await result_of("load", FakeClient(places=99), num_prompts=10, request_rate=2.0, output_len=2)
    run = result.headline_run
    assert (run.num_prompts, run.request_rate, len(run.good)) == (10, 2.0, 10)
    assert run.records[-1].start - run.start == pytest.approx(5.0, abs=0.05)


async def test_soak_finds_a_server_that_gets_slower() -> None:
    client = FakeClient(places=9, prefill=lambda request, running: 0.5 + len(client.requests) / 40)
    result = await result_of("soak", client, duration=60.0, window=10.0, output_len=2)
    assert result.verdicts[0].key == "slowing"
    assert len(result.tables[0].rows) >= 6
    assert [run.label for run in result.runs] == ["whole"]


async def test_soak_finds_a_steady_server() -> None:
    result = await result_of("soak", FakeClient(places=9), duration=60.0, window=10.0, output_len=2)
    assert result.verdicts[0].key == "steady"
    assert result.figures["drift"] == pytest.approx(1.0, abs=0.05)


def test_windows_hold_every_request_once() -> None:
    whole = run_of([record(number, start=100.0 + number) for number in range(10)])
    parts = windows(whole, 3.0)
    assert [len(part.records) for part in parts] == [3, 3, 4]
    assert sum(part.duration for part in parts) == pytest.approx(whole.duration)


def test_a_short_rest_belongs_to_the_last_window() -> None:
    whole = run_of([record(number, start=100.0 + number) for number in range(10)])
    assert [part.duration for part in windows(whole, 4.5)] == pytest.approx([4.5, 5.2])


def test_two_windows_show_no_drift() -> None:
    whole = run_of([record(number, start=100.0 + number) for number in range(10)])
    assert drift_of(windows(whole, 5.0)) is None


@pytest.mark.parametrize("scenario", ["text-parallel", "concurrency"])
async def test_the_time_of_requests_that_failed_is_marked(scenario: str) -> None:
    client = FakeClient(places=9, fails=lambda request, running: "http_500" if running == 3 else "")
    result = await result_of(scenario, client, num_prompts=3, output_len=4)
    *_, together = result.tables[0].rows
    by_key = {column.key: cell for column, cell in zip(result.tables[0].columns, together, strict=True)}
    assert by_key["total"].note == "until_last_failure"
    assert by_key["speedup"].value is None
    if scenario == "text-parallel":
        assert by_key["mean_per_request"].value is None


# interruption


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("seconds", [0.0, 0.5, 3.0])
async def test_every_scenario_reports_what_was_measured_until_an_interruption(scenario: str, seconds: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    changes: dict[str, Any] = {"output_len": 8, "image_size": 8}
    result = await SCENARIOS[scenario].run(options(**changes), runner(FakeClient(places=2), stop))
    assert result.is_interrupted
    assert result.headline_run in result.runs


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("warmups", [0, 2])
async def test_every_scenario_reports_an_interruption_before_its_first_run(scenario: str, warmups: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5 * warmups, stop.set)
    if not warmups:
        stop.set()
    changes: dict[str, Any] = {"output_len": 8, "image_size": 8, "num_warmups": warmups}
    result = await SCENARIOS[scenario].run(options(**changes), runner(FakeClient(places=2), stop))
    assert result.is_interrupted
    assert not any(run.good for run in result.runs)
    assert to_json(result)["interrupted"]


@pytest.mark.parametrize("seconds", [9.0, 16.0, 25.0])
async def test_an_interrupted_search_for_users_says_so_and_gives_lower_bounds(seconds: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    result = await SCENARIOS["users"].run(options(output_len=8, max_users=8), runner(FakeClient(places=2), stop))
    assert result.is_interrupted
    assert [run.interrupted for run in result.runs] == [False] * (len(result.runs) - 1) + [True]
    assert to_json(result)["interrupted"]
    assert str(result.verdicts[0].figures["users_at_most"]).startswith("≥")
    assert column(result.tables[1], "meets")[-1] == "incomplete"


async def test_levels_with_a_gap_give_lower_bounds() -> None:
    result = await result_of("users", FakeClient(places=2, token=shared(0.05)), levels=(1, 2, 9), output_len=8)
    realtime = result.tables[0].rows[0]
    assert (realtime[1].value, realtime[1].note) == (2, "gap_above")
    assert result.verdicts[0].figures["users_realtime"] == "≥ 2"


async def test_an_interrupted_batch_has_no_speedup() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(4.0, stop.set)
    result = await SCENARIOS["concurrency"].run(options(levels=(5,), output_len=8), runner(FakeClient(places=2), stop))
    assert result.runs[-1].interrupted
    assert result.runs[-1].good
    assert result.figures["speedup"] is None


def test_requests_know_their_image() -> None:
    assert BenchRequest((), images=tuple(make_images(1, 8))).images[0].name == "made-1.png"
