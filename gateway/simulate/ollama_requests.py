"""What comes in at Ollama's doors: JSON as Go takes it, and the job that a request asks for. Pure."""

import base64
import binascii
import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model
from gateway.simulate.words import Limits, Prompt

NATIVE_CHAT = {
    "model": "string",
    "messages": "[]api.Message",
    "stream": "bool",
    "truncate": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
}
NATIVE_GENERATE = {"model": "string", "prompt": "string", "system": "string", "stream": "bool", "truncate": "bool"}
V1_CHAT = {
    "model": "string",
    "messages": "[]openai.Message",
    "stream": "bool",
    "max_tokens": "int",
    "seed": "int",
    "frequency_penalty": "float64",
    "presence_penalty": "float64",
    "temperature": "float64",
    "top_p": "float64",
    "logprobs": "bool",
    "top_logprobs": "int",
}
V1_COMPLETION = {"model": "string", "prompt": "string", "stream": "bool", "max_tokens": "int", "temperature": "float32"}
IMAGE_PREFIXES = (*tuple(f"data:image/{kind};base64," for kind in ("jpeg", "jpg", "png", "webp")), "data:;base64,")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


class ApiError(Exception):
    """An answer that is an error. `late`: it comes out of the running model, after a stream has been promised."""

    def __init__(self, status: int, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.late = late


class DoorError(ApiError):
    """An error that the OpenAI door finds by itself, before it asks the native handler."""


@dataclass(frozen=True, slots=True)
class Job:
    """One generation, whichever door it came in by."""

    asked: str
    model: Model
    prompt: Prompt
    images: tuple[bytes, ...]
    tokens: int
    stop: tuple[str, ...]
    stream: bool
    truncate: bool = True
    context_length: int | None = None
    keep_alive: float | None = None
    top_logprobs: int | None = None
    include_usage: bool = False

    def limits(self, context_length: int) -> Limits:
        unbounded = 10 * context_length
        return Limits(min(self.tokens, unbounded) if self.tokens > 0 else unbounded, self.stop, gives_up_repeating=True)


def decode(body: bytes, struct: str, fields: dict[str, str], empty: str) -> dict[str, Any]:
    """The JSON object in `body`, with Go's words where it is none or a field has another type."""
    if not body.strip():
        raise DoorError(400, empty)
    try:
        found = json.loads(body)
    except UnicodeDecodeError as exc:
        raise DoorError(400, "invalid character in string literal") from exc
    except json.JSONDecodeError as exc:
        text = exc.doc
        if exc.pos >= len(text.rstrip()) or "Unterminated" in exc.msg:
            raise DoorError(400, "unexpected EOF") from exc
        raise DoorError(400, f"invalid character '{text[exc.pos]}' looking for beginning of value") from exc
    if not isinstance(found, dict):
        raise DoorError(400, f"json: cannot unmarshal {_go_kind(found)} into Go value of type {struct}")
    for key, kind in fields.items():
        value = found.get(key)
        if value is not None and not _fits(value, kind):
            raise DoorError(400, f"json: cannot unmarshal {_go_kind(value)} into Go struct field {struct.rpartition('.')[2]}.{key} of type {kind}")
    return found


def _go_kind(value: Any) -> str:
    if isinstance(value, float):
        return f"number {value}"
    for types, name in ((bool, "bool"), (int, "number"), (str, "string"), (list, "array")):
        if isinstance(value, types):
            return name
    return "object"


def _fits(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind.startswith("float"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, list)


def native_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of `/api/chat`, whose contents are text and whose calls have objects for arguments; else DoorError in Go's words."""
    start = "json: cannot unmarshal"
    messages: list[dict[str, Any]] = body.get("messages") or []
    for message in messages:
        if not isinstance(message, dict):
            raise DoorError(400, f"{start} {_go_kind(message)} into Go struct field ChatRequest.messages of type api.Message")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise DoorError(400, f"{start} {_go_kind(content)} into Go struct field ChatRequest.messages.content of type string")
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments", {})
            if not isinstance(arguments, dict):
                where = "ChatRequest.messages.tool_calls.function.arguments of type map[string]interface {}"
                raise DoorError(400, f"{start} {_go_kind(arguments)} into Go struct field {where}")
    return messages


def native_images(message: dict[str, Any]) -> list[bytes]:
    """The pictures of a message, decoded. Raises DoorError with Go's words for what is no base64."""
    return [_base64(str(image)) for image in message.get("images") or ()]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        wrong = _NO_BASE64.search(text)
        raise DoorError(400, f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from exc


def v1_messages(messages: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[bytes]]:
    """The turns and pictures of OpenAI messages: each part of a content list becomes a turn of its own (Ollama, openai/openai.go)."""
    turns: list[tuple[str, str]] = []
    images: list[bytes] = []
    for message in messages:
        role, content = str(message.get("role", "")).lower(), message.get("content")
        if isinstance(content, str):
            turns.append((role, content))
        elif isinstance(content, list):
            for part in content:
                if part.get("type") == "text":
                    turns.append((role, str(part.get("text", ""))))
                else:
                    images.append(_image_of(part))
                    turns.append((role, ""))
        elif message.get("tool_calls"):
            turns.append((role, ""))
        else:
            raise DoorError(400, "invalid message content type: <nil>")
    return turns, images


def _image_of(part: dict[str, Any]) -> bytes:
    source = part.get("image_url")
    url = str(source.get("url", "") if isinstance(source, dict) else source)
    if url.startswith(("http://", "https://")):
        raise DoorError(400, "image URLs are not currently supported, please use base64 encoded data instead")
    for prefix in IMAGE_PREFIXES:
        if url.startswith(prefix):
            with contextlib.suppress(DoorError):
                return _base64(url.removeprefix(prefix))
    raise DoorError(400, "invalid image input")


def is_picture(data: bytes) -> bool:
    return data.startswith(_MAGIC)


def v1_think(body: dict[str, Any]) -> bool | str | None:
    """The `think` that `reasoning` or `reasoning_effort` ask for. Raises DoorError for another word."""
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else body.get("reasoning_effort")
    if effort is None:
        return None
    if effort not in EFFORTS:
        raise DoorError(400, f'invalid reasoning value: \'{effort}\' (must be "high", "medium", "low", "max", or "none")')
    return False if effort == "none" else str(effort)


def schema_of(asked: Any) -> Any:
    """The schema that `format` means: itself, some object for "json", none for nothing."""
    if asked in (None, ""):
        return None
    return asked if isinstance(asked, dict) else {"type": "object", "properties": {"answer": {"type": "string"}}}


def v1_format(response_format: Any) -> Any:
    if not isinstance(response_format, dict):
        return None
    if response_format.get("type") == "json_object":
        return "json"
    return (response_format.get("json_schema") or {}).get("schema") if response_format.get("type") == "json_schema" else None


def strings(value: Any) -> tuple[str, ...]:
    """`stop` as Ollama takes it: one or several; what is no string is dropped."""
    return tuple(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
