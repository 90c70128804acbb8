"""A load client in virtual time: a server with a number of places and a speed, without a network."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from gateway.bench.options import BenchOptions
from gateway.bench.results import RequestRecord
from gateway.bench.runner import Runner
from gateway.bench.target import BenchRequest, Target

Seconds = Callable[[BenchRequest, int], float]


class FakeClient:
    """Serves `places` requests at once, the others in the order of their arrival.

    Attributes:
        prefill: seconds before the first token of a request, while `running` requests are served.
        token: seconds of each further token.
        fails: returns the kind of failure of a request, empty for none; called when it gets its place.
        requests: every request so far.
    """

    def __init__(
        self,
        places: int = 1,
        prefill: Seconds = lambda request, running: 1.0,
        token: Seconds = lambda request, running: 0.1,
        fails: Callable[[BenchRequest, int], str] = lambda request, running: "",
    ) -> None:
        self._places = places
        self._prefill = prefill
        self._token = token
        self._fails = fails
        self._waiting: deque[asyncio.Event] = deque()
        self.running = 0
        self.most = 0
        self.requests: list[BenchRequest] = []

    @property
    def target(self) -> Target:
        return Target("http://127.0.0.1:1", "m", label="fake")

    async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
        loop = asyncio.get_running_loop()
        self.requests.append(request)
        start = loop.time()
        try:
            async with asyncio.timeout(request.timeout):
                return await self._serve(request, index, start)
        except TimeoutError:
            return RequestRecord(index, start, start, loop.time(), loop.time(), error="timeout", name=request.name)

    async def _serve(self, request: BenchRequest, index: int, start: float) -> RequestRecord:
        loop = asyncio.get_running_loop()
        if self.running >= self._places:
            turn = asyncio.Event()
            self._waiting.append(turn)
            try:
                await turn.wait()
            except asyncio.CancelledError:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif turn.is_set():
                    self._leave()
                raise
        else:
            self.running += 1
        self.most = max(self.most, self.running)
        try:
            if error := self._fails(request, self.running):
                now = loop.time()
                return RequestRecord(index, start, start, now, now, status=500, error=error, name=request.name)
            await asyncio.sleep(self._prefill(request, self.running))
            first = last = loop.time()
            gaps = []
            for _ in range((request.max_tokens or 16) - 1):
                await asyncio.sleep(self._token(request, self.running))
                now = loop.time()
                gaps.append(now - last)
                last = now
        finally:
            self._leave()
        return RequestRecord(
            index, start, start, last, last, first - start, tuple(gaps), 10, request.max_tokens or 16,
            images=len(request.images), status=200, model=request.model, language=request.language, name=request.name,
        )  # fmt: skip

    def _leave(self) -> None:
        """Hand the place over to the request that waits longest."""
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self.running -= 1

    async def get(self, path: str) -> tuple[int, bytes]:
        return 404, b""

    async def close(self) -> None:
        """There is nothing to close."""


def runner(client: FakeClient, stop: asyncio.Event | None = None) -> Runner:
    """Return a runner on the clock of the running loop, which seldom looks at the loop's lateness."""
    return Runner(client, stop=stop, clock=asyncio.get_running_loop().time, watch_interval=20.0)


def options(**changes: Any) -> BenchOptions:
    """Return options without a warm-up."""
    return BenchOptions(**{"target": Target("http://127.0.0.1:1", "m"), "num_warmups": 0, **changes})
