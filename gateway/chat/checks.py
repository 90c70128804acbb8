"""Checks of a `Chat` that its field types cannot express. Pure: no I/O, no clock."""

from gateway.chat import json_schema as schemas
from gateway.chat.request import Chat, Choice, ImagePart, Message, SchemaFormat
from gateway.errors import InvalidRequest, UnsupportedParameter

MAX_SCHEMAS = 128 * 1024
"""Bytes of all JSON Schemas of a request."""


def check(chat: Chat) -> None:
    """What the shapes alone do not say.

    Raises:
        InvalidRequest, UnsupportedParameter
    """
    _check_served(chat)
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if chat.tools is not None or chat.tool_choice is not None:
        _check_tools(chat)
    if isinstance(chat.response_format, SchemaFormat):
        schemas.check(chat.response_format.json_schema.schema, "response_format.json_schema.schema")
    for index, message in enumerate(chat.messages):
        is_text = type(message.content) is str
        if (message.role == "tool") if is_text else (message.role != "user" or message.content is None):
            _check_turn(message, f"messages[{index}]")


def _check_served(chat: Chat) -> None:
    refused: str | None = None
    if chat.n is not None and chat.n > 1:
        refused = "n"
    elif chat.functions or chat.function_call is not None:
        raise UnsupportedParameter(
            "'functions' and 'function_call' are not served: send 'tools' and 'tool_choice'.", param="functions"
        )
    elif chat.audio is not None:
        refused = "audio"
    elif chat.modalities is not None and chat.modalities != ["text"]:
        refused = "modalities"
    if refused is not None:
        raise UnsupportedParameter(
            f"'{refused}' is not served by this gateway, on any backend. Leave it out.", param=refused
        )


def _check_tools(chat: Chat) -> None:
    tools = chat.tools or []
    names = set()
    size = 0
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequest(
                f"'tools[{index}].function.name' is there twice.", param=f"tools[{index}].function.name"
            )
        names.add(tool.function.name)
        if tool.function.parameters is not None:
            size += _check_parameters(tool.function.parameters, f"tools[{index}].function.parameters")
            if size > MAX_SCHEMAS:
                raise InvalidRequest(
                    f"The schemas of 'tools' have more than {MAX_SCHEMAS} bytes in all.", param="tools"
                )
    if isinstance(chat.tool_choice, Choice) and chat.tool_choice.function.name not in names:
        raise InvalidRequest("'tool_choice' names a function that is not among 'tools'.", param="tool_choice")
    if chat.tool_choice == "required" and not names:
        raise InvalidRequest("'tool_choice' needs 'tools'.", param="tool_choice")


def _check_parameters(parameters: dict[str, object], param: str) -> int:
    if parameters.get("type", "object") != "object":
        raise InvalidRequest(f"'{param}' must be the JSON Schema of an object.", param=param)
    return schemas.check(parameters, param)


def _check_turn(message: Message, place: str) -> None:
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(f"Missing required parameter: '{place}.tool_call_id'.", param=f"{place}.tool_call_id")
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"Missing required parameter: '{place}.content'.", param=f"{place}.content")
    if message.role in ("system", "developer") and isinstance(message.content, list):
        for number, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                here = f"{place}.content[{number}].type"
                raise UnsupportedParameter(
                    f"'{here}' must be 'text': a turn of role '{message.role}' takes no images.", param=here
                )
