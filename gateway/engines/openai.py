"""Kind `openai`: servers with OpenAI's chat completions API. Also the base of `vllm`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from gateway.chat.constraints import ChoiceFormat, GrammarFormat, RegexFormat
from gateway.chat.conversation import template_id, with_system_first, with_turns, without_system
from gateway.chat.json_schema import Schema, WorkBudget
from gateway.chat.message import CalledFunction, ImagePart, Message, TextPart, ToolCall
from gateway.chat.request import FORMAT_FIELDS, Chat, JsonFormat, NamedSchema, SchemaFormat, StreamOptions
from gateway.chat.tool_names import with_engine_names
from gateway.chat.tools import AllowedTools, Choice, Function, Tool
from gateway.engines.engine import (
    STOP_TOKEN_IDS,
    Ask,
    LoadedUntil,
    ModelFacts,
    Models,
    decode,
    possible_tokens,
    unsupported,
)
from gateway.engines.error_mapping import client_error
from gateway.engines.grammar.portable import harmless, portable, work_budget
from gateway.engines.openai_response import OpenAiReader, parse_answer
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest, RolesRefused, SchemaTooComplex


class _Meta(Struct):
    """Metadata that llama.cpp's server adds."""

    n_ctx: Any = None


class _Model(Struct):
    id: str
    max_model_len: Any = None
    meta: _Meta | None = None

    @property
    def context_length(self) -> int | None:
        return possible_tokens(
            self.max_model_len if self.max_model_len is not None or self.meta is None else self.meta.n_ctx
        )


class _Models(Struct):
    data: list[_Model] | None


_model_lists = msgspec.json.Decoder(_Models)


class _RequestMessage(Struct, omit_defaults=True, gc=False):
    role: str
    content: str | list[TextPart | ImagePart]
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    reasoning: str | None = None


class _Tool(Struct, gc=False):
    function: Function
    type: str = "function"


class _NamedTool(Struct, gc=False):
    function: dict[str, str]
    type: str = "function"


class _Format(Struct, omit_defaults=True, gc=False):
    type: str
    json_schema: NamedSchema | None = None


class OpenAiRequest(Struct, omit_defaults=True, kw_only=True):
    """Request body. Fields with their default value are omitted."""

    model: str
    messages: Sequence[_RequestMessage | Message]
    max_tokens: int | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[_Tool] = []
    tool_choice: str | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


_WITH_USAGE = StreamOptions(include_usage=True)


class OpenAi:
    """Engine `openai`. Sends only fields that OpenAI itself defines."""

    chat_path = "/v1/chat/completions"
    models_path = "/v1/models"
    health_path: str | None = None
    metrics_path: str | None = None
    streams_only = False
    names_stop = False  # OpenAI's API has no field for it
    max_stops: int | None = 4  # as at OpenAI, and `VLLM_MAX_STOP_STRINGS`
    stream_type = b"text/event-stream"

    def __init__(self) -> None:
        self._known_texts: set[bytes] = set()

    def check(self, chat: Chat) -> None:
        if chat.stop_token_ids:
            raise unsupported(*STOP_TOKEN_IDS)
        if chat.continue_final_message:
            raise unsupported("continue_final_message", "Leave it out.")
        wanted = chat.output_format
        if isinstance(wanted, ChoiceFormat | RegexFormat | GrammarFormat):
            raise unsupported(wanted.param, "Send 'response_format'.")
        check_schemas(chat)

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        return msgspec.json.encode(self.request(chat, model, facts, stream))

    def request(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> OpenAiRequest:
        if chat.tools:
            chat = with_engine_names(chat)
        limit = chat.token_limit
        if limit is not None and facts.context_length is not None and limit >= facts.context_length:
            limit = None  # the server's default: the rest of the context
        request = OpenAiRequest(
            model=model,
            messages=chat.messages
            if chat.has_plain_messages
            else [_message(message) for message in with_system_first(chat.messages)],
            max_tokens=limit,
            stop=[] if chat.stop is None else chat.stops,
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=chat.seed,
            presence_penalty=chat.presence_penalty,
            frequency_penalty=chat.frequency_penalty,
            stream=stream,
            stream_options=_WITH_USAGE if stream else None,
        )
        if chat.is_plain:
            return request
        if chat.logprobs:
            request.logprobs, request.top_logprobs = True, chat.top_logprobs or 1  # llama.cpp returns none for 0
        if chat.tools:
            self._offer_tools(chat, request)
        if chat.sets_format:
            self._set_format(chat, request)
        if chat.effort is not None:
            self._set_effort(chat, request)
        return request

    def _offer_tools(self, chat: Chat, request: OpenAiRequest) -> None:
        request.tools = [_Tool(tool.function) for tool in _converted_tools(chat, chat.offered, harmless)]
        if isinstance(chat.tool_choice, Choice):
            request.tool_choice = _NamedTool({"name": chat.tool_choice.function.name})
        elif request.tools:
            choice = chat.tool_choice
            request.tool_choice = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        request.parallel_tool_calls = chat.parallel_tool_calls if request.tools else None

    def _set_format(self, chat: Chat, request: OpenAiRequest) -> None:
        request.response_format = _response_format(chat)

    def _set_effort(self, chat: Chat, request: OpenAiRequest) -> None:
        """Send the effort if it is a word.

        True means the model's default, which servers use anyway.
        """
        request.reasoning_effort = chat.effort if isinstance(chat.effort, str) else None

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None:
        """Return a request without the token limit, with simpler schemas or in stricter turns.

        A template that wants user and assistant to take turns gets their neighbours joined, and one
        without a system message gets its text from the user. Templates raise what they like, so an
        unknown refusal counts as such a one.

        A token limit that does not fit next to the prompt is not the prompt's fault: without it,
        the rest of the context is the limit. vLLM 0.33 does this itself, earlier versions refuse
        the request. If the server does not support a schema, use the portable form that other
        engines get, unless that takes too much work.
        """
        if isinstance(error, ContextLengthExceeded) and chat.token_limit is not None:
            return msgspec.structs.replace(chat, max_tokens=None, max_completion_tokens=None)
        if isinstance(error, RolesRefused) or (type(error) is InvalidRequest and error.param is None):
            messages = with_turns(chat.messages)
            if messages is None and isinstance(error, RolesRefused):
                messages = without_system(chat.messages)
            return None if messages is None else msgspec.structs.replace(chat, messages=messages)
        if type(error) is not InvalidRequest or error.param != "response_format":
            return None
        try:
            return _with_schemas(chat, portable)
        except SchemaTooComplex:
            return None

    def reader(self, chat: Chat | None = None) -> OpenAiReader:
        return OpenAiReader(self._known_texts)

    parse_answer = staticmethod(parse_answer)

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return client_error(status, body)

    def canonical(self, name: str) -> str:
        return name

    def models(self, body: bytes) -> Models | None:
        parsed = decode(_model_lists, body)
        return None if parsed is None else {model.id: ModelFacts(model.context_length) for model in parsed.data or ()}

    async def probe_models(
        self, models: Models, before: Models, wanted: Iterable[str], ask: Ask, others: Iterable[str] = ()
    ) -> LoadedUntil | None:
        """Do nothing: the model list contains everything."""
        return None


_Conversion = Callable[[Schema, WorkBudget], Schema]


def check_schemas(chat: Chat) -> None:
    """Check that the schemas of `chat` can be converted.

    Raises:
        SchemaTooComplex: it would take too much work.
    """
    _with_schemas(chat, harmless)


def _with_schemas(chat: Chat, convert: _Conversion) -> Chat | None:
    """Return `chat` with `convert` applied to each of its schemas. None if no schema changes.

    Raises:
        SchemaTooComplex: converting them would take too much work.
    """
    changed: dict[str, Any] = {}
    wanted = chat.output_format
    if isinstance(wanted, SchemaFormat):
        schema = convert(wanted.json_schema.schema, work_budget())
        if schema != wanted.json_schema.schema:
            changed |= dict.fromkeys(FORMAT_FIELDS)
            changed["response_format"] = SchemaFormat(msgspec.structs.replace(wanted.json_schema, schema=schema))
    tools = _converted_tools(chat, chat.tools or [], convert)
    if tools != (chat.tools or []):
        changed["tools"] = tools
    return msgspec.structs.replace(chat, **changed) if changed else None


def _converted_tools(chat: Chat, tools: list[Tool], convert: _Conversion) -> list[Tool]:
    """Return `tools` with `convert` applied to the schemas that a grammar is made of.

    The others are only shown to the model, and may be anything.
    """
    budget, constrained = work_budget("tools"), chat.constrained
    return [_with_parameters(tool, convert, budget) if tool.function.name in constrained else tool for tool in tools]


def _with_parameters(tool: Tool, convert: _Conversion, budget: WorkBudget) -> Tool:
    parameters = tool.function.parameters
    if not parameters:
        return tool
    converted = convert({"type": "object"} | parameters, budget)
    return msgspec.structs.replace(tool, function=msgspec.structs.replace(tool.function, parameters=converted))


def _response_format(chat: Chat) -> _Format | None:
    wanted = chat.output_format
    if isinstance(wanted, SchemaFormat):
        return _Format(
            "json_schema", msgspec.structs.replace(wanted.json_schema, schema=harmless(wanted.json_schema.schema))
        )
    return _Format("json_object") if isinstance(wanted, JsonFormat) else None


def _message(message: Message) -> _RequestMessage:
    """Render a message.

    `developer` becomes `system`, because some chat templates drop unknown roles. Text parts without
    images are joined into a single text.
    """
    content = message.content
    if type(content) is str and (message.role == "user" or message.role == "system"):  # most messages
        return _RequestMessage(message.role, content)
    role = "system" if message.role == "developer" else message.role
    rendered = _RequestMessage(role, message.text)
    if isinstance(content, list) and message.images:
        rendered.content = [part for part in content if isinstance(part, TextPart | ImagePart)]
    if role == "assistant":
        rendered.tool_calls = [_with_whole_arguments(call) for call in message.tool_calls or ()]
        rendered.reasoning = message.reasoning_text
    elif role == "tool":
        rendered.tool_call_id = None if message.tool_call_id is None else template_id(message.tool_call_id)
    return rendered


def _with_whole_arguments(call: ToolCall) -> ToolCall:
    """Complete the arguments of a call, which templates parse as JSON, and give it an id they accept."""
    function = call.function
    return ToolCall(template_id(call.id), CalledFunction(function.name, function.whole_arguments.decode()))
