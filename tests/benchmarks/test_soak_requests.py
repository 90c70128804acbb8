"""Requests of the soak: all kinds, and half of the clients leave in every phase."""

from collections import Counter

from benchmarks.clients import Plan
from benchmarks.soak_requests import Mixture


def plans(count: int, *, leaves_more: bool) -> list[Plan]:
    mixture = Mixture(1)
    return [mixture.plan(leaves_more=leaves_more) for _ in range(count)]


def test_mixture_has_every_kind_and_unique_ids() -> None:
    made = plans(500, leaves_more=False)
    kinds = Counter(plan.kind for plan in made)
    assert set(kinds) == {
        "stream", "plain", "assembled", "image", "large image", "long chat", "embeddings", "refused",
    }  # fmt: skip
    assert len({plan.id for plan in made}) == 500
    assert {plan.expected.code for plan in made if plan.kind == "refused"} >= {"invalid_json", "request_too_large"}


def test_clients_leave_at_every_moment() -> None:
    made = plans(300, leaves_more=True)
    moments = Counter(plan.leave.moment for plan in made if plan.leave)
    assert set(moments) == {"uploading", "waiting", "streaming"}
    assert moments.total() > 200
    assert {plan.leave.resets for plan in made if plan.leave} == {True, False}


def test_client_that_leaves_does_not_keep_its_connection() -> None:
    assert not any(plan.is_kept and plan.leave for plan in plans(300, leaves_more=True))
