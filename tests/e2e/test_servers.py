"""Tiers and their names from a YAML file, and several servers behind one backend: a vLLM serves one model, and one flag moves them all."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.call import Call
from tests.e2e.conftest import SHARED_MODEL
from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway
from tests.real_engines.process import wait_until

Pair = tuple[Engine, Engine]

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]

ONE_SERVER = """
llm_backend: here
backends:
  here: {{kind: {kind}, base_url: "{url}"}}
tiers:
  first: {{models: {{here: "{model}"}}, aliases: [gpt-4o-mini, Simple]}}
  second: {{models: {{here: "{model}"}}, aliases: [{{name: hidden, listed: false}}]}}
default_tier: second
"""

TWO_SERVERS = """
llm_backend: vllm
backends:
  vllm:
    kind: vllm
    servers:
      - {{base_url: "{vision.url}/v1"}}
      - {{base_url: "{text.url}/v1"}}
tiers:
  eyes: {{models: {{vllm: "{vision.model}"}}, aliases: [gpt-4o]}}
  words: {{models: {{vllm: "{text.model}"}}}}
  both: {{models: {{vllm: "{shared}"}}}}
default_tier: words
"""


@pytest.fixture(scope="module")
def named(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One engine behind two tiers with aliases."""
    config = ONE_SERVER.format(kind=engine.kind, url=engine.url, model=engine.model)
    with Gateway(tmp_path_factory.mktemp("named"), {}, config) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def fronted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Two servers behind one backend; what each serves is for the gateway to find out."""
    vision, text = pair
    config = TWO_SERVERS.format(vision=vision, text=text, shared=SHARED_MODEL)
    with Gateway(tmp_path_factory.mktemp("fronted"), {}, config) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def idle_pair(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes the pair finds both idle and leaves them so."""
    servers: Pair | tuple[()] = request.getfixturevalue("pair") if "pair" in request.fixturenames else ()
    for server in servers:
        server.wait_until_idle()
    yield
    for server in servers:
        server.wait_until_idle()


def client_of(gateway: Gateway) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=120.0)


def served_by(pair: Pair) -> tuple[int, int]:
    """Answers that each server has ended since it started."""
    vision, text = pair
    return vision.now().served, text.now().served


# Names.


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("first", "first"),
        ("gpt-4o-mini", "first"),
        ("simple", "first"),
        ("GPT-4o-Mini", "first"),
        ("second", "second"),
        ("hidden", "second"),
        ("auto", "second"),
    ],
)
def test_tier_alias_and_auto_lead_to_their_tier(named: Gateway, engine: Engine, name: str, tier: str) -> None:
    with client_of(named) as client:
        answer = client.chat.completions.with_raw_response.create(model=name, messages=HELLO, max_tokens=2)
    assert answer.headers["x-gateway-tier"] == tier
    assert answer.headers["x-gateway-model"] == engine.model
    assert answer.headers["x-gateway-backend"] == "here"
    assert answer.parse().model == name


def test_model_name_that_two_tiers_share_means_the_first(named: Gateway, engine: Engine) -> None:
    with client_of(named) as client:
        answer = client.chat.completions.with_raw_response.create(model=engine.model, messages=HELLO, max_tokens=2)
    assert answer.headers["x-gateway-tier"] == "first"
    assert answer.parse().model == engine.model


def test_tiers_and_aliases_are_listed_but_for_hidden_ones(named: Gateway) -> None:
    with client_of(named) as client:
        listed = [model.id for model in client.models.list()]
        again = list(client.models.list())
        assert [model.id for model in again] == listed
        assert client.models.retrieve("first").created == next(model.created for model in again if model.id == "first")
    assert {"first", "second", "gpt-4o-mini"} <= set(listed)
    assert "hidden" not in listed


# Two servers.


@pytest.mark.parametrize(("tier", "place"), [("eyes", 0), ("words", 1)])
def test_each_tier_reaches_the_server_that_has_its_model(fronted: Gateway, pair: Pair, tier: str, place: int) -> None:
    server, other = pair[place], pair[1 - place]
    served, beside = server.now().served, other.now().served
    with client_of(fronted) as client:
        answer = client.chat.completions.with_raw_response.create(
            model=tier, messages=HELLO, max_tokens=4, temperature=0
        )
    assert answer.headers["x-gateway-model"] == server.model
    assert answer.headers["x-gateway-tier"] == tier
    assert answer.parse().model == tier
    server.wait_for("it has served one more", lambda load: load.served == served + 1)
    assert other.now().served == beside


def test_stream_of_each_tier_ends_well(fronted: Gateway) -> None:
    with client_of(fronted) as client:
        for name in ("eyes", "gpt-4o", "words", "auto", "both"):
            chunks = list(
                client.chat.completions.create(model=name, messages=HELLO, max_tokens=4, temperature=0, stream=True)
            )
            assert {chunk.model for chunk in chunks} == {name}
            assert chunks[-1].choices[0].finish_reason == "length"


def test_image_goes_to_the_server_that_sees(fronted: Gateway, picture: str) -> None:
    parts: Any = [{"type": "text", "text": "Which colour?"}, {"type": "image_url", "image_url": {"url": picture}}]
    with client_of(fronted) as client:
        answer = client.chat.completions.create(
            model="eyes", messages=[{"role": "user", "content": parts}], max_tokens=4, temperature=0
        )
    assert answer.choices[0].finish_reason == "length"


async def test_servers_of_the_same_model_share_the_load_evenly(fronted: Gateway, pair: Pair) -> None:
    """Least busy first, so of six at once each has three."""
    before = served_by(pair)
    async with AsyncOpenAI(base_url=f"{fronted.url}/v1", api_key=KEY, max_retries=0, timeout=120.0) as client:
        request = pair[0].long_request("both", stream=False) | {"max_tokens": 400}
        await asyncio.gather(*(client.chat.completions.create(**request) for _ in range(6)))
    wait_until(
        lambda: served_by(pair),
        lambda served: served == (before[0] + 3, before[1] + 3),
        f"three more at each than {before}",
    )


def test_server_that_is_busy_with_another_tier_is_taken_last(fronted: Gateway, pair: Pair) -> None:
    vision, _ = pair
    before = served_by(pair)
    with ExitStack() as calls, client_of(fronted) as client:
        for _ in range(2):
            calls.enter_context(Call(fronted.url, vision.long_request("eyes", stream=True), KEY))
        vision.wait_for("two run there", lambda load: load.running == 2)
        for _ in range(2):
            client.chat.completions.create(model="both", messages=HELLO, max_tokens=4, temperature=0)
    wait_until(
        lambda: served_by(pair),
        lambda served: served == (before[0], before[1] + 2),
        f"two more at the idle one than {before}",
    )


def test_leaving_ends_the_work_at_whichever_server_it_runs(fronted: Gateway, pair: Pair) -> None:
    for tier, server in zip(("eyes", "words"), pair, strict=True):
        with server.no_answer_ended(), Call(fronted.url, server.long_request(tier, stream=True), KEY) as call:
            call.read_until(b"data: ", times=3)
            server.wait_for("the request runs", lambda load: load.running == 1)
