"""The guard: rolls a canary or a fresh switch back automatically if it performs worse.

Synchronous; the clock is passed in.

Theory of operation. An operator's change puts a tier under watch if it gives part of the tier, or
all of it, to a backend other than `rollback_to`: the guard never opposes a way back. Every finished
exchange of the tier is a sample of the side that the roll-out chose for it, even if a fallback
served it.

1. A canary is compared with the other part of the tier, by samples of both sides that arrived since
   the change. The test restarts from time to time, each time with less of the probability of a
   false alarm (6 / (pi n)^2 of it in the n-th round). So a canary that turns bad after good days is
   found, too.
2. A switch of a whole tier has nothing beside it. It is compared with the samples of the side that
   it left, from right before the switch. Each of these is used once. When they are used up, or
   `window` has passed, the switch is no longer fresh, and its watch ends.
3. Each rule is a share of yes and no (`sequential_test.py`). A time counts as a yes if it is above
   the p95 of the other side; on the side under test, if it is above `ratio` times that. The bound
   comes from samples older than those that it judges.
4. A rule breaks when its evidence reaches 1 over its part of `false_alarms`, which is divided among
   the rules, the tiers of one change and the rounds. The tier then goes wholly to the other side,
   as one change of the roll-out. Any change of a tier ends its watch.

What is not a backend's fault is not a sample: a request that is itself at fault, a full or slow
queue of the gateway, a client that leaves.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.config import GuardSettings, Settings
from gateway.rollout.assignment import Assignment, Change
from gateway.rollout.guard_rules import SLACK, Rule, Sample, ShareRule, TimeRule, Trial, p95, sample_of
from gateway.rollout.sequential_test import LONGEST_ROUND
from gateway.rollout.state import Rollout
from gateway.telemetry.exchange import CHAT, NONE, WORKLOADS, Exchange

RECENT = 2000
"""Samples that are kept of each side of a tier."""
ROUND_SAMPLES = 2000
"""Samples of the side under test before a canary's test may restart, however long they take."""
MAX_PENDING_RATIO = 4
"""Pending requests that the side under test may have for each finished one before a rule can break.
Failing is often faster than answering: at the beginning, only failures have finished."""
RULE_NAMES = {
    "time_to_first_token": "time to first token",
    "inter_token_latency": "inter-token latency",
    "truncated": "truncated streams",
    "errors": "errors",
    "empty": "empty answers",
}

_log = logging.getLogger(__name__)


class WatchedTier:
    """One tier since a change.

    `past` has the samples of the side that a switch left, from before it; None for a canary.
    """

    def __init__(
        self, tier: str, tested: str, other: str, settings: GuardSettings, chance: float, began: float
    ) -> None:
        self.tier = tier
        self.tested = tested
        self.other = other
        self.began = began
        self.finished = 0
        """Finished requests of the side under test."""
        self.past: Sequence[Sample] | None = None
        self.trials: list[Trial] = []
        self._others: list[Sample] = []
        """Samples of the other side since the last one of the side under test."""
        self._settings = settings
        self._chance = chance
        self._round = 1
        self._round_began = began

    def __repr__(self) -> str:
        return f"<WatchedTier {self.tier}: {self.tested} against {self.other} {self.trials}>"

    def as_canary(self, past: deque[Sample]) -> "WatchedTier":
        """Compare a canary with the other side, whose samples continue to fill `past`."""
        for rule in self._rules():
            if isinstance(rule, TimeRule):
                rule.learn_from(past)
            self.trials.append(Trial(rule, None))
        return self

    def as_switch(self, past: Sequence[Sample]) -> "WatchedTier":
        """Compare a switch with `past`, the samples from before it."""
        self.past = past
        for rule in self._rules():
            if isinstance(rule, TimeRule):  # one half gives the bound, the other half the baseline
                known = [sample for sample in past if getattr(sample, rule.name) is not None and not sample.has_left]
                rule.set_bound(known[: len(known) // 2])
                hits = rule.judge_past(known[len(known) // 2 :])
            else:
                hits = [hit for hit in map(rule.judge, past) if hit is not None]
            self.trials.append(Trial(rule, deque(hits)))
        return self

    def _rules(self) -> Iterable[Rule]:
        settings = self._settings
        for name in settings.rules:
            if name in SLACK:
                yield TimeRule(name, settings.ratio, self.began + settings.grace, settings.min_samples)
            else:
                yield ShareRule(name, settings.margin)

    @property
    def needed(self) -> float:
        """Evidence at which a rule breaks."""
        part = 1.0 if self.past is not None else 6 / (math.pi * self._round) ** 2
        return len(self.trials) / (self._chance * part)

    def observe(self, sample: Sample, is_tested: bool, now: float) -> Trial | None:
        """Add `sample`; return the trial whose rule it breaks, if any."""
        if sample.arrived < self.began:
            return None
        if not is_tested:
            if len(self._others) < LONGEST_ROUND:
                self._others.append(sample)
            return None
        self.finished += 1
        for trial in self.trials:
            trial.take(sample, self._others)
        self._others.clear()
        min_samples, needed = self._settings.min_samples, self.needed
        for trial in self.trials:
            test = trial.test
            if test.evidence >= needed and test.tested.count >= min_samples and test.other.count >= min_samples:
                return trial
        if self.past is None and now - self._round_began >= self._settings.window and self._has_full_round:
            self._begin_round(now)
        return None

    def _begin_round(self, now: float) -> None:
        self._round += 1
        self._round_began = now
        for trial in self.trials:
            trial.restart()

    @property
    def _has_full_round(self) -> bool:
        return max(trial.test.tested.count for trial in self.trials) >= ROUND_SAMPLES

    def is_over(self, now: float) -> bool:
        """Return whether a switch is no longer fresh."""
        return self.past is not None and (
            now - self.began >= self._settings.window or all(trial.is_over for trial in self.trials)
        )


class RolloutGuard:
    """Watches all tiers.

    `pending` returns how many requests of a tier on a backend, arrived since a time, are in flight
    or queued where a server may serve them. While `defers` returns True, an engine is being woken for the
    change: `watch` is called when it serves.
    """

    def __init__(
        self,
        settings: GuardSettings,
        rollout: Rollout,
        rollback_to: str,
        pending: Callable[[str, str, float], int],
        clock: Callable[[], float],
        defers: Callable[[], bool] = lambda: False,
    ) -> None:
        self._defers = defers
        self._settings = settings
        self._rollout = rollout
        self._rollback_to = rollback_to
        self._pending = pending
        self._clock = clock
        self._recent: dict[tuple[str, str], deque[Sample]] = {}
        self._watched: dict[str, WatchedTier] = {}
        rollout.listeners.append(self._on_change)
        # After a restart, canaries are watched from the beginning. A switch is not: there are no
        # samples from before it.
        self._start_watching(
            {
                name: (tier_route.assignment, tier_route.assignment)
                for name, tier_route in rollout.tiers.items()
                if tier_route.canary is not None
            }
        )

    def __repr__(self) -> str:
        return f"<RolloutGuard {list(self._watched.values())}>"

    # Changes

    def reload(self, settings: Settings) -> None:
        """Put other settings in force. Tiers and models may be gone, `rollback_to` may differ."""
        self._rollback_to = settings.rollback_to
        sides = {(tier.name, backend) for tier in settings.tiers.values() for backend in tier.models}
        self._recent = {side: samples for side, samples in self._recent.items() if side in sides}
        self._watched = {
            tier: watched
            for tier, watched in self._watched.items()
            if (tier, watched.other) in sides
            and watched.tested != self._rollback_to
            and not self._rollout.tiers[tier].is_pinned
        }

    def _on_change(self, change: Change) -> None:
        for tier in change.tiers:
            self._watched.pop(tier, None)
        if not self._defers():
            self.watch(change)

    def watch(self, change: Change) -> None:
        """Put the tiers of an operator's change under watch."""
        if change.cause == "operator":
            self._start_watching({tier: (move.before, move.after) for tier, move in change.tiers.items()})

    def _start_watching(self, moves: dict[str, tuple[Assignment, Assignment]]) -> None:
        found = {
            tier: sides
            for tier, (before, after) in moves.items()
            if (sides := _sides(before, after)) and sides[0] != self._rollback_to
        }
        for tier, (tested, other, is_canary) in found.items():
            now = self._clock()
            watched = WatchedTier(tier, tested, other, self._settings, self._settings.false_alarms / len(found), now)
            if is_canary:
                self._watched[tier] = watched.as_canary(self._recent_of(tier, other))
                continue
            past = [sample for sample in self._recent_of(tier, other) if sample.arrived >= now - self._settings.window]
            if len(past) < self._settings.min_samples:
                _log.info(
                    "the guard does not watch tier %s: %s has served too few requests recently to compare %s with",
                    tier,
                    other,
                    tested,
                )
                continue
            self._watched[tier] = watched.as_switch(past)

    def _recent_of(self, tier: str, backend: str) -> deque[Sample]:
        found = self._recent.get((tier, backend))
        if found is None:
            found = self._recent[tier, backend] = deque(maxlen=RECENT)
        return found

    # Finished exchanges

    def observe(self, exchanges: Iterable[Exchange]) -> None:
        """Judge `exchanges`, which have just finished."""
        now = self._clock()
        for exchange in exchanges:
            if WORKLOADS[exchange.endpoint] != CHAT or NONE in (exchange.tier, exchange.chosen):
                continue
            sample = sample_of(exchange, now - exchange.duration)
            if sample is None:
                continue
            self._recent_of(exchange.tier, exchange.chosen).append(sample)
            watched = self._watched.get(exchange.tier)
            if watched is not None and exchange.chosen in (watched.tested, watched.other):
                self._judge(watched, sample, exchange.chosen == watched.tested, now)

    def _judge(self, watched: WatchedTier, sample: Sample, is_tested: bool, now: float) -> None:
        if watched.past is not None and not is_tested:
            return
        if watched.is_over(now):
            del self._watched[watched.tier]
            return
        broken = watched.observe(sample, is_tested, now)
        if (
            broken is None
            or self._pending(watched.tier, watched.tested, watched.began) > MAX_PENDING_RATIO * watched.finished
        ):
            return
        del self._watched[watched.tier]
        self._rollout.rollback(tier=watched.tier, to=watched.other, cause="guard", why=self._why(watched, broken))

    def _why(self, watched: WatchedTier, trial: Trial) -> str:
        """Return the rule and both sides' figures, in words."""
        test, rule = trial.test, trial.rule
        tested = f"{100 * (test.tested.share or 0):.1f} % of {test.tested.count} requests on {watched.tested}"
        other = f"{100 * (test.other.share or 0):.1f} % of {test.other.count} on {watched.other}"
        before = " before the switch" if watched.past is not None else ""
        if isinstance(rule, TimeRule):
            tested, other = f"{tested} above {rule.limit(True):.3f} s", f"{other} above {rule.limit(False):.3f} s"
            p95_tested, p95_other = (_seconds(p95(samples, rule.name)) for samples in self._samples_of(watched))
            before += f"; p95 {p95_tested} and {p95_other}"
        return f"{RULE_NAMES[rule.name]}: {tested}, {other}{before}"

    def _samples_of(self, watched: WatchedTier) -> tuple[list[Sample], list[Sample]]:
        tested, other = (
            [sample for sample in self._recent_of(watched.tier, backend) if sample.arrived >= watched.began]
            for backend in (watched.tested, watched.other)
        )
        return tested, other if watched.past is None else list(watched.past)

    def view(self, tier: str) -> dict[str, Any] | None:
        """Return what is watched on `tier`, for `/ops/status`, or None.

        A rule breaks when its `evidence` reaches `needed`.
        """
        watched = self._watched.get(tier)
        if watched is None or watched.is_over(self._clock()):
            return None
        return {
            "tested": watched.tested,
            "other": watched.other,
            "is_switch": watched.past is not None,
            "seconds": round(self._clock() - watched.began, 3),
            "needed": round(watched.needed, 1),
            "rules": {trial.rule.name: _view_trial(trial) for trial in watched.trials},
        }


def _sides(before: Assignment, after: Assignment) -> tuple[str, str, bool] | None:
    """Return the backend under test, the one to compare it with, and whether both serve."""
    if after.canary is not None:
        percent = after.canary.percent
        return (after.canary.backend, after.backend, percent < 100) if percent else None
    return (after.backend, before.backend, False) if after.backend != before.backend else None


def _view_trial(trial: Trial) -> dict[str, Any]:
    test = trial.test
    view: dict[str, Any] = {
        side: {"requests": tally.count, "share": None if tally.share is None else round(tally.share, 4)}
        for side, tally in (("tested", test.tested), ("other", test.other))
    }
    if isinstance(trial.rule, TimeRule):
        view["bound"] = trial.rule.bound
    return view | {"evidence": round(test.evidence, 3)}


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"
