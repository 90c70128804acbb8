"""Which models one Ollama has loaded, which is loaded next, and who makes room for it. Synchronous: it decides; `loader.py` loads.

Why. An Ollama loads a model within the request that asks for it, and drops the load when that client leaves. A load beside a load may be refused.
Where memory is short a load evicts another model, once that has no request left; and requests for that one pass by the load that waits.
So a request for a model that is not loaded waits in line, and the gateway loads the model for all who do, under a request of its own.

What is known. `see` is told what `/api/ps` shows, `ended` how a load went. Before the first word all models are taken for loaded: nothing
is then done but what was done without this. Knowledge may be out of date: then a request is slow, or a load is done at once.

States. A model is (1) loaded, and `is_ready`; (2) loaded but held: it makes room; (3) cold; (4) loading. `look` moves them, and is called when
somebody gets in line, when somebody leaves while others wait, and with each probe:

  cold → loading   when somebody waits for it, none other is loading, and those who make room for it are at rest. The one that waits the longest
                   is next; what is only to be warm comes behind those.
  loaded → held    when a rival is next.
  loading → loaded, or cold, and held → loaded: `ended`.

Rivals. Two models are rivals when the load of one was seen to evict the other: it was shown before and not after, and was not due to go. They are
rivals no more when both are shown at once. While a rival is loaded and has work, or had some a moment ago, a model waits up to `swap_after`
seconds: since it has been waited for, and since the other was loaded, so that each has that long in turn. Of models that are not known to fit
together, those at work are held too when a load has taken longer than `swap_after`: it may be waiting for them, without an end.

Invariants. L1: at most one is loading, and who is held is held for that one or for the next. L2: a model that somebody waits for and could have is
loaded after a bounded time: each hold has an end. L3: `is_ready` is true exactly when it is loaded and not held.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import combinations
from math import inf
from typing import NamedTuple, Protocol

from gateway.errors import GatewayError

REST_SECONDS = 1.0
"""A model is done when it had nothing to do for so long: a program that asks on and on leaves gaps, and a load takes longer than such a one."""


class Waiters(Protocol):
    """Those who wait for one model and need the same."""

    @property
    def waiting(self) -> int: ...

    def wants(self, state: "ModelState") -> bool:
        """Somebody waits who would be better off if the model was loaded there."""

    def may_try_elsewhere(self, state: "ModelState") -> bool:
        """Another server has the model, or could load it and has not failed."""

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        """End the wait of all."""


class LoadedModels(NamedTuple):
    """What a server says that it has loaded: until when, by canonical name, and the time there, both in Unix time."""

    until: Mapping[str, float]
    now: float


class ModelState:
    """One model at one server. `name` is canonical, `model` what the settings call it; `is_apart`: it makes embeddings."""

    __slots__ = (
        "_load_seconds",
        "has_failed",
        "is_apart",
        "is_held",
        "is_loaded",
        "is_ready",
        "load_began",
        "model",
        "name",
        "ready_since",
        "rests_since",
        "running",
        "waiters",
        "waits_since",
        "warm",
    )  # fmt: skip

    def __init__(self, name: str, model: str, is_apart: bool, is_loaded: bool) -> None:
        self.name = name
        self.model = model
        self.is_apart = is_apart
        self.waiters: list[Waiters] = []
        self.is_ready = self.is_loaded = is_loaded
        self.is_held = False
        self.has_failed = False
        """Another server is to try, before this one does again."""
        self.running = 0
        self.rests_since = -inf
        """When the last of those running ended."""
        self.warm = False
        """To be loaded though nobody waits."""
        self.waits_since: float | None = None
        self.ready_since = -inf
        self.load_began: float | None = None
        self._load_seconds = 0.0

    def __repr__(self) -> str:
        return f"<ModelState {self.name} {self.word}, {self.running} running>"

    @property
    def word(self) -> str:
        """Its state in a word."""
        return "loading" if self.is_loading else "cold" if not self.is_loaded else "held" if self.is_held else "loaded"

    @property
    def is_loading(self) -> bool:
        return self.load_began is not None

    @property
    def has_work(self) -> bool:
        return self.running > 0 or any(crowd.waiting for crowd in self.waiters)

    def load_seconds(self, now: float) -> float:
        """How long it has been loading, in all."""
        return self._load_seconds + (0.0 if self.load_began is None else now - self.load_began)

    def set(self, *, is_loaded: bool | None = None, is_held: bool | None = None) -> bool:
        """Whether it became ready."""
        was = self.is_ready
        self.is_loaded = self.is_loaded if is_loaded is None else is_loaded
        self.is_held = self.is_held if is_held is None else is_held
        self.is_ready = self.is_loaded and not self.is_held
        return self.is_ready and not was

    def end(self, now: float) -> None:
        """Of its load."""
        self._load_seconds = self.load_seconds(now)
        self.load_began = None


class ModelResidency:
    """The models of one server. `may_load` tells whether the server could load a model now; `begin` is to start a load, and to call `ended`
    at its end, whatever becomes of it."""

    def __init__(
        self,
        clock: Callable[[], float],
        alarm: Callable[[float, Callable[[], object]], object],
        swap_after: Callable[[], float],
        may_load: Callable[[str], bool],
        begin: Callable[[ModelState], None],
        on_ready: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._alarm = alarm
        self._swap_after = swap_after
        self._may_load = may_load
        self._begin = begin
        self._on_ready = on_ready
        self.states: dict[str, ModelState] = {}
        self._shown: Collection[str] | None = None
        self._next: ModelState | None = None
        self._used: set[str] = set()
        """At work when the load began."""
        self._rivals: set[frozenset[str]] = set()
        self._friends: set[frozenset[str]] = set()
        """Pairs that were shown together."""
        self._alarm_at = inf

    def __repr__(self) -> str:
        return f"<Loads {list(self.states.values())}, next {self._next}>"

    def state(self, name: str, model: str, is_apart: bool) -> ModelState:
        found = self.states.get(name)
        if found is None:
            is_loaded = self._shown is None or name in self._shown
            found = self.states[name] = ModelState(name, model, is_apart, is_loaded)
        return found

    # What is told

    def update(self, shown: Collection[str]) -> bool:
        """These are loaded, by the server's word; whether a model became ready by that."""
        became = self._note(shown)
        for state in self.states.values():
            state.has_failed = False
        return self.schedule() or became

    def ended(
        self, state: ModelState, is_loaded: bool, before: LoadedModels | None, after: LoadedModels | None
    ) -> None:
        """The load of `state` is over; this was shown before and after it."""
        now = self._clock()
        state.end(now)
        if after is not None:
            self._note(after.until)
        if before is not None and after is not None:
            gone = before.until.keys() & self.states.keys() - after.until.keys() - {state.name}
            evicted = {
                frozenset((name, state.name)) for name in gone if name in self._used or before.until[name] > after.now
            }
            self._rivals |= evicted
            self._friends -= evicted
        state.waits_since = None
        state.warm = False
        state.ready_since = now
        state.set(is_loaded=is_loaded)
        self._next = None
        self._release()

    def _note(self, shown: Collection[str]) -> bool:
        self._shown = shown
        became = False
        for state in self.states.values():
            if not state.is_loading:
                if not state.is_loaded and state.name in shown:
                    state.ready_since = self._clock()
                became |= state.set(is_loaded=state.name in shown)
                state.warm = state.warm and not state.is_loaded
        together = {frozenset(pair) for pair in combinations((name for name in self.states if name in shown), 2)}
        self._rivals -= together
        self._friends |= together
        return became

    def _release(self) -> bool:
        became = [state.set(is_held=False) for state in self.states.values()]
        return any(became)

    # What follows

    def schedule(self) -> bool:
        """Begin the load that is due; whether a model became ready since another needs no room any more."""
        released = False
        if self._next is not None:
            if self._next.is_loading:
                return False
            if not self._is_wanted(self._next) or not self._may_load(self._next.model):
                self._next = None
                released = self._release()
        if self._next is None:
            self._next = self._choose()
            if self._next is None:
                return released
            for state in self._rivals_of(self._next):
                state.set(is_held=True)
        if not any(state.is_held and state.running for state in self.states.values()):
            self._start(self._next)
        return released

    def _start(self, state: ModelState) -> None:
        self._used = {other.name for other in self.states.values() if other.running}
        state.load_began = began = self._clock()
        self._alarm(self._swap_after(), lambda: self._press(state, began))
        self._begin(state)

    def _press(self, state: ModelState, began: float) -> None:
        """The load that `began` then takes long: nothing new for those that it may be waiting for."""
        if state.load_began == began:
            for other in self.states.values():
                if other.is_loaded and other.has_work and frozenset((other.name, state.name)) not in self._friends:
                    other.set(is_held=True)

    def _is_wanted(self, state: ModelState) -> bool:
        return any(crowd.wants(state) for crowd in state.waiters)

    def _rivals_of(self, state: ModelState) -> list[ModelState]:
        return [
            other
            for other in self.states.values()
            if other.is_loaded and frozenset((other.name, state.name)) in self._rivals
        ]

    def _choose(self) -> ModelState | None:
        """The one to be loaded next, if its time has come; else an alarm is set for when it has."""
        now = self._clock()
        wanted = []
        for state in self.states.values():
            if state.is_loaded or not self._may_load(state.model):
                continue
            if self._is_wanted(state):
                state.waits_since = now if state.waits_since is None else state.waits_since
                wanted.append(state)
            else:
                state.waits_since = None
        for state in sorted(wanted, key=lambda state: state.waits_since or 0.0):
            begins = max((self._turn_ends(state, rival) for rival in self._rivals_of(state)), default=now)
            if begins <= now:
                return state
            self._schedule_at(begins)
        if wanted:
            return None
        return next(
            (
                s
                for s in self.states.values()
                if s.warm and not s.is_loaded and self._may_load(s.model) and not self._rivals_of(s)
            ),
            None,
        )

    def _turn_ends(self, state: ModelState, rival: ModelState) -> float:
        assert state.waits_since is not None
        ends = max(state.waits_since, rival.ready_since) + self._swap_after()
        return ends if rival.has_work else min(ends, rival.rests_since + REST_SECONDS)

    def _schedule_at(self, time: float) -> None:
        now = self._clock()
        if time < self._alarm_at or self._alarm_at <= now:
            self._alarm_at = time
            self._alarm(time - now, self._on_timer)

    def _on_timer(self) -> None:
        self._alarm_at = inf
        if self.schedule():
            self._on_ready()
