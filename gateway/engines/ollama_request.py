"""Rendering of a chat for Ollama's `/api/chat` (api/types.go ChatRequest, 0.24 to 0.33). Pure."""

import re
from typing import Any

import msgspec

from gateway.chat.constraints import ChoiceFormat, GrammarFormat, RegexFormat
from gateway.chat.conversation import with_system_first
from gateway.chat.json_schema import Schema
from gateway.chat.message import Message
from gateway.chat.request import Chat, JsonFormat, SchemaFormat
from gateway.chat.tool_names import with_engine_names
from gateway.chat.tools import Function, Tool
from gateway.engines.engine import ModelFacts, estimated_tokens, unsupported
from gateway.engines.grammar.portable import portable, portable_calls, work_budget
from gateway.engines.grammar.regex import check_expansion
from gateway.engines.grammar.regex import portable_whole as portable_regex

MIN_ROOM = 0.25
"""Share of the context assumed to be left by a long prompt, since the estimate may be wrong."""

GRAMMAR_ROOM = 32 * 1024
"""Bytes of a grammar that always fit."""
GROWTH, DIGIT_GROWTH = 12, 250
"""Maximum grammar bytes per byte of schema and per digit of a bound (measured: 10 and 200)."""

_integer_bounds = re.compile(rb'"(?:minimum|maximum)":-?([0-9]+)').findall
_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}


class OllamaRequest:
    """Renders one request. The operator sets `num_ctx`, `keep_alive` and `truncate`.

    A `num_ctx` other than the loaded one makes Ollama reload the model.
    """

    def __init__(
        self,
        chat: Chat,
        model: str,
        facts: ModelFacts,
        num_ctx: int | None,
        keep_alive: str | float | None,
        truncate: bool,
    ) -> None:
        self._chat = with_engine_names(chat) if chat.tools else chat
        self._model = model
        self._facts = facts
        self._num_ctx = num_ctx
        self._keep_alive = keep_alive
        self._truncate = truncate

    def render(self) -> bytes:
        chat = self._chat
        optional = self._common() | {
            "tools": [_tool(tool) for tool in chat.offered] or None,
            "format": _padded(grammar(chat)),
            "think": self._think(),
        }
        fields = {
            "model": self._model,
            "messages": _messages(with_system_first(chat.messages), not self._facts.lacks("vision")),
            "stream": True,
            "options": self._options(),
        }
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})

    def _common(self) -> dict[str, Any]:
        """Return the optional fields that a chat and a raw prompt share, None for those not to send."""
        chat = self._chat
        return {
            "keep_alive": self._keep_alive,
            "truncate": None if self._truncate else False,
            "logprobs": True if chat.logprobs else None,
            "top_logprobs": (chat.top_logprobs or None) if chat.logprobs else None,
        }

    def _options(self) -> dict[str, Any]:
        chat = self._chat
        options = {
            "num_predict": self._token_limit(),
            "num_ctx": self._num_ctx,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "top_k": chat.top_k,
            "min_p": chat.min_p,
            "seed": chat.seed,
            "presence_penalty": chat.presence_penalty,
            "frequency_penalty": chat.frequency_penalty,
            "repeat_penalty": chat.repetition_penalty,
            "stop": chat.stops or None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def _token_limit(self) -> int | None:
        """Limit the answer to the rest of the context, where other engines stop.

        When the context is full, Ollama drops its beginning and continues, up to ten contexts.
        """
        limit, context = self._chat.token_limit, self._facts.context_length
        if context is None:
            return limit
        room = max(context - estimated_tokens(self._chat.messages), int(context * MIN_ROOM))
        return room if limit is None else min(limit, room)

    def _think(self) -> bool | str | None:
        effort = self._chat.effort
        if effort is None or self._facts.lacks("thinking"):
            return None
        return False if effort == "none" else effort


def grammar(chat: Chat) -> Schema | str | None:
    """Return the grammar of the answer: a schema, `json` or None.

    It also forces a tool call, because Ollama has no parameter for that.

    Raises:
        SchemaTooComplex: converting the schemas would take too much work.
        InvalidRequest: a pattern is too large.
        UnsupportedParameter: no JSON Schema can express the format of the answer.
    """
    forced, wanted = chat.forced, chat.output_format
    if forced:
        functions = [(function.name, _parameters(function)) for function in forced]
        budget = work_budget("tools")
        return portable(functions[0][1], budget) if len(functions) == 1 else portable_calls(functions, budget)
    if isinstance(wanted, SchemaFormat):
        return portable(wanted.json_schema.schema)
    if isinstance(wanted, ChoiceFormat):
        return portable({"type": "string", "enum": wanted.choices})
    if isinstance(wanted, RegexFormat):
        pattern = portable_regex(check_expansion(wanted.pattern, wanted.param))
        if pattern is None:
            raise unsupported(wanted.param, "It takes letters, digits, classes, groups and counts only.")
        return {"type": "string", "pattern": pattern}
    if isinstance(wanted, GrammarFormat):
        raise unsupported(wanted.param, "Send a JSON Schema, a choice or a pattern.")
    return "json" if isinstance(wanted, JsonFormat) else None


def _padded(schema: Schema | str | None) -> Schema | str | None:
    """Pad the schema so that its grammar is not truncated.

    0.24 truncates a grammar that exceeds both 32 KiB and four times the length of its schema
    (llama/llama.go SchemaToGrammar).
    """
    if not isinstance(schema, dict):
        return schema
    text = msgspec.json.encode(schema)
    needed = GROWTH * len(text) + DIGIT_GROWTH * sum(map(len, _integer_bounds(text)))
    return schema if needed < GRAMMAR_ROOM else schema | {"$comment": " " * max(0, needed // 4 - len(text))}


def _parameters(function: Function) -> Schema:
    return {"type": "object"} | function.parameters if function.parameters else _NO_PARAMETERS


def _tool(tool: Tool) -> dict[str, Any]:
    function = tool.function
    parameters = {"type": "object", "properties": {}} | _ollama_schema(_parameters(function))
    if not isinstance(parameters["type"], str):
        parameters["type"] = "object"
    return {
        "type": "function",
        "function": {"name": function.name, "description": function.description or "", "parameters": parameters},
    }


_GO_TYPES: dict[str, type | tuple[type, ...]] = {
    "type": (str, list), "description": str, "required": list, "enum": list, "anyOf": list, "properties": dict,
}  # fmt: skip
_GO_TEXTS = frozenset({"type", "required"})


def _ollama_schema(schema: Schema) -> Schema:
    """Return a tool's schema in the form of Ollama's own structs.

    They do not accept `true` and `false` as schemas, nor a keyword with a value of another type
    (api/types.go ToolFunctionParameters, ToolProperty).
    """
    converted = {name: value for name, value in schema.items() if _fits_go(name, value)}
    if "properties" in converted:
        converted["properties"] = {
            name: _ollama_subschema(subschema)
            for name, subschema in schema["properties"].items()
            if subschema is not False
        }
    if "anyOf" in converted:
        converted["anyOf"] = [_ollama_subschema(subschema) for subschema in schema["anyOf"] if subschema is not False]
    return converted


def _fits_go(name: str, value: object) -> bool:
    if name not in _GO_TYPES:
        return True
    if not isinstance(value, _GO_TYPES[name]):
        return False
    return not (name in _GO_TEXTS and isinstance(value, list)) or all(isinstance(one, str) for one in value)


def _ollama_subschema(subschema: object) -> Schema:
    return _ollama_schema(subschema) if isinstance(subschema, dict) else {}


def escaped_placeholders(text: str) -> str:
    """Return `text` with image placeholders escaped, for vision models.

    For these models, Ollama replaces `[img-0]` in the text with an image, and
    rejects the text if that image does not exist.
    """
    return text.replace("[img", "[\u2060img")


def _messages(messages: list[Message], has_vision: bool) -> list[dict[str, Any]]:
    """Render the messages: text and images of a message together, images as bare base64.

    The role `developer` becomes `system` because Qwen3-VL's renderer drops it. A tool result needs
    the name of its function, which in OpenAI's format only the call contains.
    """
    names: dict[str, str] = {}
    rendered = []
    for message in messages:
        fields: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": escaped_placeholders(message.text) if has_vision else message.text,
        }
        if message.images:
            fields["images"] = [url.partition(",")[2] for url in message.images]
        if message.role == "assistant" and message.reasoning_text:
            fields["thinking"] = message.reasoning_text
        if message.role == "assistant" and message.tool_calls:
            names.update({call.id: call.function.name for call in message.tool_calls})
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "function": {"name": call.function.name, "arguments": msgspec.Raw(call.function.whole_arguments)},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool" and message.tool_call_id is not None:
            fields["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                fields["tool_name"] = names[message.tool_call_id]
        rendered.append(fields)
    return rendered
