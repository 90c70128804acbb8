"""Canonical rerank request, and its results. Pure: no I/O, no clock."""

from typing import NamedTuple

from msgspec import Struct

MAX_DOCUMENTS = 2048
"""Maximum number of documents in a request, the same as of texts to embed."""


class Rerank(Struct, frozen=True, kw_only=True):
    """One parsed request. None means that the request does not set the field."""

    model: str
    query: str
    documents: list[str]
    top_n: int | None = None
    max_tokens_per_doc: int | None = None
    truncate_prompt_tokens: int | None = None
    instruction: str | None = None

    @property
    def count(self) -> int:
        """Return the number of results to return."""
        return min(self.top_n or len(self.documents), len(self.documents))

    @property
    def is_truncated(self) -> bool:
        """Return whether the model gets only the beginning of long documents."""
        return self.max_tokens_per_doc is not None or self.truncate_prompt_tokens is not None


class Ranked(NamedTuple):
    """One result: the index of the document, and its score."""

    document: int
    score: float
