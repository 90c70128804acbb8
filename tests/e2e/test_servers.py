"""Tiers and aliases from a YAML file, and several servers with different models behind one
backend.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.call import Call
from tests.e2e.conftest import SHARED_MODEL
from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway
from tests.real_engines.process import wait_until

Pair = tuple[Engine, Engine]

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]

ONE_SERVER = """
llm_backend: active
backends:
  active: {{kind: {kind}, base_url: "{url}"}}
tiers:
  first: {{models: {{active: "{model}"}}, aliases: [gpt-4o-mini, Simple]}}
  second: {{models: {{active: "{model}"}}, aliases: [{{name: hidden, listed: false}}]}}
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
  vision: {{models: {{vllm: "{vision.model}"}}, aliases: [gpt-4o]}}
  text: {{models: {{vllm: "{text.model}"}}}}
  both: {{models: {{vllm: "{shared}"}}}}
default_tier: text
"""


@pytest.fixture(scope="module")
def named(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two tiers and aliases in front of one engine."""
    config = ONE_SERVER.format(kind=engine.kind, url=engine.url, model=engine.model)
    with Gateway(tmp_path_factory.mktemp("named"), {}, config) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def two_servers(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of a backend of two servers, which has to find out their models."""
    vision, text = pair
    config = TWO_SERVERS.format(vision=vision, text=text, shared=SHARED_MODEL)
    with Gateway(tmp_path_factory.mktemp("two_servers"), {}, config) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
def idle_pair(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that both engines of the pair are idle before and after each test that uses them."""
    servers: Pair | tuple[()] = request.getfixturevalue("pair") if "pair" in request.fixturenames else ()
    for server in servers:
        server.wait_until_idle()
    yield
    for server in servers:
        server.wait_until_idle()


def served_by(pair: Pair) -> tuple[int, int]:
    """Return the number of answers that each server has finished."""
    vision, text = pair
    return vision.current_load().served, text.current_load().served


# Names


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
def test_tier_name_alias_and_auto_select_their_tier(named: Gateway, engine: Engine, name: str, tier: str) -> None:
    with named.openai() as client:
        answer = client.chat.completions.with_raw_response.create(model=name, messages=HELLO, max_tokens=2)
    assert answer.headers["x-gateway-tier"] == tier
    assert answer.headers["x-gateway-model"] == engine.model
    assert answer.headers["x-gateway-backend"] == "active"
    assert answer.parse().model == name


def test_model_name_shared_by_two_tiers_selects_the_first(named: Gateway, engine: Engine) -> None:
    with named.openai() as client:
        answer = client.chat.completions.with_raw_response.create(model=engine.model, messages=HELLO, max_tokens=2)
    assert answer.headers["x-gateway-tier"] == "first"
    assert answer.parse().model == engine.model


def test_tiers_and_visible_aliases_are_listed(named: Gateway) -> None:
    with named.openai() as client:
        listed = [model.id for model in client.models.list()]
        again = list(client.models.list())
        assert [model.id for model in again] == listed
        assert client.models.retrieve("first").created == next(model.created for model in again if model.id == "first")
    assert {"first", "second", "gpt-4o-mini"} <= set(listed)
    assert "hidden" not in listed


# Two servers


@pytest.mark.parametrize(("tier", "index"), [("vision", 0), ("text", 1)], ids=["vision", "text"])
def test_tier_is_served_by_the_server_of_its_model(two_servers: Gateway, pair: Pair, tier: str, index: int) -> None:
    server, other = pair[index], pair[1 - index]
    served, served_by_other = server.current_load().served, other.current_load().served
    with two_servers.openai() as client:
        answer = client.chat.completions.with_raw_response.create(
            model=tier, messages=HELLO, max_tokens=4, temperature=0
        )
    assert answer.headers["x-gateway-model"] == server.model
    assert answer.headers["x-gateway-tier"] == tier
    assert answer.parse().model == tier
    server.wait_for("it has served one more request", lambda load: load.served == served + 1)
    assert other.current_load().served == served_by_other


def test_stream_of_each_tier_ends_normally(two_servers: Gateway) -> None:
    with two_servers.openai() as client:
        for name in ("vision", "gpt-4o", "text", "auto", "both"):
            chunks = list(
                client.chat.completions.create(model=name, messages=HELLO, max_tokens=4, temperature=0, stream=True)
            )
            assert {chunk.model for chunk in chunks} == {name}
            assert chunks[-1].choices[0].finish_reason == "length"


def test_image_is_sent_to_the_vision_server(two_servers: Gateway, image_url: str) -> None:
    parts: Any = [{"type": "text", "text": "Which colour?"}, {"type": "image_url", "image_url": {"url": image_url}}]
    with two_servers.openai() as client:
        answer = client.chat.completions.create(
            model="vision", messages=[{"role": "user", "content": parts}], max_tokens=4, temperature=0
        )
    assert answer.choices[0].finish_reason == "length"


async def test_servers_of_one_model_share_the_load_evenly(two_servers: Gateway, pair: Pair) -> None:
    """The least busy server is chosen, so each gets three of six concurrent requests."""
    before = served_by(pair)
    async with two_servers.async_openai() as client:
        request = pair[0].long_arguments("both", stream=False) | {"max_tokens": 400}
        await asyncio.gather(*(client.chat.completions.create(**request) for _ in range(6)))
    wait_until(
        lambda: served_by(pair),
        lambda served: served == (before[0] + 3, before[1] + 3),
        f"three more at each than {before}",
    )


def test_server_busy_with_another_tier_is_chosen_last(two_servers: Gateway, pair: Pair) -> None:
    vision, _ = pair
    before = served_by(pair)
    with ExitStack() as calls, two_servers.openai() as client:
        for _ in range(2):
            calls.enter_context(Call(two_servers.url, vision.long_request("vision", stream=True), KEY))
        vision.wait_for("two requests run there", lambda load: load.running == 2)
        for _ in range(2):
            client.chat.completions.create(model="both", messages=HELLO, max_tokens=4, temperature=0)
    wait_until(
        lambda: served_by(pair),
        lambda served: served == (before[0], before[1] + 2),
        f"two more at the idle one than {before}",
    )


def test_disconnect_cancels_the_work_on_whichever_server_it_runs(two_servers: Gateway, pair: Pair) -> None:
    for tier, server in zip(("vision", "text"), pair, strict=True):
        with (
            server.aborts_all_answers(two_servers),
            Call(two_servers.url, server.long_request(tier, stream=True), KEY) as call,
        ):
            call.read_until(b"data: ", times=3)
            server.wait_for("the request runs", lambda load: load.running == 1)
