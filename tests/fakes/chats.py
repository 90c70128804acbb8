"""Chat requests for tests, as bytes and parsed."""

import json
from typing import Any

from gateway.chat.request import Chat
from gateway.dialects.openai_chat_request import parse

MIB = 1024 * 1024
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TIME: dict[str, Any] = {"type": "object", "properties": {"zone": {"type": "string"}}}


def request(**fields: Any) -> bytes:
    """Return the body of a minimal chat request with these fields."""
    return json.dumps({"model": "standard", "messages": USER} | fields).encode()


def chat(**fields: Any) -> Chat:
    """Return the parsed `request(**fields)`."""
    return parse(request(**fields), MIB)


def tool(name: str = "get_weather", parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": WEATHER if parameters is None else parameters, **more},
    }


def called(name: str = "get_weather", arguments: str = '{"city":"Oslo"}', id: str = "call_1") -> dict[str, Any]:
    """Return a tool call of an earlier message."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def named(name: str = "get_weather") -> dict[str, Any]:
    """Return a `tool_choice` that names one function."""
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """Return a `tool_choice` that allows these functions."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def schema_format(schema: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": WEATHER if schema is None else schema, **more},
    }
