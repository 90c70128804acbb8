"""Client processes of the chaos run: their requests, and their journals after a sudden end."""

import io
import json

import pytest

from benchmarks.chaos_clients import (
    LENGTHS,
    TOPICS,
    ChaosMixture,
    Journal,
    Reference,
    prompt_of,
    prompts,
    read_journal,
)
from benchmarks.clients import ClientRecord, Expected, Plan, head_of


def plan(request_id: str) -> Plan:
    return Plan(request_id, "stream", head_of(request_id, "/", 0), b"", Expected(), 9.0)


def ended(request_id: str) -> ClientRecord:
    return ClientRecord(request_id, "stream", "ok", 1.0, 2.0, 200, None, "vllm", "", 9.0)


def test_request_in_flight_at_the_end_of_its_process_has_left() -> None:
    out = io.StringIO()
    journal = Journal(out)
    journal.sent(plan("a"))
    journal.sent(plan("b"))
    journal.ended(ended("a"))
    lines = out.getvalue().splitlines(keepends=True)
    sent_at = json.loads(lines[1])[2]
    first, second = read_journal(lines, sent_at + 5.0)
    assert first == ended("a")
    assert (second.id, second.seen, second.note, second.deadline) == ("b", "left", "process ended", 9.0)
    assert second.seconds == pytest.approx(5.0)


def test_line_that_a_killed_process_did_not_finish_does_not_count() -> None:
    out = io.StringIO()
    journal = Journal(out)
    journal.sent(plan("a"))
    journal.ended(ended("a"))
    lines = out.getvalue()[:-5].splitlines(keepends=True)
    assert [record.seen for record in read_journal(lines, 1e12)] == ["left"]


def test_every_prompt_is_different_and_has_a_reference() -> None:
    made = list(prompts())
    assert len(set(made)) == len(LENGTHS) * TOPICS
    mixture = ChaosMixture(1, "c", {prompt: Reference(7, "abc") for prompt in made}, grace=10.0)
    plans = [mixture.plan() for _ in range(200)]
    assert len({plan.id for plan in plans}) == 200
    assert {plan.leave.moment for plan in plans if plan.leave} == {"uploading", "waiting", "streaming"}
    for plan in plans:
        body = json.loads(plan.body)
        assert body["messages"][0]["content"] in made
        assert plan.expected.tokens == body["max_tokens"]
        assert plan.deadline == (46.0 if b"x-gateway-timeout: 30" in plan.head else 135.0)


def test_prompts_of_one_length_have_different_numbers_of_words() -> None:
    assert len({len(prompt_of(20, topic).split()) for topic in range(TOPICS)}) == TOPICS
