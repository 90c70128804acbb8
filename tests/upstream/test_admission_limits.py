"""Limits of a backend's admission: those of each lane, of a tier, and of one of several replicas."""

from typing import Any

import pytest

from gateway import config
from gateway.admission.limits import LaneLimits, TierLimits
from gateway.config import BackendSettings, LimitOverrides
from gateway.upstream.admission_limits import admission_limits, tier_limits


def settings(kind: str = "vllm", **limits: Any) -> BackendSettings:
    built = config.build(
        {
            "llm_backend": "here",
            "backends": {"here": {"kind": kind, "servers": [{"base_url": "http://127.0.0.1:1"}], **limits}},
            "tiers": {"standard": {"models": {"here": "llama"}}},
        }
    )
    return built.backends["here"]


def test_each_lane_has_its_own_limits() -> None:
    here = settings(
        max_concurrency=8,
        max_queue=9,
        queue_timeout=3,
        vision_concurrency=2,
        vision_max_queue=5,
        vision_queue_timeout=7,
    )
    limits = admission_limits(here, None, replicas=1)
    assert limits.slots == 8
    assert limits.lanes == {
        "text": LaneLimits(None, 9, 3.0),
        "vision": LaneLimits(2, 5, 7.0),
        "embedding": LaneLimits(8, 9, 3.0, is_separate=True),
    }


@pytest.mark.parametrize(("replicas", "places"), [(1, 9), (2, 5), (3, 3), (10, 1)])
def test_a_replica_has_all_slots_and_its_part_of_the_places_rounded_up(replicas: int, places: int) -> None:
    limits = admission_limits(settings(max_concurrency=8, max_queue=9, vision_max_queue=9), None, replicas)
    assert (limits.slots, limits.lanes["embedding"].slots) == (8, 8)
    assert {limits.lanes[lane].max_queue for lane in limits.lanes} == {places}
    text = tier_limits("text", LimitOverrides(max_queue=9), replicas)
    vision = tier_limits("vision", LimitOverrides(vision_max_queue=9), replicas)
    assert text is not None
    assert vision is not None
    assert (text.max_queue, vision.max_queue) == (places, places)


@pytest.mark.parametrize(
    ("kind", "keys", "num_parallel", "expected"),
    [
        ("ollama", {}, None, (None, True, 1)),
        ("ollama", {}, 4, (None, True, 4)),
        ("ollama", {"model_concurrency": 3}, 4, (3, True, 4)),
        ("vllm", {"model_concurrency": 3}, None, (3, False, 1)),
    ],
)
def test_limit_of_a_model_is_set_or_learned(
    kind: str, keys: dict[str, Any], num_parallel: int | None, expected: tuple[int | None, bool, int]
) -> None:
    limits = admission_limits(settings(kind, **keys), num_parallel, replicas=1)
    assert (limits.model_slots, limits.can_learn, limits.first_guess) == expected


@pytest.mark.parametrize("overrides", [None, LimitOverrides(), LimitOverrides(idle_timeout=1.0)])
def test_tier_that_sets_no_limit_of_a_queue_has_none_of_its_own(overrides: LimitOverrides | None) -> None:
    assert tier_limits("text", overrides, replicas=2) is None


def test_limits_of_a_tier_are_those_of_the_lane() -> None:
    overrides = LimitOverrides(
        max_concurrency=6,
        model_concurrency=4,
        max_queue=3,
        queue_timeout=1.0,
        vision_concurrency=2,
        vision_max_queue=5,
        vision_queue_timeout=7.0,
    )
    assert tier_limits("text", overrides, replicas=1) == TierLimits(6, 4, None, 3, 1.0)
    assert tier_limits("vision", overrides, replicas=1) == TierLimits(6, 4, 2, 5, 7.0)


@pytest.mark.parametrize(
    ("overrides", "slots"),
    [
        (LimitOverrides(concurrency=3, model_concurrency=2), 3),
        (LimitOverrides(model_concurrency=2), 2),
        (LimitOverrides(model_concurrency="auto", max_queue=1), None),
    ],
    ids=["concurrency", "model_concurrency", "auto"],
)
def test_slots_of_a_tier_for_its_model(overrides: LimitOverrides, slots: int | None) -> None:
    own = tier_limits("text", overrides, replicas=1)
    assert own is not None
    assert own.model_slots == slots
