"""Garbage collections that stay short, however much the process remembers.

A full collection looks through all objects that refer to others, and stops all threads meanwhile: for 0.1 s with
the limits of 100,000 persons. CPython makes one as soon as a quarter as many new objects have survived, such as
those of some thousand requests. `gc.freeze` exempts what there is from later ones.

What is frozen is freed as before when nothing refers to it any more. Only cycles among it are kept, so it is done
seldom: once for each 10 ms that a collection takes.
"""

import gc
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

LONG_SECONDS = 0.01
"""Processor time of a full collection from which the objects that survived it are frozen."""
FULL = 2
"""Generation of a full collection."""


class ShortCollections:
    """Callback for `gc.callbacks` that freezes what a long collection has left."""

    def __init__(self, clock: Callable[[], float] = time.thread_time, freeze: Callable[[], object] = gc.freeze) -> None:
        self._clock = clock
        self._freeze = freeze
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """Follow the beginning and the end of a collection, in the thread that makes it."""
        if info["generation"] != FULL:
            return
        if phase == "start":
            self._began = self._clock()
        elif self._clock() - self._began >= LONG_SECONDS:
            self._freeze()


@contextmanager
def short_collections() -> Generator[None, None, None]:
    """Exempt from collections what there is now, and later what makes them long."""
    callback = ShortCollections()
    gc.collect()
    gc.freeze()
    gc.callbacks.append(callback)
    try:
        yield
    finally:
        gc.callbacks.remove(callback)
