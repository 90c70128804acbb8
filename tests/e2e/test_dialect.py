"""A client cannot tell which engine answered: the same table of requests, through the gateway, to every engine at hand."""

import os
from collections.abc import Callable, Iterator

import httpx2
import pytest

from tests.e2e.dialect import CASES, Case, View, table, view
from tests.e2e.engines import Engine, real_ollama, stand_in
from tests.e2e.gateway import KEY, REPOSITORY, Gateway
from tests.e2e.test_clients import REAL_OLLAMA, REAL_VLLM, STAND_INS

OWN_WORDS = ("stop", "length", "tool_calls")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], View]]:
    """What all others are held against: what the client of vLLM's stand-in sees. Each case is asked once."""
    with (
        stand_in(STAND_INS["vllm-standin"]) as engine,
        Gateway(tmp_path_factory.mktemp("reference"), engine.settings) as gateway,
    ):
        seen: dict[str, View] = {}

        def ask(case: Case) -> View:
            if case.name not in seen:
                seen[case.name] = asked(gateway, case)
            return seen[case.name]

        yield ask


@pytest.fixture(scope="module", params=[REAL_VLLM, *STAND_INS, REAL_OLLAMA])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    if request.param in STAND_INS:
        with stand_in(STAND_INS[request.param]) as engine:
            yield from _before(engine, tmp_path_factory)
    elif request.param == "vllm":
        yield from _before(request.getfixturevalue("vllms")[0], tmp_path_factory)
    else:
        url = os.environ.get("TEST_OLLAMA_URL")
        if not url:
            pytest.skip("TEST_OLLAMA_URL names no Ollama")
        yield from _before(real_ollama(url, os.environ.get("TEST_OLLAMA_MODEL", "qwen3-vl")), tmp_path_factory)


def _before(engine: Engine, folders: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(folders.mktemp("gateway"), engine.settings) as gateway:
        yield gateway


def asked(gateway: Gateway, case: Case) -> View:
    return view(
        httpx2.post(
            f"{gateway.url}/v1/chat/completions",
            json=case.body("standard"),
            headers={"authorization": f"Bearer {KEY}"},
            timeout=120.0,
            trust_env=False,
        )
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_client_sees_the_same_whichever_engine_answers(
    reference: Callable[[Case], View], gateway: Gateway, case: Case
) -> None:
    seen, expected = asked(gateway, case), reference(case)
    assert (seen.status, seen.error and (seen.error["code"], seen.error["param"])) == (
        case.status,
        (case.code, case.param) if case.code else None,
    )
    assert seen.error == expected.error
    assert seen.counts_agree
    if case.calls is not None:
        assert seen.has_calls is case.calls
    if case.finish is None:
        assert seen.finish in (OWN_WORDS if seen.status == 200 else (None,))
    else:
        assert seen.finish == case.finish
    if case.same_shape:
        assert (seen.keys, seen.events) == (expected.keys, expected.events)


def test_docs_have_the_table() -> None:
    assert table() in (REPOSITORY / "docs" / "dialect.md").read_text()
