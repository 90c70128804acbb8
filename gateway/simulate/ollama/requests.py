"""Parsing of requests to the Ollama stand-in: fields, messages, images, options. Pure."""

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
_INTEGERS = (
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
_NON_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
_INVALID_MESSAGE = "invalid message format"


class OllamaApiError(Exception):
    """An error response. `late`: the model runner raises it, after a stream has been promised."""

    def __init__(self, status: int, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.late = late


class EndpointError(OllamaApiError):
    """An error that the endpoint finds itself, before the request reaches the native handler."""


@dataclass(frozen=True, slots=True)
class Job:
    """One generation, whichever endpoint it was requested from."""

    requested_model: str
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
    """Decode the JSON object in `body`.

    Raises:
        EndpointError: it is not an object, or a field has another type; the message is Go's.
    """
    try:
        found = fit(parse(body, empty), struct, fields)
        if isinstance(options := found.get("stream_options"), dict):
            fit_field(options.get("include_usage"), "StreamOptions.stream_options.include_usage", "bool")
    except GoError as exc:
        raise EndpointError(400, str(exc).replace("[]api.Tools", "api.Tools")) from exc
    return found


def native_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of an `/api/chat` body.

    Raises:
        EndpointError: content is not text, images are not a list of strings, or the arguments of a
            tool call are not an object; the message is Go's.
    """
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
    """Decode the images of a message.

    Raises:
        EndpointError: an image is not valid base64; the message is Go's.
    """
    return [_base64(image) for image in message.get("images") or ()]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        wrong = _NON_BASE64.search(text)
        raise EndpointError(400, f"illegal base64 data at input byte {wrong.start() if wrong else len(text)}") from exc


def native_think(value: Any) -> bool | str | None:
    """Return the `think` value of a native body.

    Raises:
        EndpointError: the value is not supported.
    """
    words = ", ".join(f'"{word}"' for word in NATIVE_EFFORTS)
    if value is None or isinstance(value, bool) or value in NATIVE_EFFORTS:
        return None if value is None else bool(value) if isinstance(value, bool) else str(value)
    if isinstance(value, str):
        raise EndpointError(400, f'invalid think value: "{value}" (must be {words}, true, or false)')
    raise EndpointError(400, f"think must be a boolean or string ({words}, true, or false)")


def native_options(body: dict[str, Any]) -> dict[str, Any]:
    """Return the `options`, with integer options as integers.

    Raises:
        OllamaApiError: an option has another type (a 500, as in Ollama).
    """
    options = {key: value for key, value in (body.get("options") or {}).items() if value is not None}
    for key, value in options.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _INTEGERS and not is_number:
            raise OllamaApiError(500, f'option "{key}" must be of type integer')
        if key in _FLOATS and not is_number:
            raise OllamaApiError(500, f'option "{key}" must be of type float32')
        if key == "stop" and not isinstance(value, list):
            raise OllamaApiError(500, 'option "stop" must be of type array')
        if key == "stop" and not all(isinstance(item, str) for item in value):
            raise OllamaApiError(500, 'option "stop" must be of an array of strings')
    return {key: int(value) if key in _INTEGERS else value for key, value in options.items()}


def keep_alive(body: dict[str, Any]) -> float | None:
    """Return the seconds of `keep_alive`; negative means forever.

    Raises:
        EndpointError: it is not a duration; the message is Go's.
    """
    try:
        return seconds(body.get("keep_alive"))
    except GoError as exc:
        raise EndpointError(400, str(exc)) from exc


def top_logprobs(body: dict[str, Any]) -> int | None:
    """Return the number of alternatives for each token; None without `logprobs`.

    Raises:
        OllamaApiError: the number is outside 0 to 20.
    """
    top = body.get("top_logprobs") or 0
    if not 0 <= top <= 20:
        raise OllamaApiError(400, "top_logprobs must be between 0 and 20")
    return int(top) if body.get("logprobs") else None


def v1_messages(messages: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[bytes]]:
    """Return the turns and images of OpenAI messages.

    Each part of a content list becomes a turn of its own, as in Ollama's openai/openai.go.
    """
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
            is_object = isinstance(json.loads(arguments), dict)
        except GoError as exc:
            raise EndpointError(400, str(exc)) from exc
        except ValueError:
            is_object = False
        if not is_object:
            raise EndpointError(400, "invalid tool call arguments")


def _part(part: Any) -> tuple[str, bytes | None]:
    """Return the text or the image of one content part. Audio counts as an image."""
    if not isinstance(part, dict):
        raise EndpointError(400, _INVALID_MESSAGE)
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
    raise EndpointError(400, _INVALID_MESSAGE)


def _image(url: str) -> bytes:
    if url.startswith(("http://", "https://")):
        raise EndpointError(400, "image URLs are not currently supported, please use base64 encoded data instead")
    for prefix in IMAGE_PREFIXES:
        if url.startswith(prefix):
            with contextlib.suppress(EndpointError):
                return _base64(url.removeprefix(prefix))
    raise EndpointError(400, "invalid image input")


def is_image(data: bytes) -> bool:
    """Return whether the data begins like an image file."""
    return data.startswith(_MAGIC)


def v1_think(body: dict[str, Any], generation: OllamaGeneration) -> bool | str | None:
    """Return the `think` value that `reasoning` or `reasoning_effort` stand for.

    Raises:
        EndpointError: the effort is not supported.
    """
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


def schema_of(output_format: Any, generation: OllamaGeneration, late: bool) -> Any:
    """Return the JSON Schema that `format` stands for; None without one.

    "json" stands for an arbitrary object.

    Raises:
        OllamaApiError: the format or its schema is invalid; the message is the runner's.
    """
    if output_format in (None, ""):
        return None
    if output_format == "json":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if not isinstance(output_format, dict):
        shown = json.dumps(json.dumps(output_format))
        raise OllamaApiError(500, f'invalid format: {shown}; expected "json" or a valid JSON Schema object')
    if isinstance(output_format.get("type"), str) and output_format["type"] not in _SCHEMA_TYPES:
        if generation == "0.24":
            raise OllamaApiError(500, "invalid JSON schema in format", late)
        raw = json.dumps(output_format, separators=(",", ":"))
        text = f"Field 'json_schema': \"json_schema\": JSON schema conversion failed:\nUnrecognized schema: {raw}"
        raise runner_refusal(text, late)
    return output_format


def runner_refusal(message: str, late: bool, kind: str = "invalid_request_error", **more: int) -> OllamaApiError:
    """Return an error of the runner of 0.33, whose message is JSON in a string."""
    inner = {"error": {"code": 400, "message": message, "type": kind, **more}}
    return OllamaApiError(400, json.dumps(inner, separators=(",", ":"), ensure_ascii=False), late)


def v1_format(response_format: Any) -> Any:
    """Return the `format` for a `response_format`. Without a schema nothing is enforced."""
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
    """Return `stop` as Ollama accepts it: one string or a list, from which non-strings are
    dropped.
    """
    return tuple(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
