"""Checks of function calls and of structured output, under schemas that even random weights follow."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped
from gateway.bench.verify.target import Event, Messages, Reply, Target

SEEDS = (3, 4, 5)
"""Seeds that are tried in turn: a model of random weights may write blanks until it is cut off."""

CITIES, ZONES = ("Seoul", "Busan"), ("KST", "UTC")


def _function(name: str, field: str, values: tuple[str, ...]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {field: {"type": "string", "enum": list(values)}},
        "required": [field],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"{name} of a place", "parameters": schema}}


TOOLS = [_function("get_weather", "city", CITIES), _function("get_time", "zone", ZONES)]
ALLOWED = {"get_weather": ("city", CITIES), "get_time": ("zone", ZONES)}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Seoul"}'}}
QUESTION = "What is the weather in Seoul?"


async def named_tool(target: Target) -> None:
    await _call(target, NAMED, ("get_weather",))


async def named_tool_streamed(target: Target) -> None:
    await _call(target, NAMED, ("get_weather",), is_stream=True)


async def required_tool(target: Target) -> None:
    await _call(target, "required", tuple(ALLOWED))


async def _call(target: Target, choice: object, names: tuple[str, ...], *, is_stream: bool = False) -> None:
    for seed in SEEDS:
        fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400, "temperature": 1, "seed": seed}
        if is_stream:
            stream = await target.stream(target.chat(QUESTION, **fields))
            reply, calls, finish = stream.reply, joined_calls(stream.chunks), "".join(stream.finishes[-1:])
        else:
            reply = await target.ask(target.chat(QUESTION, **fields))
            calls, finish = calls_of(reply), str(reply.choice.get("finish_reason"))
        if reply.status != 200:
            _refused(reply)
        if calls or finish != "length":
            break
    if not calls:
        if finish == "length":
            raise CheckSkipped("cut_off")
        raise CheckFailed("no_call", choice=json.dumps(choice))
    if finish not in ("tool_calls", "stop", "length"):
        raise CheckFailed("wrong_finish", finish=finish, wanted="tool_calls / stop")
    for call in calls:
        _check_call(call, names, is_cut=finish == "length")


def _refused(reply: Reply) -> None:
    """Tell a model without tools from a server that refuses them.

    Raises:
        CheckSkipped, CheckFailed: Always one of them.
    """
    if reply.status == 400 and "tool" in reply.message.lower():
        raise CheckSkipped("no_tools", message=reply.message)
    raise CheckFailed("refused", status=reply.status, message=reply.message)


def _check_call(call: Mapping[str, Any], names: tuple[str, ...], *, is_cut: bool) -> None:
    function = call.get("function") or {}
    name, arguments = function.get("name"), function.get("arguments")
    if not call.get("id") or call.get("type") != "function" or not isinstance(arguments, str):
        raise CheckFailed("wrong_call_shape")
    if name not in names:
        raise CheckFailed("wrong_call", name=name, wanted=" / ".join(names))
    if is_cut:
        return
    field, values = ALLOWED[name]
    try:
        given = json.loads(arguments)
    except ValueError:
        raise CheckFailed("arguments_not_json") from None
    if not isinstance(given, dict) or given.get(field) not in values or len(given) != 1:
        raise CheckFailed("arguments_off_schema", field=field)


def calls_of(reply: Reply) -> list[Mapping[str, Any]]:
    message = reply.choice.get("message")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def joined_calls(chunks: Iterable[Event]) -> list[Mapping[str, Any]]:
    """Return the calls of a stream, joined by their index as OpenAI's clients do."""
    found: dict[int, dict[str, Any]] = {}
    for event in chunks:
        for part in event.delta.get("tool_calls") or ():
            call = found.setdefault(part.get("index", 0), {"function": {"name": "", "arguments": ""}})
            call |= {key: part[key] for key in ("id", "type") if part.get(key)}
            function = part.get("function") or {}
            for key in ("name", "arguments"):
                call["function"][key] += function.get(key) or ""
    return list(found.values())


async def no_tool(target: Target) -> None:
    reply = await target.ask(target.chat(QUESTION, tools=TOOLS, tool_choice="none", max_tokens=32))
    if reply.status != 200:
        _refused(reply)
    if calls_of(reply):
        raise CheckFailed("called_anyway")


async def tool_result(target: Target) -> None:
    messages: Messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
    ]
    reply = await target.ask(target.chat(messages, tools=TOOLS))
    if reply.status != 200:
        _refused(reply)


async def json_schema(target: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}, "count": {"enum": [1, 2]}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    value = await _structured(target, wanted)
    if not isinstance(value, dict) or set(value) != {"colour", "count"}:
        raise CheckFailed("off_schema")
    if value["colour"] not in ("red", "blue") or value["count"] not in (1, 2):
        raise CheckFailed("off_schema")


async def json_object(target: Target) -> None:
    value = await _structured(target, {"type": "json_object"})
    if not isinstance(value, dict):
        raise CheckFailed("not_an_object")


async def _structured(target: Target, wanted: dict[str, Any]) -> Any:
    """Return the value that the answer is.

    Raises:
        CheckFailed: The request was refused, or the answer is complete and not JSON.
        CheckSkipped: The model was cut off each time.
    """
    for seed in SEEDS:
        question = 'Name a colour and a number, as JSON: {"colour": "red" or "blue", "count": 1 or 2}'
        body = target.chat(question, response_format=wanted, max_tokens=400, temperature=1, seed=seed)
        reply = await target.ask(body)
        if reply.status != 200:
            raise CheckFailed("refused", status=reply.status, message=reply.message)
        try:
            return json.loads(reply.text)
        except ValueError:
            if reply.choice.get("finish_reason") != "length":
                raise CheckFailed("not_json") from None
            if not reply.text.lstrip().startswith("{") and reply.text.strip():
                raise CheckFailed("not_json") from None  # no grammar allows this beginning
    raise CheckSkipped("cut_off")


CHECKS = tuple(
    Check("dialect", run.__name__, run)
    for run in (
        named_tool,
        named_tool_streamed,
        required_tool,
        no_tool,
        tool_result,
        json_schema,
        json_object,
    )
)
