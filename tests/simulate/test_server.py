"""Serving on a system-chosen port, and stopping with requests and connections still open."""

import asyncio
import gc

import httpx2
import pytest

from gateway.simulate import Fault, Options, running, serve
from tests.simulate.endpoints import PATIENCE, client, sent, until, user

KINDS = pytest.mark.parametrize("kind", ["ollama", "vllm"])


@KINDS
async def test_stop_ends_open_requests_and_idle_connections_immediately(kind: str) -> None:
    options = (
        Options("vllm", faults=(Fault("stall", times=0),)) if kind == "vllm" else Options("ollama", load_seconds=60)
    )
    server = running(options)
    async with server, client(server) as http:
        await http.get("/v1/models")
        body = {"model": options.served[0].name, "messages": user("Hello"), "stream": True}
        async with sent(server, "/v1/chat/completions", body) as reader:
            await until(lambda: server.engine.running + server.engine.waiting == 1)
            async with asyncio.timeout(PATIENCE):
                await server.stop()
            await reader.read()
    with pytest.raises(httpx2.ConnectError):
        async with client(server) as http:
            await http.get("/v1/models")


async def test_port_can_be_reused_after_a_stop() -> None:
    async with running(Options("vllm")) as first:
        port = first.port
    async with running(Options("vllm"), port) as second, client(second) as http:
        assert (second.port, (await http.get("/health")).status_code) == (port, 200)


async def test_serve_reports_its_port_and_ends_when_cancelled() -> None:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(Options("ollama"), "127.0.0.1", 0, port.set_result))
    async with httpx2.AsyncClient(verify=False) as http:
        assert (await http.get(f"http://127.0.0.1:{await port}/")).text == "Ollama is running"
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    gc.collect()
