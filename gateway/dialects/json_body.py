"""Bytes to a `Chat`, or the one error that says what is wrong with them. Pure: no I/O, no clock."""

import re
from collections.abc import Mapping

from gateway.errors import InvalidJson, InvalidRequest, UnsupportedMediaType, UnsupportedParameter

LEAST_PAYLOAD = 1024
"""Characters of an image's base64 from which on it is cut out before the rest of a body is looked at."""

_PAYLOAD = b";base64,"
_BACKSLASH = 0x5C

MAX_NESTING_MARKS = 50_000
"""`[` and `{` in a body of more than `LONG` bytes: what has more is a way to keep the parser busy."""
LONG_BODY = 64 * 1024


_WORDS = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "array": "an array", "object": "an object",
}  # fmt: skip
_WORD = re.compile(r"\b(?:str|int|float|bool|array|object)\b")


def check_media_type(fields: Mapping[bytes, bytes]) -> None:
    """Raises `UnsupportedMediaType` for a body that is not plain JSON, `InvalidRequest` without one."""
    media_type = fields.get(b"content-type", b"")
    if media_type != b"application/json" and media_type.partition(b";")[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("Send the body as 'Content-Type: application/json'.")
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


def without_images(body: bytes) -> bytes:
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
