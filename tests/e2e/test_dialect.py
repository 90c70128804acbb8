"""A client cannot tell which engine answered: the requests of one table, on every available
engine.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import TOOL_STAND_INS
from tests.e2e.dialect import CASES, Case, View, table, view
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import KEY, PLAIN_HTTP, REPOSITORY, Gateway

MODEL_FINISH_REASONS = ("stop", "length", "tool_calls")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], View]]:
    """Responses of the vLLM stand-in, with which all others are compared; each case is sent
    once.
    """
    with (
        stand_in(TOOL_STAND_INS["vllm-standin"]) as engine,
        Gateway(tmp_path_factory.mktemp("reference"), engine.settings) as gateway,
    ):
        seen: dict[str, View] = {}

        def ask(case: Case) -> View:
            if case.name not in seen:
                seen[case.name] = send(gateway, case)
            return seen[case.name]

        yield ask


def post(gateway: Gateway, case: Case) -> httpx2.Response:
    return httpx2.post(
        f"{gateway.url}/v1/chat/completions",
        json=case.body("standard"),
        headers={"authorization": f"Bearer {KEY}"},
        timeout=120.0,
        **PLAIN_HTTP,
    )


def send(gateway: Gateway, case: Case) -> View:
    return view(post(gateway, case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_response_does_not_depend_on_the_engine(
    reference: Callable[[Case], View], tool_gateway: Gateway, case: Case
) -> None:
    seen, expected = send(tool_gateway, case), reference(case)
    assert (seen.status, seen.error and (seen.error["code"], seen.error["param"])) == (
        case.status,
        (case.code, case.param) if case.code else None,
    )
    assert seen.error == expected.error
    assert seen.counts_agree
    if case.calls is not None:
        assert seen.has_calls is case.calls
    if case.finish is None:
        assert seen.finish in (MODEL_FINISH_REASONS if seen.status == 200 else (None,))
    else:
        assert seen.finish == case.finish
    if case.same_shape:
        assert (seen.keys, seen.events) == (expected.keys, expected.events)


def test_stop_token_ids_are_followed_by_vllm_and_refused_elsewhere(tool_engine: Engine, tool_gateway: Gateway) -> None:
    seen = send(tool_gateway, Case("stop_token_ids", {"stop_token_ids": [1]}))
    if tool_engine.kind == "vllm":
        assert seen.status == 200
    else:
        assert (seen.status, (seen.error or {})["param"]) == (400, "stop_token_ids")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"choice": ["positive", "negative"]}}, "positive|negative"),
        # The tiny models for Ollama write ASCII only, and need a way to the end of a choice.
        ({"guided_choice": ['예"', "x\\y", 'z "q"']}, r'예"|x\\y|z "q"'),
        ({"guided_regex": r"[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
    ],
    ids=["choice", "choice with quotes", "regex"],
)
def test_chosen_text_arrives_bare(tool_gateway: Gateway, fields: dict[str, Any], expected: str, stream: bool) -> None:
    answer = post(tool_gateway, Case("", {**fields, "max_tokens": 60, "stream": stream}))
    if stream:
        events = [json.loads(event[6:]) for event in answer.text.split("\n\n") if event not in ("", "data: [DONE]")]
        text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    else:
        text = answer.json()["choices"][0]["message"]["content"]
    assert re.fullmatch(expected, text)


def test_grammar_is_followed_by_vllm_and_refused_elsewhere(tool_engine: Engine, tool_gateway: Gateway) -> None:
    answer = post(tool_gateway, Case("", {"guided_grammar": 'root ::= "yes"'}))
    if tool_engine.kind == "vllm":
        assert answer.json()["choices"][0]["message"]["content"] == "yes"
    else:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "guided_grammar")


def test_minimum_of_tokens_is_followed_by_vllm(tool_engine: Engine, tool_gateway: Gateway) -> None:
    fields = {"messages": [{"role": "user", "content": "Say 3 words."}], "max_tokens": 60, "min_tokens": 50}
    answer = post(tool_gateway, Case("", fields))
    assert (answer.json()["usage"]["completion_tokens"] >= 50) is (
        tool_engine.kind == "vllm"
    ) or tool_engine.is_real  # the tiny models may go on by themselves


def test_docs_contain_the_table() -> None:
    assert table() in (REPOSITORY / "docs" / "dialect.md").read_text()
