"""A chat as Ollama's `/api/chat` takes it (api/types.go ChatRequest, 0.24 to 0.33). Pure."""

import re
from typing import Any

import msgspec

from gateway.chat.json_schema import Schema
from gateway.chat.request import Chat, Function, JsonFormat, Message, SchemaFormat, Tool
from gateway.engines.engine import ModelFacts
from gateway.engines.grammar.portable import portable, portable_calls

BYTES_PER_TOKEN = 4
"""Of the prompt, for the guess at how much room it leaves."""
IMAGE_TOKENS = 1024
"""Of one image, at least, on 0.33 (llama.cpp's `--image-min-tokens`)."""
LEAST_ROOM = 0.25
"""Share of the context that a long prompt is taken to leave: the guess may be wrong."""

GRAMMAR_ROOM = 32 * 1024
"""Bytes of a grammar that fit in any case."""
GROWTH, DIGIT_GROWTH = 12, 250
"""Bytes of a grammar for a byte of its schema and for a digit of a bound, at most (measured: 10 and 200)."""

_integer_bounds = re.compile(rb'"(?:minimum|maximum)":-?([0-9]+)').findall
_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}


class OllamaRequest:
    """`num_ctx`, `keep_alive` and `truncate` are the operator's; a `num_ctx` that differs from the loaded one makes Ollama reload."""

    def __init__(
        self,
        chat: Chat,
        model: str,
        facts: ModelFacts,
        num_ctx: int | None,
        keep_alive: str | float | None,
        truncate: bool,
    ) -> None:
        self._chat = chat
        self._model = model
        self._facts = facts
        self._num_ctx = num_ctx
        self._keep_alive = keep_alive
        self._truncate = truncate

    def render(self) -> bytes:
        chat = self._chat
        optional = {
            "keep_alive": self._keep_alive,
            "truncate": None if self._truncate else False,
            "tools": [_tool(tool) for tool in chat.offered] or None,
            "format": self._format(),
            "think": self._think(),
            "logprobs": True if chat.logprobs else None,
            "top_logprobs": (chat.top_logprobs or None) if chat.logprobs else None,
        }
        fields = {
            "model": self._model,
            "messages": _messages(chat.messages, not self._facts.lacks("vision")),
            "stream": True,
            "options": self._options(),
        }
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})

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
        """At a full context Ollama forgets the beginning and runs on, up to ten contexts; other engines end there."""
        limit, context = self._chat.token_limit, self._facts.context_length
        if context is None:
            return limit
        messages = self._chat.messages
        prompt = sum(len(message.text) // BYTES_PER_TOKEN + IMAGE_TOKENS * len(message.images) for message in messages)
        room = max(context - prompt, int(context * LEAST_ROOM))
        return room if limit is None else min(limit, room)

    def _format(self) -> Any:
        """The grammar of the answer. It is also how a choice of tool is forced, which Ollama has no word for."""
        forced, wanted = self._chat.forced, self._chat.response_format
        if forced:
            functions = [(function.name, _parameters(function)) for function in forced]
            return _with_room(portable(functions[0][1]) if len(functions) == 1 else portable_calls(functions))
        if isinstance(wanted, SchemaFormat):
            return _with_room(portable(wanted.json_schema.schema))
        return "json" if isinstance(wanted, JsonFormat) else None

    def _think(self) -> bool | str | None:
        effort = self._chat.effort
        if effort is None or self._facts.lacks("thinking"):
            return None
        return False if effort == "none" else effort


def _with_room(schema: Schema) -> Schema:
    """0.24 cuts off a grammar that is longer than 32 KiB and than four times its schema (llama/llama.go SchemaToGrammar): so the schema is made
    longer."""
    text = msgspec.json.encode(schema)
    needed = GROWTH * len(text) + DIGIT_GROWTH * sum(map(len, _integer_bounds(text)))
    return schema if needed < GRAMMAR_ROOM else schema | {"$comment": " " * max(0, needed // 4 - len(text))}


def _parameters(function: Function) -> Schema:
    return {"type": "object"} | function.parameters if function.parameters else _NO_PARAMETERS


def _tool(tool: Tool) -> dict[str, Any]:
    function = tool.function
    parameters = _told(_parameters(function))
    parameters.setdefault("properties", {})
    return {
        "type": "function",
        "function": {"name": function.name, "description": function.description or "", "parameters": parameters},
    }


def _told(schema: Schema) -> Schema:
    """A tool's schema as Ollama's own structs take it (api/types.go ToolFunctionParameters, ToolProperty): `true` and `false` are none to them."""
    told = dict(schema)
    if isinstance(schema.get("properties"), dict):
        told["properties"] = {
            name: _told_within(part) for name, part in schema["properties"].items() if part is not False
        }
    if isinstance(schema.get("anyOf"), list):
        told["anyOf"] = [_told_within(part) for part in schema["anyOf"] if part is not False]
    return told


def _told_within(part: object) -> Schema:
    return _told(part) if isinstance(part, dict) else {}


def _said(message: Message, sees: bool) -> str:
    """To a model with eyes Ollama puts an image where the text says `[img-0]`, and refuses the text when there is none."""
    return message.text.replace("[img", "[\u2060img") if sees else message.text


def _messages(messages: list[Message], sees: bool) -> list[dict[str, Any]]:
    """Text and images of one turn in one message; images as bare base64. Qwen3-VL's renderer drops the role `developer`. A tool's answer
    goes by the name of the function, which OpenAI's form tells only in the call."""
    names: dict[str, str] = {}
    rendered = []
    for message in messages:
        fields: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": _said(message, sees),
        }
        if message.images:
            fields["images"] = [url.partition(",")[2] for url in message.images]
        if message.role == "assistant" and message.thought:
            fields["thinking"] = message.thought
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
