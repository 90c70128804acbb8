"""A canary or a fresh switch that performs worse is rolled back automatically, once."""

import logging
import re
from collections.abc import Callable
from math import pi
from random import Random
from typing import Any

import pytest

from gateway import config
from gateway.rollout.assignment import Assignment, Canary
from gateway.rollout.guard import RECENT, RolloutGuard
from gateway.rollout.sequential_test import LONGEST_ROUND
from gateway.rollout.state import Rollout
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


class Guarded:
    """A roll-out with its guard, a clock that the test sets, and simulated requests."""

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
        """Serve `count` requests of `tier` where the roll-out sends them, or until the tier moves.

        Return how many were served.
        """
        before = self.rollout.tiers[tier].assignment
        for number in range(count):
            self.now += each
            route = self.rollout.tiers[tier]
            backend = (
                route.assignment.backend
                if route.canary is None
                else route.choose(self.random.randrange(10_000)).backend
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


def test_canary_with_errors_is_rolled_back_with_cause_and_reason() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    assert guarded.serve(2000, vllm=broken) < 1000
    assert guarded.assignment == ON_OLLAMA
    change = guarded.rollout.history[-1]
    assert (change.cause, change.by, list(change.tiers)) == ("guard", "", ["standard"])
    assert change.why.startswith("errors: 100.0 % of 20 requests on vllm, 0.0 % of ")
    assert change.why.endswith("on ollama")
    assert guarded.rollout.tiers["pro"].assignment == Assignment("ollama", TENTH)


def test_canary_that_is_as_good_stays() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    share = 0.1

    def side(backend: str) -> Callable[[Random], Exchange]:
        return lambda random: failed(backend) if random.random() < share else exchange(backend)

    guarded.serve(20_000, vllm=side("vllm"), ollama=side("ollama"))
    assert guarded.causes == ["operator"]


def test_canary_that_is_better_stays() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    guarded.serve(3000, ollama=lambda random: failed("ollama"))
    assert guarded.causes == ["operator"]


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
def test_each_rule_breaks_alone_and_only_if_it_is_enabled(rule: str, bad: Callable[[Random], Exchange]) -> None:
    guarded = Guarded(rules=[rule])
    guarded.rollout.set(canary=TENTH)
    guarded.serve(5000, vllm=bad)
    assert guarded.causes == ["operator", "guard"]
    others = [
        name for name in ("errors", "truncated", "empty", "time_to_first_token", "inter_token_latency") if name != rule
    ]
    if rule == "truncated":
        others.remove("errors")
    guarded = Guarded(rules=others)
    guarded.rollout.set(canary=TENTH)
    guarded.serve(5000, vllm=bad)
    assert guarded.causes == ["operator"]


def test_slow_canary_is_rolled_back_after_the_grace_with_both_p95() -> None:
    guarded = Guarded(grace="60s")
    guarded.rollout.set(canary=TENTH, tier="standard")
    assert guarded.serve(590, vllm=slow, ollama=quick) == 590
    guarded.serve(10_000, vllm=slow, ollama=quick)
    assert guarded.assignment == ON_OLLAMA
    why = guarded.rollout.history[-1].why
    assert re.fullmatch(
        r"time to first token: [0-9.]+ % of \d+ requests on vllm above 0\.\d+ s, "
        r"\d\.\d % of \d+ on ollama above 0\.\d+ s; p95 1\.\d+ s and 0\.\d+ s",
        why,
    )


def test_larger_ratio_keeps_the_same_canary() -> None:
    guarded = Guarded(ratio=5)
    guarded.rollout.set(canary=TENTH)
    guarded.serve(10_000, vllm=slow, ollama=quick)
    assert guarded.causes == ["operator"]


def test_requests_served_by_a_fallback_count_against_the_canary() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    guarded.serve(1000, vllm=lambda random: exchange("ollama", chosen="vllm"))
    assert guarded.assignment == ON_OLLAMA


def test_nothing_is_decided_before_min_samples() -> None:
    guarded = Guarded(min_samples=50)
    guarded.rollout.set(canary=Canary("vllm", 50))
    guarded.serve(2000, vllm=broken)
    counts = re.findall(r"of (\d+)", guarded.rollout.history[-1].why)
    assert min(map(int, counts)) >= 50


def test_failures_that_are_only_faster_than_answers_wait_for_the_answers() -> None:
    """At the beginning only failures have finished: 2,000 other requests are in flight."""
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    guarded.pending = 2000
    guarded.serve(1000, vllm=broken)
    assert guarded.causes == ["operator"]
    guarded.pending = 3
    guarded.serve(100, vllm=broken)
    assert guarded.causes == ["operator", "guard"]


def test_only_requests_that_arrived_since_the_change_count() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    for _ in range(1000):
        guarded.guard.observe([failed("vllm", duration=100.0), exchange("ollama")])
    assert guarded.causes == ["operator"]


def test_canary_that_turns_bad_after_a_long_time_is_rolled_back() -> None:
    guarded = Guarded(window="10m")
    guarded.rollout.set(canary=TENTH, tier="standard")
    guarded.serve(42_000)
    view = guarded.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] < 2000
    assert view["needed"] == pytest.approx(3**2 * 5 * 100 * pi**2 / 6, abs=0.1)
    assert guarded.serve(1500, vllm=broken) < 1500
    assert guarded.assignment == ON_OLLAMA


def test_canary_is_rolled_back_to_the_backend_beside_it() -> None:
    guarded = Guarded()
    guarded.rollout.set("vllm", Canary("cloud", 20), tier="pro")
    guarded.serve(1000, "pro", cloud=lambda random: failed("cloud"))
    assert guarded.rollout.tiers["pro"].assignment == ON_VLLM


# Switches


def test_fresh_switch_is_compared_with_the_samples_from_before() -> None:
    guarded = Guarded()
    guarded.serve(300)
    guarded.rollout.set("vllm")
    assert guarded.serve(300, vllm=broken) < 40
    assert guarded.assignment == ON_OLLAMA
    assert guarded.rollout.history[-1].why.endswith("on ollama before the switch")
    assert guarded.rollout.tiers["pro"].assignment == ON_VLLM, "it had served nothing before"


def test_slow_switch_is_rolled_back() -> None:
    guarded = Guarded()
    guarded.serve(1000, ollama=quick)
    guarded.rollout.set("vllm", tier="standard")
    guarded.serve(2000, vllm=slow)
    assert guarded.assignment == ON_OLLAMA
    assert guarded.rollout.history[-1].why.startswith("time to first token: ")
    assert " before the switch; p95 1." in guarded.rollout.history[-1].why


def test_canary_of_100_percent_is_a_switch() -> None:
    guarded = Guarded()
    guarded.serve(300)
    guarded.rollout.set(canary=Canary("vllm", 100), tier="standard")
    guarded.serve(300, vllm=broken)
    assert guarded.assignment == ON_OLLAMA


def test_switch_without_earlier_samples_is_not_watched_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    guarded = Guarded()
    guarded.serve(10)
    guarded.rollout.set("vllm", tier="standard")
    guarded.serve(500, vllm=broken)
    assert guarded.causes == ["operator"]
    assert (
        "the guard does not watch tier standard: ollama has served too few requests recently to compare vllm with"
        in caplog.text
    )


def test_samples_older_than_the_window_are_not_compared() -> None:
    guarded = Guarded(window="1m")
    guarded.serve(300)
    guarded.now += 61
    guarded.rollout.set("vllm", tier="standard")
    assert guarded.guard.view("standard") is None


def test_switch_that_went_well_is_not_watched_any_longer() -> None:
    guarded = Guarded()
    guarded.serve(100)
    guarded.rollout.set("vllm", tier="standard")
    guarded.serve(500)
    assert guarded.guard.view("standard") is None
    guarded.serve(500, vllm=broken)
    assert guarded.causes == ["operator"]
    guarded = Guarded(window="1m")
    guarded.serve(500)
    guarded.rollout.set("vllm", tier="standard")
    guarded.now += 61
    guarded.serve(500, vllm=broken)
    assert guarded.causes == ["operator"]


# The operator


def test_guard_acts_once_and_starts_again_with_the_operators_next_change() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH, tier="standard")
    guarded.serve(2000, vllm=broken)
    for _ in range(200):  # those that were in flight there
        guarded.guard.observe([failed("vllm")])
    assert guarded.causes == ["operator", "guard"]
    guarded.rollout.undo()
    assert guarded.assignment == Assignment("ollama", TENTH)
    view = guarded.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"] == {
        "tested": {"requests": 0, "share": None},
        "other": {"requests": 0, "share": None},
        "evidence": 1.0,
    }
    guarded.serve(2000, vllm=broken)
    assert guarded.causes == ["operator", "guard", "operator", "guard"]


def test_operators_change_ends_the_watch_of_the_tiers_it_moves() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    guarded.rollout.rollback(tier="standard")
    assert guarded.guard.view("standard") is None
    assert guarded.guard.view("pro") is not None


def test_way_back_to_rollback_to_is_never_opposed() -> None:
    guarded = Guarded()
    guarded.rollout.set("vllm", cause="start")
    guarded.serve(300)
    for order in (
        guarded.rollout.rollback,
        guarded.rollout.undo,
        lambda: guarded.rollout.set(canary=Canary("ollama", 50)),
    ):
        order()
        guarded.serve(500, ollama=lambda random: failed("ollama"), vllm=lambda random: exchange("vllm"))
    assert set(guarded.causes) == {"start", "operator"}


def test_canary_of_0_percent_and_automatic_changes_are_not_watched() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=Canary("vllm", 0))
    assert guarded.guard.view("standard") is None
    guarded.rollout.set(canary=TENTH, cause="reload")
    assert guarded.guard.view("standard") is None


# Restarts, and what is shown


def test_canary_is_watched_from_the_start_after_a_restart() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH, tier="standard")
    guarded.serve(100, vllm=broken)
    guarded.rollout.listeners.clear()
    guarded.guard = guarded.new_guard()
    view = guarded.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] == 0
    guarded.serve(2000, vllm=broken)
    assert guarded.assignment == ON_OLLAMA


def test_false_alarm_probability_is_divided_among_rules_and_tiers() -> None:
    guarded = Guarded(false_alarms=0.01, rules=["errors", "empty"])
    guarded.serve(100)
    guarded.rollout.set("vllm", tier="standard")
    view = guarded.guard.view("standard")
    assert view is not None
    assert (view["needed"], view["is_switch"]) == (200, True)
    guarded = Guarded(false_alarms=0.01, rules=["errors"])
    guarded.rollout.set(canary=TENTH)
    view = guarded.guard.view("standard")
    assert view is not None
    assert view["needed"] == pytest.approx(2 * 164.5, abs=0.1)


def test_other_endpoints_and_requests_without_a_route_are_ignored() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    for _ in range(300):
        guarded.guard.observe([failed("vllm", endpoint="embeddings"), failed("none"), exchange("ollama")])
    view = guarded.guard.view("standard")
    assert view is not None
    assert view["rules"]["errors"]["tested"]["requests"] == 0


def test_number_of_kept_samples_is_bounded() -> None:
    guarded = Guarded()
    guarded.serve(3 * RECENT)
    assert [len(samples) for samples in guarded.guard._recent.values()] == [RECENT]


def test_tier_removed_from_the_settings_is_not_watched_any_longer() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH)
    guarded.serve(10)
    settings = config.build({**DOCUMENT, "tiers": {"pro": DOCUMENT["tiers"]["pro"]}})
    guarded.rollout.reload(settings)
    guarded.guard.reload(settings)
    guarded.guard.observe([tiered(failed("vllm"), "standard") for _ in range(200)])
    assert (guarded.guard.view("standard"), guarded.causes) == (None, ["operator"])
    assert guarded.serve(2000, tier="pro", vllm=broken) < 1000


def test_tier_is_not_rolled_back_to_a_side_removed_from_the_settings() -> None:
    guarded = Guarded()
    guarded.rollout.set("vllm", tier="pro")
    guarded.serve(100, tier="pro")
    guarded.rollout.set("cloud", tier="pro")
    assert guarded.guard.view("pro") is not None
    document = {**DOCUMENT, "backends": {"ollama": {}, "cloud": DOCUMENT["backends"]["cloud"]}}
    settings = config.build(
        {
            **document,
            "tiers": {"standard": {"models": {"ollama": "a"}}, "pro": {"models": {"ollama": "a", "cloud": "c"}}},
        }
    )
    guarded.rollout.reload(settings)
    guarded.guard.reload(settings)
    guarded.guard.observe([tiered(failed("cloud"), "pro") for _ in range(200)])
    assert (guarded.guard.view("pro"), guarded.rollout.tiers["pro"].assignment) == (None, Assignment("cloud"))


def test_side_that_becomes_rollback_to_is_not_watched_any_longer() -> None:
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH, tier="standard")
    settings = config.build({**DOCUMENT, "rollback_to": "vllm"})
    guarded.rollout.reload(settings)
    guarded.guard.reload(settings)
    assert guarded.guard.view("standard") is None


def test_tier_that_the_settings_pin_to_the_side_under_test_is_not_watched_any_longer() -> None:
    guarded = Guarded()
    for tier in ("standard", "pro"):
        guarded.serve(300, tier=tier)
    guarded.rollout.set("vllm")
    assert guarded.guard.view("standard") is not None
    pinned = {"standard": {"models": MODELS, "backend": "vllm"}}
    settings = config.build({**DOCUMENT, "tiers": DOCUMENT["tiers"] | pinned})
    assert guarded.rollout.reload(settings) is None, "it is where it was"
    guarded.guard.reload(settings)
    assert guarded.guard.view("standard") is None
    assert guarded.guard.view("pro") is not None


def test_samples_of_a_side_removed_from_the_settings_are_forgotten() -> None:
    """A backend that comes back under this name may be another one."""
    guarded = Guarded()
    guarded.rollout.set("cloud", tier="pro")
    guarded.serve(300, tier="pro")
    guarded.rollout.set("vllm", tier="pro")
    assert guarded.guard.view("pro") is not None
    without = config.build({**DOCUMENT, "tiers": DOCUMENT["tiers"] | {"pro": {"models": MODELS}}})
    for settings in (without, guarded.settings):
        guarded.rollout.reload(settings)
        guarded.guard.reload(settings)
    guarded.rollout.set("cloud", tier="pro", cause="reload")
    guarded.rollout.set("vllm", tier="pro")
    assert guarded.guard.view("pro") is None


@pytest.mark.parametrize("served", [0, 19])
def test_nothing_is_decided_before_the_other_side_has_min_samples(served: int) -> None:
    guarded = Guarded(min_samples=20)
    guarded.rollout.set(canary=TENTH, tier="standard")
    guarded.now += 100
    guarded.guard.observe([exchange("ollama")] * served)
    guarded.guard.observe([failed("vllm")] * 500)
    assert guarded.causes == ["operator"]
    guarded.guard.observe([exchange("ollama")] * 40)
    guarded.guard.observe([failed("vllm")] * 500)
    assert guarded.causes == ["operator", "guard"]


def test_number_of_samples_that_wait_for_the_side_under_test_is_bounded() -> None:
    """A canary of a hundredth of a percent may get no request for hours."""
    guarded = Guarded()
    guarded.rollout.set(canary=TENTH, tier="standard")
    guarded.now += 100
    guarded.guard.observe([exchange("ollama")] * (LONGEST_ROUND + 100))
    (watched,) = guarded.guard._watched.values()
    assert len(watched._others) == LONGEST_ROUND
