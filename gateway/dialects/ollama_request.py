"""Ollama's own API: the requests `/api/chat` and `/api/generate` to a `Chat`. Pure: no I/O, no clock.

The fields are those of Ollama 0.33 (api/types.go). What only concerns the server's memory, such as
`num_ctx` and `keep_alive`, is accepted and left to the operator's settings. What would change the
answer and no other engine can do is refused by name.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat.images import check_count
from gateway.chat.message import CalledFunction, ImagePart, ImageUrl, Message, TextPart, ToolCall
from gateway.chat.request import MAX_MESSAGES, Chat, EffortWord, JsonFormat, NamedSchema, SchemaFormat, StreamOptions
from gateway.chat.tools import MAX_TOOLS, Function, Tool
from gateway.dialects.json_body import STEP, Steps, decode_body, explain
from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

MAX_STOPS, MAX_STOP = 16, 1024
"""Maximum number of stop strings of one request, and of characters of one."""
MAX_TOOL_NAME = 128

_Stop = Annotated[str, Meta(max_length=MAX_STOP)]
_ImageList = Annotated[list[Raw], Meta(max_length=1024)]


class _Options(Struct, frozen=True):
    """Sampling options that both engines follow. Others concern the server, or one runner only."""

    num_predict: float | None = None
    temperature: Annotated[float, Meta(le=2)] | None = None
    top_k: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: float | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None


class _Function(Struct, frozen=True):
    name: str
    arguments: Raw = Raw(b"{}")


class _Call(Struct, frozen=True):
    function: _Function
    id: str = ""


class _ToolFunction(Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=MAX_TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """OpenAI's field, which programs send here too."""


class _Tool(Struct, frozen=True):
    function: _ToolFunction


class _Message(Struct, frozen=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: _ImageList | None = None
    tool_calls: Annotated[list[_Call], Meta(max_length=128)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Common(Struct, frozen=True, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    format: Raw = Raw(b"null")
    options: _Options | None = None
    think: bool | EffortWord | Literal[""] | None = None
    keep_alive: Any = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class _ChatRequest(_Common, frozen=True, kw_only=True):
    messages: Annotated[list[_Message], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Raw], Meta(max_length=MAX_TOOLS)] | None = None


class _GenerateRequest(_Common, frozen=True, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    images: _ImageList | None = None
    suffix: str | None = None
    template: str | None = None
    raw: bool | None = None
    context: Raw = Raw(b"null")


class ParsedRequest(NamedTuple):
    """A request of Ollama's API."""

    chat: Chat
    """The chat; it has no messages if the request only loads or unloads the model."""
    text_size: int
    """Size of the body without its images, in bytes."""
    unloads: bool
    """True if the request asks to unload the model at once."""


_chats = msgspec.json.Decoder(_ChatRequest)
_generates = msgspec.json.Decoder(_GenerateRequest)
_strings = msgspec.json.Decoder(str)
_tools = msgspec.json.Decoder(_Tool)
_formats = msgspec.json.Decoder(dict[str, Any] | str | None)
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def parse_chat(body: bytes, max_text_body: int) -> Steps[ParsedRequest]:
    """Parse the body of `/api/chat` in steps.

    Raises:
        InvalidJson, InvalidRequest, UnsupportedParameter, RequestTooLarge: as in `openai_chat`.
        InvalidImage: there are too many images.
    """
    request = yield from _decoded(_chats, body)
    sources = [message.images or () for message in request.messages or ()]
    check_count(sum(map(len, sources)))
    text_size = _text_size(body, sources, max_text_body)
    messages: list[Message] = []
    pending: list[ToolCall] = []
    for index, message in enumerate(request.messages or ()):
        urls = yield from _urls(message.images or (), f"messages[{index}].images")
        messages.append(_message(message, urls, pending, index))
    tools = [_tool(raw, f"tools[{index}]") for index, raw in enumerate(request.tools or ())]
    return ParsedRequest(_chat(request, messages, tools), text_size, _unloads(request))


def parse_generate(body: bytes, max_text_body: int) -> Steps[ParsedRequest]:
    """Parse the body of `/api/generate` in steps, with the errors of `parse_chat`."""
    request = yield from _decoded(_generates, body)
    for name, value in (
        ("suffix", request.suffix),
        ("template", request.template),
        ("raw", request.raw),
        ("context", bytes(request.context) not in (b"null", b"[]")),
    ):
        if value:
            raise UnsupportedParameter(
                f"'{name}' is not supported by this gateway: the prompt goes through the model's chat template. "
                "Leave it out, or send the conversation to /api/chat.",
                param=name,
            )
    check_count(len(request.images or ()))
    text_size = _text_size(body, [request.images or ()], max_text_body)
    messages: list[Message] = []
    if request.prompt:
        if request.system:
            messages.append(Message("system", request.system))
        urls = yield from _urls(request.images or (), "images")
        messages.append(Message("user", _content(request.prompt, urls)))
    return ParsedRequest(_chat(request, messages, []), text_size, _unloads(request))


_Request = _ChatRequest | _GenerateRequest


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes) -> Steps[Any]:
    if not body:
        raise InvalidJson("missing request body")
    return (yield from decode_body(decoder, body))


def _text_size(body: bytes, sources: list[Any], max_text_body: int) -> int:
    size = len(body) - sum(memoryview(image).nbytes for images in sources for image in images)
    if size > max_text_body:
        raise RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")
    return size


def _urls(images: Any, param: str) -> Steps[list[str]]:
    """Return the images as `data:` URLs. The type in the URL is a guess: the bytes decide."""
    urls: list[str] = []
    for index, raw in enumerate(images):
        if memoryview(raw).nbytes > STEP:
            yield
        try:
            text = _strings.decode(raw)
        except _ERRORS:
            raise InvalidRequest(f"'{param}[{index}]' must be an image in base64.", param=f"{param}[{index}]") from None
        urls.append(text if text.startswith("data:") else "data:image/png;base64," + text)
    return urls


def _content(text: str, urls: list[str]) -> str | list[Any]:
    if not urls:
        return text
    images: list[Any] = [ImagePart(ImageUrl(url)) for url in urls]
    return [*images, TextPart(text)] if text else images


def _message(message: _Message, urls: list[str], pending: list[ToolCall], index: int) -> Message:
    """Convert a message. `pending` are the calls that have no result yet.

    A result that names no call belongs to the first one of its tool, or to the first one.
    """
    role = message.role.lower()
    text = message.content or ""
    if role == "user":
        return Message("user", _content(text, urls))
    if urls:
        param = f"messages[{index}].images"
        raise UnsupportedParameter(f"'{param}': only a message with role 'user' can contain images.", param=param)
    if role == "assistant":
        calls = [_call(call, index, number) for number, call in enumerate(message.tool_calls or ())]
        pending[:] = calls
        return Message("assistant", text, calls or None, reasoning=message.thinking or None)
    if role == "tool":
        return Message("tool", text, tool_call_id=message.tool_call_id or _answered_call(message, pending, index))
    if role not in ("system", "developer"):
        param = f"messages[{index}].role"
        raise InvalidRequest(f"'{param}' must be 'system', 'user', 'assistant' or 'tool'.", param=param)
    return Message("system", text)


def _call(call: _Call, index: int, number: int) -> ToolCall:
    arguments = bytes(call.function.arguments)
    text = _strings.decode(arguments) if arguments.startswith(b'"') else arguments.decode("utf-8", "replace")
    name = call.function.name
    if not 0 < len(name) <= 256:
        param = f"messages[{index}].tool_calls[{number}].function.name"
        raise InvalidRequest(f"'{param}' must have 1 to 256 characters.", param=param)
    return ToolCall(call.id or f"call_{index}_{number}", CalledFunction(name, text))


def _answered_call(message: _Message, pending: list[ToolCall], index: int) -> str:
    if not pending:
        return f"call_{index}"
    answered = next((call for call in pending if call.function.name == message.tool_name), pending[0])
    pending.remove(answered)
    return answered.id


def _tool(raw: Raw, param: str) -> Tool:
    """Convert a tool. Ollama looks neither at its `type`, which programs leave out, nor at the form of its name."""
    try:
        function = _tools.decode(raw).function
    except msgspec.ValidationError as error:
        fault = explain(str(error))
        where = f"{param}.{fault.param}" if fault.param else param
        message = (
            fault.message.replace(f"'{fault.param}'", f"'{where}'") if fault.param else f"'{param}' must be a tool."
        )
        raise InvalidRequest(message, param=where) from None
    except _ERRORS:
        raise InvalidRequest(f"'{param}' must be a tool.", param=param) from None
    return Tool(Function(function.name, function.description, function.parameters, function.strict), "function")


def _response_format(raw: Raw) -> JsonFormat | SchemaFormat | None:
    try:
        wanted = _formats.decode(raw)
    except _ERRORS:
        wanted = "invalid"
    if not wanted:
        return None
    if isinstance(wanted, dict):
        return SchemaFormat(NamedSchema("format", wanted))
    if wanted != "json":
        raise InvalidRequest("'format' must be 'json' or a JSON Schema.", param="format")
    return JsonFormat()


def _chat(request: _Request, messages: list[Message], tools: list[Tool]) -> Chat:
    if not request.model:
        raise InvalidRequest("model is required", param="model")
    options = request.options or _Options()
    limit = _integer(options.num_predict, "num_predict")
    stops = [options.stop] if isinstance(options.stop, str) else options.stop or []
    is_stream = request.stream is not False
    return Chat(
        model=request.model,
        messages=messages,
        stream=is_stream,
        stream_options=StreamOptions(include_usage=True) if is_stream else None,
        max_tokens=min(limit, 10_000_000) if limit is not None and limit > 0 else None,
        temperature=None if options.temperature is None else max(options.temperature, 0.0),
        top_p=_share(options.top_p),
        top_k=_top_k(_integer(options.top_k, "top_k")),
        min_p=_share(options.min_p),
        seed=_integer(options.seed, "seed"),
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=[stop for stop in stops if stop] or None,
        tools=tools or None,
        response_format=_response_format(request.format),
        think=None if request.think == "" else request.think,
        logprobs=request.logprobs or None,
        top_logprobs=request.top_logprobs if request.logprobs else None,
    )


def _integer(value: float | None, name: str) -> int | None:
    """Return an option as a whole number: JSON from Go and JavaScript may write one as `16.0`."""
    if value is None:
        return None
    if not -(2**63) <= value < 2**63:  # also true for NaN
        raise InvalidRequest(f"'options.{name}' is out of range.", param=f"options.{name}")
    return int(value)


def _top_k(value: int | None) -> int | None:
    return None if value is None else min(max(value, -1), 1_000_000)


def _share(value: float | None) -> float | None:
    return None if value is None else min(max(value, 0.0), 1.0)


def _unloads(request: _Request) -> bool:
    """Return whether `keep_alive` is zero, which with an empty prompt unloads the model at Ollama."""
    value = request.keep_alive
    if isinstance(value, str):
        return value.rstrip("smh").strip("0.") == "" and value != ""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0
