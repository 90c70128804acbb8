"""A load client whose answers and times the test gives."""

from collections.abc import Callable

from gateway.bench.results import RequestRecord
from gateway.bench.target import BenchRequest, Target

Reply = Callable[[BenchRequest, int], RequestRecord]


class AnsweringClient:
    """Answers each request with what `reply` returns for it and its number; keeps the requests."""

    def __init__(self, reply: Reply, label: str = "A", model: str = "m", url: str = "http://127.0.0.1:1") -> None:
        self.target = Target(url, model, label=label)
        self.requests: list[BenchRequest] = []
        self._reply = reply

    async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
        self.requests.append(request)
        return self._reply(request, len(self.requests) - 1)

    async def get(self, path: str) -> tuple[int, bytes]:
        return 404, b""

    async def close(self) -> None:
        pass


def answered(text: str, *, finish: str = "stop", error: str = "", seconds: float = 1.0) -> RequestRecord:
    """Return the record of an answer with this text."""
    return RequestRecord(0, 0.0, 0.0, seconds, seconds, ttft=0.1, status=200, finish=finish, error=error, text=text)
