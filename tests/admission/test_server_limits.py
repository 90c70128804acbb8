"""Limits at the servers of a backend: which ones a request needs, and which ones requests share.

Covers: gateway/admission/limits.py
Covers: gateway/admission/server_slots.py
"""

import pytest

from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.limits import AdmissionLimits, LaneLimits, LaneName, LimitSource, TierLimits
from gateway.admission.queues import Lane
from gateway.admission.server_limits import ServerLimits, forget_models, limits_of
from gateway.admission.server_slots import Placement
from tests.fakes.admission import Server

LANES: dict[LaneName, Lane] = {
    "text": Lane("text", LaneLimits(None, 9, 30.0)),
    "vision": Lane("vision", LaneLimits(1, 9, 30.0)),
    "embedding": Lane("embedding", LaneLimits(3, 9, 30.0, is_separate=True)),
}


def admission_limits(slots: int = 8, model_slots: int | None = 4, vision: int = 1, **given: bool) -> AdmissionLimits:
    lanes = {name: lane.limits for name, lane in LANES.items()} | {"vision": LaneLimits(vision, 9, 30.0)}
    return AdmissionLimits(slots, model_slots, lanes, **given)


class Place:
    """One server and what makes its limits."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.server = Server("m")
        self.limits = ServerLimits(limits, LimitSource(), lambda name: name.removesuffix(":latest"))
        self.limits.add([self.server])

    def needs(
        self, lane: LaneName = "text", model: str = "m", own: TierLimits | None = None, tier: str = ""
    ) -> Placement:
        return self.limits.placement(self.server, model, LANES[lane], own or TierLimits(), tier)

    def change(self, limits: AdmissionLimits) -> None:
        self.limits.change(limits, [self.server])


@pytest.mark.parametrize(
    ("lane", "own", "slots"),
    [
        ("text", TierLimits(), [8, 4]),
        ("vision", TierLimits(), [8, 4, 1]),
        ("embedding", TierLimits(), [3]),
        ("text", TierLimits(slots=2), [8, 2, 4]),
        ("text", TierLimits(model_slots=2), [8, 2]),
        ("vision", TierLimits(lane_slots=2), [8, 4, 2]),
        ("embedding", TierLimits(slots=2), [3]),
    ],
)
def test_request_needs_the_limits_of_its_server_model_and_lane(
    lane: LaneName, own: TierLimits, slots: list[int]
) -> None:
    assert [limit.limit for limit in Place(admission_limits()).needs(lane, own=own, tier="t").limits] == slots


def test_names_of_one_model_and_lanes_share_a_limit_and_tiers_with_their_own_do_not() -> None:
    place = Place(admission_limits())
    (slots, model), (*_, of_vision, vision) = place.needs(model="m:latest").limits, place.needs("vision").limits
    assert (slots, model, vision) == (place.server.slots, of_vision, place.needs("vision").limits[-1])
    assert place.needs(own=TierLimits(model_slots=4), tier="t").limits[1] is not model
    assert {id(limit) for limit in limits_of([place.server])} == {id(limit) for limit in (slots, model, vision)}


def test_changed_limits_are_in_force_in_placements_that_exist() -> None:
    place = Place(admission_limits())
    text, vision = place.needs(), place.needs("vision")
    place.change(admission_limits(slots=6, model_slots=3, vision=2))
    assert [[limit.limit for limit in each.limits] for each in (text, vision)] == [[6, 3], [6, 3, 2]]


def test_learned_limit_is_held_while_the_operator_sets_one() -> None:
    place = Place(admission_limits(model_slots=None, can_learn=True))
    learned = place.needs().limits[1]
    assert isinstance(learned, AdaptiveLimit)
    assert (learned.limit, learned.is_held) == (1, False)
    place.change(admission_limits(model_slots=3, can_learn=True))
    assert (learned.limit, learned.is_held) == (3, True)


@pytest.mark.parametrize(("is_learned", "slots"), [(True, 5), (False, 1)])
def test_forgotten_model_begins_again_with_what_was_learned(is_learned: bool, slots: int) -> None:
    place = Place(admission_limits(model_slots=None, can_learn=True))
    learned, other = place.needs().limits[1], place.needs(model="other").limits[1]
    if is_learned:
        learned.change(5)
    forget_models([place.server], [other])
    assert [*place.server.models.values()] == [other]
    assert place.needs().limits[1] is not learned
    assert place.needs().limits[1].limit == slots
