"""A client that leaves ends the engine's work, in every phase, streaming or not; what it held serves the next."""

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
    """Nothing of another test is under way, and nothing of this one stays."""
    if engine.load:
        engine.wait_until_idle()
    yield
    if engine.load:
        engine.wait_until_idle()


@pytest.fixture
def observed(engine: Engine) -> Engine:
    if engine.load is None:
        pytest.skip(f"a real {engine.kind} does not tell what it works on")
    return engine


def assert_next_is_served(client: OpenAI, seconds: float = 20.0) -> None:
    messages = [{"role": "user", "content": "Still there?"}]
    answer = client.chat.completions.create(model=TIER, messages=messages, max_tokens=2, temperature=0, timeout=seconds)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "length"


def test_leaving_in_the_stream_ends_the_work(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.no_answer_ended(), Call(gateway.url, observed.long_request(TIER, stream=True), KEY) as call:
        call.read_until(b"data: ", times=5)
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


def test_leaving_a_plain_answer_ends_the_work(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.no_answer_ended(), Call(gateway.url, observed.long_request(TIER, stream=False), KEY):
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_leaving_before_the_first_piece_ends_the_wait(
    gateway: Gateway, client: OpenAI, observed: Engine, stream: bool
) -> None:
    """The engine has taken the request and said nothing yet, all its lanes being occupied: a prefill that lasts as long as we like."""
    with observed.no_answer_ended(), observed.fully_occupied():
        with Call(gateway.url, observed.long_request(TIER, stream), KEY):
            observed.wait_for("the request waits at the engine", lambda load: load.waiting == 1)
        observed.wait_for(
            "it waits no more, the lanes still occupied",
            lambda load: load.waiting == 0 and load.running == observed.lanes,
        )
    assert_next_is_served(client)


def test_many_that_leave_at_once_leave_nothing_behind(gateway: Gateway, client: OpenAI, observed: Engine) -> None:
    with observed.no_answer_ended(), ExitStack() as calls:
        for number in range(8):
            calls.enter_context(Call(gateway.url, observed.long_request(TIER, stream=number % 2 == 0), KEY))
        observed.wait_for("the lanes are taken", lambda load: load.running == observed.lanes)
    assert_next_is_served(client)


def test_closing_a_stream_of_openai_python_ends_the_work(client: OpenAI, observed: Engine) -> None:
    with (
        observed.no_answer_ended(),
        client.chat.completions.create(**observed.long_request(TIER, stream=True)) as stream,
    ):
        next(iter(stream))
        observed.wait_for("the request runs", lambda load: load.running == 1)
    assert_next_is_served(client)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_next_one_does_not_wait_for_the_answer_of_one_that_left(
    gateway: Gateway, client: OpenAI, engine: Engine, stream: bool
) -> None:
    """What every engine shows, even one that counts nothing. A real Ollama serves such a model one request at a time."""
    with Call(gateway.url, engine.long_request(TIER, stream), KEY) as call:
        if stream:
            call.read_until(b"data: ", times=3)
    assert_next_is_served(client, seconds=10.0)
