"""Tests of parsing embeddings requests and rendering the answers."""

import json
from typing import Any

import pytest

from gateway.chat.embedding import MAX_TEXTS, Embedding
from gateway.dialects.json_body import completed
from gateway.dialects.openai_embeddings import parse_embedding, render_embeddings
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

MIB = 1024 * 1024


def parsed(**fields: Any) -> Embedding:
    return parse_embedding(json.dumps({"model": "e", **fields}).encode(), MIB)


def refused(body: bytes | dict[str, Any]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        parse_embedding(body if isinstance(body, bytes) else json.dumps({"model": "e"} | body).encode(), MIB)
    return caught.value


def test_one_or_several_texts_are_accepted() -> None:
    assert parsed(input="a").texts == ["a"]
    assert parsed(input=["a", " "]).texts == ["a", " "]
    assert len(parsed(input=["x"] * MAX_TEXTS).texts) == MAX_TEXTS


def test_unknown_fields_are_ignored() -> None:
    embedding = parsed(input="a", user=3, input_type="query", truncate=True)
    assert (embedding.encoding_format, embedding.dimensions) == (None, None)


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], [[]], ["a", 1]])
def test_token_numbers_are_rejected_with_advice(tokens: Any) -> None:
    error = refused({"input": tokens})
    assert isinstance(error, UnsupportedParameter)
    assert (error.status, error.param) == (400, "input")
    assert "check_embedding_ctx_length=False" in error.message


@pytest.mark.parametrize(
    "empty", ["", [], [""], ["a", ""], ["a"] * (MAX_TEXTS + 1)], ids=["text", "list", "in-list", "second", "too-many"]
)
def test_empty_or_too_many_texts_are_rejected(empty: Any) -> None:
    error = refused({"input": empty})
    assert type(error) is InvalidRequest
    assert error.param is not None
    assert error.param.startswith("input")
    assert str(MAX_TEXTS) in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a", None]}, "input[1]"),
        ({"input": "a", "model": 3}, "model"),
        ({"input": "a", "model": ""}, "model"),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format"),
        ({"input": "a", "encoding_format": 3}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 2.5}, "dimensions"),
        ({"input": "a", "dimensions": "8"}, "dimensions"),
        ({"input": "a", "dimensions": 10**9}, "dimensions"),
    ],
)
def test_invalid_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refused(fields)
    assert (error.code, error.param) == ("invalid_value", param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"{} {}",
        b'{"model":"e","input":"\xff"}',
        b'{"model":"e","input":"a","x":NaN}',
        b'{"x":' + b"[" * 100_000,
    ],
)
def test_body_that_is_not_a_json_object_is_rejected(body: bytes) -> None:
    assert isinstance(refused(body), (InvalidJson, InvalidRequest))
    assert refused(body).code in ("invalid_json", "invalid_value")


def test_batch_of_long_texts_may_be_as_large_as_any_body() -> None:
    assert len(parsed(input=["def f(): return [[{}]]\n" * 2000] * 50).texts) == 50


def test_body_made_large_by_something_other_than_text_is_rejected() -> None:
    assert isinstance(refused({"input": "a", "more": [[]] * 500_000}), RequestTooLarge)


# Answers


def test_answer_has_openais_shape_and_the_clients_model_name() -> None:
    body = json.loads(b"".join(completed(render_embeddings([b"[0.5]", b"[1]"], 'a "name"', 7))))
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5]},
            {"object": "embedding", "index": 1, "embedding": [1]},
        ],
        "model": 'a "name"',
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


@pytest.mark.parametrize("is_long", [False, True])
def test_integral_number_of_dimensions_is_an_integer(is_long: bool) -> None:
    text = "x" * (2 * MIB if is_long else 1)
    assert parse_embedding(f'{{"model":"e","input":"{text}","dimensions":64.0}}'.encode(), MIB).dimensions == 64
    assert refused(f'{{"model":"e","input":"{text}","dimensions":64.5}}'.encode()).param == "dimensions"
