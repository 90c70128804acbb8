"""Turns of the engines on one GPU: a switch frees the GPU of one engine, and wakes the other.

Theory of operation. With `exclusive`, the backends on the GPU take turns (`Backend.turn`). The roll-out
says which one the GPU is for: the *target*. A change of the roll-out that changes the target begins a
switch, in the step that makes the change (`follow`): the target becomes `waking`, so that requests queue
there, and the engine that has the GPU becomes `leaving`. A task then takes the GPU through these phases:

1. `draining`: what runs at the engine that is left, or is queued there and cannot go elsewhere, ends.
2. `freeing`: it frees the GPU (`upstream/gpu_engine.py`), and is `asleep`.
3. `waking`: the target is started or woken, and waited for, for at most `wake_timeout`.
4. `ready`: the target is `awake`, and its queue is served.

Changes of direction. The target may change in each phase, because the roll-out is rolled back or the
settings change. An engine that is still `leaving` and becomes the target is `awake` at once. While an
engine frees the GPU, or a command of the operator's runs, the task is not interrupted, because nobody
could say what state that leaves. Everything else is cancelled.

Failures. If the target does not come up, or the other engine does not free the GPU, the change that
began the switch is taken back with the reason, and the engine that was left is woken. If that one does
not come up either, the phase is `failed`, requests are refused, and the task tries again. A switch that
itself leads back is not taken back.

Invariants.

G1: At most one engine is `awake` or `leaving`, and none is while another one has the GPU, as far as is
    known.
G2: An engine is told to start only after all others have freed the GPU, or failed to on the way back.
G3: While no engine is `awake`, the task runs.

A restart finds out which engine has the GPU and goes on from there, so no step has to be complete when
the gateway ends.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from gateway.config import Settings
from gateway.rollout.assignment import Change
from gateway.rollout.gpu_state import GpuState, Switch, is_busy
from gateway.rollout.gpu_times import GpuTimes
from gateway.rollout.gpu_watch import GpuWatch
from gateway.rollout.state import Rollout
from gateway.state_file import StateFile
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.gpu_engine import EngineStuck, GpuEngine

SECTION = "gpu"
"""Section of the state file."""
DRAIN_CHECK_SECONDS = 0.05
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 60.0
"""Time between two attempts to wake the only engine that is left: the first, and the longest."""
CLOSE_SECONDS = 5.0
"""Time for a step that is not interrupted to end when the gateway ends."""

_log = logging.getLogger(__name__)


class Redirected(Exception):
    """The target has changed."""


class GpuSwitcher:
    """Takes the GPU from one backend to another. It does nothing unless `settings.exclusive` is set.

    - `backends` are those in force by name; the dict changes in place.
    - `build` returns the engine of a backend.
    - `clock` returns monotonic time in seconds.
    - `on_ready` is called at the end of a switch with the change that began it.
    """

    def __init__(
        self,
        settings: Settings,
        rollout: Rollout,
        backends: Mapping[str, Backend],
        build: Callable[[Backend], GpuEngine],
        metrics: Metrics,
        state_file: StateFile,
        clock: Callable[[], float],
        on_ready: Callable[[Change], None] = lambda change: None,
    ) -> None:
        self._rollout = rollout
        self._backends = backends
        self._build = build
        self._state_file = state_file
        self._on_ready = on_ready
        kept = state_file.get(SECTION)
        self._kept: Mapping[str, Any] = kept if isinstance(kept, dict) else {}
        self.state = GpuState(settings, metrics, GpuTimes(self._kept.get("times")), clock)
        self._lock = asyncio.Lock()
        """Held while engines are told to free the GPU or to wake."""
        self._watch = GpuWatch(self.state, self._lock)
        self._has_new_engine = False
        self._redirected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._is_closing = False
        if settings.exclusive:
            rollout.reason_to_refuse = self._reason_to_refuse

    def __repr__(self) -> str:
        return f"<GpuSwitcher {self.state}>"

    # Start, settings, end

    def begin(self) -> None:
        """Begin to find out which engine has the GPU. Until then, requests are queued for the target."""
        if self.state.settings.exclusive:
            self._adopt()
            self.state.take_turns(self._wanted() or self._default())
            self.state.enter("waking")
            self._task = asyncio.get_running_loop().create_task(self._run(is_start=True))
            self._watch.start()

    def prepare_reload(self, settings: Settings) -> None:
        """Take over other settings, before the roll-out does. A backend with other servers has a new engine."""
        self.state.settings = settings
        if self.state.target is not None:
            self._adopt()

    def finish_reload(self) -> None:
        """Give the new engines their turns, after the roll-out has followed the settings."""
        target = self.state.target
        if target is not None and (self._has_new_engine or target not in self.state.engines):
            self._redirect(target if target in self.state.engines else self._wanted() or self._default(), None)

    def _adopt(self) -> None:
        """Note the engines of the backends in force. Those that are new may have memory of the GPU."""
        state, on_gpu = self.state, self.state.settings.on_gpu
        for name in sorted(on_gpu):
            if name not in state.engines or state.backend(name) is not self._backends[name]:
                state.engines[name] = self._build(self._backends[name])
                state.holding.add(name)
                state.backend(name).take_turn("asleep")
                self._has_new_engine = True
        for name in set(state.engines) - on_gpu:
            del state.engines[name]
            state.holding.discard(name)

    async def close(self) -> None:
        """End the task, after the step that it is in if that ends soon. A restart goes on from there."""
        self._is_closing = True
        self._redirected.set()
        await self._watch.close()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    # Orders

    @property
    def is_switching(self) -> bool:
        return self.state.switch is not None

    def follow(self, change: Change) -> None:
        """Begin a switch if `change` needs one, or reverse the one in progress.

        Called in the step that makes the change, before queued requests move.
        """
        target = self._wanted()
        if self.state.target is not None and target is not None and target != self.state.target:
            self._redirect(target, change)

    def _wanted(self) -> str | None:
        """Return the backend on the GPU that serves tiers, by the roll-out; None if none does."""
        on_gpu = self.state.settings.on_gpu
        used = (route.assignment.backend for route in self._rollout.tiers.values() if not route.is_pinned)
        return next((backend for backend in used if backend in on_gpu), None)

    def _default(self) -> str:
        settings = self.state.settings
        candidates = (settings.llm_backend, settings.rollback_to, *sorted(settings.on_gpu))
        return next(name for name in candidates if name in settings.on_gpu)

    def _reason_to_refuse(self) -> str | None:
        """Return why the roll-out takes no new order, or None if it does."""
        switch, phase = self.state.switch, self.state.phase
        if switch is None or phase == "failed":
            return None
        return (
            f"A switch to {switch.target} is in progress ({phase} for {self.state.seconds_in_phase():.0f} s). "
            "Wait for its end, or reverse it with a rollback. Nothing was changed."
        )

    def _redirect(self, target: str, change: Change | None) -> None:
        state = self.state
        previous, self._has_new_engine = state.switch, False
        if previous is not None:
            state.count(previous, "reversed")
        source = state.holder_besides(target) if previous is None else previous.target
        state.switch = Switch(None if source == target else source, target, change, state.clock())
        state.switch.is_return = previous is not None or change is None
        state.take_turns(target)
        state.enter("draining")
        self._keep()
        self._redirected.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    # The task

    async def _run(self, *, is_start: bool = False) -> None:
        """Take the GPU to the target, until one engine is awake."""
        retry = RETRY_SECONDS
        while not self._is_closing:
            self._redirected.clear()
            try:
                if is_start:
                    await self._interruptible(self._find_holders())
                async with self._lock:
                    await self._turn_to(self.state.target or "", loads=not is_start or self.state.switch is not None)
                return
            except Redirected:
                retry = RETRY_SECONDS
            except EngineStuck as failure:
                if not self._take_back(failure.why):
                    await self._fail(failure.why, retry)
                    retry = min(2 * retry, LONGEST_RETRY_SECONDS)
            except Exception:  # requests wait for the outcome
                _log.exception("a switch of the engines failed inside the gateway")
                await self._fail("an error inside the gateway", retry)
            is_start = False

    async def _find_holders(self) -> None:
        """Find out which engines have the GPU, and go on with a switch that was not finished."""
        state, target = self.state, self.state.target or ""
        names = list(state.engines)
        found = await asyncio.gather(*(state.engines[name].holds_gpu() for name in names))
        state.holding = {name for name, holds in zip(names, found, strict=True) if holds}
        before = self._kept.get("from")
        source = before if before in state.engines and before != target else state.holder_besides(target)
        if source is not None:
            why = "has it" if source in state.holding else "was left for it, in a switch that was not finished"
            _log.warning("the GPU is for backend %s, and %s %s: switching to %s", target, source, why, target)
            state.switch = Switch(source, target, None, state.clock())
            self._keep()

    async def _turn_to(self, target: str, *, loads: bool) -> None:
        state = self.state
        others = [name for name in state.engines if name != target and name in state.holding]
        await self._drain([name for name in others if state.backend(name).turn == "leaving"])
        self._check_redirected()
        await self._free(others)
        for name in state.engines:
            if name != target:
                state.backend(name).refuse_queued()
        if state.backend(target).turn != "awake":
            await self._wake(target, loads=loads)
        self._check_redirected()
        self._finish(target)

    async def _drain(self, names: list[str]) -> None:
        if not names:
            return
        self.state.enter("draining")
        await self._interruptible(self._until_idle(names))
        for name in names:
            self.state.observe(name)

    async def _until_idle(self, names: list[str]) -> None:
        """Wait until nothing runs at these engines.

        Raises:
            EngineStuck: one of them is known to be unable to free the GPU, and the switch is not on its way back.
        """
        checking = asyncio.ensure_future(self._obstacle([] if self.state.is_returning else names))
        try:
            while not checking.done() or any(is_busy(self.state.backend(name)) for name in names):
                if checking.done() and checking.result():
                    break
                await asyncio.sleep(DRAIN_CHECK_SECONDS)
            if why := checking.result():
                raise EngineStuck(why)
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)

    async def _obstacle(self, names: list[str]) -> str:
        for name in names:
            if why := await self.state.engines[name].obstacle():
                return f"{name} cannot free the GPU: {why}"
        return ""

    async def _free(self, names: list[str]) -> None:
        state = self.state
        if names:
            state.enter("freeing")
        for name in names:
            state.backend(name).take_turn("asleep")
        for name in names:
            began = state.clock()
            try:
                await state.engines[name].free()
            except EngineStuck as failure:
                if not state.is_returning:
                    raise EngineStuck(f"{name} did not free the GPU: {failure.why}") from None
                _log.warning("backend %s may still have memory of the GPU: %s", name, failure.why)
            else:
                seconds = state.clock() - began
                state.holding.discard(name)
                state.times.record("free", name, seconds)
                _log.info("backend %s has freed the GPU in %.1f s", name, seconds)
            state.observe(name)
            self._check_redirected()

    async def _wake(self, name: str, *, loads: bool) -> None:
        state = self.state
        state.enter("waking")
        engine, began, timeout = state.engines[name], state.clock(), state.settings.wake_timeout
        was_freed = name not in state.holding
        state.holding.add(name)
        try:
            if loads or not await engine.answers():
                await engine.start(timeout)
            self._check_redirected()
            left = max(1.0, timeout - (state.clock() - began))
            await self._interruptible(engine.wake(self._models(name), left, loads=loads))
        except EngineStuck as failure:
            raise EngineStuck(f"{name} did not come up: {failure.why}") from None
        if loads and was_freed:
            state.times.record("wake", name, state.clock() - began)
        state.observe(name)
        _log.info("backend %s has the GPU after %.1f s", name, state.clock() - began)

    def _models(self, name: str) -> list[str]:
        """Return the models of the tiers that the engine is woken for, the one with the most waiting requests first."""
        waiting = {route.route.model: 0 for route in self._rollout.tiers.values() if route.assignment.backend == name}
        for queue in self.state.backend(name).admission.queues:
            if queue.model in waiting:
                waiting[queue.model] += queue.waiting
        return sorted(waiting, key=lambda model: -waiting[model])

    def _finish(self, target: str) -> None:
        state = self.state
        state.backend(target).take_turn("awake")
        switch = state.end_switch()
        state.enter("ready")
        if switch is not None:
            state.count(switch, "done")
            _log.info("switched the GPU to %s in %.1f s", target, state.clock() - switch.began)
            if switch.change is not None:
                self._on_ready(switch.change)
        self._keep()
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._warn_of_obstacle(target))

    async def _warn_of_obstacle(self, name: str) -> None:
        """Log whether the engine that has the GPU now could not free it later."""
        why = await self._obstacle([name])
        if why:
            _log.warning("the next switch would fail: %s", why)

    def _take_back(self, why: str) -> bool:
        """Take back the change that began the switch. Return False if it cannot be taken back."""
        state, switch = self.state, self.state.switch
        if switch is None or switch.is_return or switch.source is None or switch.source not in state.engines:
            return False
        state.count(switch, "failed", why)
        _log.error("the switch to %s has failed, and is taken back: %s", switch.target, why)
        state.end_switch()
        if switch.change is None:
            self._rollout.rollback(to=switch.source, cause="exclusive", why=why)
        else:
            self._rollout.take_back(switch.change, why)
        if state.switch is None:  # the settings no longer have a way back
            self._redirect(switch.target, None)
        else:
            state.switch.is_return = True
        return True

    async def _fail(self, why: str, retry: float) -> None:
        """Refuse requests, and wait before the next attempt."""
        target = self.state.target or ""
        _log.error("no engine has the GPU: %s; trying again in %.0f s", why, retry)
        self.state.enter("failed")
        self.state.note_failure(target, why)
        self.state.backend(target).take_turn("asleep")
        self.state.backend(target).refuse_queued()
        with suppress(TimeoutError):
            async with asyncio.timeout(retry):
                await self._redirected.wait()

    async def _interruptible(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of `work`.

        Raises:
            Redirected: the target changed first, and `work` was cancelled.
        """
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self._redirected.wait())
        try:
            await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
            self._check_redirected()
            return working.result()
        finally:
            for task in (working, waiting):
                task.cancel()
            await asyncio.gather(working, waiting, return_exceptions=True)

    def _check_redirected(self) -> None:
        if self._redirected.is_set():
            raise Redirected

    def _keep(self) -> None:
        """Write the times, and the engine that an unfinished switch leaves, to the state file."""
        source = None if self.state.switch is None else self.state.switch.source
        self._state_file.put(SECTION, {"from": source, "times": self.state.times.to_persist()})
