import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gateway.bench.compare_measure import ComparePlan, NotMeasured, compare
from gateway.bench.compare_result import Comparison
from gateway.bench.compare_rows import rows
from gateway.bench.compare_workload import differences
from gateway.bench.quality import QualityOptions
from gateway.bench.quality_tasks import built_in
from gateway.bench.runner import Runner
from gateway.bench.target import BenchRequest, LoadClient, Target
from tests.bench.fake_client import FakeClient, options

pytestmark = pytest.mark.virtual_time


class Server(FakeClient):
    """A server that writes down when it was used; `slow` multiplies its times."""

    def __init__(self, label: str, order: list[str], slow: Callable[[], float] = lambda: 1.0, **changes: Any) -> None:
        super().__init__(places=4, prefill=lambda *_: slow(), token=lambda *_: 0.1 * slow(), **changes)
        self.label = label
        self.order = order

    @property
    def target(self) -> Target:
        return Target(f"http://127.0.0.1:1/{self.label}", f"model-{self.label}", label=self.label)

    async def send(self, request: BenchRequest, index: int = 0) -> Any:
        self.order.append(self.label)
        return await super().send(request, index)


async def measured(a: Server, *others: Server, stop: asyncio.Event | None = None, **changes: Any) -> Comparison:
    load = options(num_prompts=4, max_concurrency=4, output_len=5, languages=("en",))
    plan = ComparePlan(load, **{"rounds": 3, **changes})

    def new_runner(client: LoadClient, **arguments: Any) -> Runner:
        return Runner(client, clock=asyncio.get_running_loop().time, watch_interval=20.0, **arguments)

    return await compare(plan, [a, *others], stop=stop, new_runner=new_runner)


async def test_the_sides_take_turns_and_get_the_same_requests() -> None:
    order: list[str] = []
    a, b = Server("A", order), Server("B", order)
    found = await measured(a, b)
    assert "".join(order) == "AB" + "AAAABBBB" * 3
    assert a.requests == b.requests
    assert len({request.messages[0]["content"] for request in a.requests}) == 13, "each round has new prompts"
    assert found.in_turn
    assert [side.name for side in found.sides] == ["A", "B"]
    assert differences(found.sides[0].workload, found.sides[1].workload) == []


async def test_a_drifting_machine_does_not_decide() -> None:
    """All times grow by half from round to round; B is a tenth faster."""
    order: list[str] = []

    def drift() -> float:
        return float(1.5 ** ((len(order) - 3) // 8))

    a = Server("A", order, drift)
    b = Server("B", order, lambda: 0.9 * drift())
    found = await measured(a, b, rounds=4)
    row = {row.metric.key: row for row in rows(found)}["response"]
    assert row.better == "B"
    assert row.ratio == pytest.approx(0.9, rel=0.02)


async def test_a_side_that_does_not_answer_is_named() -> None:
    order: list[str] = []
    with pytest.raises(NotMeasured, match="B does not answer a first request: http_404"):
        await measured(Server("A", order), Server("B", order, fails=lambda *_: "http_404"))


async def test_one_side_can_be_measured_alone_and_compared_later() -> None:
    found = await measured(Server("A", []))
    assert found.b is None
    assert len(found.a.rounds) == 3
    later = await measured(Server("B", []))
    assert differences(found.a.workload, later.a.workload) == []


async def test_other_options_give_another_workload() -> None:
    found = await measured(Server("A", []))
    for change in ({"rounds": 2}, {"cold": True}):
        other = await measured(Server("A", []), **change)
        assert differences(found.a.workload, other.a.workload)


async def test_an_interruption_keeps_the_complete_rounds() -> None:
    order: list[str] = []
    stop = asyncio.Event()

    def stop_in_third_round() -> float:
        if len(order) > 2 + 8 + 8 + 4:
            stop.set()
        return 1.0

    found = await measured(Server("A", order), Server("B", order, stop_in_third_round), stop=stop, rounds=9)
    assert min(len(side.rounds) for side in found.sides) == 2
    assert "rounds_incomplete" in found.notes
    assert rows(found)


async def test_an_interruption_before_a_round_is_complete_is_no_result() -> None:
    stop = asyncio.Event()
    order: list[str] = []

    def stop_at_once() -> float:
        if len(order) > 3:
            stop.set()
        return 1.0

    with pytest.raises(NotMeasured, match="no round was complete"):
        await measured(Server("A", order, stop_at_once), Server("B", order), stop=stop)


async def test_quality_is_asked_after_the_rounds() -> None:
    order: list[str] = []
    tasks = [msgspec.structs.replace(task, max_tokens=5) for task in built_in() if not task.has_code][:2]
    found = await measured(Server("A", order), Server("B", order), quality=QualityOptions(tasks, repeats=2))
    assert "".join(order).endswith("AAAABBBB" + "AABB" * 2)
    assert all(side.quality is not None for side in found.sides)
    assert found.sides[0].quality.tasks_sha256 == found.sides[1].quality.tasks_sha256  # type: ignore[union-attr]


async def test_a_cold_start_that_cannot_be_seen_says_why() -> None:
    found = await measured(Server("A", []), cold=True)
    assert [cold.reason for cold in found.a.cold] == ["cold_no_api"] * 3


async def test_the_backends_behind_a_gateway_are_named() -> None:
    class Gateway(Server):
        async def send(self, request: BenchRequest, index: int = 0) -> Any:
            record = await super().send(request, index)
            return replace(record, backend="vllm" if index % 2 else "ollama")

    found = await measured(Gateway("A", []))
    assert found.a.server == {"backend": "ollama, vllm"}
