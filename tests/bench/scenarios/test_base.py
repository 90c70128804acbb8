"""Covers: gateway/bench/overlap.py
Covers: gateway/bench/workload.py
Covers: gateway/bench/options.py"""

import json
from dataclasses import replace

import pytest

from gateway.bench.options import BenchOptions
from gateway.bench.overlap import classify, generating_at_once
from gateway.bench.prompts import user
from gateway.bench.scenarios import SCENARIOS, Unanswered
from gateway.bench.scenarios.base import failures_cell, request_rows, warm_up
from gateway.bench.target import BenchImage, BenchRequest
from gateway.bench.workload import Prompts, digest, token_ratio
from tests.bench.fake_client import FakeClient, options, runner
from tests.bench.records import record, run
from tests.bench.servers import request

pytestmark = pytest.mark.virtual_time


def test_spans_that_touch_are_one_at_a_time() -> None:
    records = [record(number, start=100.0 + number, ttft=0.0, itl=(0.5, 0.5)) for number in range(4)]
    assert generating_at_once(records) == pytest.approx(1.0)


def test_spans_that_overlap_are_counted_while_any_is_generated() -> None:
    together = [record(number, start=100.0, ttft=1.0, itl=(0.5, 0.5)) for number in range(4)]
    assert generating_at_once(together) == pytest.approx(4.0)
    late = record(9, start=500.0, ttft=1.0, itl=(0.5, 0.5))
    assert generating_at_once([*together, late]) == pytest.approx(2.5)


def test_answers_of_one_piece_tell_nothing() -> None:
    assert generating_at_once([record(number, itl=()) for number in range(4)]) is None
    assert generating_at_once([record(0)]) is None


@pytest.mark.parametrize(
    ("average", "requests", "kind"),
    [(None, 5, "unclear"), (1.0, 1, "unclear"), (1.1, 5, "serial"), (1.5, 5, "limited"), (3.7, 5, "limited"),
     (3.75, 5, "batched"), (1.5, 2, "batched"), (1.4, 2, "serial")],
)  # fmt: skip
def test_the_rule_of_the_verdict(average: float | None, requests: int, kind: str) -> None:
    assert classify(average, requests) == kind


async def test_a_server_that_fails_the_warm_up_is_not_measured() -> None:
    client = FakeClient(fails=lambda request, running: "http_404 model_not_found")
    with pytest.raises(Unanswered, match="http_404 model_not_found"):
        await warm_up(options(num_warmups=1), runner(client), [request()])


async def test_the_warm_up_is_as_long_as_asked_for() -> None:
    client = FakeClient()
    await warm_up(options(num_warmups=3), runner(client), [request(max_tokens=1)])
    assert len(client.requests) == 3


def test_requests_are_listed_as_they_ended() -> None:
    records = [record(0, itl=(2.0,)), record(1), record(2, ttft=None, itl=(), error="timeout", start=110.0)]
    rows = request_rows(run(records))
    assert [row[0].value for row in rows] == ["2", "1", "3"]
    assert [row[-1].value for row in rows] == ["ok", "ok", "timeout"]


def test_failures_are_counted_by_kind() -> None:
    failed = [record(number, error="http_503 queue_full" if number else "timeout") for number in range(3)]
    assert failures_cell(run(failed)).value == "3 (http_503 queue_full, timeout)"
    assert failures_cell(run([record()])).value == "0"


async def test_no_two_built_in_prompts_are_the_same() -> None:
    """An engine would answer the second from its prefix cache."""
    prompts = await Prompts.of(options(languages=("ko", "en", "ja")), runner(FakeClient()), 8)
    requests = prompts.take(60)
    assert len({json.dumps(item.messages) for item in requests}) == 60
    assert [item.language for item in requests[:4]] == ["ko", "en", "ja", "ko"]


async def test_made_up_prompts_are_measured_by_what_the_server_counts() -> None:
    class Counting(FakeClient):
        async def send(self, request: BenchRequest, index: int = 0):  # type: ignore[no-untyped-def]
            words = len(request.messages[-1]["content"].split())
            return replace(await super().send(request, index), prompt_tokens=words * 2 + 9)

    prompts = await Prompts.of(options(input_len=100), runner(Counting()), 8)
    assert prompts.tokens_per_word == pytest.approx(2.0)
    assert len(prompts.request(0).messages[-1]["content"].split()) == pytest.approx(50, abs=1)
    assert prompts.notes == ()


async def test_a_server_that_counts_nothing_is_told_of() -> None:
    """The fake counts ten tokens for every prompt, as an Ollama does that reports only what is not cached."""
    assert await token_ratio(options(input_len=100), runner(FakeClient())) is None
    prompts = await Prompts.of(options(input_len=100), runner(FakeClient()), 8)
    assert prompts.notes == ("length_estimated",)


async def test_a_dataset_is_taken_in_order_and_again() -> None:
    dataset = (BenchRequest(user("a"), 5), BenchRequest(user("b")))
    prompts = await Prompts.of(options(dataset=dataset), runner(FakeClient()), 8)
    assert [(item.messages[0]["content"], item.max_tokens) for item in prompts.take(3)] == [
        ("a", 5),
        ("b", 8),
        ("a", 5),
    ]


async def test_every_request_has_the_parameters_and_the_timeout() -> None:
    chosen = options(parameters={"temperature": 0}, timeout=3.0, stream=False)
    made = (await Prompts.of(chosen, runner(FakeClient()), 8)).request(0)
    assert (dict(made.parameters), made.timeout, made.stream) == ({"temperature": 0}, 3.0, False)


def test_the_digest_tells_workloads_apart_and_not_models() -> None:
    one = request(model="a")
    assert digest([one]) == digest([replace(one, model="b", name="x")])
    others = [
        replace(one, max_tokens=9),
        replace(one, messages=user("else")),
        replace(one, images=(BenchImage(b"x"),)),
        replace(one, parameters={"temperature": 1}),
    ]
    assert len({digest([item]) for item in (one, *others)}) == 5


def test_the_command_line_offers_every_scenario() -> None:
    assert tuple(SCENARIOS) == (
        "concurrency", "text-parallel", "vision-batch", "multi-model", "users", "load", "soak",
    )  # fmt: skip


def test_options_have_the_defaults_of_the_documentation() -> None:
    assert BenchOptions(options().target).realtime_ttft == 2.0
