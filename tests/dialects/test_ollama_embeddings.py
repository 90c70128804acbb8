"""Requests and answers of Ollama's `/api/embed` and `/api/embeddings`."""

import json
from typing import Any

import pytest

from gateway.chat.answer import Timings
from gateway.dialects.dialect import EmbeddingCall
from gateway.dialects.json_body import completed
from gateway.dialects.ollama_embeddings import OllamaEmbed, OllamaEmbeddings
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidJson,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    UnsupportedParameter,
)

LIMIT = 1 << 20
VECTORS = [b"[0.5,1]", b"[2,3]"]


def known(model: str) -> None:
    if model != "m":
        raise ModelNotFound("There is no such model.", param="model")


def embed(**fields: Any) -> EmbeddingCall:
    return OllamaEmbed().parse(json.dumps({"model": "m"} | fields).encode(), LIMIT, known)


def embeddings(**fields: Any) -> EmbeddingCall:
    return OllamaEmbeddings().parse(json.dumps({"model": "m"} | fields).encode(), LIMIT, known)


def answer(call: EmbeddingCall, vectors: list[bytes]) -> dict[str, Any]:
    body = completed(call.form.answer(vectors, 7 if vectors else 0, lambda: Timings(1.5, 0.25, 1.25, 0.0)))
    found = json.loads(b"".join(body))
    assert isinstance(found, dict)
    return found


def test_embed_answers_with_a_list_of_vectors() -> None:
    call = embed(input=["a", "b"], truncate=True, keep_alive="5m", options={"num_ctx": 4})
    assert call.embedding.texts == ["a", "b"]
    body = answer(call, VECTORS)
    assert list(body) == ["model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"]
    assert body["embeddings"] == [[0.5, 1], [2, 3]]
    assert list(body.values())[2:] == [1_500_000_000, 250_000_000, 7]


def test_a_single_text_is_answered_with_a_list_of_one() -> None:
    call = embed(input="a", dimensions=2)
    assert (call.embedding.texts, call.embedding.dimensions) == (["a"], 2)
    assert answer(call, VECTORS[:1])["embeddings"] == [[0.5, 1]]


@pytest.mark.parametrize("fields", [{}, {"input": ""}, {"input": []}, {"input": None}])
def test_an_empty_input_has_no_vectors_and_no_counts(fields: dict[str, Any]) -> None:
    call = embed(**fields)
    assert call.embedding.texts == []
    assert answer(call, []) == {"model": "m", "embeddings": []}


@pytest.mark.parametrize("size", [1, 200_000])
@pytest.mark.parametrize("dimensions", [0, -1])
def test_dimensions_of_zero_are_none_as_at_ollama(dimensions: int, size: int) -> None:
    """Programs in Go send the zero value of a field that they do not set."""
    assert embed(input="a" * size, dimensions=dimensions).embedding.dimensions is None


def test_base64_is_never_used() -> None:
    assert not embed(input="a", encoding_format="base64").embedding.in_base64


def test_embeddings_answers_with_one_vector() -> None:
    call = embeddings(prompt="안녕하세요", keep_alive="5m", options=None)
    assert call.embedding.texts == ["안녕하세요"]
    assert answer(call, VECTORS[:1]) == {"embedding": [0.5, 1]}


@pytest.mark.parametrize("fields", [{}, {"prompt": ""}, {"prompt": None}])
def test_an_empty_prompt_has_an_empty_vector(fields: dict[str, Any]) -> None:
    assert answer(embeddings(**fields), []) == {"embedding": []}


@pytest.mark.parametrize("dialect", [OllamaEmbed(), OllamaEmbeddings()], ids=["embed", "embeddings"])
@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"", InvalidJson, "missing request body"),
        (b'{"model":', InvalidJson, "valid JSON"),
        (b"[]", InvalidJson, "JSON object"),
        (b'{"input": "a", "prompt": "a"}', InvalidRequest, "model is required"),
        (b'{"model": null, "input": "a", "prompt": "a"}', InvalidRequest, "model is required"),
        (b'{"model": "", "input": "", "prompt": ""}', InvalidRequest, "model is required"),
        (b'{"model": "other", "input": "a", "prompt": "a"}', ModelNotFound, "no such model"),
        (b'{"model": "other", "input": "", "prompt": ""}', ModelNotFound, "no such model"),
        (b'{"model": "m", "input": 3, "prompt": 3}', InvalidRequest, "Expected a string"),
    ],
)
def test_bad_bodies_are_refused(
    dialect: OllamaEmbed | OllamaEmbeddings, body: bytes, kind: type[GatewayError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        dialect.parse(body, LIMIT, known)


@pytest.mark.parametrize("tokens", [[1, 2], [[1], [2]], ["a", 1]])
def test_token_numbers_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(UnsupportedParameter, match="must be text"):
        embed(input=tokens)


def test_long_texts_are_parsed_in_steps() -> None:
    text = "x" * 300_000
    body = json.dumps({"model": "m", "input": [text, text]}).encode()
    assert completed(OllamaEmbed().parse_steps(body, known)).embedding.texts == [text, text]
    body = json.dumps({"model": "m", "prompt": text}).encode()
    assert completed(OllamaEmbeddings().parse_steps(body, known)).embedding.texts == [text]


def test_a_text_that_no_model_takes_is_refused() -> None:
    body = b'{"model": "m", "prompt": "%b"}' % (b"x" * (8 * 1024 * 1024))
    with pytest.raises(ContextLengthExceeded):
        completed(OllamaEmbeddings().parse_steps(body, known))


def test_a_long_body_of_many_values_is_refused() -> None:
    body = b'{"model": "m", "prompt": "a", "options": [%b1]}' % (b"1," * 60_000)
    with pytest.raises(RequestTooLarge):
        completed(OllamaEmbeddings().parse_steps(body, known))
