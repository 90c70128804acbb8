"""Advice follows from what was measured, and says when that carries nothing."""

import math
from typing import Any

import pytest

from gateway.bench.advise.advice import Advice, Wishes, from_levels, from_loads
from gateway.bench.advise.exposition import Observations
from gateway.bench.advise.levels import levels_of
from gateway.bench.advise.loads import BackendLoad
from gateway.bench.advise.target import Target
from tests.bench.advise.machine import result


def advised(levels: tuple[int, ...] = (1, 2, 4, 8), kind: str = "vllm", slots: int = 4, **wishes: Any) -> Advice:
    targets = tuple(map(Target.parse, wishes.pop("targets", ())))
    asked = Wishes(targets=targets, **wishes)
    return from_levels(levels_of(result(levels, slots=slots), targets), asked, kind)


def settings(advice: Advice, backend: str | None = None) -> dict[str, int]:
    return {setting.name: setting.value for setting in advice.settings if setting.backend == backend}


def keys(advice: Advice) -> list[str]:
    return [remark.key for remark in advice.remarks]


# From a benchmark


def test_the_knee_of_the_throughput_is_the_limit_without_a_target() -> None:
    advice = advised()
    assert settings(advice) == {"max_concurrency": 4, "--max-num-seqs": 4, "max_queue": 120, "queue_timeout": 30}
    assert "saturated" in keys(advice)
    assert advice.meets is None


def test_a_target_on_the_first_token_bounds_the_queue() -> None:
    """4 slots do 4 requests/s; 1 s less 0.2 s of its own leaves 0.8 s in the queue: 3 requests."""
    advice = advised(targets=["p95_ttft_ms<1000"])
    assert settings(advice) == {"max_concurrency": 4, "--max-num-seqs": 4, "max_queue": 3, "queue_timeout": 1}
    assert advice.meets is True
    met = next(remark for remark in advice.remarks if remark.key == "met_up_to")
    assert met.figures["at_once"] == 4


def test_a_generous_target_takes_the_largest_level_that_meets_it() -> None:
    assert settings(advised(targets=["p95_ttft_ms<=1200"]))["max_concurrency"] == 8


def test_a_target_that_no_level_meets_has_no_limits_and_fails() -> None:
    advice = advised(targets=["p50_ttft_ms<100"])
    assert (advice.meets, advice.settings) == (False, ())
    assert "never_met" in keys(advice)


def test_a_level_with_failures_does_not_meet_a_target() -> None:
    from dataclasses import replace

    from tests.bench.advise.machine import level

    whole = result((1, 2))
    failing = replace(whole, runs=(*whole.runs, level(4, failed=1)))
    targets = (Target.parse("p95_ttft_ms<1000"),)
    advice = from_levels(levels_of(failing, targets), Wishes(targets=targets), "vllm")
    assert settings(advice)["max_concurrency"] == 2


def test_throughput_that_still_grows_is_not_called_a_limit() -> None:
    assert "not_saturated" in keys(advised(levels=(1, 2, 4)))
    assert "saturated" not in keys(advised(levels=(1, 2, 4)))


def test_one_level_carries_nothing() -> None:
    advice = advised(levels=(4,))
    assert (advice.settings, keys(advice)) == ((), ["level", "too_few_levels"])


def test_a_serial_server_is_named() -> None:
    advice = advised(levels=(1, 2, 4), slots=1, kind="ollama")
    assert "serial" in keys(advice)
    assert settings(advice)["OLLAMA_NUM_PARALLEL"] == 1


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ollama", {"OLLAMA_NUM_PARALLEL"}),
        ("vllm", {"--max-num-seqs"}),
        ("openai", {"OLLAMA_NUM_PARALLEL", "--max-num-seqs"}),
    ],
)
def test_the_engines_own_setting_goes_with_the_limit(kind: str, names: set[str]) -> None:
    assert set(settings(advised(kind=kind))) == {"max_concurrency", "max_queue", "queue_timeout"} | names


@pytest.mark.parametrize(
    ("users", "key", "meets"), [(3, "users_fit", True), (6, "users_queue", True), (30, "users_too_many", False)]
)
def test_users_at_once_are_compared_with_slots_and_patience(users: int, key: str, meets: bool) -> None:
    advice = advised(targets=["p95_ttft_ms<1000"], users=users)
    assert (keys(advice)[-1], advice.meets) == (key, meets)
    if key == "users_too_many":  # 4 run and 3 queue in time: 7 for each server
        assert advice.remarks[-1].figures["servers"] == math.ceil(30 / 7)
        assert advice.remarks[-1].figures["last"] == pytest.approx((30 - 4) / 4)


def test_a_percentile_of_few_requests_is_the_slowest_and_says_so() -> None:
    targets = (Target.parse("p99_ttft_ms<500"),)
    levels = levels_of(result((1, 2)), targets)
    assert levels[0].too_few == ("p99_ttft_ms",)
    assert levels[0].values == {"p99_ttft_ms": pytest.approx(200)}
    assert "level_too_few" in keys(from_levels(levels, Wishes(targets=targets), "vllm"))


# From metrics


def load(**changes: Any) -> BackendLoad:
    """Return 3600 requests in an hour, of 2 s at the backend and 1 s in the queue, on 4 slots."""
    values: dict[str, Any] = {
        "name": "ollama", "kind": "ollama", "period": 3600.0, "requests": 3600.0,
        "duration": Observations((2.5, 5.0), (0.0, 3600.0), 3 * 3600.0),
        "queue_wait": Observations((0.5, 2.5), (0.0, 3600.0), 3600.0),
        "vision_wait": Observations(),
        "time_to_first_token": Observations((1.0, 2.0), (3000.0, 600.0), 1.2 * 3600),
        "rejected": {}, "slots": 4, "learned": False, "servers": 1,
        "limits": {"max_concurrency": 4, "model_concurrency": 4},
    }  # fmt: skip
    return BackendLoad(**values | changes)


def test_littles_law_gives_the_requests_at_once() -> None:
    one = load()
    assert (one.rate, one.service, one.at_once, one.utilisation) == (1.0, 2.0, 2.0, 0.5)
    little = from_loads([one], Wishes()).remarks[0]
    assert (little.key, little.origin) == ("little", "computed")
    assert little.figures["at_once"] == 2.0


def test_few_requests_carry_nothing() -> None:
    advice = from_loads([load(requests=29.0)], Wishes(users=50))
    assert (advice.settings, keys(advice)) == ((), ["too_few_requests"])


def test_full_slots_and_refusals_are_named() -> None:
    advice = from_loads([load(slots=2, rejected={"queue_full": 3.0})], Wishes())
    assert {"full", "rejected"} <= set(keys(advice))


def test_averages_over_a_day_and_images_in_the_mix_are_named() -> None:
    images = Observations((0.5, 2.5), (0.0, 900.0), 1800.0)
    remarks = {
        remark.key: remark for remark in from_loads([load(period=86400.0, vision_wait=images)], Wishes()).remarks
    }
    assert remarks["long_period"].figures == {"hours": 24.0}
    assert remarks["mixed"].figures == {"share": 25.0, "wait": 2.0}
    assert not {"long_period", "mixed"} & set(keys(from_loads([load()], Wishes())))


def test_the_queue_is_as_long_as_the_slots_serve_in_time() -> None:
    """4 slots of 2 s do 2 requests/s; 1.5 s less 0.2 s of its own leaves 1.3 s: 2 requests."""
    advice = from_loads([load()], Wishes(targets=(Target.parse("p95_ttft_ms<1500"),)))
    assert settings(advice, "ollama") == {"max_queue": 2, "queue_timeout": 2}


def test_a_wait_that_was_named_counts_in_place_of_the_targets() -> None:
    assert settings(from_loads([load()], Wishes(wait=10)), "ollama") == {"max_queue": 20, "queue_timeout": 10}


@pytest.mark.parametrize(
    ("text", "meets"), [("p95_ttft_ms<2000", True), ("p95_ttft_ms<1500", False), ("mean_e2el_ms<2900", False)]
)
def test_a_target_is_compared_with_the_histograms(text: str, meets: bool) -> None:
    assert from_loads([load()], Wishes(targets=(Target.parse(text),))).meets is meets


def test_a_figure_that_the_metrics_lack_is_named() -> None:
    advice = from_loads([load()], Wishes(targets=(Target.parse("p95_tpot_ms<50"),)))
    assert advice.meets is None
    assert "no_figure" in keys(advice)


def test_users_need_slots_by_the_share_of_time_that_they_use_them() -> None:
    """60 users, 2 s of each 32 s: 3.75 at once, and 2 · √3.75 for bursts: 8."""
    advice = from_loads([load()], Wishes(users=60))
    need = next(remark for remark in advice.remarks if remark.key == "users_need")
    assert need.figures["needed"] == 8
    assert {"max_concurrency": 8, "OLLAMA_NUM_PARALLEL": 8}.items() <= settings(advice, "ollama").items()
    assert next(remark for remark in advice.remarks if remark.key == "beyond_the_data").origin == "assumed"


def test_a_learned_limit_is_the_servers_and_max_concurrency_is_left_alone() -> None:
    advice = from_loads([load(slots=1, learned=True)], Wishes(users=10))
    assert "max_concurrency" not in settings(advice, "ollama")
    assert settings(advice, "ollama")["OLLAMA_NUM_PARALLEL"] == 3
    assert "learned_limit" in keys(advice)


def test_slots_that_suffice_change_nothing() -> None:
    advice = from_loads([load()], Wishes(users=5))
    assert "slots_suffice" in keys(advice)
    assert "max_concurrency" not in settings(advice, "ollama")


def test_slots_are_spread_over_the_servers() -> None:
    advice = from_loads([load(servers=2, kind="vllm")], Wishes(users=60))
    assert {"max_concurrency": 4, "--max-num-seqs": 4}.items() <= (
        settings(advice, "ollama") | {"max_concurrency": 4}
    ).items()
