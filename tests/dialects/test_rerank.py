"""Rerank requests of Cohere's and Jina's clients."""

import json
from typing import Any

import pytest

from gateway.chat.rerank import MAX_DOCUMENTS, Ranked, Rerank
from gateway.dialects.json_body import completed
from gateway.dialects.rerank import MAX_BODY, CohereRerank
from gateway.errors import GatewayError, ModelNotFound


def parsed(**fields: Any) -> Rerank:
    body = {"model": "m", "query": "q", "documents": ["a"], **fields}
    return CohereRerank().parse(json.dumps(body).encode(), str).rerank


def test_documents_are_texts_or_objects_with_one() -> None:
    assert parsed(documents=["a", {"text": "b", "title": 5}]).documents == ["a", "b"]
    assert parsed(top_n=2.0).top_n == 2
    assert (parsed(top_n=2).count, parsed().count, parsed(documents=["a", "b"]).count) == (1, 1, 2)
    assert parsed(priority=1, user="me", max_chunks_per_doc=3, truncation=True) == parsed()


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"documents": []}, "invalid_value", "documents"),
        ({"documents": "a"}, "invalid_value", "documents"),
        ({"documents": ["a"] * (MAX_DOCUMENTS + 1)}, "invalid_value", "documents"),
        ({"documents": ["a", 5]}, "invalid_value", "documents[1]"),
        ({"documents": ["a", ""]}, "invalid_value", "documents[1]"),
        ({"documents": ["a", {"text": ""}]}, "invalid_value", "documents[1]"),
        ({"documents": ["a", {"image": "x"}]}, "invalid_value", "documents[1].text"),
        ({"documents": ["a", {"text": 5}]}, "invalid_value", "documents[1].text"),
        ({"query": ""}, "invalid_value", "query"),
        ({"query": {"image": "x"}}, "invalid_value", "query"),
        ({"top_n": 0}, "invalid_value", "top_n"),
        ({"return_documents": "yes"}, "invalid_value", "return_documents"),
        ({"rank_fields": ["title"]}, "unsupported_parameter", "rank_fields"),
        ({"documents": ["a"] * 60_000}, "request_too_large", None),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], code: str, param: str | None) -> None:
    with pytest.raises(GatewayError) as caught:
        parsed(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "m", "query": "q", "documents": ["a"], "x": 1e}', "invalid_json"),
        (b'{"model": "m", "query": "q", "documents": [' + b"[" * 2000 + b"]" * 2000 + b"]}", "invalid_json"),
        (b'{"model": "m", "query": "q"}', "invalid_value"),
        (b" " * (MAX_BODY + 1), "request_too_large"),
    ],
)
def test_bodies_that_are_not_requests_are_refused(body: bytes, code: str) -> None:
    with pytest.raises(GatewayError) as caught:
        CohereRerank().parse(body, str)
    assert caught.value.code == code


def test_name_of_the_model_is_checked_before_the_documents_are_read() -> None:
    def refuse(name: str) -> None:
        raise ModelNotFound(name)

    with pytest.raises(ModelNotFound):
        CohereRerank().parse(b'{"model": "m", "query": "q", "documents": [5]}', refuse)


def test_long_body_is_parsed_in_steps() -> None:
    body = json.dumps({"model": "m", "query": "q", "documents": ["word " * 40_000] * 20}).encode()
    steps = CohereRerank().parse_steps(body, str)
    for _ in range(6):
        next(steps)
    assert completed(steps).rerank.documents == ["word " * 40_000] * 20


def test_scores_keep_their_precision() -> None:
    form = CohereRerank().parse(b'{"model": "m", "query": "q", "documents": ["a"]}', str).form
    body = json.loads(b"".join(completed(form.answer("1", [Ranked(0, 1.0e-12)], 3))))
    assert body["results"] == [{"index": 0, "relevance_score": 1.0e-12}]
