"""Counting of tokens and failures by the load generator."""

import asyncio

import pytest

from benchmarks import requests
from benchmarks.load import Client, LoadJob, Run
from benchmarks.upstream import MODEL
from tests.benchmarks.serving import serving


async def test_tokens_are_counted_however_the_bytes_are_split() -> None:
    async with serving() as (reader, writer, shared):
        shared.pace.interval = 0
        writer.write(requests.chat(MODEL, max_tokens=9, stream=True))
        raw = await reader.readuntil(b"\r\n0\r\n\r\n")
    for step in (1, 5, 100, len(raw)):
        run = Run(LoadJob("ttft", 0, "", "", 1, 1))
        client = fed_client(run, raw, step)
        assert (run.tokens, run.answers, run.started, run.outcome.failures) == (9, 1, 1, 0), (step, client, run.outcome)
        assert run.reads == (1 if step == len(raw) else 9) or step == 100


def fed_client(run: Run, raw: bytes, step: int) -> object:
    class Transport(asyncio.Transport):
        def write(self, data: object) -> None: ...
        def close(self) -> None: ...
        def abort(self) -> None: ...

    client = Client(run, b"request", repeat=False)
    client.connection_made(Transport())
    for start in range(0, len(raw), step):
        client.data_received(raw[start : start + step])
    return client


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n~~~\r\n0\r\n\r\n",
    ],
    ids=["error status", "no [DONE]"],
)
async def test_error_status_or_incomplete_answer_is_a_failure(raw: bytes) -> None:
    run = Run(LoadJob("streams", 0, "", "", 1, 1))
    fed_client(run, raw, len(raw))
    assert run.outcome.failures == 1
