"""Each recording's request, sent to the stand-in of its server: the same status, headers and shape of the body come back.

The words of a recorded reply were a model's noise; the stand-in is given those very words to say, so that all that follows from them
(stop strings, repetition, calls, reasoning, the finish) must come out as it did.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from gateway.simulate import Model, Options, Running, running
from tests.golden import SERVERS, Recording, events, load, shape, shapes_in_turn

OPTIONS = {
    "vllm-0.32.0": Options(
        "vllm",
        models=(Model("Qwen/Qwen3-VL-8B-Instruct", family="qwen3vl", vision=True, tools=True, context_length=2048),),
        reasoning_parser=True,
    ),
    "ollama-0.33": Options("ollama", generation="0.33"),
    "ollama-0.24": Options("ollama", generation="0.24"),
}
RECORDINGS = [recording for server in SERVERS for recording in load(server).values()]
LENGTHS = ("content-length", "transfer-encoding")
# Compared only in part: of these the stand-in has but what a gateway reads (vLLM's metrics likewise: a part of the names).
PARTLY = {"api_show": ("model_info", "tensors"), "api_show_thinking": ("model_info", "tensors")}


@pytest.fixture
async def server(recording: Recording) -> AsyncIterator[Running]:
    async with running(OPTIONS[recording.server]) as server:
        yield server


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: f"{recording.server}/{recording.case}")
async def test_stand_in_answers_as_the_recorded_server_did(recording: Recording, server: Running) -> None:
    if words := _words(recording):
        server.engine.say(words)
    async with httpx2.AsyncClient(base_url=server.base_url, timeout=20, verify=False) as client:
        if recording.case == "api_ps":
            await client.post("/api/generate", json={"model": "qwen3-vl"})
        headers = {"content-type": "application/json", **recording.request_headers}
        response = await client.request(recording.method, recording.path, content=recording.content, headers=headers)
    assert response.status_code == recording.status
    assert _headers(response.headers) == _headers(recording.headers)
    if recording.is_stream:
        recorded = [run if isinstance(run, str) else run["first"] for run in recording.body]
        assert shapes_in_turn(events(response.text)) == shapes_in_turn(recorded)
    elif "json" in recording.headers.get("content-type", ""):
        _compare(response.json(), recording)
    elif recording.case == "metrics":
        ours = [line.removeprefix("# TYPE ") for line in response.text.splitlines() if line.startswith("# TYPE ")]
        assert ours
        assert set(ours) <= set(recording.body)
    else:
        assert response.text == recording.body


def _compare(ours: dict[str, Any], recording: Recording) -> None:
    theirs = dict(recording.body)
    for key in PARTLY.get(recording.case, ()):
        assert set(ours[key]) <= set(theirs[key]) if isinstance(ours[key], dict) else ours[key]
        ours, theirs = {**ours, key: None}, {**theirs, key: None}
    for key in ("models", "data"):
        if isinstance(theirs.get(key), list) and recording.case in ("api_tags", "models"):
            assert {repr(_loose(item)) for item in ours[key]} <= {repr(_loose(item)) for item in theirs[key]}
            ours, theirs = {**ours, key: None}, {**theirs, key: None}
    assert shape(ours) == shape(theirs)


def _loose(model: dict[str, Any]) -> Any:
    """The shape of an entry of a list of models, whose family and abilities are its own."""
    return re.sub(r"'(completion|tools|thinking|llama|qwen3\w*)'", "…", repr(shape({**model, "capabilities": bool(model.get("capabilities"))})))


def _headers(headers: Any) -> dict[str, str]:
    """What was recorded of headers, the length reduced to whether there is one."""
    kept = {name.lower(): value for name, value in headers.items() if name.lower() not in ("date", "connection")}
    return {name: "" if name in LENGTHS else value for name, value in kept.items()}


def _words(recording: Recording) -> list[str]:
    """The tokens that make a model say what was recorded."""
    if recording.status != 200 or recording.method != "POST":
        return []
    if recording.is_stream:
        called = next((call for run in recording.body if isinstance(run, dict) for call in _calls(run["first"])), None)
        return [_called(called)] if called else recording.pieces
    body = recording.body
    message = (body.get("choices") or [{}])[0]
    message = message.get("message") or body.get("message") or {"content": message.get("text")}
    if message.get("tool_calls"):
        return [_called(message["tool_calls"][0])]
    text = message.get("content") or message.get("reasoning") or message.get("thinking") or ""
    return _tokens(text, recording)


def _calls(event: dict[str, Any]) -> list[Any]:
    message = event.get("message") or (event.get("choices") or [{}])[0].get("delta") or {}
    return list(message.get("tool_calls") or ())


def _called(call: dict[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return json.dumps({"name": call["function"]["name"], "parameters": arguments})


def _tokens(text: str, recording: Recording) -> list[str]:
    """The text in as many tokens as were counted; with its stop string put back; in equal ones where it ended for those."""
    request, choice = recording.request_body, (recording.body.get("choices") or [{}])[0]
    stop = request.get("stop")
    if stop and "stop" in (choice.get("finish_reason"), recording.body.get("done_reason")):
        return [text + (choice.get("stop_reason") or stop[0])]
    broken = re.search(r"(.+?)\1{30}$", text)
    if broken and choice.get("finish_reason") is recording.body.get("done_reason") is None:
        return [text[: broken.start()], *[broken[1]] * 31]
    count = recording.body.get("eval_count") or (recording.body.get("usage") or {}).get("completion_tokens") or 0
    return [text[i] for i in range(count - 1)] + [text[count - 1 :]] if count else []
