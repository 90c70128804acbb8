"""Reranking on kind `vllm`: rendering, parsing answers, and mapping errors. Pure.

See vllm/entrypoints/pooling/scoring/protocol.py, 0.32.
"""

import math
import re
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from gateway.chat.rerank import Ranked, Rerank
from gateway.engines.engine import decode, token_count
from gateway.engines.error_mapping import client_error, message_of
from gateway.errors import GatewayError, UnsupportedParameter

_NO_RERANK = re.compile(r"does not support (?:the )?(?:rerank|score)", re.IGNORECASE)


class RerankAnswer(NamedTuple):
    """Parsed answer of a server, the most relevant document first."""

    results: list[Ranked]
    prompt_tokens: int


class _Result(Struct):
    index: int
    relevance_score: float


class _Usage(Struct):
    prompt_tokens: Raw = Raw(b"0")
    total_tokens: Raw = Raw(b"0")


class _Answer(Struct):
    results: list[_Result]
    usage: Raw = Raw(b"null")


_answers = msgspec.json.Decoder(_Answer)
_usages = msgspec.json.Decoder(_Usage)


class VllmReranker:
    """Reranking of kind `vllm`: `/rerank`."""

    path = "/rerank"

    def render(self, rerank: Rerank, model: str) -> bytes:
        fields: dict[str, Any] = {"model": model, "query": rerank.query, "documents": rerank.documents}
        optional = {
            "top_n": rerank.top_n,
            "max_tokens_per_doc": rerank.max_tokens_per_doc,
            "truncate_prompt_tokens": rerank.truncate_prompt_tokens,
            "instruction": rerank.instruction,
        }
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})

    def parse(self, body: bytes, rerank: Rerank) -> RerankAnswer | None:
        """Parse the body of an answer with status 200. Return None if it does not answer `rerank`."""
        parsed = decode(_answers, body)
        if parsed is None:
            return None
        results = [Ranked(result.index, result.relevance_score) for result in parsed.results]
        documents = {result.document for result in results}
        if (
            len(results) < rerank.count
            or len(documents) != len(results)
            or not documents <= set(range(len(rerank.documents)))
            or not all(math.isfinite(result.score) for result in results)
        ):
            return None
        results.sort(key=lambda result: -result.score)
        usage = decode(_usages, parsed.usage) or _Usage()
        return RerankAnswer(
            results[: rerank.count], token_count(usage.prompt_tokens) or token_count(usage.total_tokens)
        )

    def client_error(self, status: int, body: bytes) -> GatewayError:
        message = message_of(body)
        # A bare 404 is a vLLM that serves another kind of model.
        if _NO_RERANK.search(message) or (status == 404 and message == "Not Found"):
            return UnsupportedParameter("The model behind this name does not support reranking.", param="model")
        return client_error(status, body)
