"""Ollama's runners: which models are loaded, and which must be evicted for a load.

Follows Ollama's server/sched.go (0.24.0 and 0.33.0-rc2, the same in both) and observations of real
servers. Loads run one at a time, each in the request that needs it; if that client leaves, the load
is aborted.

Eviction. If memory or `OLLAMA_MAX_LOADED_MODELS` does not allow one more model, a load chooses one
runner: the idle one with the shortest `keep_alive`, or else the busy one with the shortest
`keep_alive`. It sets that runner's `keep_alive` to zero and waits until some runner is unloaded. An
idle runner is unloaded at once, however long its `keep_alive` still lasts. A busy one is unloaded
when its last request has ended. Its model still counts as loaded until then, so further requests
for it do not wait, and postpone the unloading. If one of them has its own `keep_alive`, that
replaces the zero: the runner then stays that long after its last request, and the load waits on.
The wait does not end when the client of the load leaves, and no other load begins meanwhile. A
request that unloads the runner (`keep_alive` 0) ends it, once the runner has no requests.

Freezes. When many clients leave a model at once, a real Ollama may keep the slot of one of them for
ever. Its runner then answers no request until it is unloaded, which needs all its requests to end.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.simulate.clock import Clock
from gateway.simulate.engine import SimulatedLane
from gateway.simulate.gpu import OutOfGpuMemory, SharedGpu
from gateway.simulate.options import Model, Options

DEFAULT_KEEP_ALIVE = 300.0
LEFT_AT_ONCE_SECONDS = 0.1
LEAST_CONTEXT = 4
LEAST_CONTEXT_OF_VISION = 2048


class LoadFailed(Exception):
    """The GPU has too little free memory for the model."""


class TooManyPending(Exception):
    """Too many requests wait for a load."""


class Runner:
    """A loaded model.

    `refs` counts its requests, running or queued. `expires` is the clock's time at which it is
    unloaded if idle.
    """

    def __init__(self, model: Model, context_length: int, slots: int) -> None:
        self.model = model
        self.context_length = context_length
        self.lane = SimulatedLane(slots)
        self.keep_alive = DEFAULT_KEEP_ALIVE
        self.refs = 0
        self.left: list[float] = []
        """Times at which clients left."""
        self.expires = 0.0


class Scheduler:
    """Runners of one server.

    A single event loop uses it, so only the loads need a lock.
    """

    def __init__(self, options: Options, clock: Clock, gpu: SharedGpu | None = None) -> None:
        self._options = options
        self._gpu = gpu or SharedGpu("", options.gpu_memory)
        self._clock = clock
        self._runners: dict[str, Runner] = {}
        self._loading = asyncio.Lock()
        self._pending = 0
        self.loads = 0
        """Number of loads so far."""
        self._unloads = 0
        self._evicting_since: int | None = None
        """Number of unloads at the time of the last eviction, until the next unload.

        It outlives the request that evicts.
        """
        self._changed = asyncio.Event()
        """Set, and replaced, when a runner becomes idle or is unloaded."""

    def runners(self) -> list[Runner]:
        """Unload the expired runners and return the others."""
        now = self._clock.now()
        for runner in list(self._runners.values()):
            if not runner.refs and runner.keep_alive >= 0 and runner.expires <= now:
                self._unload(runner)
        return list(self._runners.values())

    def expires_in(self, runner: Runner) -> float | None:
        """Return the seconds until a runner expires if it stays idle; None for never."""
        if runner.keep_alive < 0:
            return None
        return runner.keep_alive if runner.refs else max(0.0, runner.expires - self._clock.now())

    def expire(self, model: Model) -> None:
        """Unload the model as soon as its last request has ended."""
        if runner := self._runners.get(model.tagged):
            self._expire(runner)

    def freeze(self, model: Model) -> bool:
        """Let the runner of `model` start no more requests. Return False if the model is not loaded."""
        runner = self._runners.get(model.tagged)
        if runner is not None:
            runner.lane.is_frozen = True
        return runner is not None

    @asynccontextmanager
    async def served(self, runner: Runner) -> AsyncIterator[None]:
        """Freeze the runner if the client of the block leaves, and many others have just left."""
        try:
            yield
        except asyncio.CancelledError:
            self._count_left(runner)
            raise

    def _count_left(self, runner: Runner) -> None:
        now = self._clock.now()
        runner.left = [time for time in runner.left if time > now - LEFT_AT_ONCE_SECONDS] + [now]
        if self._options.freeze_after and len(runner.left) >= self._options.freeze_after:
            runner.lane.is_frozen = True

    def crash(self, runner: Runner) -> None:
        """Unload the runner at once, even if it has requests."""
        self._unload(runner)

    @asynccontextmanager
    async def runner(
        self, model: Model, context_length: int | None, keep_alive: float | None
    ) -> AsyncIterator[tuple[Runner, float]]:
        """Keep a runner of `model` with that context during the block; yield it and the seconds it
        took.

        Raises:
            TooManyPending: `max_queue` requests already wait for the current load.
            LoadFailed: the GPU has too little free memory.
        """
        began = self._clock.now()
        wanted = self._context(model, context_length)
        runner = self._usable(model, wanted) or await self._load(model, wanted)
        runner.refs += 1
        if keep_alive is not None:
            runner.keep_alive = keep_alive
        try:
            yield runner, self._clock.now() - began
        finally:
            runner.refs -= 1
            runner.expires = self._clock.now() + runner.keep_alive
            if not runner.refs and not runner.keep_alive:
                self._unload(runner)
            self._notify()

    def _context(self, model: Model, asked: int | None) -> int:
        least = LEAST_CONTEXT_OF_VISION if model.vision else LEAST_CONTEXT
        return min(max(asked if asked is not None else model.context_length, least), model.longest)

    def _usable(self, model: Model, context_length: int) -> Runner | None:
        self.runners()
        runner = self._runners.get(model.tagged)
        return runner if runner is not None and runner.context_length == context_length else None

    async def _load(self, model: Model, context_length: int) -> Runner:
        if self._pending > self._options.max_queue:
            raise TooManyPending
        self._pending += 1
        try:
            async with self._loading:
                await self._finish_eviction()
                while (runner := self._usable(model, context_length)) is None:
                    victim = self._victim_for(model)
                    if victim is not None:
                        self._evicting_since = self._unloads
                        self._expire(victim)
                        await self._finish_eviction()
                        continue
                    await self._clock.sleep(self._options.load_seconds)
                    try:
                        self._hold(model.size)
                    except OutOfGpuMemory:
                        raise LoadFailed from None
                    slots = 1 if model.is_serial else self._options.parallel
                    runner = self._runners[model.tagged] = Runner(model, context_length, slots)
                    runner.expires = self._clock.now() + runner.keep_alive
                    self.loads += 1
                return runner
        finally:
            self._pending -= 1

    def _victim_for(self, model: Model) -> Runner | None:
        """Return the runner to evict before `model` can be loaded; None if it fits.

        That is the model's own runner with another context, else the one with the shortest
        `keep_alive`, idle ones first.
        """
        if own := self._runners.get(model.tagged):
            return own
        others = self.runners()
        size = sum(runner.model.size for runner in others) + model.size
        fits = len(others) < self._options.max_loaded and (not self._options.memory or size <= self._options.memory)
        if fits or not others:
            return None
        by_keep_alive = sorted(
            others,
            key=lambda runner: (runner.keep_alive if runner.keep_alive >= 0 else float("inf"), runner.model.tagged),
        )
        return next((runner for runner in by_keep_alive if not runner.refs), by_keep_alive[0])

    async def _finish_eviction(self) -> None:
        """Wait until a runner has been unloaded since the last eviction."""
        while self._evicting_since == self._unloads:
            idle = [self.expires_in(runner) for runner in self._runners.values() if not runner.refs]
            await self._clock.wait(self._changed, min((left for left in idle if left is not None), default=None))
            self.runners()
        self._evicting_since = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _expire(self, runner: Runner) -> None:
        runner.keep_alive = 0.0
        if not runner.refs:
            self._unload(runner)

    def _unload(self, runner: Runner) -> None:
        if self._runners.get(runner.model.tagged) is runner:
            del self._runners[runner.model.tagged]
            self._unloads += 1
            self._hold(0)
        self._notify()

    def _hold(self, more: int) -> None:
        """Hold the memory of the loaded models, and of one that needs `more` bytes."""
        self._gpu.hold(sum(runner.model.size for runner in self._runners.values()) + more)
