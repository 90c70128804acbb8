"""Sleep mode of vLLM 0.32: `/sleep`, `/wake_up`, `/is_sleeping` and the part of `/server_info` that tells of it.

Follows vllm/entrypoints/serve/dev and vllm/v1/engine/core.py. The endpoints exist with
`VLLM_SERVER_DEV_MODE=1` (`dev_mode`). Without `--enable-sleep-mode` (`sleep_mode`), and always on a CPU, an
engine says that it sleeps and keeps its memory. Requests to an engine that sleeps wait until it wakes.
"""

import asyncio
from urllib.parse import parse_qs

from gateway.simulate.engine import SimulatedEngine
from gateway.simulate.gpu import OutOfGpuMemory
from gateway.simulate.vllm.errors import VllmApiError, bad_request

MODES = ("abort", "wait", "keep")
POLL_SECONDS = 0.005


class Sleeper:
    """Whether the engine sleeps. `level` 0 pauses it, and keeps its memory."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._awake = asyncio.Event()
        self.is_sleeping = engine.options.asleep
        if not self.is_sleeping:
            engine.gpu.hold(self._size)
            self._awake.set()

    @property
    def _size(self) -> int:
        return int(self._engine.options.gpu_share * self._engine.options.gpu_memory)

    async def until_awake(self) -> None:
        """Wait until the engine is awake."""
        if not self._awake.is_set():
            self._engine.asked_asleep += 1
        await self._awake.wait()

    async def sleep(self, query: str) -> int:
        """Sleep; return the level.

        Raises:
            VllmApiError: a parameter is invalid.
        """
        given = {name: values[-1] for name, values in parse_qs(query).items()}
        level, mode = given.get("level", "1"), given.get("mode", "abort")
        if level not in ("0", "1", "2") or mode not in MODES:
            raise bad_request("level must be 0, 1 or 2, and mode abort, wait or keep")
        self._awake.clear()
        if mode == "abort":
            self._engine.abort()
        while mode == "wait" and self._engine.running:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)  # as long as its requests take
        if not self.is_sleeping and level != "0":
            await self._engine.clock.sleep(self._engine.options.sleep_seconds)
            if self._engine.options.sleep_mode:
                self._engine.gpu.hold(0)
        self.is_sleeping = True
        return int(level)

    async def wake_up(self) -> None:
        """Wake up.

        Raises:
            VllmApiError: the GPU has too little free memory; the engine goes on to sleep.
        """
        if self.is_sleeping:
            await self._engine.clock.sleep(self._engine.options.wake_seconds)
            try:
                self._engine.gpu.hold(self._size)
            except OutOfGpuMemory:
                raise VllmApiError(500, "Internal server error", "InternalServerError") from None
        self.is_sleeping = False
        self._awake.set()
