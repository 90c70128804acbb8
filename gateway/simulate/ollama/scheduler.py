"""Ollama's runners: which models are loaded, and which must be evicted for a load.

Follows Ollama's server/sched.go and observations of real servers. Loads run one at a time, each in
the request that needs it; if that client leaves, the load is aborted. Requests for a loaded model
do not wait for a load of another, not even if their runner is about to be evicted: it is unloaded
when its last request has ended. A request with its own `keep_alive` keeps that runner for so long,
and the load that needs its memory waits on.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.simulate.clock import Clock
from gateway.simulate.engine import SimulatedLane
from gateway.simulate.options import Model, Options

DEFAULT_KEEP_ALIVE = 300.0
LEAST_CONTEXT = 4
LEAST_CONTEXT_OF_VISION = 2048


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
        self.expires = 0.0
        self.is_unloaded = False
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Wake up the load that waits for this runner to be unloaded."""
        self.changed.set()
        self.changed = asyncio.Event()


class Scheduler:
    """Runners of one server.

    A single event loop uses it, so only the loads need a lock.
    """

    def __init__(self, options: Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._runners: dict[str, Runner] = {}
        self._loading = asyncio.Lock()
        self._pending = 0

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
            runner.notify()

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
                while (runner := self._usable(model, context_length)) is None:
                    victim = self._victim_for(model)
                    if victim is not None:
                        await self._evict(victim)
                        continue
                    await self._clock.sleep(self._options.load_seconds)
                    slots = 1 if model.is_serial else self._options.parallel
                    runner = self._runners[model.tagged] = Runner(model, context_length, slots)
                    runner.expires = self._clock.now() + runner.keep_alive
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

    async def _evict(self, victim: Runner) -> None:
        """Expire `victim` and wait until it is unloaded."""
        self._expire(victim)
        while not victim.is_unloaded:
            seconds = None if victim.refs else self.expires_in(victim)
            await self._clock.wait(victim.changed, seconds)
            self.runners()

    def _expire(self, runner: Runner) -> None:
        runner.keep_alive = 0.0
        if not runner.refs:
            self._unload(runner)

    def _unload(self, runner: Runner) -> None:
        if self._runners.get(runner.model.tagged) is runner:
            del self._runners[runner.model.tagged]
        runner.is_unloaded = True
        runner.notify()
