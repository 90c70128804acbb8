"""Tests of the checks of JSON bodies, and of the messages for invalid ones."""

import json

import pytest

from gateway.dialects.json_body import (
    MAX_DEPTH,
    MAX_MEMBERS,
    MIN_PAYLOAD,
    STEP,
    check_media_type,
    completed,
    explain,
    is_too_deep,
    without_images,
)
from gateway.dialects.openai_chat_request import decode
from gateway.errors import InvalidJson, InvalidRequest, UnsupportedMediaType, UnsupportedParameter
from tests.fakes.chats import MIB, request

# Headers


@pytest.mark.parametrize(
    "media_type",
    [
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b"application/json, application/json",
        b"application/json;charset=utf-8,Application/JSON",
    ],
)
def test_json_body_is_accepted(media_type: bytes) -> None:
    check_media_type({b"content-type": media_type})
    check_media_type({b"content-type": media_type, b"content-encoding": b"Identity"})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"content-type": b"text/plain"},
        {b"content-type": b"application/jsonl"},
        {b"content-type": b"application/json, text/plain"},
        {b"content-type": b", "},
        {b"content-type": b"multipart/form-data; boundary=application/json"},
        {b"content-type": b"application/json", b"content-encoding": b"gzip"},
    ],
)
def test_other_media_type_or_compressed_body_is_rejected(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(UnsupportedMediaType):
        check_media_type(fields)


# Images

PAYLOAD = b"A" * MIN_PAYLOAD


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        (b'["data:;base64,%b","b"]' % PAYLOAD, b'["data:;base64,","b"]'),
        (b'["data:;base64,%b","data:;base64,%b"]' % (PAYLOAD, PAYLOAD), b'["data:;base64,","data:;base64,"]'),
        (b'["data:;base64,%b"]' % PAYLOAD[1:], b'["data:;base64,%b"]' % PAYLOAD[1:]),
        (b'["data:;base64,%b' % PAYLOAD, b'["data:;base64,%b' % PAYLOAD),
        (rb'["data:;base64,%b\\"b"]' % PAYLOAD, rb'["data:;base64,\\"b"]'),
        (rb'["data:;base64,%b\\\\","b"]' % PAYLOAD, rb'["data:;base64,\\\\","b"]'),
    ],
    ids=["one", "two", "short", "unterminated", "escaped quote", "escaped backslash"],
)
def test_long_base64_is_cut_out(body: bytes, rest: bytes) -> None:
    assert completed(without_images(body)) == rest


# Messages


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_field_is_named(name: str) -> None:
    body = json.loads(request())
    del body[name]
    with pytest.raises(InvalidRequest) as caught:
        decode(json.dumps(body).encode(), MIB)
    error = caught.value
    assert (error.code, error.param, error.message) == ("invalid_value", name, f"Missing required parameter: '{name}'.")


@pytest.mark.parametrize(
    ("text", "param", "message"),
    [
        (
            "Expected `str | null`, got `int` - at `$.stop`",
            "stop",
            "Invalid value for 'stop'. Expected a string or null, got an integer.",
        ),
        (
            "Expected `float` <= 2.0 - at `$.temperature`",
            "temperature",
            "Invalid value for 'temperature'. Expected a number <= 2.0.",
        ),
        (
            "Invalid enum value 'x' - at `$.reasoning_effort`",
            "reasoning_effort",
            "Invalid value for 'reasoning_effort'. It is out of range or not one of the allowed values.",
        ),
        (
            "Expected `str` matching regex '^a$' - at `$.tools[0].function.name`",
            "tools[0].function.name",
            "Invalid value for 'tools[0].function.name'. It is out of range or not one of the allowed values.",
        ),
        (
            "Object missing required field `url` - at `$.messages[0].content[0].image_url`",
            "messages[0].content[0].image_url.url",
            "Missing required parameter: 'messages[0].content[0].image_url.url'.",
        ),
    ],
)
def test_message_uses_json_type_names_and_repeats_no_value(text: str, param: str, message: str) -> None:
    error = explain(text)
    assert (type(error), error.param, error.message) == (InvalidRequest, param, message)


@pytest.mark.parametrize(
    ("param", "types"),
    [
        ("messages[0].content[1].type", "'text' or 'image_url'"),
        ("response_format.type", "'text', 'json_object' or 'json_schema'"),
        ("tools[2].type", "'function'"),
    ],
)
def test_unsupported_variant_is_answered_with_the_supported_ones(param: str, types: str) -> None:
    error = explain(f"Invalid value 'x' - at `$.{param}`")
    assert (type(error), error.message) == (UnsupportedParameter, f"'{param}' must be {types}.")


def test_body_that_is_not_an_object_is_invalid_json() -> None:
    assert isinstance(explain("Expected `object`, got `array`"), InvalidJson)


# Depth


def nested(levels: int) -> bytes:
    return b'[{"a":' * (levels // 2) + b"[" * (levels % 2) + b"]" * (levels % 2) + b"}]" * (levels // 2)


def test_depth_is_counted_on_over_long_bodies() -> None:
    half, blanks = b"[" * (MAX_DEPTH // 2), b" " * STEP
    assert not completed(is_too_deep(half + blanks + half))
    assert completed(is_too_deep(half + blanks + half + blanks + b"["))
    assert not completed(is_too_deep(half + blanks + b"]" * 8 + half + blanks + b"[" * 8))


def test_brackets_after_as_many_as_a_body_may_have_members_do_not_count() -> None:
    wide = b"[]" * (MAX_MEMBERS // 2 - 1000)
    deep = b"[" * (MAX_DEPTH + 1)
    assert completed(is_too_deep(wide + b" " * STEP + deep))
    assert not completed(is_too_deep(wide + b" " * STEP + b"[]" * 1000 + deep))


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 20_000, 1_000_000])
@pytest.mark.parametrize("head", [b"", b'{"text":"]]}}\\"]\\\\","b":', b'{"wide":[[],{},[]],"b":'])
def test_body_is_too_deep_whatever_stands_before(levels: int, head: bytes) -> None:
    assert completed(is_too_deep(head + nested(levels)))


@pytest.mark.parametrize(
    "body",
    [
        nested(MAX_DEPTH),
        b"[" + b"[[]],{}," * 10_000 + b"0]",
        b'["' + b"[{" * 10_000 + b'"]',
        b'["\\"' + b"[{" * 10_000 + b'\\\\",[]]',
        b"",
    ],
    ids=["just so deep", "wide", "in a string", "in a string with escapes", "empty"],
)
def test_body_with_many_brackets_is_not_too_deep(body: bytes) -> None:
    assert not completed(is_too_deep(body))
