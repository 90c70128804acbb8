"""Replay of recorded exchanges to a stand-in: its model's text, the request, and the comparison of
the responses.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from gateway.simulate import Options, Running, running
from tests.golden import PICTURE_MARK, Recording, consecutive_shapes, events, picture, shape

LENGTHS = ("content-length", "transfer-encoding")
# Keys compared only in part: the stand-in has only what a gateway reads. The same holds for the
# names of vLLM's metrics.
PARTIAL_KEYS = {"api_show": ("model_info", "tensors"), "api_show_thinking": ("model_info", "tensors")}


def recorded(server: str) -> dict[str, Recording]:
    """Load the recordings of tiny models in `recorded/`, in the form of those in `tests/golden`."""
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


class Replayer:
    """A stand-in with a client, to which recordings are replayed one after the other."""

    def __init__(self, server: Running, client: httpx2.AsyncClient) -> None:
        self._server = server
        self._client = client

    async def replay(self, recording: Recording, tokens: list[str] | None = None) -> httpx2.Response:
        """Send the recorded request while the model produces `tokens`, by default the recorded
        text.
        """
        self._server.engine.scripts.clear()  # an earlier request that was refused has not used its script
        if script := tokens or tokens_of(recording):
            self._server.engine.say(script)
        headers = {"content-type": "application/json", **recording.request_headers}
        return await self._client.request(recording.method, recording.path, content=recording.content, headers=headers)

    async def load(self, model: str) -> None:
        """Have an Ollama load `model`."""
        await self._client.post("/api/generate", json={"model": model})


@asynccontextmanager
async def replayer(options: Options) -> AsyncIterator[Replayer]:
    """Start a stand-in and a client of it."""
    async with (
        running(options) as server,
        httpx2.AsyncClient(base_url=server.base_url, timeout=20, verify=False) as client,
    ):
        yield Replayer(server, client)


def compare_heads(response: httpx2.Response, recording: Recording) -> None:
    assert response.status_code == recording.status
    assert _headers(response.headers) == _headers(recording.headers)


def compare_bodies(response: httpx2.Response, recording: Recording, in_order: bool = True) -> None:
    """Check that the shapes are equal; for a stream, in the same order if `in_order`."""
    if recording.is_stream:
        ours, theirs = (
            consecutive_shapes(events(response.text)),
            consecutive_shapes([run if isinstance(run, str) else run["first"] for run in recording.body]),
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
    """Check that the errors are equal except for their messages."""
    ours, theirs = response.json()["error"], recording.body["error"]
    assert {**ours, "message": ""} == {**theirs, "message": ""}


def _compare_json(ours: dict[str, Any], recording: Recording) -> None:
    theirs = dict(recording.body)
    for key in PARTIAL_KEYS.get(recording.case, ()):
        assert set(ours[key]) <= set(theirs[key]) if isinstance(ours[key], dict) else ours[key]
        ours, theirs = {**ours, key: None}, {**theirs, key: None}
    for key in ("models", "data"):
        if isinstance(theirs.get(key), list) and recording.case in ("api_tags", "models"):
            assert {repr(_loose(item)) for item in ours[key]} <= {repr(_loose(item)) for item in theirs[key]}
            ours, theirs = {**ours, key: None}, {**theirs, key: None}
    assert shape(ours) == shape(theirs)


def _loose(model: dict[str, Any]) -> Any:
    """Return the shape of an entry of a model list, without the model's family and capabilities."""
    return re.sub(
        r"'(completion|tools|thinking|llama|qwen3\w*)'",
        "…",
        repr(shape({**model, "capabilities": bool(model.get("capabilities"))})),
    )


def _headers(headers: Any) -> dict[str, str]:
    """Return the comparable headers, without the value of the length."""
    kept = {name.lower(): value for name, value in headers.items() if name.lower() not in ("date", "connection")}
    return {name: "" if name in LENGTHS else value for name, value in kept.items()}


def tokens_of(recording: Recording) -> list[str]:
    """Return the tokens that make the simulated model produce the recorded text."""
    if recording.status != 200 or recording.method != "POST":
        return []
    if recording.is_stream:
        called = next((call for run in recording.body if isinstance(run, dict) for call in _calls(run["first"])), None)
        return _call_tokens(called) if called else recording.pieces
    body = recording.body
    message = (body.get("choices") or [{}])[0]
    message = (
        message.get("message")
        or body.get("message")
        or {"content": message.get("text") or body.get("response"), "thinking": body.get("thinking")}
    )
    if message.get("tool_calls"):
        return _call_tokens(message["tool_calls"][0])
    text = message.get("content") or message.get("reasoning") or message.get("thinking") or ""
    return _text_tokens(text, recording)


def _calls(event: dict[str, Any]) -> list[Any]:
    message = event.get("message") or (event.get("choices") or [{}])[0].get("delta") or {}
    return list(message.get("tool_calls") or ())


def _call_tokens(call: dict[str, Any]) -> list[str]:
    arguments = call["function"].get("arguments", "{}")
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    text = json.dumps({"name": call["function"]["name"], "parameters": arguments})
    return [text[:9], text[9:]]


def _text_tokens(text: str, recording: Recording) -> list[str]:
    """Split the text into as many tokens as the recording counted.

    A stop string that the engine removed is added again. A text that was aborted because of a
    repetition is split into equal tokens.
    """
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
