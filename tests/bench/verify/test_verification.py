"""Every check passes on a server that is right, and fails on one that is wrong in its way.

Covers: gateway/bench/verify/concurrency_check.py
Covers: gateway/bench/verify/dialect_checks.py
Covers: gateway/bench/verify/embedding_checks.py
Covers: gateway/bench/verify/error_checks.py
Covers: gateway/bench/verify/history_checks.py
Covers: gateway/bench/verify/korean_checks.py
Covers: gateway/bench/verify/outcome.py
Covers: gateway/bench/verify/server_checks.py
Covers: gateway/bench/verify/stream_checks.py
Covers: gateway/bench/verify/tool_checks.py
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any, cast

import pytest

from gateway import config, simulate
from gateway.bench.verify import stream_checks
from gateway.bench.verify.concurrency_check import at_once
from gateway.bench.verify.embedding_checks import CHECKS as EMBEDDING_CHECKS
from gateway.bench.verify.outcome import CheckFailed, Outcome, Reason
from gateway.bench.verify.server_checks import REACH
from gateway.bench.verify.target import Event, Reply, Stream, Target
from gateway.bench.verify.verification import CHECKS, PreflightRefused, verify
from tests.bench.verify.changes import error, on, streamed
from tests.bench.verify.faults import EMBEDDING_FAULTS, FAULTS, Fault
from tests.bench.verify.wrong_server import Answer, Body, Wrong, outcome, target
from tests.fakes.running_gateway import running
from tests.fakes.stand_ins import stand_in

MODEL = simulate.Model("Qwen/Qwen3-VL-8B-Instruct", family="qwen3vl", vision=True, tools=True, context_length=2048)
EMBEDDER = simulate.Model("bge-m3", family="bert", embedding=16)
BY_NAME = {check.name: check for check in (*REACH, *CHECKS)}


def no_preflight() -> Mapping[str, Any]:
    raise AssertionError("only a gateway has one")


def options(fault: Fault) -> simulate.Options:
    return simulate.Options(
        "vllm",
        (MODEL,),
        tokens_per_second=fault.tokens_per_second,
        answer_tokens=fault.answer_tokens,
        api_key=fault.server_key,
    )


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_a_server_that_is_wrong_in_one_way_fails_the_check_for_it(fault: Fault) -> None:
    async with target(fault.wrong, options(fault), key=fault.key) as server:
        found = await outcome(server, BY_NAME[fault.check], fault.kind)
    assert (found.status, found.reason and found.reason.key) == ("failed", fault.reason), found


async def test_a_late_answer_of_one_token_hides_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other answer of one token takes as long as a whole one."""
    event = Event(b'{"choices":[{"delta":{"content":"a"}}]}', 0.5, 1)
    late = itertools.cycle([True, False])

    async def asked(target: Target, *, max_tokens: int, **fields: Any) -> Stream:
        seconds = 0.5 if max_tokens > 1 or next(late) else 0.01
        return Stream(Reply(200, {}, b"", None, seconds), (event, event), 0.0, seconds)

    monkeypatch.setattr(stream_checks, "streamed", asked)
    with pytest.raises(CheckFailed) as caught:
        await stream_checks.comes_piece_by_piece(cast("Target", None))
    assert caught.value.reason.key == "buffered"


@pytest.mark.parametrize("fault", EMBEDDING_FAULTS, ids=str)
async def test_wrong_embeddings_fail_their_check(fault: Fault) -> None:
    async with target(fault.wrong, simulate.Options("vllm", (EMBEDDER,))) as server:
        server.embedding_model = EMBEDDER.name
        checked = {check.name: await outcome(server, check, reaches=False) for check in EMBEDDING_CHECKS}
    found = checked[fault.check]
    assert (found.status, found.reason and found.reason.key) == ("failed", fault.reason), found


async def test_a_prompt_that_was_taken_whole_was_not_cut() -> None:
    """A gateway lists the shortest context of a tier's backends, and the active one may have a longer one."""

    def shorter(answer: Answer) -> None:
        listed = json.loads(answer.body)
        listed["data"][0]["max_model_len"] = 256
        answer.say(200, listed)

    async with target(on("/v1/models", shorter), simulate.Options("vllm", (MODEL,))) as server:
        found = await outcome(server, BY_NAME["too_long"])
    assert (found.status, found.reason and found.reason.key) == ("skipped", "context_longer"), found


def test_every_check_has_a_server_that_fails_it() -> None:
    assert {fault.check for fault in (*FAULTS, *EMBEDDING_FAULTS)} == set(BY_NAME)


async def test_a_right_vllm_fails_nothing() -> None:
    async with target(Wrong(), simulate.Options("vllm", (MODEL,), tokens_per_second=800)) as server:
        found = [each async for each in verify(server, no_preflight)]
    assert {each.name: each.reason for each in found if each.status == "failed"} == {}
    assert server.kind == "vllm"
    skipped = {each.name for each in found if each.status == "skipped"}
    embeddings = {check.name for check in EMBEDDING_CHECKS}
    assert skipped == {"shows_its_model", "recalls_a_fact", "missing_model", "wrong_key", "preflight", *embeddings}


async def test_a_gateway_fails_nothing_and_what_a_bare_ollama_fails_is_named() -> None:
    models = (simulate.Model("qwen3-vl", family="qwen3vl", vision=True, tools=True), EMBEDDER)
    reports = iter([{"backend": "vllm", "breaks": False, "findings": []}])
    async with stand_in(simulate.Options("ollama", models, parallel=4)) as ollama:
        settings = config.build(
            {
                "backends": {"ollama": {"kind": "ollama", "base_url": ollama.base_url}},
                "tiers": {"standard": {"models": {"ollama": "qwen3-vl"}}},
                "embeddings": {"bge": {"backend": "ollama", "model": EMBEDDER.name}},
                "state_file": "",
            }
        )
        async with running(settings) as gateway, Target(gateway.base_url, model=None, key=None) as server:
            through = [each async for each in verify(server, lambda: next(reports))]
        async with Target(ollama.base_url, model=None, key=None) as bare:
            directly = [each async for each in verify(bare, no_preflight)]
    assert {each.name: each.reason for each in through if each.status == "failed"} == {}
    assert (server.kind, bare.kind) == ("gateway", "ollama")
    assert {each.name for each in through if each.status == "skipped"} == {"recalls_a_fact", "wrong_key"}
    assert {each.name for each in directly if each.status == "failed"} == {
        "too_long", "max_completion_tokens", "several_choices", "no_tool",
    }  # fmt: skip


async def test_nothing_else_runs_against_a_server_that_answers_no_chat() -> None:
    async with Target("http://127.0.0.1:1", model=None, key=None) as server:
        found = [each async for each in verify(server, no_preflight)]
    assert [(each.name, each.status) for each in found] == [("lists_models", "failed")]
    assert found[0].reason is not None
    assert found[0].reason.key == "unreachable"


async def test_a_key_for_an_open_server_is_no_failure() -> None:
    async with target(Wrong(), simulate.Options("vllm", (MODEL,)), key="sk-of-another-service") as server:
        found = await outcome(server, BY_NAME["wrong_key"])
    assert (found.status, found.reason and found.reason.key) == ("skipped", "open_server")


@pytest.mark.parametrize(("end", "message"), [([], "no finish_reason"), ([error("grammar")], "grammar")])
async def test_a_stream_that_breaks_off_under_a_schema_says_so(end: list[Body], message: str) -> None:
    """As the plain answer, which is refused then: an engine may not follow the schema."""
    async with target(streamed(lambda events: [*events[:2], *end]), simulate.Options("vllm", (MODEL,))) as server:
        found = await outcome(server, BY_NAME["returns_hangul_streamed"])
    assert (found.status, found.reason) == ("skipped", Reason("stream_broke_off", {"message": message}))


async def test_only_the_named_groups_run() -> None:
    async with target(Wrong(), simulate.Options("vllm", (MODEL,))) as server:
        found = [each async for each in verify(server, no_preflight, ["history", "korean"])]
    assert {each.group for each in found} == {"server", "korean", "history"}
    assert [each.name for each in found if each.group == "server"] == ["lists_models", "answers"]


@pytest.mark.parametrize(("seats", "verdict"), [(1, "serial"), (256, "batched"), (2, "limited")])
async def test_the_verdict_tells_serial_from_batched(seats: int, verdict: str) -> None:
    slow = simulate.Options("vllm", (MODEL,), tokens_per_second=15, max_num_seqs=seats, answer_tokens=20)
    async with target(Wrong(), slow) as server:
        server.users = 4
        found = await outcome(server, BY_NAME["answers_at_once"])
    assert (found.status, found.reason and found.reason.key) == ("ok", verdict), found


def test_answers_that_follow_each_other_count_as_one_at_a_time() -> None:
    assert at_once([answer(0, 1), answer(1, 2), answer(2, 3)]) == pytest.approx(1)
    assert at_once([answer(0, 2), answer(0, 2), answer(0, 2)]) == pytest.approx(3)
    assert at_once([answer(0, 2), answer(0, 2), answer(2, 4), answer(2, 4)]) == pytest.approx(2)
    assert at_once([answer(0, 1)]) is None


def answer(first: float, last: float) -> Stream:
    chunk = b'{"choices": [{"delta": {"content": "a"}}]}'
    return Stream(Reply(200, {}, b"", None, 0), (Event(chunk, first, 0), Event(chunk, last, 1)), 0, last)


async def preflight_outcome(report: Mapping[str, Any] | Exception) -> Outcome:
    def preflight() -> Mapping[str, Any]:
        if isinstance(report, Exception):
            raise report
        return report

    async with target(Wrong(), simulate.Options("vllm", (MODEL,))) as server:
        outcomes = verify(server, preflight, ["preflight"])
        async for each in outcomes:
            server.kind = "gateway"
            if each.group == "preflight":
                return each
    raise AssertionError("no preflight")


async def test_a_switch_that_would_break_a_tier_fails() -> None:
    finding = {"tier": "ultra", "what": "vision", "severity": "breaks", "words": "requests with images are refused"}
    found = await preflight_outcome({"backend": "vllm", "breaks": True, "findings": [finding]})
    assert found.status == "failed"
    assert found.reason is not None
    assert "vllm would break: ultra: requests with images are refused" in found.reason.said("en")


async def test_a_preflight_that_is_refused_fails_and_without_the_key_it_is_skipped() -> None:
    failed = await preflight_outcome(PreflightRefused("the settings changed", is_key=False))
    skipped = await preflight_outcome(PreflightRefused("the gateway refuses the key", is_key=True))
    assert (failed.status, failed.reason and failed.reason.key) == ("failed", "preflight_refused")
    assert (skipped.status, skipped.reason and skipped.reason.key) == ("skipped", "no_admin_key")
