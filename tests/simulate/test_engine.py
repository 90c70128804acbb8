"""Faults of both stand-ins, and the control endpoints under `/simulate/`.

Covers: gateway/simulate/asgi.py
"""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from gateway.simulate import Fault, Options, Running, running
from tests.golden import events
from tests.simulate.endpoints import client, sent, until, user

ENDPOINTS = {
    "ollama": ("/api/chat", "llama"),
    "ollama v1": ("/v1/chat/completions", "llama"),
    "vllm": ("/v1/chat/completions", None),
}
EACH_ENDPOINT = pytest.mark.parametrize("endpoint", ENDPOINTS)


def options(endpoint: str, *faults: Fault) -> Options:
    return Options("vllm" if endpoint == "vllm" else "ollama", faults=faults)


def body(endpoint: str, stream: bool) -> dict[str, Any]:
    return {"model": ENDPOINTS[endpoint][1], "messages": user("Hello"), "stream": stream}


async def post(server: Running, endpoint: str, stream: bool) -> httpx2.Response:
    async with client(server) as http:
        return await http.post(ENDPOINTS[endpoint][0], json=body(endpoint, stream))


@EACH_ENDPOINT
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_die_closes_the_connection_and_the_next_request_is_served(endpoint: str, stream: bool) -> None:
    async with running(options(endpoint, Fault("die", after=3))) as server:
        with pytest.raises(httpx2.RemoteProtocolError):
            await post(server, endpoint, stream)
        assert (await post(server, endpoint, stream)).status_code == 200
        assert server.engine.state() == {"running": 0, "waiting": 0, "served": 1, "cancelled": 0}


@EACH_ENDPOINT
async def test_die_sends_the_tokens_before_it(endpoint: str) -> None:
    async with (
        running(options(endpoint, Fault("die", after=3))) as server,
        sent(server, ENDPOINTS[endpoint][0], body(endpoint, True)) as reader,
    ):
        received = await reader.read()
    assert b" images" not in received
    assert b" saw" in received
    assert not received.endswith(b"0\r\n\r\n")


async def test_error_in_an_ollama_stream_is_a_native_error_line_and_a_v1_chunk_without_a_model() -> None:
    async with running(options("ollama", Fault("error", after=2, times=2))) as server:
        native = events((await post(server, "ollama", True)).text)
        openai = events((await post(server, "ollama v1", True)).text)
    assert [line.get("error") for line in native] == [
        None,
        None,
        "an error was encountered while running the model: unexpected EOF",
    ]
    assert [chunk["model"] for chunk in openai] == ["llama", "llama", ""]
    assert openai[-1]["choices"] == [{"index": 0, "delta": {"content": ""}, "finish_reason": None}]


async def test_error_in_a_vllm_stream_is_an_event_before_done() -> None:
    async with running(options("vllm", Fault("error", after=2))) as server:
        *_, error, done = events((await post(server, "vllm", True)).text)
    assert error["error"]["code"] == 500
    assert done == "[DONE]"


@EACH_ENDPOINT
async def test_error_in_a_plain_answer_is_a_500(endpoint: str) -> None:
    async with running(options(endpoint, Fault("error", after=2))) as server:
        assert (await post(server, endpoint, False)).status_code == 500


@EACH_ENDPOINT
async def test_truncate_ends_the_body_cleanly_without_a_finish(endpoint: str) -> None:
    async with running(options(endpoint, Fault("truncate", after=2, times=2))) as server:
        text = (await post(server, endpoint, True)).text
        plain = (await post(server, endpoint, False)).text
    assert '"done":true' not in text
    assert "[DONE]" not in text
    assert '"finish_reason":"' not in text
    if endpoint == "vllm":
        with pytest.raises(json.JSONDecodeError):
            json.loads(plain)
    else:
        assert '"done":false' in plain or '"finish_reason":null' in plain


@EACH_ENDPOINT
async def test_stall_sends_nothing_more_and_holds_its_slot_until_the_client_leaves(endpoint: str) -> None:
    async with running(options(endpoint, Fault("stall", after=2))) as server:
        async with sent(server, ENDPOINTS[endpoint][0], body(endpoint, True)) as reader:
            await reader.readuntil(b" saw")
            await until(lambda: server.engine.running == 1)
        await until(lambda: server.engine.running == 0)
        assert server.engine.cancelled == 1


@EACH_ENDPOINT
@pytest.mark.parametrize("status", [500, 503])
async def test_status_replaces_the_answer_in_the_error_format_of_the_endpoint(endpoint: str, status: int) -> None:
    async with running(options(endpoint, Fault("status", status=status))) as server:
        response = await post(server, endpoint, True)
    assert response.status_code == status
    assert isinstance(response.json()["error"], str if endpoint == "ollama" else dict)


@EACH_ENDPOINT
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_reset_closes_the_connection_with_a_reset(endpoint: str, stream: bool) -> None:
    async with running(options(endpoint, Fault("reset"))) as server:
        with pytest.raises(httpx2.ReadError):
            await post(server, endpoint, stream)
        assert (await post(server, endpoint, stream)).status_code == 200


@EACH_ENDPOINT
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_garbage_is_a_200_of_the_usual_type_that_is_not_json(endpoint: str, stream: bool) -> None:
    async with running(options(endpoint, Fault("garbage"))) as server:
        broken, sound = [await post(server, endpoint, stream) for _ in range(2)]
    assert (broken.status_code, broken.headers["content-type"]) == (200, sound.headers["content-type"])
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken.text)


async def test_fault_of_every_third_generation_spares_the_others() -> None:
    async with running(options("vllm", Fault("status", times=2, every=3))) as server:
        statuses = [(await post(server, "vllm", False)).status_code for _ in range(9)]
    assert statuses == [200, 200, 500, 200, 200, 500, 200, 200, 200]


async def test_fault_set_while_running_applies_as_often_as_requested_and_can_be_cleared() -> None:
    async with running(Options("vllm")) as server, client(server) as http:
        await http.post("/simulate/fault", json={"kind": "status", "status": 503, "times": 2})
        assert [(await post(server, "vllm", False)).status_code for _ in range(3)] == [503, 503, 200]
        await http.post("/simulate/fault", json={"kind": "status", "times": 0})
        assert [(await post(server, "vllm", False)).status_code for _ in range(3)] == [500, 500, 500]
        await http.post("/simulate/fault", json={"kind": None})
        assert (await post(server, "vllm", False)).status_code == 200
        assert (await http.post("/simulate/fault", json={"kind": "sulk"})).status_code == 400


async def test_scripted_answer_is_used_once_and_recorded_requests_have_long_strings_shortened() -> None:
    async with running(Options("ollama")) as server, client(server) as http:
        await http.post("/simulate/answer", json={"tokens": ["Hel", "lo"]})
        body = {"model": "llama", "messages": user("x" * 5000), "stream": False}
        first = (await http.post("/api/chat", json=body)).json()["message"]["content"]
        second = (await http.post("/api/chat", json=body)).json()["message"]["content"]
        kept = (await http.get("/simulate/requests")).json()
    assert first == "Hello" != second
    assert kept[0]["body"]["messages"][0]["content"].endswith("5000 characters")


@pytest.mark.parametrize(("kind", "path", "key"), [("ollama", "/api/tags", "name"), ("vllm", "/v1/models", "id")])
async def test_models_can_be_replaced_at_run_time(kind: Any, path: str, key: str) -> None:
    async with running(Options(kind)) as server, client(server) as http:
        answer = await http.post("/simulate/models", json={"models": ["new:1b,vision", "vectors:small,embedding=8"]})
        assert (answer.status_code, answer.json()) == (200, {"models": ["new:1b", "vectors:small"]})
        listed = (await http.get(path)).json()
        assert [item[key] for item in listed["models" if kind == "ollama" else "data"]] == ["new:1b", "vectors:small"]
        body = {"model": "new:1b", "messages": user("Hello"), "stream": False}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        for wrong in ([], ["new,unknown"]):
            assert (await http.post("/simulate/models", json={"models": wrong})).status_code == 400


@pytest.mark.parametrize(("requests", "served"), [(3, 3), (4, 0)])
async def test_one_request_more_than_fits_into_memory_fails_all_that_run(requests: int, served: int) -> None:
    """A queue before the memory spares them: `max_num_seqs` of 3 serves any number."""
    settings = Options("vllm", tokens_per_second=100, time_to_first_token=1, out_of_memory_above=3)
    for limit, expected in ((256, served), (3, requests)):
        async with running(replace(settings, max_num_seqs=limit)) as server:
            responses = await asyncio.gather(*(post(server, "vllm", stream=False) for _ in range(requests)))
            assert [response.status_code for response in responses].count(200) == expected
            assert (await post(server, "vllm", stream=False)).status_code == 200
