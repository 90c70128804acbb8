"""A client that leaves cancels the engine's work in every phase, and frees its slot."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from openai import OpenAI

from tests.e2e.call import Call
from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway

TIER = "standard"


@pytest.fixture(autouse=True)
def idle_engine(engine: Engine) -> Iterator[None]:
    """Check that the engine is idle before and after each test."""
    if engine.load:
        engine.wait_until_idle()
    yield
    if engine.load:
        engine.wait_until_idle()


@pytest.fixture
def observed(engine: Engine) -> Engine:
    if engine.load is None:
        pytest.skip(f"a real {engine.kind} does not report its load")
    return engine


def assert_next_is_served(client: OpenAI, seconds: float = 20.0) -> None:
    messages = [{"role": "user", "content": "Still there?"}]
    answer = client.chat.completions.create(model=TIER, messages=messages, max_tokens=2, temperature=0, timeout=seconds)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "length"


def test_disconnect_during_a_stream_cancels_the_work(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.aborts_all_answers(gateway), Call(gateway.url, observed.long_request(TIER, stream=True), KEY) as call:
        call.read_until(b"data: ", times=5)
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


def test_disconnect_during_a_plain_answer_cancels_the_work(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.aborts_all_answers(gateway), Call(gateway.url, observed.long_request(TIER, stream=False), KEY):
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_disconnect_before_the_first_token_cancels_the_request(
    gateway: Gateway, client: OpenAI, observed: Engine, stream: bool
) -> None:
    """All slots of the engine are occupied, so the request waits there as in an endless prefill."""
    with observed.aborts_all_answers(gateway), observed.fully_occupied():
        with Call(gateway.url, observed.long_request(TIER, stream), KEY):
            observed.wait_for("the request waits at the engine", lambda load: load.waiting == 1)
        observed.wait_for(
            "it no longer waits, and the slots are still occupied",
            lambda load: load.waiting == 0 and load.running == observed.slots,
        )
    assert_next_is_served(client)


def test_simultaneous_disconnects_leave_nothing_behind(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.aborts_all_answers(gateway), ExitStack() as calls:
        for number in range(8):
            calls.enter_context(Call(gateway.url, observed.long_request(TIER, stream=number % 2 == 0), KEY))
        observed.wait_for("the slots are taken", lambda load: load.running == observed.slots)
    assert_next_is_served(client)


def test_closing_a_stream_of_openai_python_cancels_the_work(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with (
        observed.aborts_all_answers(gateway),
        client.chat.completions.create(**observed.long_arguments(TIER, stream=True)) as stream,
    ):
        next(iter(stream))
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_next_request_does_not_wait_for_a_cancelled_answer(
    gateway: Gateway, client: OpenAI, engine: Engine, stream: bool
) -> None:
    """Works even for an engine that does not report its load: a real Ollama serves such a model one
    request at a time.
    """
    with Call(gateway.url, engine.long_request(TIER, stream), KEY) as call:
        if stream:
            call.read_until(b"data: ", times=3)
    assert_next_is_served(client, seconds=10.0)
