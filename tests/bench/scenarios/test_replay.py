"""Recorded traffic is sent again at its times, and compared with its own latencies."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.bench.formatting import verdict_text
from gateway.bench.recording import Recording
from gateway.bench.results import RequestRecord, ScenarioResult
from gateway.bench.scenarios import SCENARIOS
from gateway.bench.target import BenchRequest, Target
from gateway.telemetry.recording import RecordedExchange
from tests.bench.fake_client import FakeClient, options, runner
from tests.bench.traffic import recorded, recording

pytestmark = pytest.mark.virtual_time

EVEN = tuple(recorded(1000.0 + number, completion_tokens=5) for number in range(30))
"""A request each second, whose answer took 2 s, and its first token 0.5 s."""


async def replay(
    exchanges: Sequence[RecordedExchange] = EVEN, *, client: FakeClient | None = None, places: int = 64, **changes: Any
) -> tuple[ScenarioResult, FakeClient]:
    """Replay to a server that takes 0.2 s to the first token, and 0.96 s to the last of 5."""
    used = client or FakeClient(places, lambda request, running: 0.2, lambda request, running: 0.19)
    chosen = options(replay=Recording(tuple(exchanges), {}), **changes)
    return await SCENARIOS["load"].run(chosen, runner(used)), used


def rows(result: ScenarioResult) -> dict[str, tuple[Any, Any]]:
    return {str(row[0].value): (row[1].value, row[2].value) for row in result.tables[0].rows}


async def test_requests_are_due_at_their_times_divided_by_the_speed() -> None:
    result, _ = await replay(speed=2.0)
    run = result.headline_run
    assert [record.arrival - run.start for record in run.records] == pytest.approx([n / 2 for n in range(30)])
    assert result.workload["speed"] == 2.0
    assert len(run.good) == 30


async def test_latencies_stand_beside_the_recorded_ones() -> None:
    result, _ = await replay()
    found = rows(result)
    assert found["replay_ttft_p50"] == (pytest.approx(0.5), pytest.approx(0.2, rel=0.05))
    assert found["replay_e2el_p95"] == (pytest.approx(2.0), pytest.approx(0.96, rel=0.05))
    assert found["replay_e2el_p99"] == (None, None)
    assert found["replay_requests"] == ("30", "30")
    assert found["replay_output_tokens"] == ("150", "150")
    assert result.figures["recorded_p95_ttft_ms"] == pytest.approx(500)
    assert result.verdicts[0].key == "replay_carried"


async def test_a_server_that_queues_is_slower() -> None:
    result, _ = await replay(places=1, speed=4.0)
    assert result.verdicts[0].key == "replay_slower"
    assert result.verdicts[0].figures["now"] > 2.2  # type: ignore[operator]  # a number


async def test_more_failures_than_recorded_are_not_carried() -> None:
    def fails(request: BenchRequest, running: int) -> str:
        return "http_503 queue_full" if running > 1 else ""

    result, _ = await replay(client=FakeClient(4, fails=fails), speed=4.0)
    assert result.verdicts[0].key == "replay_failed"
    assert "95 %" not in verdict_text(result.verdicts[0], "en")[0]
    assert "http_503 queue_full" in str(rows(result)["failures"][1])


async def test_failures_that_were_recorded_may_happen_again() -> None:
    refused = tuple(recorded(1000.0 + n, outcome="rejected", status=503) for n in range(30, 34))
    count = iter(range(100))  # the first two requests measure the tokens of a word

    def fails(request: BenchRequest, running: int) -> str:
        return "http_503" if next(count) >= 32 else ""

    client = FakeClient(64, lambda request, running: 0.2, lambda request, running: 0.19, fails)
    result, _ = await replay((*EVEN, *refused), client=client)
    assert result.verdicts[0].key == "replay_carried"
    assert rows(result)["failures"][0] == "4"


async def test_every_figure_may_be_a_condition() -> None:
    result, _ = await replay()
    assert [name for name in result.figures if not re.fullmatch(SCENARIOS["load"].figures, name)] == []


async def test_few_requests_lead_to_no_verdict() -> None:
    result, _ = await replay(EVEN[:5])
    assert result.verdicts[0].key == "unclear"


class Gateway(FakeClient):
    """A server that lists models, and counts words as tokens."""

    def __init__(self, *models: str) -> None:
        super().__init__(64, lambda request, running: 0.2, lambda request, running: 0.19)
        self._models = models

    async def get(self, path: str) -> tuple[int, bytes]:
        return 200, json.dumps({"data": [{"id": model} for model in self._models]}).encode()

    async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
        from dataclasses import replace

        words = sum(len(message["content"].split()) for message in request.messages)
        return replace(await super().send(request, index), prompt_tokens=words + 8)


@pytest.mark.parametrize(
    ("models", "names_model", "sent"),
    [(("standard", "pro"), False, "standard"), (("standard",), True, ""), (("other",), False, "")],
)
async def test_recorded_tiers_are_asked_for_where_the_server_has_them(
    models: tuple[str, ...], names_model: bool, sent: str
) -> None:
    _, client = await replay(EVEN[:2], client=Gateway(*models), names_model=names_model)
    assert {request.model for request in client.requests[2:]} == {sent}


async def test_prompts_have_the_recorded_tokens_as_the_target_counts_them() -> None:
    result, _ = await replay(client=Gateway())
    assert rows(result)["replay_prompt_tokens"] == ("3000", "3000")
    assert "length_estimated" not in result.notes


async def test_what_was_not_sent_is_noted() -> None:
    mixed = recording(*EVEN)
    partial = Recording(mixed.exchanges, {"embeddings": 3}, unreadable=1)
    result = await SCENARIOS["load"].run(options(replay=partial), runner(FakeClient(64)))
    assert "ollama_ignores_eos" not in result.notes
    ollama = options(replay=partial, target=Target("http://127.0.0.1:1", "m", "ollama"))
    assert "ollama_ignores_eos" in (await SCENARIOS["load"].run(ollama, runner(FakeClient(64)))).notes
    assert {"replay_skipped", "replay_unreadable", "length_estimated"} <= set(result.notes)
