"""The embeddings endpoint on real sockets.

tests/relay/test_embeddings.py covers the relay of its requests.
"""

import pytest

from gateway import config
from gateway.api.paths import EMBEDDING_PATHS
from gateway.simulate import Model, Options
from tests.api.one_backend import code, post
from tests.fakes.running_gateway import running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop


@pytest.mark.parametrize("path", EMBEDDING_PATHS)
@pytest.mark.parametrize(
    ("model", "headers", "expected"),
    [
        ("Embedder", {}, (200, None)),
        ("embedder", {"x-gateway-timeout": "30", "x-gateway-priority": "batch"}, (200, None)),
        ("embedder", {"x-gateway-timeout": "0"}, (400, "x-gateway-timeout")),
        ("embedder", {"x-gateway-priority": "urgent"}, (400, "x-gateway-priority")),
        ("standard", {}, (404, "model")),
    ],
    ids=["name in other case", "deadline and priority", "wrong deadline", "wrong priority", "name of a tier"],
)
async def test_embedding_request_is_routed_by_its_model_and_headers(
    path: str, model: str, headers: dict[str, str], expected: tuple[int, str | None]
) -> None:
    async with stand_in(Options("ollama", (Model("chat-model"), Model("bge-m3", embedding=16)))) as server:
        settings = config.build(
            {
                "llm_backend": "ollama",
                "backends": {"ollama": {"kind": "ollama", "base_url": server.base_url}},
                "tiers": {"standard": {"models": {"ollama": "chat-model"}}},
                "embeddings": {"embedder": {"backend": "ollama", "model": "bge-m3"}},
                "state_file": "",
            }
        )
        async with running(settings) as gateway:
            reply = await post(gateway, {"model": model, "input": "a text"}, headers, path)
            assert (reply.status, reply.error and reply.error["param"]) == expected
            if reply.status == 200:
                assert reply.headers["x-gateway-model"] == "bge-m3"
                assert reply.headers["x-gateway-backend"] == "ollama"
            else:
                assert code(reply) == (reply.status, "invalid_value" if reply.status == 400 else "model_not_found")
