"""Cleans up after settings that were in force once: what they needed goes when the last request that began under them is over."""

import asyncio
from collections.abc import Callable

LOOK_SECONDS = 0.5
"""How late the end of the last request may be noticed."""


class Retirement:
    """`oldest` tells the generation of the oldest request that is under way, and the present one where there is none."""

    def __init__(self, oldest: Callable[[], int]) -> None:
        self._oldest = oldest
        self._leaving: dict[int, Callable[[], None]] = {}
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Retirement of generations {sorted(self._leaving)}>"

    def add(self, generation: int, clean_up: Callable[[], None]) -> None:
        """Call `clean_up` once no request of this generation, or of one before, is left."""
        self._leaving[generation] = clean_up
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """No request is left: clean up what there is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for generation in sorted(self._leaving):
            self._leaving.pop(generation)()

    async def _run(self) -> None:
        while self._leaving:
            await asyncio.sleep(LOOK_SECONDS)
            oldest = self._oldest()
            for generation in sorted(number for number in self._leaving if number < oldest):
                self._leaving.pop(generation)()
