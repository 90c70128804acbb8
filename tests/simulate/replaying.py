"""Playing a recorded exchange to a stand-in: the words that its model shall say, the request, and what must come back the same."""

import json
import re
from pathlib import Path
from typing import Any

import httpx2

from gateway.simulate import Options, running
from tests.golden import PICTURE_MARK, Recording, events, picture, shape, shapes_in_turn

LENGTHS = ("content-length", "transfer-encoding")
# Compared only in part: of these the stand-in has but what a gateway reads (vLLM's metrics likewise: a part of the names).
PARTLY = {"api_show": ("model_info", "tensors"), "api_show_thinking": ("model_info", "tensors")}


def recorded(server: str) -> dict[str, Recording]:
    """The recordings of single requests in `recorded/`, made of tiny models; in the form of those in `tests/golden`."""
    text = (Path(__file__).parent / "recorded" / f"{server}.json").read_text().replace(PICTURE_MARK, picture())
    return {
        case: Recording(
            server,
            case,
            entry["method"],
            entry["path"],
            entry.get("request_headers", {}),
            entry.get("request"),
            entry["status"],
            entry["headers"],
            entry.get("events", entry.get("body")),
            "events" in entry,
        )
        for case, entry in json.loads(text).items()
    }


async def play(recording: Recording, options: Options, said: list[str] | None = None) -> httpx2.Response:
    """What a stand-in answers to the recording's request when its model says the recorded words (or `said`)."""
    async with running(options) as server:
        if words := said or words_of(recording):
            server.engine.say(words)
        async with httpx2.AsyncClient(base_url=server.base_url, timeout=20, verify=False) as client:
            if recording.case == "api_ps":
                await client.post("/api/generate", json={"model": "qwen3-vl"})
            headers = {"content-type": "application/json", **recording.request_headers}
            return await client.request(recording.method, recording.path, content=recording.content, headers=headers)


def compare_heads(response: httpx2.Response, recording: Recording) -> None:
    assert response.status_code == recording.status
    assert _headers(response.headers) == _headers(recording.headers)


def compare_bodies(response: httpx2.Response, recording: Recording, in_order: bool = True) -> None:
    """The shapes are the same; of a stream, one after the other, or only which there are."""
    if recording.is_stream:
        ours, theirs = (
            shapes_in_turn(events(response.text)),
            shapes_in_turn([run if isinstance(run, str) else run["first"] for run in recording.body]),
        )
        if in_order:
            assert ours == theirs
        else:
            assert set(ours) == set(theirs)
    elif "json" in recording.headers.get("content-type", "") and recording.body != "":
        _compare_json(response.json(), recording)
    elif recording.case == "metrics":
        ours = [line.removeprefix("# TYPE ") for line in response.text.splitlines() if line.startswith("# TYPE ")]
        assert ours
        assert set(ours) <= set(recording.body)
    else:
        assert response.text == recording.body


def compare_errors(response: httpx2.Response, recording: Recording) -> None:
    """The kind and field of an error, whatever its words."""
    ours, theirs = response.json()["error"], recording.body["error"]
    assert {**ours, "message": ""} == {**theirs, "message": ""}


def _compare_json(ours: dict[str, Any], recording: Recording) -> None:
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
    return re.sub(
        r"'(completion|tools|thinking|llama|qwen3\w*)'",
        "…",
        repr(shape({**model, "capabilities": bool(model.get("capabilities"))})),
    )


def _headers(headers: Any) -> dict[str, str]:
    """What was recorded of headers, the length reduced to whether there is one."""
    kept = {name.lower(): value for name, value in headers.items() if name.lower() not in ("date", "connection")}
    return {name: "" if name in LENGTHS else value for name, value in kept.items()}


def words_of(recording: Recording) -> list[str]:
    """The tokens that make a model say what was recorded."""
    if recording.status != 200 or recording.method != "POST":
        return []
    if recording.is_stream:
        called = next((call for run in recording.body if isinstance(run, dict) for call in _calls(run["first"])), None)
        return _called(called) if called else recording.pieces
    body = recording.body
    message = (body.get("choices") or [{}])[0]
    message = (
        message.get("message")
        or body.get("message")
        or {"content": message.get("text") or body.get("response"), "thinking": body.get("thinking")}
    )
    if message.get("tool_calls"):
        return _called(message["tool_calls"][0])
    text = message.get("content") or message.get("reasoning") or message.get("thinking") or ""
    return _tokens(text, recording)


def _calls(event: dict[str, Any]) -> list[Any]:
    message = event.get("message") or (event.get("choices") or [{}])[0].get("delta") or {}
    return list(message.get("tool_calls") or ())


def _called(call: dict[str, Any]) -> list[str]:
    arguments = call["function"].get("arguments", "{}")
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    text = json.dumps({"name": call["function"]["name"], "parameters": arguments})
    return [text[:9], text[9:]]


def _tokens(text: str, recording: Recording) -> list[str]:
    """The text in as many tokens as were counted; with its stop string put back; in equal ones where it ended for those."""
    request, choice = recording.request_body, (recording.body.get("choices") or [{}])[0]
    stop = request.get("stop") or request.get("options", {}).get("stop")
    count = recording.body.get("eval_count") or (recording.body.get("usage") or {}).get("completion_tokens") or 0
    if stop and "stop" in (choice.get("finish_reason"), recording.body.get("done_reason")):
        last = choice.get("stop_reason") or stop[0]
        return [text, last] if count > 1 else [text + last]
    broken = re.search(r"(.+?)\1{30}$", text)
    if broken and choice.get("finish_reason") is recording.body.get("done_reason") is None:
        return [text[: broken.start()], *[broken[1]] * 31]
    singles = min(count - 1, len(text))
    return [*text[:singles], text[singles:], *[""] * (count - singles - 1)] if count else []
