"""Reranking of the vLLM stand-in."""

from typing import Any

import pytest

from gateway.simulate import Model, Options
from gateway.simulate.vllm.errors import VllmApiError
from gateway.simulate.vllm.rerank import rerank_job

RANKER = Model("bge", reranks=True, context_length=64)
OPTIONS = Options("vllm", (RANKER,))


def answer(**body: Any) -> dict[str, Any]:
    return rerank_job({"query": "red cat", "documents": ["dog", "a red cat"], **body}, RANKER, OPTIONS).answer("bge")


def test_documents_with_more_words_of_the_query_come_first() -> None:
    results = answer()["results"]
    assert [(result["index"], result["relevance_score"]) for result in results] == [(1, 1.0), (0, 0.0)]
    assert results[0]["document"] == {"text": "a red cat", "multi_modal": None}
    assert len(answer(top_n=1)["results"]) == 1
    assert answer()["usage"]["prompt_tokens"] == answer()["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"documents": []}, "At least one text_pair element must be given"),
        ({"top_n": -1}, "greater than or equal to 0"),
        ({"top_n": "x"}, "valid integer"),
        ({"documents": ["word " * 100]}, "maximum context length is 64 tokens"),
        ({"model": "other"}, "does not exist"),
    ],
)
def test_requests_are_refused_in_the_words_of_vllm(body: dict[str, Any], words: str) -> None:
    with pytest.raises(VllmApiError) as caught:
        answer(**body)
    assert words in str(caught.value.body)


def test_truncated_documents_fit() -> None:
    assert answer(documents=["word " * 100], max_tokens_per_doc=10)["results"]


def test_missing_fields_are_named() -> None:
    with pytest.raises(VllmApiError) as caught:
        rerank_job({}, RANKER, OPTIONS)
    assert "body.query" in str(caught.value.body)


def test_model_option_selects_it() -> None:
    assert Model.parse("bge,reranks").reranks
