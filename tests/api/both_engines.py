"""Gateway in front of a vLLM stand-in and an Ollama stand-in, and a client of it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2

from gateway import config, simulate
from tests.fakes.running_gateway import PATIENCE, Running, running
from tests.fakes.stand_ins import stand_in

KEY, ADMIN, SCRAPER = "client-key", "admin-key", "scraper-key"
VLLM_MODEL, OLLAMA_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl"


def document(vllm: str = "http://127.0.0.1:1", ollama: str = "http://127.0.0.1:1", **more: Any) -> dict[str, Any]:
    return {
        "llm_backend": "vllm",
        "backends": {"vllm": {"kind": "vllm", "base_url": vllm}, "ollama": {"kind": "ollama", "base_url": ollama}},
        "tiers": {
            "team/Standard": {
                "models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL},
                "aliases": ["gpt-4o", {"name": "hidden", "listed": False}],
            },
            "pinned": {"models": {"ollama": "nothing-there"}, "backend": "ollama"},
        },
        "embeddings": {"bge-m3": {"backend": "ollama", "model": "bge-m3"}},
        "state_file": "",
        **more,
    }


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    vllm = simulate.Options("vllm", (simulate.Model(VLLM_MODEL, context_length=32768),))
    ollama = simulate.Options("ollama", (simulate.Model(OLLAMA_MODEL, context_length=8192),))
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(stand_in(vllm)), await stack.enter_async_context(stand_in(ollama))
        gateway = await stack.enter_async_context(running(config.build(document(one.base_url, two.base_url, **more))))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield gateway, await stack.enter_async_context(client)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    """Return the status and the error code of a response in OpenAI's error format."""
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, body["error"]["code"]
