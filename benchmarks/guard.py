"""Puts the guard of the roll-out before simulated canaries and switches, equal ones and bad ones, and says which it took back, and when.

`make bench-guard` runs it. Time is virtual: the roll-out, the guard and its settings are the real ones, the requests are drawn. Exit status 1
when more than `MOST_FALSE` of 100 equal ones went back, or a bad canary stayed.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import exp, log

from benchmarks.report import percentile
from gateway import config
from gateway.chat.answer import Usage
from gateway.errors import Outcome
from gateway.rollout.assignment import Canary
from gateway.rollout.guard import RolloutGuard
from gateway.rollout.state import Rollout
from gateway.telemetry.exchange import CHAT, Exchange, Phase

MOST_FALSE = 1
OTHER, TESTED = "ollama", "vllm"
_TIER = "standard"
_FIRST_TOKEN_SECONDS, _FIRST_TOKEN_SPREAD = 0.4, 0.6
"""Median, and deviation of the logarithm: the p95 is 2.7 times the median."""
_GAP_SECONDS, _GAP_SPREAD = 0.02, 0.25
_TOKENS = 150
_EACH_SECONDS = 0.2
"""Between two looks, as the gateway has it."""


@dataclass(frozen=True, slots=True)
class SideModel:
    """How a backend does. Shares are of its requests."""

    errors: float = 0.01
    truncated: float = 0.002
    empty: float = 0.002
    first_token: float = 1.0
    """Times the usual."""
    gap: float = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated: `worse` is the side under test, from `turns_bad` seconds after the change on."""

    name: str
    worse: SideModel
    percent: float
    """Of the canary; 100: a switch of everything."""
    is_bad: bool
    counts: bool = True
    """Towards the verdict."""
    turns_bad: float = 0.0
    usual: SideModel = field(default=SideModel())


@dataclass(frozen=True, slots=True)
class GuardOptions:
    runs: int
    rate: float
    """Requests a second of the tier."""
    hours: float
    """How long an equal one is looked at; bad ones at most so long."""
    seed: int


@dataclass(slots=True)
class Result:
    """Of one case: of those that went back, seconds after the change, requests of the side under test until then, and why."""

    runs: int = 0
    seconds: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)
    cost: float = 0.0
    """Seconds of this machine for an exchange."""


def cases(percent: float) -> list[Case]:
    usual = SideModel()
    worse = {
        "equal": (usual, False),
        "5 points more errors": (replace(usual, errors=usual.errors + 0.05), True),
        "2 x time to first token": (replace(usual, first_token=2.0), True),
        "2 x inter-token latency": (replace(usual, gap=2.0), True),
        "5 points more truncated": (replace(usual, truncated=usual.truncated + 0.05), True),
        "5 points more empty": (replace(usual, empty=usual.empty + 0.05), True),
        "fails everything": (replace(usual, errors=1.0), True),
    }
    found = [Case(f"canary, {name}", side, percent, is_bad) for name, (side, is_bad) in worse.items()]
    found.append(
        Case("canary, fails everything after 20 min", worse["fails everything"][0], percent, True, turns_bad=1200)
    )
    switches = ("equal", "5 points more errors", "2 x time to first token", "fails everything")
    return found + [
        Case(f"switch, {name}", worse[name][0], 100, worse[name][1], counts=name == "equal") for name in switches
    ]


def simulate(case: Case, options: GuardOptions, random_: random.Random, result: Result) -> None:
    """One canary or switch, until it went back or the time is over."""
    now = [0.0]
    document = {
        "tiers": {_TIER: {"models": {OTHER: "a", TESTED: "b"}}},
        "llm_backend": OTHER,
        "guard": {},
        "state_file": "",
    }
    settings = config.build(document)
    assert settings.guard is not None
    rollout = Rollout(settings)
    under_way = {OTHER: 0, TESTED: 0}
    guard = RolloutGuard(
        settings.guard, rollout, settings.rollback_to, lambda tier, backend, since: under_way[backend], lambda: now[0]
    )
    changed = 300.0 if case.percent == 100 else 60.0  # with a time before, for a switch
    ends = changed + options.hours * 3600
    has_changed = False
    over: list[Exchange] = []
    spent, looked, count, tested = 0.0, 0.0, 0, 0
    for at, exchange in _exchanges(case, changed, options.rate, random_, under_way, rollout):
        if not has_changed and at >= changed:
            has_changed = True
            rollout.set(TESTED) if case.percent == 100 else rollout.set(canary=Canary(TESTED, case.percent))
        over.append(exchange)
        count += 1
        tested += exchange.backend == TESTED
        if at < looked + _EACH_SECONDS:
            continue
        now[0] = looked = at
        began = time.thread_time()
        guard.observe(over)
        spent += time.thread_time() - began
        over.clear()
        change = rollout.history[-1] if rollout.history else None
        if change is not None and change.cause == "guard":
            result.seconds.append(at - changed)
            result.requests.append(tested)
            rule = change.why.partition(":")[0]
            result.rules[rule] = result.rules.get(rule, 0) + 1
            break
        if at > ends or (has_changed and case.percent == 100 and guard.view(_TIER) is None):
            break
    result.runs += 1
    result.cost += (spent / count - result.cost) / result.runs


def _exchanges(
    case: Case, changed: float, rate: float, random_: random.Random, under_way: dict[str, int], rollout: Rollout
) -> Iterator[tuple[float, Exchange]]:
    """Each with the time of its end, in that order; arrivals are a Poisson process."""
    running: list[tuple[float, int, Exchange]] = []
    arrival, number = 0.0, 0
    while True:
        arrival += random_.expovariate(rate)
        while running and running[0][0] <= arrival:
            at, _, exchange = heappop(running)
            under_way[exchange.backend] -= 1
            yield at, exchange
        line = rollout.tiers[_TIER]
        backend = line.assignment.backend if line.canary is None else line.choose(random_.randrange(10_000)).backend
        side = case.worse if backend == TESTED and arrival >= changed + case.turns_bad else case.usual
        number += 1
        exchange = _exchange(side, backend, random_)
        under_way[backend] += 1
        heappush(running, (arrival + exchange.duration, number, exchange))


def _exchange(side: SideModel, backend: str, random_: random.Random) -> Exchange:
    outcome: Outcome = "ok"
    phase: Phase = "streaming"
    first: float | None = side.first_token * _FIRST_TOKEN_SECONDS * exp(random_.gauss(0, _FIRST_TOKEN_SPREAD))
    tokens = max(8, int(-_TOKENS * log(1 - random_.random())))
    duration = (first or 0) + side.gap * _GAP_SECONDS * exp(random_.gauss(0, _GAP_SPREAD)) * (tokens - 1)
    is_empty = random_.random() < side.empty
    if random_.random() < side.errors:  # at once, before a piece
        outcome, phase, first, duration, is_empty = "upstream_error", "waiting", None, 0.05, False
    elif random_.random() < side.truncated:
        outcome, duration, is_empty = "upstream_error", duration / 2, False
    return Exchange(
        request_id="", key_id="", endpoint=CHAT, tier=_TIER, backend=backend, chosen=backend, model="", lane="text", stream=True, status=200,
        code=None, reason=None, outcome=outcome, empty=is_empty, phase=phase, duration=duration, queue_wait=0.0, upstream=duration,
        time_to_first_token=first, usage=Usage(10, tokens) if outcome == "ok" else None, attempts=1,
    )  # fmt: skip


def _line(case: Case, result: Result) -> str:
    found = f"{case.name:<38} {len(result.seconds):>4} of {result.runs}"
    if not result.seconds:
        return found
    times = f"{percentile(result.seconds, 0.5):>8.0f} s {max(result.seconds):>8.0f} s"
    counts = f"{percentile(result.requests, 0.5):>8.0f} {max(result.requests):>8.0f}"
    rules = ", ".join(f"{rule} {count}" for rule, count in sorted(result.rules.items(), key=lambda item: -item[1]))
    return f"{found} {times} {counts}   {rules}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="of each case")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second of the tier")
    parser.add_argument("--percent", type=float, default=10.0, help="of the canary")
    parser.add_argument("--hours", type=float, default=1.0, help="how long each is looked at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name has this word")
    words = parser.parse_args(arguments)
    options = GuardOptions(words.runs, words.rate, words.hours, words.seed)
    usual = SideModel()
    print(
        f"{options.rate:g} requests a second, {words.percent:g} % of them to the canary, each looked at for {options.hours:g} h at most"
    )
    print(
        f"usual: {usual.errors:.1%} errors, {usual.truncated:.1%} truncated, {usual.empty:.1%} empty, {_FIRST_TOKEN_SECONDS:g} s to the first token"
    )
    print(f"{'':38} went back     median      worst   requests, worst   rule that broke")
    good = True
    costs = []
    for case in cases(words.percent):
        if words.only not in case.name:
            continue
        random_ = random.Random(f"{options.seed} {case.name}")
        result = Result()
        for _ in range(options.runs):
            simulate(case, options, random_, result)
        print(_line(case, result), flush=True)
        costs.append(result.cost)
        if case.counts:
            good &= (
                len(result.seconds) == result.runs
                if case.is_bad
                else len(result.seconds) <= MOST_FALSE * result.runs / 100
            )
    print(f"the guard takes {1e6 * sum(costs) / len(costs):.1f} µs of this machine for an exchange")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
