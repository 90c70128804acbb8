"""Assignments of tiers, the moves between them, and the routes that requests get."""

import json

import msgspec
import pytest

from gateway import config
from gateway.relay.route import Route
from gateway.rollout.assignment import (
    BUCKETS,
    Assignment,
    Canary,
    Change,
    Move,
    PersistedRollout,
    TierRoute,
    backends_of,
)

ON_OLLAMA, ON_VLLM = Assignment("ollama"), Assignment("vllm")
WITH_CANARY = Assignment("ollama", Canary("vllm", 12.5))


# Assignments and moves


def test_assignment_is_shown_in_words() -> None:
    assert (str(ON_VLLM), str(WITH_CANARY)) == ("vllm", "ollama with 12.5 % on vllm")


def test_backends_of_an_assignment_include_the_canary() -> None:
    assert list(backends_of(ON_OLLAMA)) == ["ollama"]
    assert list(backends_of(WITH_CANARY)) == ["ollama", "vllm"]


@pytest.mark.parametrize(
    ("before", "after", "ends"),
    [
        (ON_OLLAMA, ON_VLLM, ("ollama", "vllm")),
        (ON_OLLAMA, Assignment("ollama", Canary("vllm", 10)), ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 10)), Assignment("ollama", Canary("vllm", 50)), ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 50)), Assignment("ollama", Canary("vllm", 10)), ("vllm", "ollama")),
        (Assignment("ollama", Canary("vllm", 50)), ON_OLLAMA, ("vllm", "ollama")),
        (Assignment("ollama", Canary("vllm", 50)), ON_VLLM, ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 50)), Assignment("ollama", Canary("cloud", 5)), ("vllm", "cloud")),
    ],
    ids=["switch", "new-canary", "larger", "smaller", "canary-removed", "canary-promoted", "other-canary"],
)
def test_ends_are_the_backend_that_lost_and_the_one_that_gained(
    before: Assignment, after: Assignment, ends: tuple[str, str]
) -> None:
    assert Move(before, after).ends == ends


def test_change_is_shown_in_words() -> None:
    change = Change("", "", "operator", {"standard": Move(ON_OLLAMA, ON_VLLM), "pro": Move(ON_VLLM, WITH_CANARY)})
    assert str(change) == "standard from ollama to vllm, pro from vllm to ollama with 12.5 % on vllm"


def test_persisted_rollout_names_the_ends_of_a_move_from_and_to() -> None:
    change = Change("2026-01-01T00:00:00.000Z", "local", "operator", {"standard": Move(ON_OLLAMA, WITH_CANARY)})
    persisted = PersistedRollout("ollama", {"standard": WITH_CANARY}, [change])
    document = json.loads(msgspec.json.encode(persisted))
    assert document["history"][0]["tiers"]["standard"] == {
        "from": {"backend": "ollama", "canary": None},
        "to": {"backend": "ollama", "canary": {"backend": "vllm", "percent": 12.5}},
    }
    assert "why" not in document["history"][0]
    assert msgspec.convert(document, PersistedRollout) == persisted


@pytest.mark.parametrize("percent", [-1, 100.5, "10", None])
def test_percent_outside_0_to_100_is_rejected(percent: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"backend": "vllm", "percent": percent}, Canary)


# Routes


def tier_route(assignment: Assignment, **tier: str) -> TierRoute:
    models = {"ollama": "small", "vllm": "Small"}
    document = {
        "llm_backend": "ollama",
        "backends": {name: {"kind": name, "base_url": "http://127.0.0.1:1"} for name in models},
        "tiers": {"standard": {"models": models, **tier}},
    }
    return TierRoute(config.build(document).tiers["standard"], assignment)


def test_canary_gets_the_lowest_buckets() -> None:
    route = tier_route(Assignment("ollama", Canary("vllm", 10)))
    on_vllm, on_ollama = Route("standard", "vllm", "Small"), Route("standard", "ollama", "small")
    assert [route.choose(bucket) for bucket in (0, BUCKETS // 10 - 1, BUCKETS // 10, BUCKETS - 1)] == [
        on_vllm,
        on_vllm,
        on_ollama,
        on_ollama,
    ]
    assert (route.requests, route.canary_requests) == (4, 2)


def test_side_is_the_same_choice_without_counting() -> None:
    route = tier_route(WITH_CANARY)
    for bucket in range(0, BUCKETS, 50):
        requests = route.requests
        side = route.side(bucket)
        assert route.requests == requests
        assert route.choose(bucket) is side


def test_new_assignment_resets_the_counts() -> None:
    route = tier_route(WITH_CANARY)
    route.choose(0)
    route.assign(ON_VLLM)
    assert (route.requests, route.canary_requests, route.canary) == (0, 0, None)
    assert {route.choose(bucket).backend for bucket in (0, BUCKETS - 1)} == {"vllm"}
    assert route.canary_requests == 0


def test_tier_with_a_backend_is_pinned() -> None:
    assert not tier_route(ON_OLLAMA).is_pinned
    assert tier_route(ON_OLLAMA, backend="ollama").is_pinned
