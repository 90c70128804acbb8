"""OpenAI's Responses API: a request to a `Chat`. Pure: no I/O, no clock.

The API is stateless here: `store` is ignored, and what refers to stored state is refused by name.
So are tools that OpenAI runs itself, and files.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat.request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AllowedList,
    AllowedTool,
    AllowedTools,
    CalledFunction,
    Chat,
    Choice,
    ChosenFunction,
    Function,
    ImagePart,
    ImageUrl,
    JsonFormat,
    Message,
    NamedSchema,
    RefusalPart,
    SchemaFormat,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
)
from gateway.dialects.json_body import STEP, Steps, decode_body, explain
from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter


class _InputText(Struct, frozen=True, tag="input_text"):
    text: str


class _OutputText(Struct, frozen=True, tag="output_text"):
    text: str


class _Refusal(Struct, frozen=True, tag="refusal"):
    refusal: str


class _InputImage(Struct, frozen=True, tag="input_image"):
    image_url: Raw = Raw(b"null")
    file_id: str | None = None


class _InputFile(Struct, frozen=True, tag="input_file"):
    pass


_Part = _InputText | _OutputText | _Refusal | _InputImage | _InputFile


class _Message(Struct, frozen=True, tag="message"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Raw]


class _FunctionCall(Struct, frozen=True, tag="function_call"):
    call_id: str
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str = ""


class _FunctionOutput(Struct, frozen=True, tag="function_call_output"):
    call_id: str
    output: str | list[Raw]


class _ReasoningText(Struct, frozen=True):
    text: str = ""


class _Reasoning(Struct, frozen=True, tag="reasoning"):
    summary: list[_ReasoningText] | None = None
    content: list[_ReasoningText] | None = None


class _Reference(Struct, frozen=True, tag="item_reference"):
    """Item of an earlier answer, by its id."""

    id: str


_Item = _Message | _FunctionCall | _FunctionOutput | _Reasoning | _Reference


class _Typed(Struct, frozen=True):
    type: str = "message"


class _Tool(Struct, frozen=True):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _AllowedTool(Struct, frozen=True):
    type: str
    name: str = ""


class _ToolChoice(Struct, frozen=True, omit_defaults=True):
    type: str
    name: str = ""
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[_AllowedTool], Meta(max_length=MAX_TOOLS)] | None = None


class _Format(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "output"
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class _TextOptions(Struct, frozen=True):
    format: _Format | None = None


class _ReasoningOptions(Struct, frozen=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None


class _Request(Struct, frozen=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1)]
    input: str | Annotated[list[Raw], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    tools: Annotated[list[_Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: _TextOptions | None = None
    reasoning: _ReasoningOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    truncation: str | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None


class ParsedResponse(NamedTuple):
    """A request of the Responses API."""

    chat: Chat
    text_size: int
    """Size of the body without its images, in bytes."""
    echo: dict[str, Any]
    """Fields of the request that the answer repeats."""


_requests = msgspec.json.Decoder(_Request)
_items: dict[str, msgspec.json.Decoder[Any]] = {
    "message": msgspec.json.Decoder(_Message),
    "function_call": msgspec.json.Decoder(_FunctionCall),
    "function_call_output": msgspec.json.Decoder(_FunctionOutput),
    "reasoning": msgspec.json.Decoder(_Reasoning),
    "item_reference": msgspec.json.Decoder(_Reference),
}
_parts: msgspec.json.Decoder[_Part] = msgspec.json.Decoder(_Part)
_urls = msgspec.json.Decoder(str)
_types = msgspec.json.Decoder(_Typed)
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_LOGPROBS = "message.output_text.logprobs"
REASONING_PREFIX = "rs"
"""Beginning of the ids of items with thoughts."""


def parse_response(body: bytes, max_text_body: int) -> Steps[ParsedResponse]:
    """Parse the body of `/v1/responses` in steps.

    Raises:
        InvalidJson, InvalidRequest, UnsupportedParameter, RequestTooLarge: as in `openai_chat`.
    """
    request = yield from decode_body(_requests, body)
    _check_supported(request)
    conversation = _Conversation()
    if request.instructions:
        conversation.messages.append(Message("system", request.instructions))
    if isinstance(request.input, str):
        conversation.messages.append(Message("user", request.input))
    else:
        for index, raw in enumerate(request.input):
            item = yield from _item(raw, f"input[{index}]")
            yield from conversation.add(item, f"input[{index}]")
    conversation.end_turn()
    text_size = len(body) - conversation.image_bytes
    if text_size > max_text_body:
        raise RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")
    return ParsedResponse(_chat(request, conversation.messages), text_size, _echo(request))


def _check_supported(request: _Request) -> None:
    for name, is_used in (
        ("previous_response_id", request.previous_response_id is not None),
        ("conversation", request.conversation is not None),
        ("prompt", request.prompt is not None),
        ("background", bool(request.background)),
    ):
        if is_used:
            raise UnsupportedParameter(
                f"'{name}' is not supported: this gateway keeps no state between requests. Send the whole "
                "conversation as 'input'.",
                param=name,
            )


def _item(raw: Raw, path: str) -> Steps[_Item]:
    """Decode an item. One without a type is a message."""
    yield from _turn(raw)
    kind = _decoded(_types, raw, path).type
    if kind not in _items:
        raise _unsupported_type(path)
    yield from _turn(raw)
    item: _Item = _decoded(_items[kind], raw, path)
    return item


def _turn(raw: Raw) -> Steps[None]:
    """Give other requests a turn before a pass over a long value."""
    if memoryview(raw).nbytes > STEP:
        yield


def _decoded(decoder: msgspec.json.Decoder[Any], raw: Raw, path: str) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        fault = explain(str(error))
        where = path if fault.param is None else f"{path}.{fault.param}"
        if where.endswith(".type"):
            raise _unsupported_type(where.removesuffix(".type")) from None
        raise InvalidRequest(f"Invalid value for '{where}'.", param=where) from None
    except _ERRORS:
        raise InvalidJson("The body is not valid JSON.") from None


def _unsupported_type(path: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"The type of '{path}' is not supported.", param=f"{path}.type")


class _Conversation:
    """Collects the canonical messages. Consecutive items of the model become one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.image_bytes = 0
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []

    def add(self, item: _Item, path: str) -> Steps[None]:
        if isinstance(item, _FunctionCall):
            self._calls.append(ToolCall(item.call_id, CalledFunction(item.name, item.arguments)))
        elif isinstance(item, _Reasoning):
            if self._calls or self._texts:
                self.end_turn()
            self._thoughts += [part.text for part in (item.content or item.summary or ()) if part.text]
        elif isinstance(item, _Reference):
            if not item.id.startswith(REASONING_PREFIX):  # thoughts are not needed, and the AI SDK sends them so
                raise UnsupportedParameter(
                    f"'{path}' is a reference to an item, but this gateway keeps no state between requests. Send the "
                    "item itself. Clients do so with 'store' set to false.",
                    param=path,
                )
        elif isinstance(item, _FunctionOutput):
            self.end_turn()
            content = yield from self._content(item.output, f"{path}.output")
            text = content if isinstance(content, str) else _text(content)
            self.messages.append(Message("tool", text, tool_call_id=item.call_id))
            if not isinstance(content, str):
                images: list[Any] = [part for part in content if isinstance(part, ImagePart)]
                if images:
                    self.messages.append(Message("user", images))
        elif item.role == "assistant":
            if self._calls:
                self.end_turn()
            content = yield from self._content(item.content, f"{path}.content")
            self._texts.append(content if isinstance(content, str) else _text(content))
        else:
            self.end_turn()
            content = yield from self._content(item.content, f"{path}.content")
            self.messages.append(Message(item.role, content))

    def end_turn(self) -> None:
        """End the message of the model that was being collected."""
        if self._texts or self._thoughts or self._calls:
            reasoning = "\n".join(self._thoughts) or None
            self.messages.append(Message("assistant", "\n".join(self._texts), self._calls or None, reasoning=reasoning))
            self._texts, self._thoughts, self._calls = [], [], []

    def _content(self, content: str | list[Raw], path: str) -> Steps[str | list[TextPart | ImagePart | RefusalPart]]:
        if isinstance(content, str):
            return content
        parts: list[TextPart | ImagePart | RefusalPart] = []
        for number, raw in enumerate(content):
            yield from _turn(raw)
            part: _Part = _decoded(_parts, raw, f"{path}[{number}]")
            if isinstance(part, _InputText | _OutputText):
                parts.append(TextPart(part.text))
            elif isinstance(part, _Refusal):
                parts.append(RefusalPart(part.refusal))
            else:
                yield from _turn(raw)
                parts.append(self._image(part, f"{path}[{number}]"))
        return parts

    def _image(self, part: _InputImage | _InputFile, path: str) -> ImagePart:
        if isinstance(part, _InputFile) or part.file_id is not None:
            raise UnsupportedParameter(f"'{path}': files are not supported. Send text or images.", param=path)
        self.image_bytes += memoryview(part.image_url).nbytes
        try:
            return ImagePart(ImageUrl(_urls.decode(part.image_url)))
        except _ERRORS:
            raise InvalidRequest(f"'{path}.image_url' must be a string.", param=f"{path}.image_url") from None


def _text(parts: list[TextPart | ImagePart | RefusalPart]) -> str:
    texts = (
        part.text if isinstance(part, TextPart) else part.refusal for part in parts if not isinstance(part, ImagePart)
    )
    return "\n".join(texts)


def _tools(tools: list[_Tool] | None) -> list[Tool] | None:
    found: list[Tool] = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function":
            param = f"tools[{index}].type"
            raise UnsupportedParameter(f"'{param}' must be 'function': no engine runs tools of OpenAI's.", param=param)
        if not 0 < len(tool.name) <= 128:
            raise InvalidRequest(f"Invalid value for 'tools[{index}].name'.", param=f"tools[{index}].name")
        found.append(Tool(Function(tool.name, tool.description, tool.parameters, tool.strict), "function"))
    return found or None


def _tool_choice(choice: str | _ToolChoice | None) -> Any:
    if not isinstance(choice, _ToolChoice):
        return choice
    if choice.type == "function":
        return Choice(ChosenFunction(choice.name))
    if choice.type != "allowed_tools":
        raise UnsupportedParameter(
            "'tool_choice.type' must be 'function' or 'allowed_tools'.", param="tool_choice.type"
        )
    if choice.mode is None or choice.tools is None:
        missing = "tool_choice.mode" if choice.mode is None else "tool_choice.tools"
        raise InvalidRequest(f"Missing required parameter: '{missing}'.", param=missing)
    for index, tool in enumerate(choice.tools):
        if tool.type != "function":
            param = f"tool_choice.tools[{index}].type"
            raise UnsupportedParameter(f"'{param}' must be 'function': no engine runs tools of OpenAI's.", param=param)
    tools = [AllowedTool(ChosenFunction(tool.name), "function") for tool in choice.tools]
    return AllowedTools(AllowedList(choice.mode, tools))


def _response_format(options: _TextOptions | None) -> JsonFormat | SchemaFormat | None:
    wanted = None if options is None else options.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JsonFormat()
    if wanted.schema is None:
        raise InvalidRequest("Missing required parameter: 'text.format.schema'.", param="text.format.schema")
    return SchemaFormat(NamedSchema(wanted.name, wanted.schema, wanted.description, wanted.strict))


def _chat(request: _Request, messages: list[Message]) -> Chat:
    wants_logprobs = _LOGPROBS in (request.include or ())
    return Chat(
        model=request.model,
        messages=messages,
        stream=bool(request.stream),
        stream_options=StreamOptions(include_usage=True) if request.stream else None,
        max_completion_tokens=None if request.max_output_tokens is None else min(request.max_output_tokens, 10_000_000),
        temperature=request.temperature,
        top_p=request.top_p,
        logprobs=wants_logprobs or None,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        tools=_tools(request.tools),
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request.text),
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
    )


def _echo(request: _Request) -> dict[str, Any]:
    """Return what the answer repeats of the request, with OpenAI's defaults for the rest."""
    builtins = msgspec.to_builtins
    format_ = request.text.format if request.text is not None and request.text.format is not None else None
    described = {"type": "text"} if format_ is None else _without_nulls(builtins(format_))
    if described["type"] != "json_schema":
        described = {"type": described["type"]}
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None if request.reasoning is None else request.reasoning.effort, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": described, "verbosity": "medium"},
        "tool_choice": "auto" if request.tool_choice is None else builtins(request.tool_choice),
        "tools": [_tool_echo(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _tool_echo(tool: _Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict is not False,
    }


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
