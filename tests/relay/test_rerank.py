"""Rerank requests through the whole gateway on real sockets."""

import asyncio
import json
from typing import Any

import pytest

from gateway import config
from gateway.relay.turns import YIELD_BYTES
from gateway.simulate import Fault, Model
from tests.fakes.fault_backend import CANARY, FaultBackend
from tests.fakes.rerank import DOCUMENTS, RANKER, document, error, post, serving
from tests.fakes.running_gateway import running, until

pytestmark = pytest.mark.uvloop

PATHS = ["/v1/rerank", "/rerank", "/v2/rerank"]


@pytest.mark.parametrize("path", PATHS)
async def test_documents_come_back_by_relevance_with_their_index(path: str) -> None:
    async with serving() as (gateway, server):
        answer = await post(gateway, path)
        body = answer.json()
        assert answer.status_code == 200
        assert list(body) == ["id", "model", "results", "usage", "meta"]
        assert body["results"] == [
            {"index": 1, "relevance_score": 1.0},
            {"index": 0, "relevance_score": 0.0},
            {"index": 2, "relevance_score": 0.0},
        ]
        assert (body["model"], body["id"][:7]) == ("ours", "rerank-")
        tokens = body["usage"]["prompt_tokens"]
        assert tokens > 0
        assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert body["meta"] == {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": tokens}}
        assert answer.headers["x-gateway-tier"] == "Ours"
        (request,) = [request for request in server.engine.requests if request["path"] == "/rerank"]
        assert request["body"] == {"model": RANKER.name, "query": "llama Peru", "documents": DOCUMENTS}


async def test_top_n_and_return_documents_are_followed() -> None:
    async with serving() as (gateway, _):
        body = (await post(gateway, top_n=1, return_documents=True)).json()
        first = {"index": 1, "relevance_score": 1.0, "document": {"text": DOCUMENTS[1]}}
        assert body["results"] == [first]
        objects = [{"text": text, "id": 5} for text in DOCUMENTS]
        assert (await post(gateway, top_n=1, return_documents=True, documents=objects)).json()["results"] == [first]
        assert len((await post(gateway, top_n=50)).json()["results"]) == 3


async def test_document_that_does_not_fit_is_refused_by_name() -> None:
    async with serving() as (gateway, server):
        for size in (300, 5000):
            answer = await post(gateway, documents=["short", "words and " * size])
            assert error(answer) == (400, "context_length_exceeded", "documents")
        asked = len(server.engine.requests)
        truncated = await post(gateway, documents=["short", "words and " * 5000], max_tokens_per_doc=100)
        assert truncated.status_code == 200
        assert len(server.engine.requests) > asked


async def test_long_request_is_served_and_a_longer_one_refused() -> None:
    async with serving() as (gateway, _):
        documents = [f"number {index} " + "é" * 500 for index in range(1000)]
        assert len(json.dumps(documents)) > YIELD_BYTES
        answer = await post(gateway, documents=[*documents, "llama Peru"], return_documents=True)
        assert answer.json()["results"][0] == {
            "index": 1000,
            "relevance_score": 1.0,
            "document": {"text": "llama Peru"},
        }
        assert error(await post(gateway, documents=["x" * 5_000_000] * 2)) == (413, "request_too_large", None)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("status", status=500), (502, "upstream_error", None)),
        (Fault("status", status=503), (503, "backend_unavailable", None)),
        (Fault("die"), (502, "upstream_error", None)),
        (Fault("garbage"), (502, "upstream_error", None)),
    ],
)
async def test_failure_of_the_server_is_an_error_of_the_gateway(fault: Fault, expected: tuple[Any, ...]) -> None:
    async with serving() as (gateway, server):
        server.engine.inject(fault)
        assert error(await post(gateway)) == expected
        await until(gateway.is_idle)


async def test_client_that_leaves_ends_the_request() -> None:
    async with serving() as (gateway, server):
        server.engine.inject(Fault("stall"))
        task = asyncio.create_task(post(gateway))
        await until(lambda: server.engine.running == 1)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: server.engine.running == 0)
        await until(gateway.is_idle)
        assert [record["status"] for record in gateway.exchanges()] == [499]


async def test_model_that_cannot_rerank_is_said_to_be_wrong() -> None:
    async with serving(Model(RANKER.name)) as (gateway, _):
        assert error(await post(gateway)) == (400, "unsupported_parameter", "model")


async def test_requests_have_their_own_label_and_lane_and_the_log_no_text() -> None:
    async with serving() as (gateway, _):
        await post(gateway, query=CANARY, documents=[CANARY])
        assert gateway.metric("gateway_requests_total", endpoint="rerank", tier="Ours", outcome="ok") == 1
        assert gateway.metric("gateway_tokens_total", tier="Ours", type="prompt") > 0
        (record,) = gateway.exchanges()
        assert (record["lane"], record["endpoint"]) == ("embedding", "rerank")
        assert CANARY not in gateway.log.getvalue().decode()


@pytest.mark.virtual_time(only=True)
async def test_hung_server_ends_with_a_timeout() -> None:
    async with FaultBackend("vllm", "silent") as backend:
        settings = document(backend.base_url, backend.base_url, first_token_timeout=0.2)
        settings["backends"]["ranks"] |= {"servers": [{"base_url": backend.base_url, "models": [RANKER.name]}]}
        del settings["backends"]["ranks"]["base_url"]
        async with running(config.build(settings)) as gateway:
            assert error(await post(gateway))[:2] == (504, "upstream_timeout")
