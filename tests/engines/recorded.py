"""Recordings in the form that an engine's reader gets them, and the text that they contain."""

import json
from copy import deepcopy
from typing import Any

from tests.golden import SERVERS, Recording, load

RECORDINGS = [recording for server in SERVERS for recording in load(server).values()]
CHAT_PATHS = ("/api/chat", "/v1/chat/completions")
CHATS = [recording for recording in RECORDINGS if recording.path in CHAT_PATHS and recording.method == "POST"]
ERRORS = [recording for recording in RECORDINGS if recording.status >= 400 and recording.method == "POST"]


def recording_id(recording: Recording) -> str:
    return f"{recording.server}/{recording.case}"


def text_fields(event: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an event that contains its text."""
    if "choices" in event:
        return dict(event["choices"][0]["delta"]) if event["choices"] else {}
    return dict(event.get("message") or {})


def unfold(recording: Recording) -> list[Any]:
    """Return all events of a stream, one by one. `[DONE]` stays a string."""
    events: list[Any] = []
    for run in recording.body:
        pieces = None if isinstance(run, str) else run.get("pieces")
        if pieces is None:
            events.append(run if isinstance(run, str) else run["first"])
            continue
        key = next(key for key in ("thinking", "reasoning", "content") if text_fields(run["first"]).get(key))
        for text, times in ((piece, 1) if isinstance(piece, str) else piece for piece in pieces):
            event = deepcopy(run["first"])
            holder = event["choices"][0]["delta"] if "choices" in event else event["message"]
            holder[key] = text
            events += [event] * times
    return events


def body_of(recording: Recording) -> bytes:
    """Return the bytes of the stream."""
    if recording.path == "/api/chat":
        return b"".join(json.dumps(event).encode() + b"\n" for event in unfold(recording))
    return b"".join(
        b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
        for event in unfold(recording)
    )


def recorded_text(recording: Recording, *keys: str) -> str:
    """Return the text of a stream under any of `keys`."""
    return "".join(
        text_fields(event).get(key) or "" for event in unfold(recording) if not isinstance(event, str) for key in keys
    )


def error_body(recording: Recording) -> bytes:
    return recording.body.encode() if isinstance(recording.body, str) else json.dumps(recording.body).encode()
