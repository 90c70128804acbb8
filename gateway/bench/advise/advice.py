"""Limits that fit a target, with the reasons. Pure.

Two sources carry different statements. A benchmark with several levels shows what a server does with
more requests at once, so it carries limits. The metrics of a gateway show only the load that there
was: from them follow how full the slots are and how long a queue may be, but not what more requests
at once would do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from gateway.bench.advise.levels import Level, is_saturated, knee, largest_that_meets
from gateway.bench.advise.loads import LEAST_REQUESTS, BackendLoad
from gateway.bench.advise.target import Target

Origin = Literal["measured", "computed", "assumed"]
DEFAULT_WAIT = 30.0
"""Seconds for which a person waits for the first token, if no target says otherwise."""
LONG_PERIOD = 2 * 3600.0
"""Seconds; an average over a longer time hides the busy hours."""
FULL = 0.8
"""Share of the slots above which the queue grows long: arrivals come in bursts."""


class Setting(Struct, frozen=True):
    """A recommended value of a setting; `backend` is None if it is one of the measured server.

    `why` is a key of `texts.py`, filled with `figures`.
    """

    name: str
    value: int
    why: str
    figures: Mapping[str, object]
    origin: Origin = "computed"
    backend: str | None = None


class Remark(Struct, frozen=True):
    """A statement about the data: a key of `texts.py`, filled with `figures`."""

    key: str
    figures: Mapping[str, object]
    origin: Origin = "measured"
    backend: str | None = None


class Advice(Struct, frozen=True):
    """Recommended settings and remarks. `meets` is False if the target cannot be met, None if unknown."""

    settings: tuple[Setting, ...]
    remarks: tuple[Remark, ...]
    meets: bool | None = None


class Wishes(Struct, frozen=True, kw_only=True):
    """Target to reach.

    `users` ask again `think` seconds after each answer. `wait` is the longest acceptable wait for
    the first token, in seconds; None: a target on the first token says it, or `DEFAULT_WAIT`.
    """

    targets: tuple[Target, ...] = ()
    users: int | None = None
    think: float = 30.0
    wait: float | None = None

    @property
    def first_token(self) -> float | None:
        """Limit of the time to the first token in seconds, if there is a target on it."""
        return min((target.limit / 1000 for target in self.targets if target.metric == "ttft"), default=None)

    def patience(self, own: float | None) -> float:
        """Return how long a request may queue, if the server takes `own` seconds to its first token."""
        if self.wait is not None:
            return self.wait
        limit = self.first_token
        return DEFAULT_WAIT if limit is None else max(0.0, limit - (own or 0.0))


# From a benchmark


def from_levels(levels: Sequence[Level], wishes: Wishes, kind: str) -> Advice:
    """Return the advice that the levels of a benchmark carry; `kind` is the kind of the measured server."""
    remarks = [_level_remark(level, wishes) for level in levels]
    if len(levels) < 2:
        return Advice((), (*remarks, Remark("too_few_levels", {"levels": len(levels)})))
    top = knee(levels)
    if is_saturated(levels):
        remarks.append(Remark("saturated", {"at_once": top.at_once, "rate": top.rate, "tokens": top.tokens_per_second}))
    else:
        remarks.append(Remark("not_saturated", {"at_once": levels[-1].at_once}))
    if levels[0].at_once == 1 and top.at_once == 1:
        remarks.append(Remark("serial", {"at_once": levels[-1].at_once}))
    chosen = top
    if wishes.targets:
        names = ", ".join(map(str, wishes.targets))
        best = largest_that_meets(levels, wishes.targets)
        if best is None:
            return Advice((), (*remarks, Remark("never_met", {"targets": names, "at_once": levels[0].at_once})), False)
        remarks.append(Remark("met_up_to", {"targets": names, "at_once": best.at_once}))
        chosen = best
    return _limits_of(chosen, wishes, kind, remarks, meets=True if wishes.targets else None)


def _level_remark(level: Level, wishes: Wishes) -> Remark:
    key = "level" if not level.too_few else "level_too_few"
    shown = ", ".join(
        f"{target.name} {value:.0f}" for target in wishes.targets if (value := level.values[target.name]) is not None
    )
    figures = {
        "at_once": level.at_once, "rate": level.rate, "tokens": level.tokens_per_second, "latency": level.latency,
        "failed": level.failed, "requests": level.requests, "values": f", {shown}" if shown else "",
    }  # fmt: skip
    return Remark(key, figures)


def _limits_of(chosen: Level, wishes: Wishes, kind: str, remarks: list[Remark], meets: bool | None) -> Advice:
    slots, rate = chosen.at_once, chosen.rate
    patience = wishes.patience(chosen.first_token)
    queue = math.floor(patience * rate)
    settings = [Setting("max_concurrency", slots, "why_level", {"at_once": slots, "rate": rate}, "measured")]
    if kind in ("ollama", "openai"):
        settings.append(Setting("OLLAMA_NUM_PARALLEL", slots, "why_parallel", {"at_once": slots}, "measured"))
    if kind in ("vllm", "openai"):
        settings.append(Setting("--max-num-seqs", slots, "why_seqs", {"at_once": slots}, "measured"))
    settings += _queue_settings(queue, patience, rate)
    if wishes.users is not None:
        remark = _users_at_once(wishes.users, slots, rate, patience)
        remarks.append(remark)
        if remark.key == "users_too_many":
            meets = False
    return Advice(tuple(settings), tuple(remarks), meets)


def _queue_settings(queue: int, patience: float, rate: float) -> list[Setting]:
    figures = {"patience": patience, "rate": rate}
    seconds = max(1, math.ceil(patience))
    return [
        Setting("max_queue", max(1, queue), "why_queue", figures),
        Setting("queue_timeout", seconds, "why_timeout", {"patience": patience}),
    ]


def _users_at_once(users: int, slots: int, rate: float, patience: float) -> Remark:
    """Say whether `users` who all ask in the same moment are served in time: the worst case."""
    if users <= slots:
        return Remark("users_fit", {"users": users, "slots": slots}, "computed")
    last = (users - slots) / rate if rate else math.inf
    carried = slots + math.floor(patience * rate)
    key = "users_queue" if users <= carried else "users_too_many"
    servers = math.ceil(users / max(1, carried))
    figures = {"users": users, "slots": slots, "last": last, "patience": patience, "servers": servers}
    return Remark(key, figures, "computed")


# From metrics


def from_loads(loads: Sequence[BackendLoad], wishes: Wishes) -> Advice:
    """Return the advice that the metrics of a gateway carry."""
    settings: list[Setting] = []
    remarks: list[Remark] = []
    meets: list[bool | None] = []
    for load in loads:
        if not load.is_enough:
            figures = {"requests": load.requests, "needed": LEAST_REQUESTS}
            remarks.append(Remark("too_few_requests", figures, backend=load.name))
            continue
        remarks += _load_remarks(load)
        meets += [verdict for target in wishes.targets for verdict in [_verdict(load, target, remarks)]]
        settings += _load_settings(load, wishes, remarks)
    known = [verdict for verdict in meets if verdict is not None]
    return Advice(tuple(settings), tuple(remarks), all(known) if known else None)


def _load_remarks(load: BackendLoad) -> Iterator[Remark]:
    assert load.service is not None
    assert load.at_once is not None
    assert load.utilisation is not None
    little = {
        "rate": load.rate, "service": load.service, "at_once": load.at_once, "requests": load.requests,
        "period": load.period,
    }  # fmt: skip
    yield Remark("little", little, "computed", load.name)
    slots = {"slots": load.slots, "share": load.utilisation * 100, "wait": load.queue_wait.mean or 0.0}
    yield Remark("slots_learned" if load.learned else "slots", slots, "measured", load.name)
    if load.period > LONG_PERIOD:
        yield Remark("long_period", {"hours": load.period / 3600}, "measured", load.name)
    if load.vision_wait.count:
        share = load.vision_wait.count / load.requests * 100
        yield Remark("mixed", {"share": share, "wait": load.vision_wait.mean or 0.0}, "measured", load.name)
    if load.rejected:
        reasons = ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(load.rejected.items()))
        yield Remark("rejected", {"reasons": reasons}, "measured", load.name)
    if load.utilisation > FULL:
        yield Remark("full", {"share": load.utilisation * 100, "full": FULL * 100}, "measured", load.name)


def _verdict(load: BackendLoad, target: Target, remarks: list[Remark]) -> bool | None:
    """Compare a target with the histogram; only the first token and the whole answer have one."""
    histogram = {"ttft": load.time_to_first_token, "e2el": load.duration}.get(target.metric)
    value = None if histogram is None else _figure(target, histogram.mean, histogram.quantile(target.share))
    if value is None:
        remarks.append(Remark("no_figure", {"target": target.name}, backend=load.name))
        return None
    holds = target.holds(value * 1000)
    key = "target_met" if holds else "target_missed"
    remarks.append(Remark(key, {"target": str(target), "value": value * 1000}, "measured", load.name))
    return holds


def _figure(target: Target, mean: float | None, quantile: float | None) -> float | None:
    return mean if target.name.startswith("mean_") else quantile


def _load_settings(load: BackendLoad, wishes: Wishes, remarks: list[Remark]) -> Iterator[Setting]:
    assert load.service is not None
    slots = load.slots
    if wishes.users is not None:
        needed = _slots_for(wishes, load, remarks)
        if needed <= load.slots:
            remarks.append(Remark("slots_suffice", {"needed": needed, "slots": slots}, "computed", load.name))
        else:
            figures: dict[str, object] = {"needed": needed, "slots": slots, "at_once": load.at_once}
            remarks.append(Remark("beyond_the_data", figures, "assumed", load.name))
            per_server = math.ceil(needed / load.servers)
            if load.learned:
                remarks.append(Remark("learned_limit", {"slots": slots}, "measured", load.name))
            if int(load.limits["max_concurrency"]) < per_server:
                yield Setting("max_concurrency", per_server, "why_users", figures, "computed", load.name)
            if load.kind == "ollama":
                yield Setting("OLLAMA_NUM_PARALLEL", per_server, "why_parallel_users", figures, "computed", load.name)
            elif load.kind == "vllm":
                yield Setting("--max-num-seqs", per_server, "why_seqs_users", figures, "computed", load.name)
            slots = needed
    patience = wishes.patience(load.own_first_token)
    rate = slots / load.service if load.service else 0.0
    if rate:
        for setting in _queue_settings(math.floor(patience * rate), patience, rate):
            yield Setting(setting.name, setting.value, setting.why, setting.figures, "computed", load.name)


def _slots_for(wishes: Wishes, load: BackendLoad, remarks: list[Remark]) -> int:
    """Return the slots that `users` need.

    Each has a request running for a share service / (service + think) of the time. Two standard
    deviations of a Poisson number above the mean leave about 2 % of the moments short of a slot.
    """
    assert wishes.users is not None
    assert load.service is not None
    mean = wishes.users * load.service / (load.service + wishes.think)
    needed = min(wishes.users, math.ceil(mean + 2 * math.sqrt(mean)))
    figures = {
        "users": wishes.users, "think": wishes.think, "service": load.service, "mean": mean, "needed": needed,
    }  # fmt: skip
    remarks.append(Remark("users_need", figures, "computed", load.name))
    return needed
