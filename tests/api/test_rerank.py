"""The names of rerankers, at their endpoint and at the others."""

import httpx2
import pytest

from tests.fakes.rerank import RANKER, error, post, serving

pytestmark = pytest.mark.uvloop


async def test_names_of_other_models_are_404_here_and_the_rerankers_elsewhere() -> None:
    async with serving() as (gateway, _):
        for name in ("standard", "unknown", "embedder"):
            answer = await post(gateway, model=name)
            assert error(answer) == (404, "model_not_found", "model")
            assert answer.json()["error"]["message"].endswith("Rerankers: 'Ours'.")
        assert (await post(gateway, model=RANKER.name)).status_code == 200
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            fields = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
            assert error(await post(gateway, path, **fields))[:2] == (404, "model_not_found")


async def test_reranker_is_listed_among_the_models() -> None:
    async with serving() as (gateway, _), httpx2.AsyncClient(base_url=gateway.base_url, verify=False) as client:
        ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["standard", "embedder", "Ours"]
        for name in ("ours", RANKER.name):
            assert (await client.get(f"/v1/models/{name}")).status_code == 200
