import pytest

from gateway import simulate
from gateway.bench.measure import NoModel, first_model, measure, with_model
from gateway.bench.target import Target
from gateway.bench.writers import Style
from tests.bench.fake_client import options
from tests.bench.servers import client_of, plain, scripted


async def test_the_first_model_of_each_api_is_found() -> None:
    ollama = simulate.Options("ollama", (simulate.Model("llama"),))
    async with client_of(ollama, "ollama") as client:
        assert await first_model(client) == "llama:latest"
    async with client_of(ollama) as client:
        assert await first_model(client) == "llama:latest"


@pytest.mark.parametrize("answer", [plain(b'{"data":[]}'), plain(b"{}", "401 Unauthorized"), plain(b"<html>"), None])
async def test_a_server_without_models_is_told_of(answer: bytes | None) -> None:
    async with scripted(answer) as (url, _):
        with pytest.raises(NoModel, match="--model"):
            await with_model(Target(url, ""))


async def test_a_named_model_asks_nobody() -> None:
    assert (await with_model(Target("http://127.0.0.1:1", "m"))).model == "m"


async def test_what_ollama_lacks_is_told_of() -> None:
    model = simulate.Model("llama")
    async with simulate.running(simulate.Options("ollama", (model,))) as server:
        chosen = options(
            target=Target(server.base_url, "llama", "ollama"), parameters={"ignore_eos": True}, num_prompts=1
        )
        result = await measure("load", chosen, None, Style())
    assert "ollama_ignores_eos" in result.notes
    assert len(result.headline_run.good) == 1
