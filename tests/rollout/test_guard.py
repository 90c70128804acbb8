"""A canary, or a fresh switch, that does worse goes back by itself, once; nothing else does."""

import logging
import re
from collections.abc import Callable
from math import pi
from random import Random
from typing import Any

import pytest

from gateway import config
from gateway.rollout.guard import RECENT, RolloutGuard
from gateway.rollout.state import Assignment, Canary, Rollout
from gateway.telemetry.exchange import Exchange
from tests.fakes.exchanges import exchange, failed

MODELS = {"ollama": "a", "vllm": "b"}
DOCUMENT: dict[str, Any] = {
    "llm_backend": "ollama",
    "tiers": {"standard": {"models": MODELS}, "pro": {"models": {**MODELS, "cloud": "c"}}},
    "backends": {"ollama": {}, "vllm": {}, "cloud": {"kind": "openai", "base_url": "http://127.0.0.1:1"}},
    "state_file": "",
}
ON_OLLAMA, ON_VLLM = Assignment("ollama"), Assignment("vllm")
TENTH = Canary("vllm", 10)


class House:
    """A roll-out with its guard, a clock that is set, and requests that are drawn."""

    def __init__(self, **guard: Any) -> None:
        settings = config.build({**DOCUMENT, "guard": guard})
        assert settings.guard is not None
        self.settings = settings
        self.rollout = Rollout(settings)
        self.now = 1000.0
        self.pending = 0
        self.random = Random(5)
        self.guard = self.new_guard()

    def new_guard(self) -> RolloutGuard:
        assert self.settings.guard is not None
        return RolloutGuard(
            self.settings.guard,
            self.rollout,
            self.settings.rollback_to,
            lambda tier, backend, since: self.pending,
            lambda: self.now,
        )

    def serve(
        self, count: int, tier: str = "standard", each: float = 0.1, **sides: Callable[[Random], Exchange]
    ) -> int:
        """So many requests of `tier`, each where the roll-out says, until it moves; how many there were."""
        before = self.rollout.tiers[tier].assignment
        for number in range(count):
            self.now += each
            line = self.rollout.tiers[tier]
            backend = (
                line.assignment.backend if line.canary is None else line.choose(self.random.randrange(10_000)).backend
            )
            made = sides[backend](self.random) if backend in sides else exchange(backend)
            self.guard.observe([tiered(made, tier)])
            if self.rollout.tiers[tier].assignment != before:
                return number + 1
        return count

    @property
    def assignment(self) -> Assignment:
        return self.rollout.tiers["standard"].assignment

    @property
    def causes(self) -> list[str]:
        return [change.cause for change in self.rollout.history]


def tiered(made: Exchange, tier: str) -> Exchange:
    return exchange(**{name: getattr(made, name) for name in made.__struct_fields__} | {"tier": tier})


def broken(random: Random) -> Exchange:
    return failed("vllm")


def slow(random: Random) -> Exchange:
    first = 1.0 * random.lognormvariate(0, 0.3)
    return exchange("vllm", time_to_first_token=first, duration=first + 1)


def quick(random: Random) -> Exchange:
    first = 0.3 * random.lognormvariate(0, 0.3)
    return exchange("ollama", time_to_first_token=first, duration=first + 1)


# Canaries


def test_canary_with_errors_goes_back_with_cause_and_reason() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    assert house.serve(2000, vllm=broken) < 1000
    assert house.assignment == ON_OLLAMA
    change = house.rollout.history[-1]
    assert (change.cause, change.by, list(change.tiers)) == ("guard", "", ["standard"])
    assert change.why.startswith("errors: 100.0 % of 20 requests on vllm, 0.0 % of ")
    assert change.why.endswith("on ollama")
    assert house.rollout.tiers["pro"].assignment == Assignment("ollama", TENTH)


def test_equal_canary_stays() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    share = 0.1

    def side(backend: str) -> Callable[[Random], Exchange]:
        return lambda random: failed(backend) if random.random() < share else exchange(backend)

    house.serve(20_000, vllm=side("vllm"), ollama=side("ollama"))
    assert house.causes == ["operator"]


def test_canary_that_is_better_stays() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    house.serve(3000, ollama=lambda random: failed("ollama"))
    assert house.causes == ["operator"]


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("errors", broken),
        ("truncated", lambda random: failed("vllm", reason="truncated", phase="streaming")),
        ("empty", lambda random: exchange("vllm", empty=True)),
        ("time_to_first_token", lambda random: exchange("vllm", time_to_first_token=0.5, duration=1.5)),
        ("inter_token_latency", lambda random: exchange("vllm", duration=2.25)),
    ],
)
def test_each_rule_breaks_alone_and_only_where_it_is_named(rule: str, bad: Callable[[Random], Exchange]) -> None:
    house = House(rules=[rule])
    house.rollout.set(canary=TENTH)
    house.serve(5000, vllm=bad)
    assert house.causes == ["operator", "guard"]
    others = [
        name for name in ("errors", "truncated", "empty", "time_to_first_token", "inter_token_latency") if name != rule
    ]
    if rule == "truncated":
        others.remove("errors")
    house = House(rules=others)
    house.rollout.set(canary=TENTH)
    house.serve(5000, vllm=bad)
    assert house.causes == ["operator"]


def test_slow_canary_goes_back_once_the_grace_is_over_and_both_p95_are_told() -> None:
    house = House(grace="60s")
    house.rollout.set(canary=TENTH, tier="standard")
    assert house.serve(590, vllm=slow, ollama=quick) == 590
    house.serve(10_000, vllm=slow, ollama=quick)
    assert house.assignment == ON_OLLAMA
    why = house.rollout.history[-1].why
    assert re.fullmatch(
        r"time to first token: [0-9.]+ % of \d+ requests on vllm above 0\.\d+ s, \d\.\d % of \d+ on ollama above 0\.\d+ s; p95 1\.\d+ s and 0\.\d+ s",
        why,
    )


def test_bigger_ratio_lets_the_same_canary_be() -> None:
    house = House(ratio=5)
    house.rollout.set(canary=TENTH)
    house.serve(10_000, vllm=slow, ollama=quick)
    assert house.causes == ["operator"]


def test_requests_that_a_fallback_saved_count_against_the_canary() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    house.serve(1000, vllm=lambda random: exchange("ollama", chosen="vllm"))
    assert house.assignment == ON_OLLAMA


def test_few_samples_decide_nothing() -> None:
    house = House(min_samples=50)
    house.rollout.set(canary=Canary("vllm", 50))
    house.serve(2000, vllm=broken)
    counts = re.findall(r"of (\d+)", house.rollout.history[-1].why)
    assert min(map(int, counts)) >= 50


def test_failures_that_are_only_quicker_than_answers_wait_for_those() -> None:
    """At the beginning nothing else is over: 2,000 others are under way."""
    house = House()
    house.rollout.set(canary=TENTH)
    house.pending = 2000
    house.serve(1000, vllm=broken)
    assert house.causes == ["operator"]
    house.pending = 3
    house.serve(100, vllm=broken)
    assert house.causes == ["operator", "guard"]


def test_only_requests_that_came_since_the_change_count() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    for _ in range(1000):
        house.guard.observe([failed("vllm", duration=100.0), exchange("ollama")])
    assert house.causes == ["operator"]


def test_canary_that_turns_bad_after_a_long_time_goes_back() -> None:
    house = House(window="10m")
    house.rollout.set(canary=TENTH, tier="standard")
    house.serve(42_000)
    view = house.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] < 2000
    assert view["needed"] == pytest.approx(3**2 * 5 * 100 * pi**2 / 6, abs=0.1)
    assert house.serve(1500, vllm=broken) < 1500
    assert house.assignment == ON_OLLAMA


def test_canary_beside_another_backend_than_rollback_to_goes_back_there() -> None:
    house = House()
    house.rollout.set("vllm", Canary("cloud", 20), tier="pro")
    house.serve(1000, "pro", cloud=lambda random: failed("cloud"))
    assert house.rollout.tiers["pro"].assignment == ON_VLLM


# Switches


def test_fresh_switch_is_compared_with_the_side_before() -> None:
    house = House()
    house.serve(300)
    house.rollout.set("vllm")
    assert house.serve(300, vllm=broken) < 40
    assert house.assignment == ON_OLLAMA
    assert house.rollout.history[-1].why.endswith("on ollama before the switch")
    assert house.rollout.tiers["pro"].assignment == ON_VLLM, "it had served nothing before"


def test_slow_switch_goes_back() -> None:
    house = House()
    house.serve(1000, ollama=quick)
    house.rollout.set("vllm", tier="standard")
    house.serve(2000, vllm=slow)
    assert house.assignment == ON_OLLAMA
    assert house.rollout.history[-1].why.startswith("time to first token: ")
    assert " before the switch; p95 1." in house.rollout.history[-1].why


def test_canary_of_everything_is_a_switch() -> None:
    house = House()
    house.serve(300)
    house.rollout.set(canary=Canary("vllm", 100), tier="standard")
    house.serve(300, vllm=broken)
    assert house.assignment == ON_OLLAMA


def test_switch_without_a_time_before_is_not_watched_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    house = House()
    house.serve(10)
    house.rollout.set("vllm", tier="standard")
    house.serve(500, vllm=broken)
    assert house.causes == ["operator"]
    assert (
        "the guard does not watch tier standard: ollama has served too little of late to compare vllm with"
        in caplog.text
    )


def test_what_the_side_did_long_ago_is_not_compared() -> None:
    house = House(window="1m")
    house.serve(300)
    house.now += 61
    house.rollout.set("vllm", tier="standard")
    assert house.guard.view("standard") is None


def test_switch_that_went_well_is_left_alone_after_a_while() -> None:
    house = House()
    house.serve(100)
    house.rollout.set("vllm", tier="standard")
    house.serve(500)
    assert house.guard.view("standard") is None
    house.serve(500, vllm=broken)
    assert house.causes == ["operator"]
    house = House(window="1m")
    house.serve(500)
    house.rollout.set("vllm", tier="standard")
    house.now += 61
    house.serve(500, vllm=broken)
    assert house.causes == ["operator"]


# The operator


def test_it_acts_once_and_begins_afresh_with_the_operators_next_change() -> None:
    house = House()
    house.rollout.set(canary=TENTH, tier="standard")
    house.serve(2000, vllm=broken)
    for _ in range(200):  # what was under way there
        house.guard.observe([failed("vllm")])
    assert house.causes == ["operator", "guard"]
    house.rollout.undo()
    assert house.assignment == Assignment("ollama", TENTH)
    view = house.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"] == {
        "tested": {"requests": 0, "share": None},
        "other": {"requests": 0, "share": None},
        "evidence": 1.0,
    }
    house.serve(2000, vllm=broken)
    assert house.causes == ["operator", "guard", "operator", "guard"]


def test_operators_change_ends_the_watch_of_the_tiers_that_it_moves() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    house.rollout.rollback(tier="standard")
    assert house.guard.view("standard") is None
    assert house.guard.view("pro") is not None


def test_way_back_is_never_stood_in_the_way_of() -> None:
    house = House()
    house.rollout.set("vllm", cause="start")
    house.serve(300)
    for order in (house.rollout.rollback, house.rollout.undo, lambda: house.rollout.set(canary=Canary("ollama", 50))):
        order()
        house.serve(500, ollama=lambda random: failed("ollama"), vllm=lambda random: exchange("vllm"))
    assert set(house.causes) == {"start", "operator"}


def test_canary_of_nobody_and_changes_that_nobody_ordered_are_not_watched() -> None:
    house = House()
    house.rollout.set(canary=Canary("vllm", 0))
    assert house.guard.view("standard") is None
    house.rollout.set(canary=TENTH, cause="reload")
    assert house.guard.view("standard") is None


# Over a restart, and what is shown


def test_canary_is_watched_from_the_beginning_after_a_restart() -> None:
    house = House()
    house.rollout.set(canary=TENTH, tier="standard")
    house.serve(100, vllm=broken)
    house.rollout.listeners.clear()
    house.guard = house.new_guard()
    view = house.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] == 0
    house.serve(2000, vllm=broken)
    assert house.assignment == ON_OLLAMA


def test_chance_of_a_false_alarm_is_divided_among_rules_and_tiers() -> None:
    house = House(false_alarms=0.01, rules=["errors", "empty"])
    house.serve(100)
    house.rollout.set("vllm", tier="standard")
    view = house.guard.view("standard")
    assert view is not None
    assert (view["needed"], view["is_switch"]) == (200, True)
    house = House(false_alarms=0.01, rules=["errors"])
    house.rollout.set(canary=TENTH)
    view = house.guard.view("standard")
    assert view is not None
    assert view["needed"] == pytest.approx(2 * 164.5, abs=0.1)


def test_other_endpoints_and_requests_without_a_route_are_nobodys() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    for _ in range(300):
        house.guard.observe([failed("vllm", endpoint="embeddings"), failed("none"), exchange("ollama")])
    view = house.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] == 0


def test_memory_is_bounded() -> None:
    house = House()
    house.serve(3 * RECENT)
    assert [len(samples) for samples in house.guard._recent.values()] == [RECENT]


def test_tier_that_new_settings_do_not_have_is_watched_no_more() -> None:
    house = House()
    house.rollout.set(canary=TENTH)
    house.serve(10)
    settings = config.build({**DOCUMENT, "tiers": {"pro": DOCUMENT["tiers"]["pro"]}})
    house.rollout.reload(settings)
    house.guard.reload(settings)
    house.guard.observe([tiered(failed("vllm"), "standard") for _ in range(200)])
    assert (house.guard.view("standard"), house.causes) == (None, ["operator"])
    assert house.serve(2000, tier="pro", vllm=broken) < 1000


def test_side_that_new_settings_do_not_have_is_not_gone_back_to() -> None:
    house = House()
    house.rollout.set("vllm", tier="pro")
    house.serve(100, tier="pro")
    house.rollout.set("cloud", tier="pro")
    assert house.guard.view("pro") is not None
    document = {**DOCUMENT, "backends": {"ollama": {}, "cloud": DOCUMENT["backends"]["cloud"]}}
    settings = config.build(
        {
            **document,
            "tiers": {"standard": {"models": {"ollama": "a"}}, "pro": {"models": {"ollama": "a", "cloud": "c"}}},
        }
    )
    house.rollout.reload(settings)
    house.guard.reload(settings)
    house.guard.observe([tiered(failed("cloud"), "pro") for _ in range(200)])
    assert (house.guard.view("pro"), house.rollout.tiers["pro"].assignment) == (None, Assignment("cloud"))


def test_side_that_becomes_the_way_back_is_watched_no_more() -> None:
    house = House()
    house.rollout.set(canary=TENTH, tier="standard")
    settings = config.build({**DOCUMENT, "rollback_to": "vllm"})
    house.rollout.reload(settings)
    house.guard.reload(settings)
    assert house.guard.view("standard") is None
