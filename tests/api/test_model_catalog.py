"""Lists and entries of models on real sockets."""

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.api.both_engines import OLLAMA_MODEL, VLLM_MODEL, error_of, serving

pytestmark = pytest.mark.uvloop


async def test_models_lists_the_public_names_with_a_stable_created_time() -> None:
    async with serving() as (gateway, client):
        body = (await client.get("/v1/models")).json()
        assert [entry["id"] for entry in body["data"]] == ["team/Standard", "gpt-4o", "pinned", "bge-m3"]
        assert body["object"] == "list"
        assert len({(entry["object"], entry["created"]) for entry in body["data"]}) == 1
        assert (await client.get("/v1/models")).json() == body == (await client.get("/models")).json()
        async with AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="any", max_retries=0) as openai:
            assert [model.id async for model in openai.models.list()] == [entry["id"] for entry in body["data"]]
            assert (await openai.models.retrieve("gpt-4o")).id == "gpt-4o"


@pytest.mark.parametrize(
    "path", ["/v1/models/team/Standard", "/v1/models/team%2FStandard", "/models/TEAM/standard", "/v1/models/bge-m3"]
)
async def test_one_model_is_found_by_its_name(client: httpx2.AsyncClient, path: str) -> None:
    entry = (await client.get(path)).json()
    assert entry["id"] in ("team/Standard", "bge-m3")
    assert entry in (await client.get("/v1/models")).json()["data"]


async def test_context_length_is_the_smallest_of_the_backends(client: httpx2.AsyncClient) -> None:
    """Switching backends then does not break a client."""
    entry = (await client.get("/v1/models/gpt-4o")).json()
    assert (entry["context_length"], entry["max_model_len"]) == (8192, 8192)
    assert "context_length" not in (await client.get("/v1/models/pinned")).json()


@pytest.mark.parametrize("name", ["nope", "a/b", "%00", "x" * 300])
async def test_unknown_model_name_is_not_echoed(client: httpx2.AsyncClient, name: str) -> None:
    answer = await client.get(f"/v1/models/{name}")
    assert error_of(answer) == (404, "model_not_found")
    assert "nope" not in answer.text


@pytest.mark.parametrize(
    ("name", "expected", "length"),
    [
        (VLLM_MODEL, VLLM_MODEL, 8192),
        (VLLM_MODEL.upper(), VLLM_MODEL, 8192),
        (OLLAMA_MODEL, OLLAMA_MODEL, 8192),
        ("Hidden", "hidden", 8192),
        ("nothing-there", "nothing-there", None),
        ("auto", "auto", None),
    ],
)
async def test_every_name_that_chat_accepts_can_be_retrieved(
    client: httpx2.AsyncClient, name: str, expected: str, length: int | None
) -> None:
    """The backends' own names, aliases that are not listed, and `auto`."""
    entry = (await client.get(f"/v1/models/{name}")).json()
    assert (entry["id"], entry["object"], entry.get("context_length")) == (expected, "model", length)
    assert expected not in [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]
