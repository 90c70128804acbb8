"""Anthropic's Messages API: a request to a `Chat`. Pure: no I/O, no clock.

The fields are those of API version 2023-06-01. Tools that Anthropic runs itself, documents other
than plain text and files cannot be served by any engine, and are refused by name.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat.message import MAX_CALLS, CalledFunction, ImagePart, ImageUrl, Message, TextPart, ToolCall
from gateway.chat.request import MAX_MESSAGES, Chat, NamedSchema, SchemaFormat, StreamOptions
from gateway.chat.tools import MAX_TOOLS, Choice, ChosenFunction, Function, Tool
from gateway.dialects.json_body import STEP, Steps, decode_body, explain
from gateway.errors import InvalidRequest, RequestTooLarge, UnsupportedParameter


class _Text(Struct, frozen=True, tag="text"):
    text: str


class _Source(Struct, frozen=True):
    type: str
    media_type: str = ""
    data: Raw = Raw(b"")
    url: str = ""


class _Image(Struct, frozen=True, tag="image"):
    source: _Source


class _Document(Struct, frozen=True, tag="document"):
    source: _Source
    title: str | None = None
    context: str | None = None
    """Text about the document that the model gets with it."""


class _Thinking(Struct, frozen=True, tag="thinking"):
    thinking: str
    signature: str = ""


class _RedactedThinking(Struct, frozen=True, tag="redacted_thinking"):
    pass


class _ToolUse(Struct, frozen=True, tag="tool_use"):
    id: str
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    input: Raw = Raw(b"{}")


class _SearchResult(Struct, frozen=True, tag="search_result"):
    source: str
    title: str
    content: list[_Text]


_Shown = _Text | _Image | _Document | _SearchResult


class _ToolResult(Struct, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[_Shown] | None = None
    is_error: bool | None = None


_Block = _Text | _Image | _Document | _SearchResult | _Thinking | _RedactedThinking | _ToolUse | _ToolResult


class _Message(Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block] | None = None


class _Tool(Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolChoice(Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class _ThinkingOption(Struct, frozen=True):
    type: Literal["enabled", "disabled", "adaptive"]


class _OutputFormat(Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class _OutputConfig(Struct, frozen=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _OutputFormat | None = None


_StopSequence = Annotated[str, Meta(min_length=1, max_length=1024)]


class _Request(Struct, frozen=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[_Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    system: str | list[_Text] | None = None
    stop_sequences: Annotated[list[_StopSequence], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    tools: Annotated[list[_Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _ThinkingOption | None = None
    output_config: _OutputConfig | None = None
    output_format: _OutputFormat | None = None
    mcp_servers: list[Any] | None = None


class ParsedMessages(NamedTuple):
    """A request of the Messages API."""

    chat: Chat
    text_size: int
    """Size of the body without its images, in bytes."""
    image_paths: list[str]


_requests = msgspec.json.Decoder(_Request)
_strings = msgspec.json.Decoder(str)
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MAX_TOKENS = 10_000_000
_BILLING = "x-anthropic-billing-header:"
"""Beginning of a line that Claude Code puts in front of its system prompt.

It is for Anthropic's accounting, and differs with each request: with it, no engine could reuse the
prompt that it read for the request before.
"""


def parse_messages(body: bytes, max_text_body: int, *, counts: bool = False) -> Steps[ParsedMessages]:
    """Parse the body of `/v1/messages` in steps. With `counts`, `max_tokens` is not required.

    Raises:
        InvalidJson, InvalidRequest, UnsupportedParameter, RequestTooLarge: as in `openai_chat`.
    """
    request = yield from decode_body(_requests, body, _explained)
    if request.max_tokens is None and not counts:
        raise InvalidRequest("Missing required parameter: 'max_tokens'.", param="max_tokens")
    if request.mcp_servers:
        raise UnsupportedParameter("'mcp_servers' is not supported: no engine calls MCP servers.", param="mcp_servers")
    reader = _Reader()
    messages: list[Message] = []
    if request.system:
        texts = [request.system] if isinstance(request.system, str) else [block.text for block in request.system]
        if text := "\n".join(filter(None, map(_without_billing, texts))):
            messages.append(Message("system", text))
    for index, message in enumerate(request.messages):
        messages += yield from reader.messages(message, f"messages[{index}]")
    text_size = len(body) - reader.image_bytes
    if text_size > max_text_body:
        raise RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")
    return ParsedMessages(_chat(request, messages), text_size, reader.image_paths)


def _explained(text: str) -> InvalidRequest:
    """Turn msgspec's error message into an error in the words of this API."""
    fault = explain(text)
    if isinstance(fault, UnsupportedParameter) and fault.param is not None:
        place = fault.param.removesuffix(".type")
        advice = " Send text, images, thoughts, tool calls and their results." if ".content[" in place else ""
        return UnsupportedParameter(f"The type of '{place}' is not supported.{advice}", param=fault.param)
    return fault


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


class _Reader:
    """Converts messages, and notes the bytes and the paths of their images."""

    def __init__(self) -> None:
        self.image_bytes = 0
        self.image_paths: list[str] = []

    def messages(self, message: _Message, path: str) -> Steps[list[Message]]:
        """Return the canonical messages of one message.

        Results of tools become messages of their own. They come first, since the model has to see
        them directly after its calls; what images they have follows in the user's message.
        """
        if message.content is None and message.role != "assistant":
            raise InvalidRequest(f"Missing required parameter: '{path}.content'.", param=f"{path}.content")
        if message.content is None or isinstance(message.content, str):
            return [Message(message.role, message.content or "")]
        if message.role == "assistant":
            return [_assistant(message.content, path)]
        results: list[Message] = []
        parts: list[Any] = []
        for number, block in enumerate(message.content):
            place = f"{path}.content[{number}]"
            if isinstance(block, _ToolResult):
                blocks = [_Text(block.content)] if isinstance(block.content, str) else block.content or []
                found: list[Any] = []
                for inner, each in enumerate(blocks):
                    found += yield from self._parts(each, f"{place}.content[{inner}]")
                text = "\n".join(part.text for part in found if isinstance(part, TextPart))
                if block.is_error:
                    text = f"Error: {text}"
                results.append(Message("tool", text, tool_call_id=block.tool_use_id))
                parts += [part for part in found if isinstance(part, ImagePart)]
            elif isinstance(block, _Shown):
                parts += yield from self._parts(block, place)
            else:
                raise InvalidRequest(f"'{place}' cannot be in a message with role '{message.role}'.", param=place)
        return [*results, Message(message.role, _joined(parts))] if parts or not results else results

    def _parts(self, block: _Shown, path: str) -> Steps[list[Any]]:
        """Return the part that a block becomes. An empty text becomes none."""
        if isinstance(block, _Text):
            return [TextPart(block.text)] if block.text else []
        if isinstance(block, _SearchResult):
            texts = (block.title, block.source, *(text.text for text in block.content))
            return [TextPart("\n".join(texts))]
        if isinstance(block, _Document):
            return [TextPart(_document_text(block, path))]
        return [(yield from self._image(block.source, path))]

    def _image(self, source: _Source, path: str) -> Steps[ImagePart]:
        self.image_paths.append(f"{path}.source")
        if source.type == "url":
            return ImagePart(ImageUrl(source.url))
        if source.type != "base64":
            raise UnsupportedParameter(f"'{path}.source.type' must be 'base64' or 'url'.", param=f"{path}.source.type")
        size = memoryview(source.data).nbytes
        self.image_bytes += size
        if size > STEP:
            yield
        return ImagePart(ImageUrl(f"data:{source.media_type};base64,{_string(source.data, f'{path}.source.data')}"))


def _document_text(block: _Document, path: str) -> str:
    if block.source.type != "text":
        raise UnsupportedParameter(
            f"'{path}.source.type' must be 'text': the models read no other documents.", param=f"{path}.source.type"
        )
    text = _string(block.source.data, f"{path}.source.data")
    return "\n".join(part for part in (block.title, block.context, text) if part)


def _string(raw: Raw, path: str) -> str:
    try:
        return _strings.decode(raw)
    except _ERRORS:
        raise InvalidRequest(f"'{path}' must be a string.", param=path) from None


def _joined(parts: list[Any]) -> str | list[Any]:
    if any(isinstance(part, ImagePart) for part in parts):
        return parts
    return "\n".join(part.text for part in parts)


def _assistant(blocks: list[_Block], path: str) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for number, block in enumerate(blocks):
        if isinstance(block, _Text):
            if block.text:
                texts.append(block.text)
        elif isinstance(block, _Thinking):
            thoughts.append(block.thinking)
        elif isinstance(block, _ToolUse):
            calls.append(ToolCall(block.id, CalledFunction(block.name, bytes(block.input).decode("utf-8", "replace"))))
        elif not isinstance(block, _RedactedThinking):
            place = f"{path}.content[{number}]"
            raise InvalidRequest(f"'{place}' cannot be in a message with role 'assistant'.", param=place)
    if len(calls) > MAX_CALLS:
        raise InvalidRequest(f"'{path}' has more than {MAX_CALLS} tool calls.", param=f"{path}.content")
    return Message("assistant", "\n".join(texts), calls or None, reasoning="\n".join(thoughts) or None)


def _tool(tool: _Tool, index: int) -> Tool:
    if tool.type not in (None, "custom"):
        param = f"tools[{index}].type"
        raise UnsupportedParameter(f"'{param}' must be 'custom': no engine runs tools of Anthropic's.", param=param)
    return Tool(Function(tool.name, tool.description, tool.input_schema, tool.strict), "function")


def _tool_choice(choice: _ToolChoice | None) -> Literal["none", "auto", "required"] | Choice | None:
    if choice is None or choice.type == "auto":
        return None
    if choice.type == "tool":
        return Choice(ChosenFunction(choice.name))
    return "required" if choice.type == "any" else "none"


def _continues(messages: list[Message]) -> bool:
    """Return whether the answer continues the last message, which is the beginning of an answer."""
    last = messages[-1]
    return last.role == "assistant" and not last.tool_calls and bool(last.text.strip())


def _chat(request: _Request, messages: list[Message]) -> Chat:
    config = request.output_config or _OutputConfig()
    wanted = config.format or request.output_format
    choice = request.tool_choice
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    return Chat(
        model=request.model,
        messages=messages,
        stream=bool(request.stream),
        stream_options=StreamOptions(include_usage=True) if request.stream else None,
        max_tokens=None if request.max_tokens is None else min(request.max_tokens, _MAX_TOKENS),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=None if request.top_k is None else min(request.top_k, 1_000_000),
        stop=request.stop_sequences or None,
        tools=[_tool(tool, index) for index, tool in enumerate(request.tools or ())] or None,
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=None if wanted is None else SchemaFormat(NamedSchema("output", wanted.schema)),
        reasoning_effort=config.effort if thinks else None,
        think=thinks,
        continue_final_message=True if _continues(messages) else None,
    )
