"""Checks of JSON request bodies, and error messages for invalid ones. Pure: no I/O, no clock."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TypeVar

import msgspec
from msgspec import Raw

from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedMediaType, UnsupportedParameter

MIN_PAYLOAD = 1024
"""Minimum length of base64 that is cut out before the body is inspected, in characters."""

MAX_PAYLOADS = 10_000
"""Maximum number of payloads that are cut out. No request has so many images."""

LEAST_BYTES_PER_ESCAPE = 16
"""Minimum average distance of the backslashes in a payload. Programs escape `/` and `+`, one of 32
characters, and the ends of lines of 64 or 76."""

_PAYLOAD = b";base64,"

MAX_MEMBERS = 50_000
"""Maximum number of array elements and object members in a body of more than `LONG_BODY` bytes.

A body with more would keep the parser busy. 128 KiB of JSON Schemas have 20,000.
"""
MAX_ESCAPES = 2_000_000
"""Maximum number of backslashes in a body. Parsers take ten times longer for them than for text."""
MAX_DEPTH = 1024
"""Maximum depth of a long body's arrays and objects, which is also orjson's."""
LONG_BODY = 64 * 1024
STEP = 1024 * 1024
"""Bytes that are looked at before other requests get a turn. It takes a few milliseconds."""
_MARKS = (b",", b"[", b"{")
"""Each member follows one of these."""
_BRACKETS = b"[{]}"
_OPENS = bytes.maketrans(_BRACKETS, b"\1\1\0\0")
_CHANGES = (-1, 1)
"""Change of the depth at a bracket that closes, and at one that opens."""
_NO_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))

_fields = msgspec.json.Decoder(dict[str, Raw])
_got_fraction = re.compile(r"Expected `[^`]*\bint\b[^`]*`, got `float`").match
_number = re.compile(rb"-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?").fullmatch
_MAX_NUMBER = 32
"""Maximum length of a number that is looked at, in characters."""

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps of at most some milliseconds, between which other requests get a turn."""


_WORDS = {
    "str": "a string", "int": "an integer", "float": "a number", "bool": "a boolean", "array": "an array",
    "object": "an object",
}  # fmt: skip
_WORD = re.compile(r"\b(?:str|int|float|bool|array|object)\b")


def check_media_type(fields: Mapping[bytes, bytes]) -> None:
    """Check the headers of a JSON body.

    Raises:
        UnsupportedMediaType: the body is not JSON, or is compressed.
    """
    media_type = fields.get(b"content-type", b"")
    if media_type != b"application/json" and not _is_json(media_type):
        raise UnsupportedMediaType("Send the body as 'Content-Type: application/json'.")
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.")


def _is_json(media_type: bytes) -> bool:
    """Return whether the header value names only JSON.

    A proxy joins a header that was sent twice to `application/json, application/json`.
    """
    named = [item.partition(b";")[0].strip().lower() for item in media_type.split(b",")]
    return set(named) - {b""} == {b"application/json"}


def completed(steps: Steps[T]) -> T:
    """Return the result of `steps`, done without a break."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def without_images(body: bytes) -> Steps[bytes]:
    """Return `body` without the payloads of `data:` URLs.

    Searching for one character is a hundred times faster than parsing.
    """
    parts = []
    begin = quote = payload_end = 0
    for _ in range(MAX_PAYLOADS):
        found = body.find(_PAYLOAD, begin) + len(_PAYLOAD)
        if found < len(_PAYLOAD):
            break
        if found > quote:  # otherwise in the same string as the last one, which was not cut out
            quote = body.find(b'"', found)
            if quote < 0:
                break
            payload_end = quote
            if body.endswith(b"\\", found, quote):
                payload_end = _before_backslashes(body, found, quote)
            if payload_end - found < MIN_PAYLOAD or not (yield from _can_be_base64(body, found, payload_end)):
                payload_end = found
        end = max(found, payload_end)
        parts.append(body[begin:found])
        begin = end
    parts.append(body[begin:])
    return b"".join(parts)


def _before_backslashes(body: bytes, start: int, end: int) -> int:
    """Return where the backslashes at the end of `body[start:end]` begin, or `start` if they are many."""
    least = max(start, end - MIN_PAYLOAD)
    at = least + len(body[least:end].rstrip(b"\\"))
    return start if at == least else at


def decode_fields(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode the request in `body`, and accept `16.0` as the integer 16.

    Programs in languages that have only one type of number, and the serialisers of others, write
    integers so.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: as `decoder`.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if not _got_fraction(str(error)):
            raise
        return decoder.decode(_with_integers(body))


def decode_in_steps(decoder: msgspec.json.Decoder[T], body: bytes) -> Steps[T]:
    """Decode a long body in steps, to the same result as `decode_fields`."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if not _got_fraction(str(error)):
            raise
    yield
    repaired = _with_integers(body)
    yield
    return decoder.decode(repaired)


def decode_body(
    decoder: msgspec.json.Decoder[T], body: bytes, explained: Callable[[str], InvalidRequest] | None = None
) -> Steps[T]:
    """Decode a request of any length in steps. `explained` turns msgspec's message into the error.

    Raises:
        RequestTooLarge: the body has too many members.
        InvalidJson: it is not JSON, or nested too deeply.
        InvalidRequest, UnsupportedParameter: a field is not as `decoder` expects it.
    """
    if len(body) > LONG_BODY and (yield from has_too_many_members(body)):
        raise RequestTooLarge("The request has too many JSON values or escapes.")
    try:
        return (yield from decode_in_steps(decoder, body))
    except msgspec.ValidationError as error:
        raise (explained or explain)(str(error)) from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None


def _with_integers(body: bytes) -> bytes:
    """Return the JSON object in `body` with the integral numbers of its fields as integers."""
    fields = _fields.decode(body)
    for name, value in fields.items():
        if memoryview(value).nbytes <= _MAX_NUMBER and _number(text := bytes(value)):
            number = float(text)
            if number.is_integer() and not text.lstrip(b"-").isdigit():
                fields[name] = Raw(b"%d" % number)
    return msgspec.json.encode(fields)


def _can_be_base64(body: bytes, start: int, end: int) -> Steps[bool]:
    """Return whether a long string between two positions may be base64.

    It has no character beyond ASCII, and few escapes: `\\/`, `\\n` between lines, or `\\u002b`. Any
    other string takes parsers three times longer than base64, so it counts as text.
    """
    escapes, most = 0, (end - start) // LEAST_BYTES_PER_ESCAPE
    for at in range(start, end, STEP):
        piece = body[at : min(at + STEP, end)]
        if not piece.isascii():
            return False
        if b"\\" in piece:  # finding none is a tenth of counting
            escapes += piece.count(b"\\")
            if escapes > most:
                return False
        if at + STEP < end:
            yield
    return True


def has_too_many_members(body: bytes) -> Steps[bool]:
    """Return whether `body` has more than `MAX_MEMBERS` array elements and object members.

    Or more than `MAX_ESCAPES` backslashes.
    Nearly all bodies are told by counting three characters. Only if there are many, those within
    strings are left out.
    """
    found = 0
    if len(body) > MAX_ESCAPES:
        escapes = 0
        for start in range(0, len(body), STEP):
            escapes += body.count(b"\\", start, start + STEP)
            if escapes > MAX_ESCAPES:
                return True
            yield
    for start in range(0, len(body), STEP):
        found += sum(body.count(mark, start, start + STEP) for mark in _MARKS)
        if found > MAX_MEMBERS:
            return (yield from _count_members(body)) > MAX_MEMBERS
        yield
    return False


def _count_members(body: bytes) -> Steps[int]:
    """Return the number of marks outside of strings, or any number above the maximum."""
    members = 0
    for piece in _outside_of_strings(body):
        members += sum(map(piece.count, _MARKS))
        if members > MAX_MEMBERS:
            break
        yield
    return members


def is_too_deep(body: bytes) -> Steps[bool]:
    """Return whether the first `MAX_MEMBERS` brackets of `body` reach a depth of more than `MAX_DEPTH`.

    msgspec cannot tell: from Python 3.14 on, the size of the stack ends a recursion in C, which leaves
    room for tens of thousands of levels.
    """
    depth, rest = 0, MAX_MEMBERS
    for piece in _outside_of_strings(body):
        brackets = piece.translate(_OPENS, _NO_BRACKETS)[:rest]
        if any(map(MAX_DEPTH.__lt__, accumulate(map(_CHANGES.__getitem__, brackets), initial=depth))):
            return True
        opened = brackets.count(1)
        depth += 2 * opened - len(brackets)
        rest -= len(brackets)
        yield
    return False


def _outside_of_strings(body: bytes) -> Iterator[bytes]:
    """Yield the parts of `body` without what stands in quotes. Each is found in a few milliseconds."""
    is_in_string, rest = False, b""
    for start in range(0, len(body), STEP // 4):
        part = rest + body[start : start + STEP // 4]
        is_cut = (len(part) - len(part.rstrip(b"\\"))) % 2  # in the middle of an escape
        part, rest = (part[:-1], part[-1:]) if is_cut else (part, b"")
        if b"\\" in part:  # finding none is faster than replacing none
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')
        yield b"".join(pieces[is_in_string::2])
        is_in_string ^= len(pieces) % 2 == 0


def explain(text: str) -> InvalidRequest:
    """Turn msgspec's error message into an error in the gateway's words.

    Its messages have the form `REASON - at `$.path``. Only reasons that cannot contain the client's
    text are passed on. The client's text may contain a path of its own: the last one is msgspec's.
    """
    reason, found, path = text.rpartition(" - at `$")
    if not found:
        reason, path = text, ""
    param = path.rstrip("`").lstrip(".") or None
    if reason.startswith("Object missing required field `"):
        name = reason.split("`")[1]
        param = f"{param}.{name}" if param else name
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    supported = _supported_types(param)
    if supported and not reason.startswith("Expected"):
        return UnsupportedParameter(f"'{param}' must be {supported}.", param=param)
    if not reason.startswith("Expected") or "matching regex" in reason:
        reason = "It is out of range or not one of the allowed values"
    return InvalidRequest(f"Invalid value for '{param}'. {_with_json_type_names(reason)}.", param=param)


def _supported_types(param: str) -> str | None:
    """Return the supported values of a `type` field that selects between variants."""
    if not param.endswith(".type"):
        return None
    if ".content[" in param:
        return "'text' or 'image_url'"
    if param.startswith("response_format"):
        return "'text', 'json_object' or 'json_schema'"
    if param == "thinking.type":
        return "'enabled', 'disabled', 'adaptive' or 'auto'"
    return "'function' or 'allowed_tools'" if param == "tool_choice.type" else "'function'"


def _with_json_type_names(reason: str) -> str:
    """Replace Python's type names. msgspec writes: "Expected `str | null`, got `int`"."""
    return _WORD.sub(lambda found: _WORDS[found[0]], reason.replace("`", "").replace(" | ", " or "))


def render_list(before: bytes, items: Iterable[bytes], after: bytes) -> Steps[list[bytes]]:
    """Render a list in steps, as parts of about `STEP` bytes."""
    parts: list[bytes] = []
    pieces, size = [before], 0
    comma = b""
    for item in items:
        pieces += (comma, item)
        comma = b","
        size += len(item)
        if size > STEP:
            parts.append(b"".join(pieces))
            pieces, size = [], 0
            yield
    parts.append(b"".join((*pieces, after)))
    return parts
