"""Ollama's runners: what is loaded, what a load waits for, and what has to go for it (Ollama, server/sched.go, and as seen on real ones).

Loads are made one at a time, each in the request that asked for it: it ends when that client leaves, and then no runner is there. Requests for
a model that is loaded pass by, also those for a runner that has been told to go; it goes when none of them is left. One that brings a
`keep_alive` of its own keeps it there for that long, and who waits for its place waits on.
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


class Busy(Exception):
    """Too many requests wait for a load."""


class Runner:
    """A loaded model. `refs` requests are at it, running or in its line; `expires` is the clock's time at which it goes when idle."""

    def __init__(self, model: Model, context_length: int, places: int) -> None:
        self.model = model
        self.context_length = context_length
        self.lane = SimulatedLane(places)
        self.keep_alive = DEFAULT_KEEP_ALIVE
        self.refs = 0
        self.expires = 0.0
        self.gone = False
        self.changed = asyncio.Event()

    def tell(self) -> None:
        """Let those look again who wait for this one to go."""
        self.changed.set()
        self.changed = asyncio.Event()


class Scheduler:
    """The runners of one server. Only one event loop touches it, so nothing here is locked but the loads."""

    def __init__(self, options: Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._runners: dict[str, Runner] = {}
        self._loading = asyncio.Lock()
        self._pending = 0

    def runners(self) -> list[Runner]:
        """Those that there are now; the ones past their time are gone."""
        now = self._clock.now()
        for runner in list(self._runners.values()):
            if not runner.refs and runner.keep_alive >= 0 and runner.expires <= now:
                self._unload(runner)
        return list(self._runners.values())

    def expires_in(self, runner: Runner) -> float | None:
        """Seconds that an idle runner stays, from its last use; None for ever."""
        if runner.keep_alive < 0:
            return None
        return runner.keep_alive if runner.refs else max(0.0, runner.expires - self._clock.now())

    def expire(self, model: Model) -> None:
        """Have the model go when its last request is done."""
        if runner := self._runners.get(model.tagged):
            self._dismiss(runner)

    def crash(self, runner: Runner) -> None:
        """The runner is no more, whoever was at it."""
        self._unload(runner)

    @asynccontextmanager
    async def runner(
        self, model: Model, context_length: int | None, keep_alive: float | None
    ) -> AsyncIterator[tuple[Runner, float]]:
        """A runner of `model` with that context, kept while the block runs, and the seconds that it took to have it.

        Raises:
            Busy: `max_queue` requests wait for the load that is going on.
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
            runner.tell()

    def _context(self, model: Model, asked: int | None) -> int:
        least = LEAST_CONTEXT_OF_VISION if model.vision else LEAST_CONTEXT
        return min(max(asked if asked is not None else model.context_length, least), model.longest)

    def _usable(self, model: Model, context_length: int) -> Runner | None:
        self.runners()
        runner = self._runners.get(model.tagged)
        return runner if runner is not None and runner.context_length == context_length else None

    async def _load(self, model: Model, context_length: int) -> Runner:
        if self._pending > self._options.max_queue:
            raise Busy
        self._pending += 1
        try:
            async with self._loading:
                while (runner := self._usable(model, context_length)) is None:
                    victim = self._in_the_way(model)
                    if victim is not None:
                        await self._see_off(victim)
                        continue
                    await self._clock.sleep(self._options.load_seconds)
                    places = 1 if model.is_serial else self._options.parallel
                    runner = self._runners[model.tagged] = Runner(model, context_length, places)
                    runner.expires = self._clock.now() + runner.keep_alive
                return runner
        finally:
            self._pending -= 1

    def _in_the_way(self, model: Model) -> Runner | None:
        """The runner that must go before `model` can be loaded: its own of another shape, else an idle one, the shortest kept first."""
        if own := self._runners.get(model.tagged):
            return own
        others = self.runners()
        size = sum(runner.model.size for runner in others) + model.size
        fits = len(others) < self._options.max_loaded and (not self._options.memory or size <= self._options.memory)
        if fits or not others:
            return None
        by_patience = sorted(
            others,
            key=lambda runner: (runner.keep_alive if runner.keep_alive >= 0 else float("inf"), runner.model.tagged),
        )
        return next((runner for runner in by_patience if not runner.refs), by_patience[0])

    async def _see_off(self, victim: Runner) -> None:
        self._dismiss(victim)
        while not victim.gone:
            seconds = None if victim.refs else self.expires_in(victim)
            await self._clock.wait(victim.changed, seconds)
            self.runners()

    def _dismiss(self, runner: Runner) -> None:
        runner.keep_alive = 0.0
        if not runner.refs:
            self._unload(runner)

    def _unload(self, runner: Runner) -> None:
        if self._runners.get(runner.model.tagged) is runner:
            del self._runners[runner.model.tagged]
        runner.gone = True
        runner.tell()
