"""SIGTERM under load: no request is refused before /readyz says so, and every stream gets an
end.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import VISION_STAND_IN
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import KEY, Gateway

DELAY, TIMEOUT = 4.0, 2.5
PER_SECOND = 20
STREAMS = 50
SHORT, LONG = 20, 1000  # tokens
BACKEND = replace(VISION_STAND_IN, tokens_per_second=10, answer_tokens=LONG, max_num_seqs=4 * STREAMS)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine on which half of the streams take 2 s, and the others would take minutes."""
    with stand_in(BACKEND) as engine:
        yield engine


@pytest.fixture
def gateway(engine: Engine, tmp_path: Path) -> Iterator[Gateway]:
    settings = {**engine.settings, "GATEWAY__DRAIN_DELAY": str(DELAY), "GATEWAY__DRAIN_TIMEOUT": str(TIMEOUT)}
    with Gateway(tmp_path, settings) as gateway:
        yield gateway


class Caller:
    """Client on raw sockets, which show how each body ends."""

    def __init__(self, gateway: Gateway) -> None:
        self._port = int(gateway.url.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []  # keeps the connections open

    async def open(
        self, body: dict[str, Any] | None = None, path: str = "/v1/chat/completions"
    ) -> asyncio.StreamReader:
        """Send a request on a new connection and return its response stream.

        Raises:
            OSError: the gateway does not listen.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        data = (
            b""
            if body is None
            else json.dumps({"model": "standard", "messages": [{"role": "user", "content": "Go on."}], **body}).encode()
        )
        lines = [
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {KEY}",
        ]
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}", "", ""]
        writer.write("\r\n".join(lines).encode() + data)
        return reader

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    async def status(self, body: dict[str, Any] | None = None, path: str = "/v1/chat/completions") -> int:
        reader = await self.open(body, path)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        return int(head.split()[1])


async def send_short_requests(caller: Caller, until: asyncio.Event) -> list[int | BaseException]:
    """Send `PER_SECOND` short requests a second and return the status or the error of each."""
    calls: list[asyncio.Task[int]] = []
    while not until.is_set():
        calls.append(asyncio.create_task(caller.status({"max_tokens": 1})))
        await asyncio.sleep(1 / PER_SECOND)
    return await asyncio.gather(*calls, return_exceptions=True)


async def is_ready(caller: Caller) -> bool:
    return await caller.status(path="/readyz") == 200


@pytest.mark.timeout(120)
async def test_drain_refuses_nothing_during_the_delay_and_ends_every_stream_explicitly(gateway: Gateway) -> None:
    caller, closing = Caller(gateway), asyncio.Event()
    streams = [
        await caller.open({"stream": True, "max_tokens": SHORT if number % 2 else LONG}) for number in range(STREAMS)
    ]
    for stream in streams:
        await stream.readuntil(b'"role":"assistant"')
    sending = asyncio.create_task(send_short_requests(caller, closing))
    await asyncio.sleep(0.2)
    process = gateway._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # makes its leash send SIGTERM
    begun = time.monotonic()
    async with asyncio.timeout(DELAY / 2):
        while await is_ready(caller):
            await asyncio.sleep(0.01)
    late = asyncio.create_task(caller.open({"stream": True, "max_tokens": 2}))
    await asyncio.sleep(begun + DELAY * 0.8 - time.monotonic())
    closing.set()
    outcomes = await sending
    assert len(outcomes) > 10  # how many of the rate, depends on the machine
    assert outcomes == [200] * len(outcomes)
    assert (await (await late).read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    for number, stream in enumerate(streams):
        rest = await stream.read()
        assert rest.endswith(b"\r\n0\r\n\r\n")
        assert (b"data: [DONE]" in rest) is bool(number % 2)
        assert (b'"code":"shutting_down"' in rest) is not bool(number % 2)
    with pytest.raises(OSError, match="Connect call failed"):
        await caller.open({})
    caller.close()
    status = await asyncio.to_thread(process.wait, 10)
    assert status == 0, gateway.tail()
    assert time.monotonic() - begun < DELAY + TIMEOUT + 20
