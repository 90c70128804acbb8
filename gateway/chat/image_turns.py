"""Fair turns at a limited number of workers: keys take turns, and behind a key the oldest request is first."""

import asyncio
from collections import OrderedDict, deque


class FairTurns:
    """At most `count` turns are taken at once.

    A key with a thousand requests is served as often as a key with two. A turn is not bound to a
    task: whoever finishes the work releases it.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Keys in the order of their next turn, each with at least one request. Empty while a turn is free."""

    def __repr__(self) -> str:
        return f"<FairTurns {self._free} free, {sum(map(len, self._waiting.values()))} waiting>"

    async def take(self, key: str) -> None:
        """Wait for a turn; `release` has to follow, except after a cancellation."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(key, turn)
            else:  # the turn came in the same step of the loop
                self.release()
            raise

    def release(self) -> None:
        """Give the turn to the next key, or keep it free."""
        if not self._waiting:
            self._free += 1
            return
        key, turns = next(iter(self._waiting.items()))
        turn = turns.popleft()
        if turns:
            self._waiting.move_to_end(key)
        else:
            del self._waiting[key]
        if turn.done():  # cancelled in this step of the loop, and not removed yet
            self.release()
        else:
            turn.set_result(None)

    def _remove(self, key: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(key)
        if turns and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[key]
