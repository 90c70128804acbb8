"""OpenAI's Responses API: a request to a `Chat`. Pure: no I/O, no clock.

The API is stateless here: `store` is ignored, and what refers to stored state is refused by name.
So are tools that OpenAI runs itself, and files.
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat.constraints import StructuredOutputs
from gateway.chat.message import Message
from gateway.chat.request import (
    MAX_MESSAGES,
    MAX_STOP_IDS,
    MAX_TOKEN_ID,
    Chat,
    JsonFormat,
    NamedSchema,
    Penalty,
    SchemaFormat,
    StreamOptions,
    TemplateOptions,
)
from gateway.chat.tools import MAX_TOOLS, AllowedList, AllowedTool, AllowedTools, Choice, ChosenFunction, Function, Tool
from gateway.dialects.json_body import Steps, decode_body
from gateway.dialects.responses_items import Conversation, read_item
from gateway.errors import InvalidRequest, RequestTooLarge, UnsupportedParameter

_Stop = Annotated[str, Meta(min_length=1)]


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
    type: str
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
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=4)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]], Meta(max_length=MAX_STOP_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: TemplateOptions | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


_SHARED = (
    "temperature", "top_p", "parallel_tool_calls", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "structured_outputs", "chat_template_kwargs",
    "mm_processor_kwargs",
)  # fmt: skip
"""Fields that mean the same in a chat completion. Those that OpenAI's API lacks are vLLM's."""


class ParsedResponse(NamedTuple):
    """A request of the Responses API."""

    chat: Chat
    text_size: int
    """Size of the body without its images, in bytes."""
    echo: dict[str, Any]
    """Fields of the request that the answer repeats."""
    image_paths: list[str]


_requests = msgspec.json.Decoder(_Request)
_LOGPROBS = "message.output_text.logprobs"


def parse_response(body: bytes, max_text_body: int) -> Steps[ParsedResponse]:
    """Parse the body of `/v1/responses` in steps.

    Raises:
        InvalidJson, InvalidRequest, UnsupportedParameter, RequestTooLarge: as in `openai_chat`.
    """
    request = yield from decode_body(_requests, body)
    _check_supported(request)
    conversation = Conversation()
    if request.instructions:
        conversation.messages.append(Message("system", request.instructions))
    if isinstance(request.input, str):
        conversation.messages.append(Message("user", request.input))
    else:
        for index, raw in enumerate(request.input):
            item = yield from read_item(raw, f"input[{index}]")
            yield from conversation.add(item, f"input[{index}]")
    conversation.end_turn()
    text_size = len(body) - conversation.image_bytes
    if text_size > max_text_body:
        raise RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")
    chat = _chat(request, conversation.messages)
    return ParsedResponse(chat, text_size, _echo(request), conversation.image_paths)


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


def _tools(tools: list[_Tool] | None) -> list[Tool] | None:
    found: list[Tool] = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function":
            param = f"tools[{index}].type"
            raise UnsupportedParameter(
                f"'{param}' must be 'function': the models are offered no other tools.", param=param
            )
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
            raise UnsupportedParameter(
                f"'{param}' must be 'function': the models are offered no other tools.", param=param
            )
    tools = [AllowedTool(ChosenFunction(tool.name), "function") for tool in choice.tools]
    return AllowedTools(AllowedList(choice.mode, tools))


def _response_format(options: _TextOptions | None) -> JsonFormat | SchemaFormat | None:
    wanted = None if options is None else options.format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return JsonFormat()
    if wanted.type != "json_schema":
        raise UnsupportedParameter(
            "'text.format.type' must be 'text', 'json_object' or 'json_schema'.", param="text.format.type"
        )
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
        logprobs=wants_logprobs or None,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        tools=_tools(request.tools),
        tool_choice=_tool_choice(request.tool_choice),
        response_format=_response_format(request.text),
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        **{name: getattr(request, name) for name in _SHARED},
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
