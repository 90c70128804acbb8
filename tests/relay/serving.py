"""A gateway with one tier on one backend, for the tests of the relay."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

from gateway import config, simulate
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PROMPT, TIMES, Raw, Reply, Running, running
from tests.fakes.stand_ins import stand_in

Kind = Literal["ollama", "vllm"]
KINDS = ["ollama", "vllm"]
IMAGE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": png_data_url()}}],
    }
]
PATIENT: dict[str, Any] = {"first_token_timeout": 60, "idle_timeout": 60, "total_timeout": 60}
EMPTY_DELTA = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}


def settings(kind: Kind, urls: list[str], top: dict[str, Any], limits: dict[str, Any]) -> config.Settings:
    servers = [{"base_url": url, "models": [MODEL]} for url in urls]
    return config.build(
        {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "servers": servers, **TIMES, **limits}},
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "state_file": "",
            **top,
        }
    )


@asynccontextmanager
async def serving(
    kind: Kind, mode: str = "healthy", *, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, FaultBackend]]:
    async with (
        FaultBackend(kind, mode) as backend,
        running(settings(kind, [backend.base_url], top or {}, limits)) as gateway,
    ):
        yield gateway, backend


@asynccontextmanager
async def in_front_of(
    options: simulate.Options, *, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, simulate.Running]]:
    async with (
        stand_in(options) as server,
        running(settings(options.kind, [server.base_url], top or {}, limits)) as gateway,
    ):
        yield gateway, server


@asynccontextmanager
async def servers(
    *modes: str, top: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, FaultBackend, FaultBackend]]:
    """Start a gateway whose backend has two servers, one for each of `modes`.

    Without affinity, so that the first server gets each request if both are equally busy.
    """
    limits = {"balance": "least_busy", **limits}
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(FaultBackend("vllm", mode)) for mode in modes]
        gateway = running(settings("vllm", [one.base_url, two.base_url], top or {}, limits))
        yield await stack.enter_async_context(gateway), one, two


def options(kind: Kind, **more: Any) -> simulate.Options:
    return simulate.Options(kind, (simulate.Model(MODEL, vision=True),), **more)


def code(reply: Reply) -> str | None:
    return None if reply.error is None else reply.error["code"]


@asynccontextmanager
async def with_header(gateway: Running, body: dict[str, Any], header: str) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    data = json.dumps({"model": "standard", "messages": PROMPT, **body}).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        header,
        f"Content-Length: {len(data)}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
