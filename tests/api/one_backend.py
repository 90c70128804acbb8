"""Gateway in front of one fault backend, and requests to its chat endpoint as plain bytes."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from gateway import config
from gateway.api.paths import CHAT_PATH
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import PATIENCE, TIMES, Raw, Reply, Running, running

KEY = "client-key"
CANARY = "the-canary-of-this-test"
"""Text of a request that must not appear in logs or responses."""


def document(backend: FaultBackend, **more: Any) -> dict[str, Any]:
    kind = backend.kind
    return {
        "llm_backend": kind,
        "backends": {
            kind: {"kind": kind, "servers": [{"base_url": backend.base_url, "models": [MODEL, "big"]}], **TIMES}
        },
        "tiers": {
            "standard": {"models": {kind: MODEL}, "aliases": ["gpt-4o-mini", {"name": "hidden", "listed": False}]},
            "ultra": {"models": {kind: "big"}, "aliases": ["gpt-4o"]},
        },
        "default_tier": "ultra",
        "state_file": "",
        **more,
    }


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[tuple[Running, FaultBackend]]:
    async with FaultBackend("vllm") as backend, running(config.build(document(backend, **more))) as gateway:
        yield gateway, backend


async def exchange(gateway: Running, headers: Mapping[str, str], body: bytes = b"", *, path: str = CHAT_PATH) -> Reply:
    """Send exactly these bytes and return the response.

    The connection stays open, so a gateway that waits for more bytes lets the test time out.
    """
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            *(f"{name}: {value}" for name, value in headers.items()),
            "",
            "",
        ]
        writer.write("\r\n".join(lines).encode() + body)
        try:
            return await Raw(reader, writer).reply()
        finally:
            writer.close()


async def post(
    gateway: Running,
    body: bytes | dict[str, Any],
    headers: Mapping[str, str] | None = None,
    path: str = CHAT_PATH,
) -> Reply:
    data = (
        body
        if isinstance(body, bytes)
        else json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x"}]} | body).encode()
    )
    return await exchange(
        gateway,
        {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})},
        data,
        path=path,
    )


def code(reply: Reply) -> tuple[int, str]:
    """Return the status and the error code of a response in OpenAI's error format."""
    assert reply.error is not None
    assert list(reply.error) == ["message", "type", "param", "code"]
    return reply.status, reply.error["code"]
