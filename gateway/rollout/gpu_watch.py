"""Watches the engines that sleep: one that is started anew, by a supervisor or after a reboot, takes the GPU.

Such an engine is told to free the GPU again. Only the change is acted on: an engine that answers although
its `stop` command has freed the GPU is left alone.
"""

import asyncio
import logging

from gateway.rollout.gpu_state import GpuState
from gateway.upstream.gpu_engine import EngineStuck

WATCH_SECONDS = 10.0

_log = logging.getLogger(__name__)


class GpuWatch:
    """Watch of the engines in `state`. It holds `lock` while it tells an engine anything, as a switch does."""

    def __init__(self, state: GpuState, lock: asyncio.Lock) -> None:
        self._state = state
        self._lock = lock
        self._held: dict[str, bool] = {}
        """Whether each engine that sleeps had memory of the GPU when it was last asked."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name in list(self._state.engines):
                try:
                    await self._check(name)
                except Exception:  # the watch has to go on
                    _log.exception("backend %s: the check of the GPU failed", name)

    async def _check(self, name: str) -> None:
        if not self._should_sleep(name):
            self._held.pop(name, None)
            return
        before = self._held.get(name)
        self._held[name] = await self._state.engines[name].holds_gpu()
        if before is not False or not self._held[name]:
            return
        async with self._lock:
            if not self._should_sleep(name):
                return
            _log.warning("backend %s has taken memory of the GPU, which is not its turn: it is freed again", name)
            try:
                await self._state.engines[name].free()
            except EngineStuck as failure:
                _log.error("backend %s goes on to have memory of the GPU: %s", name, failure.why)

    def _should_sleep(self, name: str) -> bool:
        state = self._state
        return state.phase == "ready" and name in state.engines and state.backend(name).turn == "asleep"
