"""What comes in at Ollama's doors: fields, messages, pictures, options, and the job that a request asks for. Pure."""

import base64
import binascii
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.simulate.ollama.go_json import GoError, fit, fit_field, kind_of, parse, seconds, type_of
from gateway.simulate.options import Model, OllamaGeneration, Options
from gateway.simulate.text import GenerationLimits, Prompt

_OPTIONS = "map[string]interface {}"
_TOOLS = "[]api.Tools=api.Tool"
NATIVE_CHAT = {
    "model": "string",
    "messages": "[]api.Message=api.Alias",
    "stream": "bool",
    "truncate": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
    "options": _OPTIONS,
    "tools": _TOOLS,
}
NATIVE_GENERATE = {
    "model": "string",
    "prompt": "string",
    "suffix": "string",
    "system": "string",
    "stream": "bool",
    "truncate": "bool",
    "raw": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
    "options": _OPTIONS,
}
V1_CHAT = {
    "model": "string",
    "messages": "[]openai.Message",
    "stream": "bool",
    "stream_options": "openai.StreamOptions",
    "max_tokens": "int",
    "seed": "int",
    "frequency_penalty": "float64",
    "presence_penalty": "float64",
    "temperature": "float64",
    "top_p": "float64",
    "response_format": "openai.ResponseFormat",
    "tools": "[]api.Tool",
    "reasoning_effort": "string",
    "logprobs": "bool",
    "top_logprobs": "int",
}
V1_COMPLETION = {
    "model": "string",
    "prompt": "string",
    "suffix": "string",
    "stream": "bool",
    "max_tokens": "int",
    "temperature": "float32",
}
IMAGE_PREFIXES = (*tuple(f"data:image/{kind};base64," for kind in ("jpeg", "jpg", "png", "webp")), "data:;base64,")
NATIVE_EFFORTS = ("high", "medium", "low", "max")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")
_WHOLE = (
    "num_predict",
    "seed",
    "top_k",
    "num_ctx",
    "num_keep",
    "repeat_last_n",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
)
_FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
_SCHEMA_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
_NO_MESSAGE = "invalid message format"


class OllamaApiError(Exception):
    """An answer that is an error. `late`: it comes out of the running model, after a stream has been promised."""

    def __init__(self, status: int, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.late = late


class EndpointError(OllamaApiError):
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
    raw: bool = False
    repeat_penalty: float = 1.0

    def limits(self, context_length: int, options: Options) -> GenerationLimits:
        unbounded = 10 * context_length
        return GenerationLimits(
            min(self.tokens, unbounded) if self.tokens > 0 else unbounded,
            self.stop,
            False,
            options.repeat_limit,
            options.generation == "0.24",
        )


def decode(body: bytes, struct: str, fields: Mapping[str, str], empty: str) -> dict[str, Any]:
    """The JSON object in `body`, with Go's words where it is none or a field has another type."""
    try:
        found = fit(parse(body, empty), struct, fields)
        if isinstance(options := found.get("stream_options"), dict):
            fit_field(options.get("include_usage"), "StreamOptions.stream_options.include_usage", "bool")
    except GoError as exc:
        raise EndpointError(400, str(exc).replace("[]api.Tools", "api.Tools")) from exc
    return found


def native_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of `/api/chat`, whose contents are text and whose calls have objects for arguments; else DoorError in Go's words."""
    messages: list[dict[str, Any]] = body.get("messages") or []
    try:
        for message in messages:
            fit_field(message.get("content"), "ChatRequest.messages.content", "string")
            _fit_images(message.get("images"))
            for call in message.get("tool_calls") or ():
                if isinstance(function := call.get("function"), dict) and not isinstance(
                    function.get("arguments", {}), dict
                ):
                    raise GoError("Value looks like object, but can't find closing '}' symbol")
    except GoError as exc:
        raise EndpointError(400, str(exc)) from exc
    return messages


def _fit_images(images: Any) -> None:
    where = "json: cannot unmarshal {} into Go struct field ChatRequest.messages.images of type {}"
    if images is not None and not isinstance(images, list):
        raise GoError(where.format(kind_of(images), "[]api.ImageData"))
    for image in images or ():
        if not isinstance(image, str):
            raise GoError(where.format(kind_of(image), "api.ImageData"))


def native_images(message: dict[str, Any]) -> list[bytes]:
    """The pictures of a message, decoded. Raises DoorError with Go's words for what is no base64."""
    return [_base64(image) for image in message.get("images") or ()]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        wrong = _NO_BASE64.search(text)
        raise EndpointError(400, f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from exc


def native_think(value: Any) -> bool | str | None:
    """The `think` of a native body. Raises DoorError for what it cannot be."""
    words = ", ".join(f'"{word}"' for word in NATIVE_EFFORTS)
    if value is None or isinstance(value, bool) or value in NATIVE_EFFORTS:
        return None if value is None else bool(value) if isinstance(value, bool) else str(value)
    if isinstance(value, str):
        raise EndpointError(400, f'invalid think value: "{value}" (must be {words}, true, or false)')
    raise EndpointError(400, f"think must be a boolean or string ({words}, true, or false)")


def native_options(body: dict[str, Any]) -> dict[str, Any]:
    """The `options` with whole numbers whole. Raises ApiError for one of another type, a 500 as Ollama has it."""
    options = {key: value for key, value in (body.get("options") or {}).items() if value is not None}
    for key, value in options.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _WHOLE and not is_number:
            raise OllamaApiError(500, f'option "{key}" must be of type integer')
        if key in _FLOATS and not is_number:
            raise OllamaApiError(500, f'option "{key}" must be of type float32')
        if key == "stop" and not isinstance(value, list):
            raise OllamaApiError(500, 'option "stop" must be of type array')
        if key == "stop" and not all(isinstance(item, str) for item in value):
            raise OllamaApiError(500, 'option "stop" must be of an array of strings')
    return {key: int(value) if key in _WHOLE else value for key, value in options.items()}


def keep_alive(body: dict[str, Any]) -> float | None:
    """Seconds that `keep_alive` asks for, below 0 for ever. Raises DoorError in Go's words."""
    try:
        return seconds(body.get("keep_alive"))
    except GoError as exc:
        raise EndpointError(400, str(exc)) from exc


def top_logprobs(body: dict[str, Any]) -> int | None:
    """How many alternatives each token shall have; None when none of it was asked for. Raises ApiError outside 0 to 20."""
    top = body.get("top_logprobs") or 0
    if not 0 <= top <= 20:
        raise OllamaApiError(400, "top_logprobs must be between 0 and 20")
    return int(top) if body.get("logprobs") else None


def v1_messages(messages: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[bytes]]:
    """The turns and pictures of OpenAI messages: each part of a content list becomes a turn of its own (Ollama, openai/openai.go)."""
    turns: list[tuple[str, str]] = []
    images: list[bytes] = []
    _check_arguments(messages)
    for message in messages:
        role, content = str(message.get("role", "")).lower(), message.get("content")
        if isinstance(content, str):
            turns.append((role, content))
        elif isinstance(content, list):
            for part in content:
                text, image = _part(part)
                turns.append((role, text))
                images += [] if image is None else [image]
        elif message.get("tool_calls"):
            turns.append((role, ""))
        else:
            raise EndpointError(400, f"invalid message content type: {type_of(content)}")
    return turns, images


def _check_arguments(messages: list[dict[str, Any]]) -> None:
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        arguments = call.get("function", {}).get("arguments", "")
        try:
            fit_field(arguments, ".messages.tool_calls.function.arguments", "string")
            whole = isinstance(json.loads(arguments), dict)
        except GoError as exc:
            raise EndpointError(400, str(exc)) from exc
        except ValueError:
            whole = False
        if not whole:
            raise EndpointError(400, "invalid tool call arguments")


def _part(part: Any) -> tuple[str, bytes | None]:
    """The text of one content part, or its picture; a sound goes for a picture."""
    if not isinstance(part, dict):
        raise EndpointError(400, _NO_MESSAGE)
    match part.get("type"):
        case "text" if isinstance(part.get("text"), str):
            return part["text"], None
        case "input_audio":
            return "", _base64(str(part.get("input_audio", {}).get("data", "")))
        case "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            if isinstance(url, str):
                return "", _image(url)
    raise EndpointError(400, _NO_MESSAGE)


def _image(url: str) -> bytes:
    if url.startswith(("http://", "https://")):
        raise EndpointError(400, "image URLs are not currently supported, please use base64 encoded data instead")
    for prefix in IMAGE_PREFIXES:
        if url.startswith(prefix):
            with contextlib.suppress(EndpointError):
                return _base64(url.removeprefix(prefix))
    raise EndpointError(400, "invalid image input")


def is_picture(data: bytes) -> bool:
    return data.startswith(_MAGIC)


def v1_think(body: dict[str, Any], generation: OllamaGeneration) -> bool | str | None:
    """The `think` that `reasoning` or `reasoning_effort` ask for. Raises DoorError for another word."""
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else body.get("reasoning_effort")
    if not effort:
        return None
    if generation == "0.24" and effort not in (*NATIVE_EFFORTS, "none"):
        raise EndpointError(
            400, f'invalid reasoning value: \'{effort}\' (must be "high", "medium", "low", "max", or "none")'
        )
    if effort not in EFFORTS:
        words = ", ".join(f'"{word}"' for word in EFFORTS[1:])
        raise EndpointError(400, f'invalid reasoning value: "{effort}" (must be {words}, or "none")')
    return False if effort == "none" else str(effort)


def schema_of(asked: Any, generation: OllamaGeneration, late: bool) -> Any:
    """The schema that `format` means: itself, some object for "json", none for nothing. Raises ApiError in the runner's words."""
    if asked in (None, ""):
        return None
    if asked == "json":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if not isinstance(asked, dict):
        shown = json.dumps(json.dumps(asked))
        raise OllamaApiError(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object')
    if isinstance(asked.get("type"), str) and asked["type"] not in _SCHEMA_TYPES:
        if generation == "0.24":
            raise OllamaApiError(500, "invalid JSON schema in format", late)
        raw = json.dumps(asked, separators=(",", ":"))
        text = f"Field 'json_schema': \"json_schema\": JSON schema conversion failed:\nUnrecognized schema: {raw}"
        raise runner_refusal(text, late)
    return asked


def runner_refusal(message: str, late: bool, kind: str = "invalid_request_error", **more: int) -> OllamaApiError:
    """What the runner of 0.33 refuses: JSON in a string."""
    inner = {"error": {"code": 400, "message": message, "type": kind, **more}}
    return OllamaApiError(400, json.dumps(inner, separators=(",", ":"), ensure_ascii=False), late)


def v1_format(response_format: Any) -> Any:
    """The `format` that a `response_format` becomes; one without a schema is no bound at all."""
    if not isinstance(response_format, dict):
        return None
    if response_format.get("type") == "json_object":
        return "json"
    return (
        (response_format.get("json_schema") or {}).get("schema")
        if response_format.get("type") == "json_schema"
        else None
    )


def strings(value: Any) -> tuple[str, ...]:
    """`stop` as Ollama takes it: one or several; what is no string is dropped."""
    return tuple(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
