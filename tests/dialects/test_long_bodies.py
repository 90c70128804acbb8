"""Tests of long bodies: no step of reading one takes long, and a legitimate one is read as ever."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from gateway.chat import checks
from gateway.dialects.json_body import LEAST_BYTES_PER_ESCAPE, LONG_BODY, MAX_MEMBERS, completed, without_images
from gateway.dialects.ollama_chat import OllamaChat, OllamaGenerate
from gateway.dialects.openai_chat_request import check_long_text, check_text, decode, parse
from gateway.dialects.openai_embeddings import MAX_TEXT, parse_embedding, parse_long_embedding
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidJson,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    UnsupportedParameter,
)
from tests.fakes.chats import MIB, USER, request
from tests.fakes.processor_time import assert_seconds_at_most

MOST_SECONDS = 0.05
CHAT = request()
EMBEDDING = b'{"model":"e","input":'


def chat_steps(body: bytes, limit: int) -> Iterator[None]:
    yield from check_long_text(body, limit)
    yield
    chat = decode(body, limit)
    yield
    yield from checks.check_in_steps(chat)


def embedding_steps(body: bytes, limit: int) -> Iterator[None]:
    yield from parse_long_embedding(body, len)


def longest_step(steps: Iterator[None]) -> float:
    longest = 0.0
    while True:
        began = time.process_time()
        try:
            next(steps)
        except (StopIteration, GatewayError):
            return max(longest, time.process_time() - began)
        longest = max(longest, time.process_time() - began)


def filled(head: bytes, unit: bytes, tail: bytes, size: int = 3 * MIB) -> bytes:
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


FIELD = CHAT[:-1] + b',"x":['
TEXT = b'{"model":"m","messages":[{"role":"user","content":"'
IMAGE_PART = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,'
IMAGE = b'{"model":"m","messages":[{"role":"user","content":[' + IMAGE_PART
IMAGE_END = b'"}}]}]}'
HOSTILE = {
    "numbers": filled(FIELD, b"1,", b"1]}"),
    "floats": filled(FIELD, b"1.5e-7,", b"1]}"),
    "strings": filled(FIELD, b'"",', b"1]}"),
    "objects": filled(FIELD, b'{"a":1},', b"1]}"),
    "nested arrays": filled(FIELD, b"[[[1]]],", b"1]}"),
    "deep": FIELD + b"[" * MIB,
    "keys": CHAT[:-1] + b',"x":{' + b",".join(b'"%x":0' % number for number in range(200_000)) + b"}}",
    "duplicate keys": filled(CHAT[:-1] + b',"x":{', b'"a":0,', b'"a":0}}'),
    "unknown fields": CHAT[:-1] + b"".join(b',"%x":0' % number for number in range(200_000)) + b"}",
    "biases": CHAT[:-1] + b',"logit_bias":{' + b",".join(b'"%d":0' % number for number in range(200_000)) + b"}}",
    "functions": filled(CHAT[:-1] + b',"functions":[', b"1,", b"1]}"),
    "stops": filled(CHAT[:-1] + b',"stop":[', b'"a",', b'"a"]}'),
    "messages": filled(b'{"model":"m","messages":[', b'{"role":"user","content":"a"},', b"1]}"),
    "escapes": filled(TEXT, b"\\n", b'"}]}'),
    "escaped quotes": filled(TEXT, b'\\"', b'"}]}'),
    "backslashes": filled(TEXT, b"\\\\", b'"}]}'),
    "surrogates": filled(TEXT, b"\\ud83d\\ude00", b'"}]}'),
    "quotes": filled(FIELD, b'""', b"1,"),
    "quotes after many members": FIELD + b"1," * 50_001 + b'""' * 400_000,
    "image": filled(IMAGE, b"A", IMAGE_END, 20 * MIB),
    "image with escapes": filled(IMAGE, b"\\/", IMAGE_END, 20 * MIB),
    "image with as many escapes as are allowed": filled(
        IMAGE, b"A" * (LEAST_BYTES_PER_ESCAPE - 2) + b"\\/", IMAGE_END, 20 * MIB
    ),
    "image in code points": filled(IMAGE, b"\\u0041", IMAGE_END, 20 * MIB),
    "image of surrogates": filled(IMAGE, b"\\ud83d\\ude00", IMAGE_END, 20 * MIB),
    "image beyond ASCII": filled(IMAGE, b"\xea\xb0\x80", IMAGE_END, 20 * MIB),
    "image beyond ASCII with escapes": filled(IMAGE, b"\\n\xea\xb0\x80", IMAGE_END, 20 * MIB),
    "image in blanks": filled(IMAGE, b" ", IMAGE_END, 20 * MIB),
    "images": filled(IMAGE, b"A" * 9999 + IMAGE_END[:-3] + b"," + IMAGE_PART, IMAGE_END, 20 * MIB),
    "marks of images": filled(TEXT, b";base64,", b'"}]}', 16 * MIB),
    "marks of images without an end": filled(TEXT, b";base64,", b"", 16 * MIB),
    "marks of images in strings": filled(FIELD, b'";base64,",', b"1]}", 8 * MIB),
    "marks of images and backslashes": TEXT + b";base64," * 1000 + b"\\" * 8 * MIB + b'"}]}',
}
MARK_BYTES = [name for name in HOSTILE if name.startswith("marks")]


def assert_short_steps(steps: Callable[[], Iterator[None]]) -> None:
    assert_seconds_at_most(MOST_SECONDS, lambda: longest_step(steps()))


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_no_step_of_reading_a_chat_takes_long(body: bytes) -> None:
    for limit in (MIB, 20 * MIB):
        assert_short_steps(lambda: chat_steps(body, limit))  # noqa: B023  # it is called at once


@pytest.mark.parametrize(
    "body",
    [
        *(body.replace(CHAT[:-1], EMBEDDING + b'"a"').replace(TEXT, EMBEDDING + b'"') for body in HOSTILE.values()),
        filled(EMBEDDING + b"[", b'"a",', b'"a"]}', 16 * MIB),
        filled(EMBEDDING + b"[", b"{},", b"1]}", 16 * MIB),
        filled(EMBEDDING + b'["', b"\\n", b'"]}', 16 * MIB),
    ],
    ids=[*HOSTILE, "texts", "objects as input", "one long text"],
)
def test_no_step_of_reading_embeddings_takes_long(body: bytes) -> None:
    assert_short_steps(lambda: embedding_steps(body, MIB))


# What is refused, and as what


def refusal(body: bytes, limit: int = MIB) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        parse(body, limit)
    return caught.value


@pytest.mark.parametrize("levels", [LONG_BODY, 100_000, 400_000])
def test_body_is_too_deep_rather_than_too_large_whatever_the_python(levels: int) -> None:
    deep = b',"x":%b%b}' % (b"[" * levels, b"]" * levels)
    assert refusal(CHAT[:-1] + deep).message == "The body is nested too deeply."
    with pytest.raises(InvalidJson, match="nested too deeply"):
        parse_embedding(b'{"model":"e","input":"a"' + deep, MIB, len)


@pytest.mark.parametrize("name", ["numbers", "objects", "keys", "duplicate keys", "unknown fields", "functions"])
@pytest.mark.parametrize("limit", [MIB // 4, 20 * MIB])
def test_chat_with_too_many_members_is_refused(name: str, limit: int) -> None:
    body = HOSTILE[name]
    assert isinstance(refusal(body, limit), RequestTooLarge)
    with pytest.raises(GatewayError):
        parse_embedding(body.replace(CHAT[:-1], EMBEDDING + b'"a"'), limit)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": USER * 100_000}, "messages"),
        ({"logit_bias": {str(number): 1 for number in range(100_000)}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": f"f{number}"}} for number in range(30_000)]}, "tools"),
    ],
    ids=["messages", "biases", "tools"],
)
def test_field_that_is_too_long_is_named(fields: dict[str, Any], param: str) -> None:
    body = request(**fields)
    error = refusal(body, 20 * MIB)
    assert type(error) is InvalidRequest
    assert error.param == param


def test_token_numbers_are_rejected_with_advice_however_many() -> None:
    for numbers in ([[7] * 1000] * 2048, [7] * 400_000):
        for body in (EMBEDDING + orjson.dumps(numbers) + b"}", b'{ "input" : ' + orjson.dumps(numbers) + b"}"):
            with pytest.raises(UnsupportedParameter, match="check_embedding_ctx_length=False"):
                parse_embedding(body, MIB)


def test_model_is_looked_up_before_the_texts_are_decoded() -> None:
    def unknown(model: str) -> None:
        assert model == "e"
        raise ModelNotFound("none")

    body = EMBEDDING + b'"' + b"\\n" * MIB + b'\xff"}'  # invalid, which nobody has seen yet
    with pytest.raises(ModelNotFound):
        parse_embedding(body, MIB, unknown)
    with pytest.raises(InvalidJson):
        parse_embedding(body, MIB)
    with pytest.raises(ModelNotFound):
        parse_embedding(EMBEDDING + b'"a"}', MIB, unknown)


def test_text_that_no_model_takes_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        parse_embedding(EMBEDDING + b'["a","' + b"x" * MAX_TEXT + b'"]}', MIB)
    assert caught.value.param == "input"


LONG = "x" * LONG_BODY


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ["a", LONG, 3]}, "input"),
        ({"input": ["a", LONG, None]}, "input[2]"),
        ({"input": ["a", LONG, ""]}, "input[2]"),
        ({"input": [LONG] + ["a"] * 2048}, "input"),
        ({"input": LONG, "dimensions": 0}, "dimensions"),
        ({"input": LONG, "model": 3}, "model"),
        ({"input": {"a": LONG}}, "input"),
        ({"x": LONG}, "input"),
    ],
)
def test_invalid_field_of_a_long_body_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embedding(orjson.dumps({"model": "e"} | fields), MIB)
    assert caught.value.param == param


@pytest.mark.parametrize("rest", [b'"x":NaN', b'"x":1e999', b'"x":"\xff"', b'"x":', b'"x":1}{', b'"x":01'])
def test_long_body_that_is_not_json_is_refused(rest: bytes) -> None:
    for head in (EMBEDDING, CHAT[:-1] + b',"y":'):
        body = head + orjson.dumps(LONG) + b"," + rest + b"}"
        with pytest.raises(InvalidJson):
            parse(body, MIB) if head is not EMBEDDING else parse_embedding(body, MIB)


# What is served


def test_texts_full_of_structure_are_served() -> None:
    """A prompt may hold a table or a JSON document, with any number of commas and brackets."""
    for text in ("1,2,3\n" * 100_000, '[{"a": [1, 2]}, ' * 50_000, '"\\' * 100_000, "가나, " * 90_000):
        body = request(messages=[{"role": "user", "content": text}])
        assert parse(body, 2 * MIB).messages[0].content == text
        again = orjson.dumps({"model": "e", "input": ["a", text], "dimensions": 8, "user": text})
        embedding = parse_embedding(again, MIB)
        assert (embedding.texts, embedding.dimensions) == (["a", text], 8)


def test_large_batch_of_texts_is_served() -> None:
    texts = ["word, " * 1365 + str(number) for number in range(2048)]
    assert parse_embedding(orjson.dumps({"model": "e", "input": texts}), MIB).texts == texts


@pytest.mark.parametrize("shift", range(8))
def test_members_are_counted_wherever_a_string_or_an_escape_is_cut(shift: int) -> None:
    """The search goes in slices: a string full of commas and escapes must not end at their edges."""
    for unit in ('\\",', "\\\\,", "\\,\\"):
        text = "x" * shift + unit * 300_000
        for count, is_served in ((MAX_MEMBERS - 100, True), (MAX_MEMBERS + 1, False)):
            body = orjson.dumps({"model": "m", "messages": USER, "x": text, "y": [1] * count})
            if is_served:
                assert check_text(body, 8 * MIB) == len(body)
            else:
                assert isinstance(refusal(body, 8 * MIB), RequestTooLarge)


@pytest.mark.parametrize(
    ("url", "left"),
    [
        (b"data:image/png;base64," + b"A" * 5000, b"data:image/png;base64,"),
        (b"data:image/png;base64," + b"A" * 5000 + b"\\\\", b"data:image/png;base64,\\\\"),
        (b"data:image/png;base64," + b"A" * 500, b"data:image/png;base64," + b"A" * 500),
        (b";base64," * 3 + b"\\" * 5000, b";base64," * 3 + b"\\" * 5000),
        (b";base64," + b"A" * 5000 + b"\\" * 5000,) * 2,
        (b";base64,;base64," + b"A" * 5000, b";base64,"),
        (b";base64," + b"A" * 3 * MIB, b";base64,"),
        (b";base64," + (b"A" * 15 + b"\\/A") * 200_000, b";base64,"),  # as PHP writes it
        (b";base64," + (b"A" * 76 + b"\\r\\n") * 50_000, b";base64,"),  # in lines
        (b";base64," + (b"A" * 64 + b"\\u002B") * 50_000, b";base64,"),  # as .NET writes it
        (b";base64," + (b"A" * 12 + b"\\/") * 200_000,) * 2,
        (b";base64," + b"A" * 5000 + b"\xea\xb0\x80" * 9,) * 2,
        (b";base64," + b"A" * 3 * MIB + b"\xea\xb0\x80",) * 2,
        (b";base64," + b"\\/" * 5000 + b";base64," + b"A" * 5000,) * 2,
    ],
)
def test_payloads_are_cut_out(url: bytes, left: bytes) -> None:
    assert completed(without_images(b'{"url":"%b"}' % url)) == b'{"url":"%b"}' % left
    assert completed(without_images(b'{"url":"%b","b":"%b"}' % (url, url))) == b'{"url":"%b","b":"%b"}' % (left, left)


# Ollama's own API

OLLAMA_HEAD = b'{"model":"m","messages":[{"role":"user","content":"x","images":["'
OLLAMA: dict[str, tuple[OllamaChat | OllamaGenerate, bytes]] = {
    "one image": (OllamaChat(), filled(OLLAMA_HEAD, b"iVBO", b'"]}]}', 20 * MIB)),
    "many images": (OllamaChat(), filled(OLLAMA_HEAD, b"iVBO" * 25_000 + b'","', b'"]}]}', 20 * MIB)),
    "an image of escapes": (OllamaChat(), filled(OLLAMA_HEAD, b"iVBO\\/", b'"]}]}', 8 * MIB)),
    "numbers as images": (OllamaChat(), filled(OLLAMA_HEAD[:-1], b"1,", b"1]}]}")),
    "messages": (OllamaChat(), filled(b'{"model":"m","messages":[', b'{"role":"user","content":"a"},', b"1]}")),
    "calls": (OllamaChat(), filled(b'{"model":"m","tools":[', b'{"function":{"name":"f"}},', b"1]}")),
    "options": (OllamaChat(), filled(b'{"model":"m","options":{', b'"a":0,', b'"a":0}}')),
    "a prompt": (OllamaGenerate(), filled(b'{"model":"m","prompt":"', b"hello ", b'"}')),
    "an image of a prompt": (
        OllamaGenerate(),
        filled(b'{"model":"m","prompt":"x","images":["', b"iVBO", b'"]}', 20 * MIB),
    ),
    "context": (OllamaGenerate(), filled(b'{"model":"m","prompt":"x","context":[', b"1,", b"1]}")),
}


def steps_of(dialect: OllamaChat | OllamaGenerate, body: bytes) -> Iterator[None]:
    yield from dialect.parse_steps(body, MIB)


@pytest.mark.parametrize("name", OLLAMA)
def test_no_step_of_a_long_body_for_ollamas_api_takes_long(name: str) -> None:
    dialect, body = OLLAMA[name]
    assert_short_steps(lambda: steps_of(dialect, body))
