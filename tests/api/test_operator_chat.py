"""An operator's chat with a tier on a backend of choice, on real sockets."""

import asyncio
from typing import Any

import httpx2
import pytest

from gateway import config
from tests.api.both_engines import ADMIN, KEY, OLLAMA_MODEL, VLLM_MODEL, bearer, error_of, serving
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import running, until

pytestmark = pytest.mark.uvloop

BODY: dict[str, Any] = {"model": "gpt-4o", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello?"}]}


async def chat(client: httpx2.AsyncClient, backend: str | None, *, key: str = ADMIN, **more: Any) -> httpx2.Response:
    headers = bearer(key) | ({} if backend is None else {"x-gateway-backend": backend})
    return await client.post("/ops/chat", json=BODY | more, headers=headers)


async def test_the_named_backend_answers_whatever_the_roll_out_says() -> None:
    async with serving(admin_key=ADMIN, api_keys=[KEY]) as (gateway, client):
        for backend, served, model in (
            ("vllm", "vllm", VLLM_MODEL),
            ("Ollama", "ollama", OLLAMA_MODEL),
            (None, "vllm", VLLM_MODEL),
        ):
            answer = await chat(client, backend)
            assert answer.status_code == 200, answer.text
            assert (answer.headers["x-gateway-backend"], answer.headers["x-gateway-model"]) == (served, model)
            assert answer.json()["choices"][0]["message"]["content"]
        streamed = await chat(client, "ollama", stream=True)
        assert streamed.text.rstrip().endswith("data: [DONE]")
        assert {line["key_id"] for line in gateway.exchanges() if line.get("tier")} == {"69a52655"}


async def test_it_needs_the_operators_key() -> None:
    async with serving(admin_key=ADMIN, api_keys=[KEY]) as (_, client):
        for key in (KEY, "wrong"):
            assert error_of(await chat(client, "vllm", key=key)) == (401, "invalid_api_key")
        assert error_of(await client.get("/ops/chat", headers=bearer(ADMIN))) == (405, "method_not_allowed")


async def test_without_keys_only_local_programs_may_use_it() -> None:
    async with serving() as (_, client):
        assert (await client.post("/ops/chat", json=BODY)).status_code == 200
        for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}, {"x-forwarded-for": "1.2.3.4"}):
            assert error_of(await client.post("/ops/chat", json=BODY, headers=headers)) == (403, "forbidden")


async def test_a_backend_without_the_tier_is_refused_by_name() -> None:
    async with serving(admin_key=ADMIN) as (_, client):
        answer = await chat(client, "cloud")
        assert error_of(answer) == (400, "invalid_value")
        assert answer.json()["error"]["param"] == "x-gateway-backend"
        assert "vllm, ollama" in answer.json()["error"]["message"]
        assert error_of(await chat(client, "vllm", model="pinned")) == (400, "invalid_value")


async def test_a_client_cannot_choose_a_backend_on_the_data_port() -> None:
    async with serving(admin_key=ADMIN) as (_, client):
        answer = await client.post("/v1/chat/completions", json=BODY, headers={"x-gateway-backend": "ollama"})
        assert answer.headers["x-gateway-backend"] == "vllm"


async def test_a_queued_chat_stays_on_its_backend_when_the_roll_out_changes() -> None:
    """A client's queued request moves with its tier; this one is a trial of the backend."""
    async with FaultBackend("vllm", "never_responds") as vllm, FaultBackend("ollama") as ollama:
        limit = {"max_concurrency": 1, "first_token_timeout": 30, "probe_interval": 60}
        settings = config.build(
            {
                "llm_backend": "vllm",
                "backends": {
                    "vllm": {"kind": "vllm", "base_url": vllm.base_url, **limit},
                    "ollama": {"kind": "ollama", "base_url": ollama.base_url},
                },
                "tiers": {"standard": {"models": {"vllm": MODEL, "ollama": MODEL}}},
                "state_file": "",
            }
        )
        async with running(settings) as gateway, httpx2.AsyncClient(base_url=gateway.base_url, verify=False) as client:

            async def trial() -> str:
                answer = await client.post(
                    "/ops/chat", json=BODY | {"model": "standard"}, headers={"x-gateway-backend": "vllm"}, timeout=30
                )
                return answer.headers["x-gateway-backend"]

            async with gateway.sent():
                await until(lambda: gateway.running == 1)
                queued = asyncio.create_task(trial())
                await until(lambda: gateway.waiting == 1)
                async with gateway.sent() as of_client:
                    await until(lambda: gateway.waiting == 2)
                    answer = await client.post("/ops/rollback")
                    assert answer.json()["moved"] == 1
                    assert (await of_client.reply()).headers["x-gateway-backend"] == "ollama"
                assert gateway.waiting == 1
                vllm.mode = "healthy"
            assert await queued == "vllm"
