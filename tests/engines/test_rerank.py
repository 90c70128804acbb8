"""Reranking at a vLLM: requests, answers and errors."""

import json
from typing import Any

import pytest

from gateway.chat.rerank import Ranked, Rerank
from gateway.engines.rerank import RerankAnswer, VllmReranker
from gateway.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedParameter, UpstreamError

ASKED = Rerank(model="ours", query="q", documents=["a", "b", "c"])


def answer(*results: tuple[Any, Any], usage: Any = None) -> RerankAnswer | None:
    listed = [
        {"index": index, "document": {"text": "x", "multi_modal": None}, "relevance_score": score}
        for index, score in results
    ]
    body = {"id": "rerank-1", "model": "m", "usage": usage, "results": listed}
    return VllmReranker().parse(json.dumps(body).encode(), ASKED)


def test_only_fields_that_the_client_set_are_sent() -> None:
    sent = json.loads(VllmReranker().render(ASKED, "theirs"))
    assert sent == {"model": "theirs", "query": "q", "documents": ["a", "b", "c"]}
    full = Rerank(
        model="m", query="q", documents=["a"], top_n=1, max_tokens_per_doc=9, truncate_prompt_tokens=-1, instruction="i"
    )
    sent = json.loads(VllmReranker().render(full, "theirs"))
    assert [sent[name] for name in ("top_n", "max_tokens_per_doc", "truncate_prompt_tokens", "instruction")] == [
        1,
        9,
        -1,
        "i",
    ]


def test_results_are_ordered_by_score_and_the_tokens_counted() -> None:
    found = answer((0, 0.1), (2, 0.9), (1, -3), usage={"prompt_tokens": 7, "total_tokens": 7})
    assert found == RerankAnswer([Ranked(2, 0.9), Ranked(0, 0.1), Ranked(1, -3)], 7)
    older = answer((0, 1), (1, 1), (2, 1), usage={"total_tokens": 5})  # before 0.11
    assert older == RerankAnswer([Ranked(0, 1), Ranked(1, 1), Ranked(2, 1)], 5)


@pytest.mark.parametrize(
    "results",
    [
        [(0, 1), (1, 1)],
        [(0, 1), (1, 1), (1, 1)],
        [(0, 1), (1, 1), (3, 1)],
        [(0, 1), (1, 1), (-1, 1)],
        [(0, 1), (1, 1), (2, None)],
        [(0, 1), (1, 1), (2, "9")],
        [(0, 1), (1, 1), (2, float("inf"))],
    ],
)
def test_answer_that_does_not_rank_the_documents_is_refused(results: list[tuple[Any, Any]]) -> None:
    assert answer(*results) is None


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, "Not Found", UnsupportedParameter),
        (501, "The model does not support Rerank (Score) API", UnsupportedParameter),
        (404, "The model `x` does not exist.", ModelNotFound),
        (400, "This model's maximum context length is 512 tokens. However", ContextLengthExceeded),
        (400, "At least one text_pair element must be given", InvalidRequest),
        (500, "Internal server error", UpstreamError),
    ],
)
def test_errors_of_the_server_become_the_gateways(status: int, message: str, kind: type[Exception]) -> None:
    body = json.dumps({"error": {"message": message}} if message != "Not Found" else {"detail": message}).encode()
    assert type(VllmReranker().client_error(status, body)) is kind
