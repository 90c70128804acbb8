"""Model residency of one Ollama: which models are loaded, which is next, and which make room.

Synchronous: it decides, and `upstream/model_loader.py` loads and unloads.

Reasons. Ollama loads a model as part of the request that asks for it, and drops the load when that
client disconnects. It may refuse a load while another one is running. If memory is short, a load
evicts another model, once that model has no requests left, and requests for that model overtake the
waiting load. So requests for a model that is not loaded stay queued, and the gateway loads the
model for all of them with a request of its own.

Knowledge. `update` receives what `/api/ps` reports, `ended` the outcome of a load, and `heard` that
a model has begun an answer. Before the first report, all models count as loaded. The gateway then
does nothing that it would not do without this module. Reports may be outdated: then a request is
slow, because it loads its model itself, or a load ends at once. A model that is not loaded, but has
requests in flight, is being loaded by them.

States. A model is (1) loaded, and `is_ready`; (2) loaded but held: it makes room; (3) cold; (4)
loading; (5) unloading, because it has frozen (`relay/frozen_models.py`). `schedule` moves models
between the first four. It is called when a request is queued, when a request leaves while others
wait, and with each probe:

  cold → loaded             by `heard`.
  cold → loading            if requests wait for the model, no other model is loading, and the
                            models that make room for it are idle. The model that has been wanted
                            the longest is next. Models that only need to be warm come after those.
  loaded → held             if a rival is next.
  loading → loaded or cold  by `ended`.
  held → loaded             by `ended`, or by `schedule` once the next model is not wanted any more.
  held → cold               by `unloaded`, if a load may be waiting for it (see below).
  loaded → unloading        by `begin_unload`.
  unloading → cold, loaded  by `end_unload`.

Rivals. Two models are rivals if loading one was seen to evict the other: the other was reported
before the load and not after it, and it was at work or not yet due to expire. They stop being
rivals when both are reported at the same time. While a rival is loaded and has work, or had some a
moment ago, a model waits up to `swap_after` seconds, from the later of two times: when the model
was first wanted, and when the rival was loaded. So each has that long in turn.

Slow loads. A load that takes longer than `swap_after` may be waiting for models that have worked
since it began. So these are then held too, unless they are known to fit together with the new
model. That is not enough if their requests carry a `keep_alive`: it replaces the order to unload
that Ollama gave when it chose the model to evict, and Ollama waits until that time is over as well
(server/sched.go 0.24 and 0.33, `useLoadedRunner`). So a model that is held for such a load, has no
requests left, and is still loaded `UNLOAD_AFTER_SECONDS` later, is unloaded. Models that were idle
all the time are not: Ollama would have evicted them at once.

Invariants.

L1: At most one model is loading, and models are held only for that one or for the next.
L2: A model that requests wait for, and that the server can load, is loaded after a bounded time:
    each hold has an end.
L3: `is_ready` is true exactly if the model is loaded, not held, and not unloading.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import combinations
from math import inf
from typing import NamedTuple

from gateway.admission.model_state import ModelState

IDLE_AFTER_SECONDS = 1.0
"""Seconds without work after which a model is idle.

A program that sends one request after the other leaves gaps, and a load takes longer than such a
gap.
"""

UNLOAD_AFTER_SECONDS = 2.0
"""Seconds that Ollama has to evict a model without requests, before the gateway unloads it."""
UNLOAD_AGAIN_SECONDS = 10.0
"""Interval at which the gateway tries again to unload a model that a load waits for."""


class LoadedModels(NamedTuple):
    """Loaded models that a server reports: expiry times by canonical name, and the server's time.

    All times are Unix times.
    """

    until: Mapping[str, float]
    now: float


class ModelResidency:
    """The models of one server.

    - `may_load` returns whether the server could load a model now.
    - `begin_load` starts a load, and must call `ended` when the load is over, whatever its outcome.
    - `make_room` starts to unload a model if the server still reports it, and must call `unloaded`
      if that succeeds. It may be called again before that.
    - `on_evicted` returns the requests for an evicted model that have no answer yet to the queue. At
      the server, they would evict the model that was loaded in its place.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], object]], object],
        swap_after: Callable[[], float],
        may_load: Callable[[str], bool],
        begin_load: Callable[[ModelState], None],
        on_ready: Callable[[], None],
        make_room: Callable[[ModelState], None],
        on_evicted: Callable[[ModelState], None],
    ) -> None:
        self._clock = clock
        self._call_later = call_later
        self._swap_after = swap_after
        self._may_load = may_load
        self._begin_load = begin_load
        self._on_ready = on_ready
        self._make_room = make_room
        self._on_evicted = on_evicted
        self.states: dict[str, ModelState] = {}
        self._reported: Collection[str] | None = None
        self._next: ModelState | None = None
        self._busy_at_start: set[str] = set()
        """Models that were at work when the load began."""
        self._may_block: set[str] = set()
        """Models that a slow load may be waiting for."""
        self._rivals: set[frozenset[str]] = set()
        self._compatible: set[frozenset[str]] = set()
        """Pairs of models that were reported at the same time."""
        self._timer_due = inf

    def __repr__(self) -> str:
        return f"<ModelResidency {list(self.states.values())}, next {self._next}>"

    @property
    def occupancy(self) -> int:
        """Number of models that the server has loaded or is about to, as far as is known."""
        loaded = set(self._reported or ()).union(name for name, state in self.states.items() if state.is_loaded)
        return len(loaded) + (self._next is not None and self._next.name not in loaded)

    def state(self, name: str, model: str, is_embedding: bool) -> ModelState:
        state = self.states.get(name)
        if state is None:
            is_loaded = self._reported is None or name in self._reported
            state = self.states[name] = ModelState(name, model, is_embedding, is_loaded)
        return state

    def forget(self, name: str) -> bool:
        """Drop the state of a model without requests. Return False if it is about to be loaded or unloaded."""
        state = self.states.get(name)
        if state is None or state.waiters or state.warm:
            return True
        if state is self._next or state.is_loading or state.is_unloading:
            return False
        del self.states[name]
        self._may_block.discard(name)
        self._busy_at_start.discard(name)
        self._rivals = {pair for pair in self._rivals if name not in pair}
        self._compatible = {pair for pair in self._compatible if name not in pair}
        return True

    # Reports

    def update(self, reported: Collection[str]) -> bool:
        """Apply the server's report of its loaded models. Return whether a model became ready."""
        became_ready = self._apply_report(reported)
        for state in self.states.values():
            state.has_failed = False
        return self.schedule() or became_ready

    def ended(
        self, state: ModelState, is_loaded: bool, before: LoadedModels | None, after: LoadedModels | None
    ) -> None:
        """Record the end of the load of `state`, with reports from before and after the load."""
        now = self._clock()
        state.end(now)
        if after is not None:
            self._apply_report(after.until)
        if before is not None and after is not None:
            gone = before.until.keys() & self.states.keys() - after.until.keys() - {state.name}
            evicted = {
                frozenset((name, state.name))
                for name in gone
                if name in self._busy_at_start or before.until[name] > after.now
            }
            self._rivals |= evicted
            self._compatible -= evicted
            for name in gone:
                self._on_evicted(self.states[name])
        state.wanted_since = None
        state.warm = False
        state.ready_since = now
        state.set(is_loaded=is_loaded)
        self._next = None
        self._release()

    def unloaded(self, state: ModelState) -> None:
        """Record that the server has unloaded a model at the request of `make_room`."""
        state.set(is_loaded=False)

    def heard(self, state: ModelState) -> bool:
        """Record that an answer of the model has begun, so it is loaded. Return whether it became ready."""
        if state.is_loaded or state.is_loading:
            return False
        state.ready_since = self._clock()
        for rival in self._rivals_of(state):
            rival.set(is_loaded=False)
            self._on_evicted(rival)
        makes_room = self._next is not None and self._are_rivals(self._next, state)
        if makes_room and self._next is not None and self._next.is_loading:
            self._may_block.add(state.name)
        return state.set(is_loaded=True, is_held=makes_room)

    def begin_unload(self, state: ModelState) -> None:
        """Admit no more requests for a model, because it is going to be unloaded."""
        state.set(is_unloading=True)

    def end_unload(self, state: ModelState, is_loaded: bool) -> None:
        """Record the end of an unload. Requests for the model start again, or a load for them."""
        state.set(is_unloading=False, is_loaded=is_loaded)

    def _apply_report(self, reported: Collection[str]) -> bool:
        self._reported = reported
        became_ready = False
        for state in self.states.values():
            if not state.is_loading:
                if not state.is_loaded and state.name in reported:
                    state.ready_since = self._clock()
                became_ready |= state.set(is_loaded=state.name in reported)
                state.warm = state.warm and not state.is_loaded
        together = {frozenset(pair) for pair in combinations((name for name in self.states if name in reported), 2)}
        self._rivals -= together
        self._compatible |= together
        for state in self.states.values():
            if state.running and not state.is_loaded and any(rival.is_loaded for rival in self._rivals_of(state)):
                self._on_evicted(state)
        return became_ready

    def _release(self) -> bool:
        became_ready = [state.set(is_held=False) for state in self.states.values()]
        return any(became_ready)

    # Decisions

    def schedule(self) -> bool:
        """Begin the load that is due.

        Return whether a model became ready because another one no longer needs room.
        """
        released = False
        if self._next is not None:
            if self._next.is_loading:
                self._watch_drained()
                return False
            if not self._is_wanted(self._next) or not self._may_load(self._next.model):
                self._next = None
                released = self._release()
        if self._next is None:
            self._next = self._choose_next()
            if self._next is None:
                return released
            for state in self._rivals_of(self._next):
                state.set(is_held=True)
        if not any(state.is_held and state.running for state in self.states.values()):
            self._start(self._next)
        return released

    def _start(self, state: ModelState) -> None:
        self._busy_at_start = {other.name for other in self.states.values() if other.running}
        self._may_block = set()
        state.load_began = began = self._clock()
        self._call_later(self._swap_after(), lambda: self._hold_busy_models(state, began))
        self._begin_load(state)

    def _hold_busy_models(self, state: ModelState, began: float) -> None:
        """Hold the models that the load begun at `began` may be waiting for, if it still runs."""
        if state.load_began != began:
            return
        for other in self.states.values():
            has_worked = other.has_work or other.idle_since >= began
            if other.is_ready and has_worked and frozenset((other.name, state.name)) not in self._compatible:
                other.set(is_held=True)
                self._may_block.add(other.name)
        self._watch_drained()

    def _watch_drained(self) -> None:
        """Give Ollama some time to evict the models that the load may be waiting for."""
        state = self._next
        assert state is not None
        assert state.load_began is not None
        for name in [name for name in self._may_block if not self.states[name].running]:
            self._may_block.discard(name)
            self._call_later(UNLOAD_AFTER_SECONDS, partial(self._unload_drained, self.states[name], state.load_began))

    def _unload_drained(self, state: ModelState, began: float) -> None:
        """Unload a held model, unless the load begun at `began` has ended."""
        if self._next is not None and self._next.load_began == began and state.is_loaded and state.is_held:
            self._make_room(state)
            self._call_later(UNLOAD_AGAIN_SECONDS, partial(self._unload_drained, state, began))

    def _is_wanted(self, state: ModelState) -> bool:
        return any(queue.wants(state) for queue in state.waiters)

    def _rivals_of(self, state: ModelState) -> list[ModelState]:
        return [
            other
            for other in self.states.values()
            if (other.is_loaded or other.running) and self._are_rivals(other, state)
        ]

    def _are_rivals(self, one: ModelState, other: ModelState) -> bool:
        return frozenset((one.name, other.name)) in self._rivals

    def _choose_next(self) -> ModelState | None:
        """Return the model to load next, if one is due. Otherwise set a timer for the next one."""
        now = self._clock()
        wanted = []
        for state in self.states.values():
            if state.is_loaded or state.is_unloading or not self._may_load(state.model):
                continue
            if self._is_wanted(state):
                state.wanted_since = now if state.wanted_since is None else state.wanted_since
                wanted.append(state)
            else:
                state.wanted_since = None
        for state in sorted(wanted, key=lambda state: state.wanted_since or 0.0):
            begins = max((self._turn_end(state, rival) for rival in self._rivals_of(state)), default=now)
            if begins <= now:
                return state
            self._schedule_at(begins)
        if wanted:
            return None
        return next(
            (
                state
                for state in self.states.values()
                if state.warm and not state.is_loaded and self._may_load(state.model) and not self._rivals_of(state)
            ),
            None,
        )

    def _turn_end(self, state: ModelState, rival: ModelState) -> float:
        assert state.wanted_since is not None
        ends = max(state.wanted_since, rival.ready_since) + self._swap_after()
        return ends if rival.has_work else min(ends, rival.idle_since + IDLE_AFTER_SECONDS)

    def _schedule_at(self, time: float) -> None:
        now = self._clock()
        if time < self._timer_due or self._timer_due <= now:
            self._timer_due = time
            self._call_later(time - now, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_due = inf
        if self.schedule():
            self._on_ready()
