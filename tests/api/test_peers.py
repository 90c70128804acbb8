"""Figures of several replicas in the answers of one."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from gateway.api.peers import Peers
from gateway.telemetry.live import LiveFigures
from gateway.telemetry.metrics import Metrics
from tests.fakes.exchanges import exchange


class Channel:
    """Connection of replica `number`; what it tells goes to `others` as it would over a socket."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.serving: frozenset[int] = frozenset({1, 2})
        self.respond: dict[str, Callable[[Any], Awaitable[Any]]] = {}
        self.on_told: dict[str, Callable[[int, Any], None]] = {}
        self.others: list[Channel] = []

    async def ask(self, subject: str, argument: Any = None) -> dict[int, Any]:
        return {other.number: sent(await other.respond[subject](argument)) for other in self.others}

    def tell(self, subject: str, content: Any) -> None:
        for other in self.others:
            other.on_told[subject](self.number, sent(content))


def sent(content: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(content))


class Replica:
    def __init__(self, number: int, running: int, run: str = "") -> None:
        self.channel = Channel(number)
        self.metrics = Metrics(CollectorRegistry(), "1")
        self.timers: list[Callable[[], None]] = []
        self.live = LiveFigures(self.metrics, self.loads, self.call_later)
        self.running = running
        self.peers = Peers(self.channel, run or str(number), self.metrics, self.live, self.status, self.loads)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        self.timers.append(callback)
        return self

    def cancel(self) -> None: ...

    def loads(self) -> dict[str, tuple[int, int]]:
        return {"vllm": (self.running, 1)}

    def serve(self, count: int) -> None:
        exchanges = [exchange(tier="standard", backend="vllm") for _ in range(count)]
        for each in exchanges:
            self.metrics.record(each)
        self.live.observe(exchanges)

    def status(self) -> dict[str, Any]:
        server = {
            "name": "vllm",
            "up": self.channel.number == 1,
            "gets_requests": self.channel.number == 1,
            "running": self.running,
            "connections": 2,
            "model_slots": {"m": {"running": self.running, "limit": 8, "learned": False}},
        }
        return {
            "ready": {"status": "ready"},
            "backends": {
                "vllm": {
                    "up": self.channel.number == 2,
                    "running": {"text": self.running, "vision": 0},
                    "waiting": {"text": 1, "vision": 0},
                    "servers": [server],
                    "leaving": [{"name": f"vllm#{name}", "running": 2} for name in ("old", self.channel.number)],
                }
            },
            "tiers": {"standard": {"share": {"requests": 10, "canary_requests": self.running, "percent": 0}}},
            "errors": [{"at": f"2026-11-29T10:00:0{self.channel.number}Z"}],
        }


def pair() -> tuple[Replica, Replica]:
    first, second = Replica(1, running=3), Replica(2, running=4)
    first.channel.others, second.channel.others = [second.channel], [first.channel]
    return first, second


async def test_status_has_the_sums_of_all_replicas() -> None:
    first, _ = pair()
    await first.peers.refresh()
    whole = first.peers.whole_status(first.status())
    backend = whole["backends"]["vllm"]
    assert (backend["running"], backend["waiting"]) == ({"text": 7, "vision": 0}, {"text": 2, "vision": 0})
    assert backend["up"] is True
    (server,) = backend["servers"]
    assert (server["running"], server["connections"], server["gets_requests"]) == (7, 4, True)
    assert server["model_slots"] == {"m": {"running": 7, "limit": 8, "learned": False}}
    assert whole["tiers"]["standard"]["share"] == {"requests": 20, "canary_requests": 7, "percent": 35.0}
    assert [error["at"][-2] for error in whole["errors"]] == ["2", "1"]
    assert [(each["replica"], each["running"]) for each in whole["processes"]] == [(1, {"vllm": 3}), (2, {"vllm": 4})]


async def test_a_server_is_up_and_leaves_if_it_does_for_one_of_the_replicas() -> None:
    for replica in pair():
        await replica.peers.refresh()
        backend = replica.peers.whole_status(replica.status())["backends"]["vllm"]
        assert backend["servers"][0]["up"] is True
        leaving = {server["name"]: server["running"] for server in backend["leaving"]}
        assert leaving == {"vllm#old": 4, "vllm#1": 2, "vllm#2": 2}


async def test_a_replica_that_does_not_serve_any_more_is_not_in_the_status() -> None:
    first, _ = pair()
    await first.peers.refresh()
    first.channel.serving = frozenset({1})
    assert first.peers.whole_status(first.status())["backends"]["vllm"]["running"] == {"text": 3, "vision": 0}


async def test_live_figures_and_latencies_cover_all_replicas() -> None:
    first, second = pair()
    first.live.want()
    first.serve(10)
    second.serve(30)
    await first.peers.refresh()
    first.live.sample()
    assert first.live.figures("standard", "vllm")["requests"] == 4.0
    assert first.live.series("standard", ["vllm"])["backends"]["vllm"]["running"] == [7]
    (counts,) = first.peers.latency_counts("duration", ("standard", "vllm"))
    assert sum(counts) == 30


async def test_counts_of_a_replica_that_was_started_again_go_on() -> None:
    """They would fall otherwise, and hide the requests until they have caught up."""
    first, second = pair()
    second.serve(30)
    await first.peers.refresh()
    again = Replica(2, running=0, run="another")
    first.channel.others = [again.channel]
    again.serve(5)
    await first.peers.refresh()
    assert first.peers.counts()["standard", "vllm"].requests == 35
