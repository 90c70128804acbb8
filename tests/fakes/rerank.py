"""A gateway in front of a stand-in that reranks, and requests to it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2

from gateway import config
from gateway.simulate import Model, Options
from gateway.simulate import Running as StandIn
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, running
from tests.fakes.stand_ins import stand_in

RANKER = Model("their-ranker", reranks=True, context_length=512)
CHAT = Model("chat-model")
DOCUMENTS = ["about pandas", "the llama of Peru", "llamas"]


def document(base_url: str, chat_url: str, **limits: Any) -> dict[str, Any]:
    patient = {**TIMES, "first_token_timeout": 30, "total_timeout": 30, **limits}
    return {
        "llm_backend": "chats",
        "backends": {
            "ranks": {"kind": "vllm", "base_url": base_url, **patient},
            "chats": {"kind": "vllm", "base_url": chat_url, **patient},
        },
        "tiers": {"standard": {"models": {"chats": CHAT.name}, "aliases": ["*"]}},
        "embeddings": {"embedder": {"backend": "chats", "model": "bge-m3"}},
        "rerankers": {"Ours": {"backend": "ranks", "model": RANKER.name}},
        "state_file": "",
        "log_format": "json",
    }


@asynccontextmanager
async def serving(ranker: Model = RANKER, **limits: Any) -> AsyncIterator[tuple[Running, StandIn]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(stand_in(Options("vllm", (ranker,), max_num_seqs=8)))
        two = await stack.enter_async_context(stand_in(Options("vllm", (CHAT,))))
        settings = config.build(document(one.base_url, two.base_url, **limits))
        yield await stack.enter_async_context(running(settings)), one


async def post(gateway: Running, path: str = "/v1/rerank", **body: Any) -> httpx2.Response:
    fields = {"model": "ours", "query": "llama Peru", "documents": DOCUMENTS, **body}
    async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False) as client:
        return await client.post(path, json=fields)


def error(answer: httpx2.Response) -> tuple[int, str, str | None]:
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["param"]
