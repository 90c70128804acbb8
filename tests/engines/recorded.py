"""The recordings as a backend's dialect meets them: the bytes of a stream, and what it says."""

import json
from copy import deepcopy
from typing import Any

from tests.golden import SERVERS, Recording, load

RECORDINGS = [recording for server in SERVERS for recording in load(server).values()]
CHAT_PATHS = ("/api/chat", "/v1/chat/completions")
CHATS = [recording for recording in RECORDINGS if recording.path in CHAT_PATHS and recording.method == "POST"]
REFUSALS = [recording for recording in RECORDINGS if recording.status >= 400 and recording.method == "POST"]


def name(recording: Recording) -> str:
    return f"{recording.server}/{recording.case}"


def texts(event: dict[str, Any]) -> dict[str, Any]:
    """The part of an event in which its text stands."""
    if "choices" in event:
        return dict(event["choices"][0]["delta"]) if event["choices"] else {}
    return dict(event.get("message") or {})


def unfolded(recording: Recording) -> list[Any]:
    """All events of a stream, one by one; `[DONE]` stays text."""
    events: list[Any] = []
    for run in recording.body:
        pieces = None if isinstance(run, str) else run.get("pieces")
        if pieces is None:
            events.append(run if isinstance(run, str) else run["first"])
            continue
        key = next(key for key in ("thinking", "reasoning", "content") if texts(run["first"]).get(key))
        for text, times in ((piece, 1) if isinstance(piece, str) else piece for piece in pieces):
            event = deepcopy(run["first"])
            holder = event["choices"][0]["delta"] if "choices" in event else event["message"]
            holder[key] = text
            events += [event] * times
    return events


def body_of(recording: Recording) -> bytes:
    """The stream as it came."""
    if recording.path == "/api/chat":
        return b"".join(json.dumps(event).encode() + b"\n" for event in unfolded(recording))
    return b"".join(
        b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
        for event in unfolded(recording)
    )


def said(recording: Recording, *keys: str) -> str:
    """What a stream says under any of `keys`."""
    return "".join(
        texts(event).get(key) or "" for event in unfolded(recording) if not isinstance(event, str) for key in keys
    )


def error_body(recording: Recording) -> bytes:
    return recording.body.encode() if isinstance(recording.body, str) else json.dumps(recording.body).encode()
