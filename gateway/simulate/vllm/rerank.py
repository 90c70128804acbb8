"""Reranking of a vLLM with a cross-encoder (vLLM 0.32, `--runner pooling`). Pure."""

import re
import secrets
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model, Options
from gateway.simulate.text import count_tokens
from gateway.simulate.vllm.embeddings import text_tokens
from gateway.simulate.vllm.errors import ErrorDetail, bad_request, error_detail, validation_failed
from gateway.simulate.vllm.requests import check_model

_words = re.compile(r"\w+").findall


@dataclass(frozen=True, slots=True)
class RerankJob:
    """One rerank request. The score of a document is the share of the query's words that it has."""

    query: str
    documents: tuple[str, ...]
    tokens: int
    top_n: int

    def answer(self, name: str) -> dict[str, Any]:
        """Return the response body, with `name` as the model."""
        wanted = set(_words(self.query.lower()))
        scores = [len(wanted & set(_words(text.lower()))) / (len(wanted) or 1) for text in self.documents]
        results = [
            {"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": score}
            for index, (text, score) in enumerate(zip(self.documents, scores, strict=True))
        ]
        results.sort(key=lambda result: -scores[int(str(result["index"]))])
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens}
        return {
            "id": f"rerank-{secrets.token_hex(8)}",
            "model": name,
            "usage": usage,
            "results": results[: self.top_n or None],
        }


def rerank_job(body: dict[str, Any], model: Model, options: Options) -> RerankJob:
    """Parse a body of `/rerank`.

    Raises:
        VllmApiError: the request is not valid; the message is vLLM's.
    """
    errors: list[ErrorDetail] = [
        error_detail("missing", f"body.{name}", "Field required", body)
        for name in ("query", "documents")
        if name not in body
    ]
    top_n = body.get("top_n", 0)
    if not isinstance(top_n, int):
        errors.append(error_detail("int_type", "body.top_n", "Input should be a valid integer", top_n))
    elif top_n < 0:
        message = "Input should be greater than or equal to 0"
        errors.append(error_detail("greater_than_equal", "body.top_n", message, top_n, ge=0))
    if errors:
        raise validation_failed(*errors)
    check_model(body, options)
    documents = body["documents"] if isinstance(body["documents"], list) else [body["documents"]]
    if not documents:
        raise bad_request("At least one text_pair element must be given")
    texts = tuple(text if isinstance(text, str) else str(text) for text in documents)
    limit = body.get("max_tokens_per_doc") or body.get("truncate_prompt_tokens")
    query = count_tokens(str(body["query"]))
    if limit:
        tokens = sum(query + min(count_tokens(text), int(limit) if limit > 0 else count_tokens(text)) for text in texts)
    else:
        tokens = sum(text_tokens(f"{body['query']}{text}", model) for text in texts)
    return RerankJob(str(body["query"]), texts, tokens, top_n)
