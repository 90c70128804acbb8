"""The canonical rerank request."""

import pytest

from gateway.chat.rerank import Rerank


@pytest.mark.parametrize(("top_n", "count"), [(None, 3), (2, 2), (50, 3)])
def test_number_of_results_is_what_is_asked_or_all(top_n: int | None, count: int) -> None:
    assert Rerank(model="m", query="q", documents=["a", "b", "c"], top_n=top_n).count == count


def test_documents_are_truncated_only_if_the_client_says_so() -> None:
    assert not Rerank(model="m", query="q", documents=["a"]).is_truncated
    assert Rerank(model="m", query="q", documents=["a"], max_tokens_per_doc=5).is_truncated
    assert Rerank(model="m", query="q", documents=["a"], truncate_prompt_tokens=-1).is_truncated
