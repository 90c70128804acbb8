"""Bytes to a `Chat`, or the one error that says what is wrong with them. Pure: no I/O, no clock."""

import re
from collections.abc import Mapping

import msgspec
import orjson

from gateway import schemas
from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedMediaType, UnsupportedParameter
from gateway.protocol import Chat, Choice, ImagePart, Message, SchemaFormat

LEAST_PAYLOAD = 1024
"""Characters of an image's base64 from which on it is cut out before the rest of a body is looked at."""

_PAYLOAD = b";base64,"
_BACKSLASH = 0x5C

MAX_NESTING_MARKS = 50_000
"""`[` and `{` in a body of more than `LONG` bytes: what has more is a way to keep the parser busy."""
LONG = 64 * 1024
MAX_SCHEMAS = 128 * 1024
"""Bytes of all JSON Schemas of a request."""

_decoder = msgspec.json.Decoder(Chat)

_WORDS = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "array": "an array", "object": "an object",
}  # fmt: skip
_WORD = re.compile(r"\b(?:str|int|float|bool|array|object)\b")


def check_json(fields: Mapping[bytes, bytes]) -> None:
    """Raises `UnsupportedMediaType` for a body that is not plain JSON, `InvalidRequest` without one."""
    media_type = fields.get(b"content-type", b"")
    if media_type != b"application/json" and media_type.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("Send the body as 'Content-Type: application/json'.")
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


def parse(body: bytes, max_text_body: int) -> Chat:
    """The request in `body`: the three steps below in one.

    Raises:
        RequestTooLarge, InvalidJson, InvalidRequest, UnsupportedParameter
    """
    check_text(body, max_text_body)
    chat = decode(body, max_text_body)
    check(chat)
    return chat


def check_text(body: bytes, max_text_body: int) -> int:
    """Look at what is not an image; how many bytes that is.

    msgspec skips the fields that it does not take without a look: numbers and text there may be such that no JSON has them.

    Raises:
        RequestTooLarge: more than `max_text_body` bytes, or too many parts.
        InvalidJson: it is no JSON.
    """
    text = body if len(body) <= max_text_body else _without_images(body)
    if len(text) > max_text_body:
        raise _too_large(max_text_body)
    if len(text) > LONG and text.count(b"[") + text.count(b"{") > MAX_NESTING_MARKS:
        decode(text, max_text_body)  # which may know better what is wrong, and makes no objects of what it skips
        raise RequestTooLarge("The request has too many parts.")
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidJson("The body is not valid JSON.") from None
    return len(text)


def _without_images(body: bytes) -> bytes:
    """`body` without the payloads of `data:` URLs. Finding one character is a hundred times faster than parsing."""
    parts = []
    begin = 0
    while (found := body.find(_PAYLOAD, begin)) >= 0:
        found += len(_PAYLOAD)
        end = body.find(b'"', found)
        while end > found and body[end - 1] == _BACKSLASH:
            end -= 1
        if end - found < LEAST_PAYLOAD:
            end = found
        parts.append(body[begin:found])
        begin = end
    parts.append(body[begin:])
    return b"".join(parts)


def decode(body: bytes, max_text_body: int) -> Chat:
    """The request in a body that `check_text` has let pass.

    Raises:
        RequestTooLarge: what looked like images in the body was text.
        InvalidJson: no JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its path.
        UnsupportedParameter: it asks for what the gateway does not serve.
    """
    try:
        chat = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    if len(body) > max_text_body and sum(len(message.text) for message in chat.messages) > max_text_body:
        raise _too_large(max_text_body)
    return chat


def _too_large(max_text_body: int) -> RequestTooLarge:
    return RequestTooLarge(f"A request may have at most {max_text_body} bytes beside its images.")


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


def explain(text: str) -> InvalidRequest:
    """What msgspec says, in our words. Its own are `REASON - at `$.path``; only reasons that cannot hold the client's text are passed on. The
    client's text may hold a place of its own: the last one is msgspec's."""
    reason, found, place = text.rpartition(" - at `$")
    if not found:
        reason, place = text, ""
    param = place.rstrip("`").lstrip(".") or None
    if reason.startswith("Object missing required field `"):
        name = reason.split("`")[1]
        param = f"{param}.{name}" if param else name
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    kinds = _kinds(param)
    if kinds and not reason.startswith("Expected"):
        return UnsupportedParameter(f"'{param}' must be {kinds}.", param=param)
    if not reason.startswith("Expected") or "matching regex" in reason:
        reason = "It is out of range or not one of the values allowed"
    return InvalidRequest(f"Invalid value for '{param}'. {_in_json_words(reason)}.", param=param)


def _kinds(param: str) -> str | None:
    """What there is to choose from where a part tells by `type` what it is."""
    if not param.endswith(".type"):
        return None
    if ".content[" in param:
        return "'text' or 'image_url'"
    return "'text', 'json_object' or 'json_schema'" if param.startswith("response_format") else "'function'"


def _in_json_words(reason: str) -> str:
    """msgspec names types as Python does: "Expected `str | null`, got `int`"."""
    return _WORD.sub(lambda found: _WORDS[found[0]], reason.replace("`", "").replace(" | ", " or "))


def _check_served(chat: Chat) -> None:
    refused: str | None = None
    if chat.n is not None and chat.n > 1:
        refused = "n"
    elif chat.functions or chat.function_call is not None:
        raise UnsupportedParameter("'functions' and 'function_call' are not served: send 'tools' and 'tool_choice'.", param="functions")
    elif chat.audio is not None:
        refused = "audio"
    elif chat.modalities is not None and chat.modalities != ["text"]:
        refused = "modalities"
    if refused is not None:
        raise UnsupportedParameter(f"'{refused}' is not served by this gateway, on any backend. Leave it out.", param=refused)


def _check_tools(chat: Chat) -> None:
    tools = chat.tools or []
    names = set()
    size = 0
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequest(f"'tools[{index}].function.name' is there twice.", param=f"tools[{index}].function.name")
        names.add(tool.function.name)
        if tool.function.parameters is not None:
            size += _check_parameters(tool.function.parameters, f"tools[{index}].function.parameters")
            if size > MAX_SCHEMAS:
                raise InvalidRequest(f"The schemas of 'tools' have more than {MAX_SCHEMAS} bytes in all.", param="tools")
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
                raise UnsupportedParameter(f"'{here}' must be 'text': a turn of role '{message.role}' takes no images.", param=here)
