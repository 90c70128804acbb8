"""The Responses and Messages APIs through a complete gateway on real sockets, on both engines.

What a backend's failure, a client that leaves and a silent model do has to look the same as at
`/v1/chat/completions`, in the form of each API.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx2
import openai
import pytest
from openai.types.responses import Response

from tests.fakes.fault_backend import FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, running, settings_for, until
from tests.relay.serving import KINDS, PATIENT, Kind, servers, serving

pytestmark = pytest.mark.uvloop

URL = png_data_url()
IMAGE = {"type": "base64", "media_type": "image/png", "data": URL.partition(",")[2]}


class Api(NamedTuple):
    """One client API: its path, a request with a text, and one with an image."""

    path: str
    text: dict[str, Any]
    image: dict[str, Any]


APIS = {
    "responses": Api(
        "/v1/responses",
        {"model": "standard", "input": "Hello?", "max_output_tokens": 64},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]},
    ),
    "messages": Api(
        "/v1/messages",
        {"model": "standard", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 64},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": IMAGE}]}]},
    ),
}


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> Api:
    return APIS[request.param]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def backend(kind: Kind) -> AsyncIterator[FaultBackend]:
    async with FaultBackend(kind) as backend:
        yield backend


@pytest.fixture
async def gateway(backend: FaultBackend) -> AsyncIterator[Running]:
    async with running(settings_for(backend, **TIMES)) as gateway:
        yield gateway


@asynccontextmanager
async def client_of(gateway: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False) as client:
        yield client


async def post(gateway: Running, api: Api, path: str | None = None, **fields: Any) -> httpx2.Response:
    async with client_of(gateway) as client:
        return await client.post(path or api.path, json=api.text | fields)


def events_of(answer: httpx2.Response | str) -> list[dict[str, Any]]:
    text = answer if isinstance(answer, str) else answer.text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def text_of(answer: httpx2.Response) -> str:
    whole = answer.json()
    if whole.get("object") == "response":
        return str(Response.model_validate(whole).output_text)
    return "".join(block["text"] for block in whole["content"] if block["type"] == "text")


def shape(value: Any) -> Any:
    """Return the keys of objects, in order, and the types of values."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    return [shape(one) for one in value] if isinstance(value, list) else type(value).__name__


async def test_a_client_cannot_tell_which_engine_serves(api: Api) -> None:
    """Status, header names, and every field of the answer and of each event have the same shape."""
    found: list[Any] = []
    kinds: list[Kind] = ["ollama", "vllm"]
    for kind in kinds:
        async with serving(kind) as (gateway, _):
            plain, streamed = await post(gateway, api), await post(gateway, api, stream=True)
            headers = [sorted(set(answer.headers) - {"content-length"}) for answer in (plain, streamed)]
            texts = [event.get("delta") for event in events_of(streamed)]
            found.append((headers, shape(plain.json()), [shape(event) for event in events_of(streamed)], texts))
    assert found[0] == found[1]


async def test_images_and_parameters_in_the_address_are_taken(api: Api, gateway: Running) -> None:
    """Claude Code adds `?beta=true`."""
    answer = await post(gateway, api, f"{api.path}?beta=true", **api.image)
    assert answer.status_code == 200, answer.text
    assert text_of(answer)


async def test_an_error_before_the_first_byte_is_a_status(api: Api, gateway: Running, backend: FaultBackend) -> None:
    for fields in ({"stream": False}, {"stream": True}):
        backend.script.extend(["garbage"] * 2)
        answer = await post(gateway, api, **fields)
        assert answer.status_code == 502
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert error["type"] == ("api_error" if api.path == "/v1/messages" else "server_error")


@pytest.mark.parametrize("mode", ["cut", "malformed", "truncated"])
async def test_a_stream_that_breaks_never_looks_complete(
    api: Api, mode: str, gateway: Running, backend: FaultBackend
) -> None:
    backend.script.append(mode)
    answer = await post(gateway, api, stream=True)
    if answer.status_code != 200:  # nothing had been sent, and no second attempt is left
        assert answer.status_code >= 500
        return
    kinds = kinds_of(events_of(answer))
    assert not {"response.completed", "response.incomplete", "message_stop", "message_delta"} & set(kinds), kinds
    assert kinds[-1] == ("error" if api.path == "/v1/messages" else "response.failed")
    assert "error" in kinds


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_falls_back_to_another_server(api: Api, stream: bool) -> None:
    async with servers("close", "healthy") as (gateway, _, _two):
        for _ in range(2):
            answer = await post(gateway, api, stream=stream)
            assert answer.status_code == 200
            assert "error" not in kinds_of(events_of(answer))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_request_at_the_engine(api: Api, kind: Kind, stream: bool) -> None:
    async with serving(kind, "silent", **PATIENT) as (gateway, backend), client_of(gateway) as client:
        request = asyncio.create_task(client.post(api.path, json=api.text | {"stream": stream}))
        await until(lambda: len(backend.requests) == 1)
        request.cancel()
        await until(lambda: backend.peers[-1].closed_at is not None and gateway.is_idle())


async def test_a_silent_model_keeps_the_stream_alive_in_events_that_clients_ignore(api: Api, kind: Kind) -> None:
    """openai-python's accumulator and Anthropic's take a second `in_progress` and a `ping`."""
    top = {"commit_after": 0.05, "heartbeat": 0.05}
    async with (
        serving(kind, "silent", top=top, **PATIENT) as (gateway, _),
        client_of(gateway) as client,
        client.stream("POST", api.path, json=api.text | {"stream": True}) as answer,
    ):
        text, beat = "", "ping" if api.path == "/v1/messages" else "response.in_progress"
        async for piece in answer.aiter_text():
            text += piece
            kinds = kinds_of(events_of(text[: text.rfind("\n\n") + 2]))
            if kinds.count(beat) >= 3:
                break
    assert kinds[0] == ("message_start" if api.path == "/v1/messages" else "response.created")
    assert set(kinds[1:]) == {beat}


async def test_openais_accumulator_survives_keep_alives() -> None:
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    from gateway.chat.answer import Delta, Timings, Usage
    from gateway.dialects.openai_responses import OpenAiResponses

    body = json.dumps(APIS["responses"].text | {"stream": True}).encode()
    stream = OpenAiResponses().parse(body, 1 << 20)[0].form.stream("1", 0)
    parts = [stream.opening(), stream.keepalive(), stream.render(Delta("Hel")), stream.keepalive()]
    parts += [stream.render(Delta("lo", finish="stop", usage=Usage(1, 2))), stream.end(lambda: Timings(0, 0, 0, 0))]
    state: Any = ResponseStreamState(input_tools=[], text_format=openai.omit)
    adapter: Any = TypeAdapter(ResponseStreamEvent)
    for event in events_of(b"".join(parts).decode()):
        state.handle_event(adapter.validate_python(event))
    assert state._completed_response.output_text == "Hello"


async def test_errors_below_messages_have_anthropics_form_wherever_they_arise(gateway: Running) -> None:
    async with client_of(gateway) as client:
        answers = [
            (await client.get("/v1/messages"), 405, "invalid_request_error"),
            (await client.post("/v1/messages/batches", json={}), 404, "not_found_error"),
            (await client.post("/messages/nothing", json={}), 404, "not_found_error"),
            (await client.post("/v1/messages", content=b"{"), 415, "invalid_request_error"),
            (await client.post("/v1/messages", json=[]), 400, "invalid_request_error"),
            (await client.post("/v1/messages", json={"model": "gpt-99", "max_tokens": 1, "messages": [
                {"role": "user", "content": "x"}]}), 404, "not_found_error"),
            (await client.post("/v1/messages/count_tokens", json={"model": "x"}), 400, "invalid_request_error"),
        ]  # fmt: skip
    for answer, status, kind in answers:
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
        assert list(body["error"]) == ["type", "message"]


async def test_anthropics_clients_find_the_id_of_a_request(gateway: Running) -> None:
    for fields in ({}, {"stream": True}, {"max_tokens": 0}):
        answer = await post(gateway, APIS["messages"], **fields)
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "request-id" not in (await post(gateway, APIS["responses"])).headers


async def test_keys_are_taken_from_anthropics_header(backend: FaultBackend) -> None:
    settings = settings_for(backend, **TIMES).model_copy(update={"api_keys": settings_with_key()})
    async with running(settings) as gateway, client_of(gateway) as client:
        for headers, status in (({"x-api-key": "key"}, 200), ({"x-api-key": "other"}, 401), ({}, 401)):
            answer = await client.post("/v1/messages", json=APIS["messages"].text, headers=headers)
            assert answer.status_code == status
            if status == 401:
                assert answer.json()["error"]["type"] == "authentication_error"


def settings_with_key() -> Any:
    from pydantic import SecretStr

    return (SecretStr("key"),)


async def test_tokens_are_counted_by_the_engine(gateway: Running, backend: FaultBackend) -> None:
    answer = await post(gateway, APIS["messages"], "/v1/messages/count_tokens")
    assert (answer.status_code, list(answer.json())) == (200, ["input_tokens"])
    assert answer.json()["input_tokens"] > 0
