"""A client cannot tell which engine answered: the requests of one table, on every available
engine.
"""

from collections.abc import Callable, Iterator

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


def send(gateway: Gateway, case: Case) -> View:
    return view(
        httpx2.post(
            f"{gateway.url}/v1/chat/completions",
            json=case.body("standard"),
            headers={"authorization": f"Bearer {KEY}"},
            timeout=120.0,
            **PLAIN_HTTP,
        )
    )


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


def test_minimum_of_tokens_is_followed_by_vllm(tool_engine: Engine, tool_gateway: Gateway) -> None:
    fields = {"messages": [{"role": "user", "content": "Say 3 words."}], "max_tokens": 60, "min_tokens": 50}
    answer = httpx2.post(
        f"{tool_gateway.url}/v1/chat/completions",
        json=Case("", fields).body("standard"),
        headers={"authorization": f"Bearer {KEY}"},
        timeout=120.0,
        **PLAIN_HTTP,
    )
    assert (answer.json()["usage"]["completion_tokens"] >= 50) is (
        tool_engine.kind == "vllm"
    ) or tool_engine.is_real  # the tiny models may go on by themselves


def test_docs_contain_the_table() -> None:
    assert table() in (REPOSITORY / "docs" / "dialect.md").read_text()
