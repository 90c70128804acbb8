"""Body of a chat completion: bytes to a `Chat`, in steps where it is long. Pure: no I/O, no clock."""

from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from gateway.chat.checks import check
from gateway.chat.message import Message
from gateway.chat.request import MAX_BIASES, MAX_MESSAGES, RARE_FIELDS, Chat, StreamOptions
from gateway.chat.tools import MAX_TOOLS
from gateway.dialects.json_body import (
    LONG_BODY,
    Steps,
    completed,
    decode_fields,
    decode_in_steps,
    explain,
    has_too_many_members,
    is_too_deep,
    without_images,
)
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge

_decoder = msgspec.json.Decoder(Chat)

_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MANY_BYTES = 2048
"""Size from which a body is decoded in one pass, if it can be. A second pass over a shorter one costs less
than to find out."""
_MAX_DECODED = 1024 * 1024
_MAX_SEARCHED = 8 * 1024 * 1024
_MAX_MEMBERS = 400_000
"""Maximum size and number of members of a text that is decoded for a better error."""


class _Lengths(Struct):
    """The fields that may be too long, which is told without decoding their members."""

    messages: Annotated[list[Raw], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Raw], Meta(max_length=MAX_TOOLS)] | None = None
    logit_bias: Raw = Raw(b"")


_lengths = msgspec.json.Decoder(_Lengths)


# msgspec skips what it does not know without checking it. These types have nothing to skip.


class _KnownMessage(Message, frozen=True, forbid_unknown_fields=True):
    pass


class _KnownStreamOptions(StreamOptions, frozen=True, forbid_unknown_fields=True):
    pass


class _KnownChat(Chat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request with nothing but known fields, at least outside its rare ones and the parts of messages.

    Beside those of a `Chat` they are fields of OpenAI's API that do not concern an engine.
    """

    messages: Annotated[list[_KnownMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]  # type: ignore[assignment]  # frozen
    stream_options: _KnownStreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    verbosity: str | None = None


_known_decoder = msgspec.json.Decoder(_KnownChat)


def parse(body: bytes, max_text_body: int) -> Chat:
    """Parse the request in `body`: `check_text`, `decode` and `check` in one call.

    Raises:
        RequestTooLarge, InvalidJson, InvalidRequest, UnsupportedParameter: see those functions.
    """
    check_text(body, max_text_body)
    chat = decode(body, max_text_body)
    check(chat)
    return chat


def read(body: bytes, max_text_body: int) -> tuple[Chat, int]:
    """Read the request in `body`, and return it with its number of bytes without images.

    Raises:
        RequestTooLarge, InvalidJson, InvalidRequest: as `check_text` and `decode`.
    """
    text_size = len(body)
    if text_size > LONG_BODY or text_size > max_text_body:
        text_size = check_text(body, max_text_body)
        return decode(body, max_text_body), text_size
    return (_decode_known(body) if text_size > _MANY_BYTES else _decode_checked(body)), text_size


def check_text(body: bytes, max_text_body: int) -> int:
    """Check everything but the images, and return its size in bytes.

    msgspec skips fields that are not in its types without checking them: their numbers and text may
    be invalid JSON.

    Raises:
        RequestTooLarge: more than `max_text_body` bytes, or too many members.
        InvalidJson: the body is not JSON.
    """
    if len(body) > LONG_BODY:
        return completed(check_long_text(body, max_text_body))
    text = body if len(body) <= max_text_body else completed(_checked_text(body, max_text_body))
    _load(text)
    return len(text)


def _load(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidJson("The body is not valid JSON.") from None


def check_long_text(body: bytes, max_text_body: int) -> Steps[int]:
    """Check a long body in steps, to the same result as `check_text`."""
    text = body if len(body) <= max_text_body else (yield from _checked_text(body, max_text_body))
    if len(text) > LONG_BODY and (yield from has_too_many_members(text)):
        raise (yield from _too_many_members(text, max_text_body))
    _load(text)
    return len(text)


def _checked_text(body: bytes, max_text_body: int) -> Steps[bytes]:
    """Return the body without its images, if it is short enough."""
    text = yield from without_images(body)
    if len(text) > max_text_body:
        raise _too_large(max_text_body)
    return text


def _too_many_members(text: bytes, max_text_body: int) -> Steps[GatewayError]:
    """Return the error for a text with too many members, a better one if there is one.

    Decoding creates no objects for unknown fields.
    """
    try:
        if len(text) <= _MAX_DECODED:
            if (yield from is_too_deep(text)):
                return InvalidJson("The body is nested too deeply.")
            decode(text, max_text_body)
        elif len(text) <= _MAX_SEARCHED and text.count(b",") <= _MAX_MEMBERS:
            found = _lengths.decode(text)
            if bytes(found.logit_bias).count(b",") >= MAX_BIASES:
                return InvalidRequest(
                    f"Invalid value for 'logit_bias'. Expected an object of length <= {MAX_BIASES}.", param="logit_bias"
                )
    except GatewayError as error:
        return error
    except msgspec.ValidationError as error:
        return explain(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InvalidJson("The body is not valid JSON.")
    return RequestTooLarge("The request has too many JSON values or escapes.")


def decode(body: bytes, max_text_body: int) -> Chat:
    """Decode the request in a body that `check_text` has accepted.

    Raises:
        RequestTooLarge: text in the body looked like images.
        InvalidJson: the body is not a JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its path.
        UnsupportedParameter: the request uses a variant that the gateway does not support.
    """
    try:
        chat = _decoder.decode(body)
    except _JSON_ERRORS:
        chat = _decode_odd(body)
    return chat if len(body) <= max_text_body else _with_text_limit(chat, max_text_body)


def _decode_checked(body: bytes) -> Chat:
    """Do what `check_text` and `decode` do."""
    fields = _load(body)
    try:
        chat = _decoder.decode(body)
    except _JSON_ERRORS:
        chat = _decode_odd(body)
    if RARE_FIELDS.isdisjoint(fields):
        chat.__dict__["is_plain"] = True  # here it is known without a look at each of the fields
    return chat


def _decode_known(body: bytes) -> Chat:
    """Do the same in one pass, if the body has nothing but known and common fields."""
    try:
        chat = _known_decoder.decode(body)
    except _JSON_ERRORS:
        return _decode_checked(body)
    if not (chat.is_plain and chat.has_plain_messages):
        _load(body)  # msgspec may have skipped fields inside others
    return chat


def _decode_odd(body: bytes) -> Chat:
    """Decode a body that `_decoder` refuses, if integers with a fraction are the only reason."""
    try:
        return decode_fields(_decoder, body)
    except _JSON_ERRORS as error:
        raise _json_error(error) from None


def decode_long(body: bytes, max_text_body: int) -> Steps[Chat]:
    """Decode a long body in steps, to the same result as `decode`."""
    try:
        chat = yield from decode_in_steps(_decoder, body)
    except _JSON_ERRORS as error:
        raise _json_error(error) from None
    return chat if len(body) <= max_text_body else _with_text_limit(chat, max_text_body)


def _json_error(error: Exception) -> GatewayError:
    if isinstance(error, msgspec.ValidationError):
        return explain(str(error))
    is_deep = isinstance(error, RecursionError)
    return InvalidJson("The body is nested too deeply." if is_deep else "The body is not valid JSON.")


def _with_text_limit(chat: Chat, max_text_body: int) -> Chat:
    if sum(len(message.text) for message in chat.messages) > max_text_body:
        raise _too_large(max_text_body)
    return chat


def _too_large(max_text_body: int) -> RequestTooLarge:
    return RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")


# Answers
