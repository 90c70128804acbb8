"""Automatic rollbacks of simulated canaries and switches, healthy and bad ones, by the real guard.

`make bench-guard` runs it. Roll-out, guard and settings are the real ones; time is virtual and the
requests are random. Exit status 1: more than `MAX_FALSE` of 100 healthy canaries or switches were
rolled back, or a bad canary was not.
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

MAX_FALSE = 1
OTHER, TESTED = "ollama", "vllm"
_TIER = "standard"
_FIRST_TOKEN_SECONDS, _FIRST_TOKEN_SPREAD = 0.4, 0.6
"""Median, and standard deviation of the logarithm: the p95 is 2.7 times the median."""
_GAP_SECONDS, _GAP_SPREAD = 0.02, 0.25
_TOKENS = 150
_INTERVAL_SECONDS = 0.2
"""Seconds between two evaluations, as in the gateway."""


@dataclass(frozen=True, slots=True)
class BackendModel:
    """Behaviour of a backend: shares of its requests, and factors of the usual times."""

    errors: float = 0.01
    truncated: float = 0.002
    empty: float = 0.002
    first_token: float = 1.0
    gap: float = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One simulated canary or switch.

    Attributes:
        tested: the backend under test, from `degrades_after` seconds after the change on.
        percent: percentage of the canary; 100 means a complete switch.
        counts: whether the case counts for the exit status.
    """

    name: str
    tested: BackendModel
    percent: float
    is_bad: bool
    counts: bool = True
    degrades_after: float = 0.0
    usual: BackendModel = field(default=BackendModel())


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """Command line.

    Attributes:
        rate: requests per second of the tier.
        hours: longest time that one canary or switch is simulated.
    """

    runs: int
    rate: float
    hours: float
    seed: int


@dataclass(slots=True)
class Result:
    """Results of one case.

    Attributes:
        seconds: time from the change to each rollback.
        requests: requests on the tested backend until each rollback.
        rules: number of rollbacks by the rule that caused them.
        cost: CPU seconds of the guard for an exchange.
    """

    runs: int = 0
    seconds: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)
    cost: float = 0.0


def cases(percent: float) -> list[Case]:
    usual = BackendModel()
    models = {
        "equal": (usual, False),
        "5 points more errors": (replace(usual, errors=usual.errors + 0.05), True),
        "2 x time to first token": (replace(usual, first_token=2.0), True),
        "2 x inter-token latency": (replace(usual, gap=2.0), True),
        "5 points more truncated": (replace(usual, truncated=usual.truncated + 0.05), True),
        "5 points more empty": (replace(usual, empty=usual.empty + 0.05), True),
        "fails everything": (replace(usual, errors=1.0), True),
    }
    found = [Case(f"canary, {name}", model, percent, is_bad) for name, (model, is_bad) in models.items()]
    failing = models["fails everything"][0]
    found.append(Case("canary, fails everything after 20 min", failing, percent, True, degrades_after=1200))
    switches = ("equal", "5 points more errors", "2 x time to first token", "fails everything")
    return found + [
        Case(f"switch, {name}", models[name][0], 100, models[name][1], counts=name == "equal") for name in switches
    ]


def simulate(case: Case, options: GuardOptions, random_: random.Random, result: Result) -> None:
    """Simulate one canary or switch until it is rolled back or the time is over."""
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
    in_flight = {OTHER: 0, TESTED: 0}
    guard = RolloutGuard(
        settings.guard, rollout, settings.rollback_to, lambda tier, backend, since: in_flight[backend], lambda: now[0]
    )
    changed = 300.0 if case.percent == 100 else 60.0  # a switch is compared with the time before it
    ends = changed + options.hours * 3600
    has_changed = False
    over: list[Exchange] = []
    spent, evaluated, count, tested = 0.0, 0.0, 0, 0
    for at, exchange in _exchanges(case, changed, options.rate, random_, in_flight, rollout):
        if not has_changed and at >= changed:
            has_changed = True
            rollout.set(TESTED) if case.percent == 100 else rollout.set(canary=Canary(TESTED, case.percent))
        over.append(exchange)
        count += 1
        tested += exchange.backend == TESTED
        if at < evaluated + _INTERVAL_SECONDS:
            continue
        now[0] = evaluated = at
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
    case: Case, changed: float, rate: float, random_: random.Random, in_flight: dict[str, int], rollout: Rollout
) -> Iterator[tuple[float, Exchange]]:
    """Yield exchanges with the time of their end, in that order; arrivals are a Poisson process."""
    running: list[tuple[float, int, Exchange]] = []
    arrival, number = 0.0, 0
    while True:
        arrival += random_.expovariate(rate)
        while running and running[0][0] <= arrival:
            at, _, exchange = heappop(running)
            in_flight[exchange.backend] -= 1
            yield at, exchange
        tier = rollout.tiers[_TIER]
        backend = tier.assignment.backend if tier.canary is None else tier.choose(random_.randrange(10_000)).backend
        model = case.tested if backend == TESTED and arrival >= changed + case.degrades_after else case.usual
        number += 1
        exchange = _exchange(model, backend, random_)
        in_flight[backend] += 1
        heappush(running, (arrival + exchange.duration, number, exchange))


def _exchange(model: BackendModel, backend: str, random_: random.Random) -> Exchange:
    outcome: Outcome = "ok"
    phase: Phase = "streaming"
    first: float | None = model.first_token * _FIRST_TOKEN_SECONDS * exp(random_.gauss(0, _FIRST_TOKEN_SPREAD))
    tokens = max(8, int(-_TOKENS * log(1 - random_.random())))
    duration = (first or 0) + model.gap * _GAP_SECONDS * exp(random_.gauss(0, _GAP_SPREAD)) * (tokens - 1)
    is_empty = random_.random() < model.empty
    if random_.random() < model.errors:  # immediately, before the first token
        outcome, phase, first, duration, is_empty = "upstream_error", "waiting", None, 0.05, False
    elif random_.random() < model.truncated:
        outcome, duration, is_empty = "upstream_error", duration / 2, False
    return Exchange(
        request_id="",
        key_id="",
        endpoint=CHAT,
        tier=_TIER,
        backend=backend,
        chosen=backend,
        model="",
        lane="text",
        stream=True,
        status=200,
        code=None,
        reason=None,
        outcome=outcome,
        empty=is_empty,
        phase=phase,
        duration=duration,
        queue_wait=0.0,
        upstream=duration,
        time_to_first_token=first,
        usage=Usage(10, tokens) if outcome == "ok" else None,
        attempts=1,
    )


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
    parser.add_argument("--runs", type=int, default=100, help="simulations of each case")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second of the tier")
    parser.add_argument("--percent", type=float, default=10.0, help="percentage of the canary")
    parser.add_argument("--hours", type=float, default=1.0, help="longest simulated time of each run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="run only cases whose name contains this text")
    given = parser.parse_args(arguments)
    options = GuardOptions(given.runs, given.rate, given.hours, given.seed)
    usual = BackendModel()
    print(
        f"{options.rate:g} requests per second, {given.percent:g} % of them to the canary, "
        f"at most {options.hours:g} h each"
    )
    print(
        f"usual: {usual.errors:.1%} errors, {usual.truncated:.1%} truncated, {usual.empty:.1%} empty, "
        f"{_FIRST_TOKEN_SECONDS:g} s to the first token"
    )
    print(f"{'':38} rolled back   median      worst   requests, worst   rule that was broken")
    good = True
    costs = []
    for case in cases(given.percent):
        if given.only not in case.name:
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
                else len(result.seconds) <= MAX_FALSE * result.runs / 100
            )
    print(f"the guard takes {1e6 * sum(costs) / len(costs):.1f} µs of CPU for an exchange")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
