"""Spans as a collector receives them, and what happens if none does."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from gateway.telemetry import otlp
from gateway.telemetry.otlp import OtlpTracer
from gateway.telemetry.tracing import start_tracing
from tests.fakes.collector import Collector, ReceivedSpan
from tests.fakes.exchanges import exchange
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend, Kind
from tests.fakes.running_gateway import Running, running, settings_for, until

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"traceparent: 00-{TRACE_ID}-{SPAN_ID}-01"
CANARY = "the-canary-of-this-test"
SERVER, INTERNAL = 2, 1
ERROR = 2


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
    monkeypatch.setattr(otlp, "EMIT_SECONDS", 0.01)
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(("Otel", "end of traces")):
            thread.join(15)
            assert not thread.is_alive(), f"{thread.name} goes on after its tracer was closed"


@asynccontextmanager
async def traced(
    collector: Collector, backend: FaultBackend, monkeypatch: pytest.MonkeyPatch, **variables: str
) -> AsyncIterator[Running]:
    """Run a gateway whose traces go to `collector`, with more of OpenTelemetry's variables."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, **variables}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = settings_for(backend, first_token_timeout=10, total_timeout=20)
    async with running(settings, shares_loop=True, tracer=start_tracing(environ)) as gateway:
        yield gateway


async def ask(gateway: Running, *headers: str, **body: Any) -> int:
    async with gateway.sent(body, *headers) as raw:
        return (await raw.reply()).status


async def roots(collector: Collector, number: int = 1) -> list[ReceivedSpan]:
    """Wait for the spans of so many exchanges, and return them."""
    found: list[ReceivedSpan] = []

    def has_all() -> bool:
        nonlocal found
        found = [span for span in collector.spans if span.kind == SERVER]
        return len(found) >= number

    await until(has_all)
    assert len(found) == number
    return found


def header_of(request: bytes, name: str) -> str | None:
    head = request.partition(b"\r\n\r\n")[0].decode()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    return fields.get(name)


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_stream_is_one_span_with_its_steps(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend(kind) as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway, TRACEPARENT, "tracestate: a=1", "x-request-id: my-request", stream=True) == 200
            (span,) = await roots(collector)
            (logged,) = gateway.exchanges()
        assert (span.name, span.kind, span.status, span.state) == (f"chat {MODEL}", SERVER, 0, "a=1")
        assert (span.trace_id, span.parent_id) == (TRACE_ID, SPAN_ID)
        assert (logged["trace_id"], logged["span_id"]) == (TRACE_ID, span.span_id)
        assert header_of(backend.requests[0], "traceparent") == f"00-{TRACE_ID}-{span.span_id}-01"
        assert header_of(backend.requests[0], "tracestate") == "a=1"
        usage = logged["usage"]
        assert span.attributes == {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": kind,
            "gen_ai.request.model": MODEL,
            "gen_ai.request.stream": True,
            "gen_ai.response.time_to_first_chunk": logged["time_to_first_token"],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "http.response.status_code": 200,
            "gateway.tier": "standard",
            "gateway.backend": kind,
            "gateway.lane": "text",
            "gateway.attempts": 1,
            "gateway.endpoint": "chat",
            "gateway.outcome": "ok",
            "gateway.request_id": "my-request",
        }
        steps = collector.children(span)
        assert [step.name for step in steps] == ["queue", "connect", "first token", "stream"]
        assert {step.trace_id for step in steps} == {TRACE_ID}
        assert {step.kind for step in steps} == {INTERNAL}
        assert span.seconds == pytest.approx(logged["duration"], abs=1e-6)
        assert steps[0].begin == span.begin
        for one, other in pairwise(steps):
            assert one.begin <= one.end <= other.begin + 1000
        assert steps[-1].end <= span.end + 1000
        assert (steps[3].begin - span.begin) / 1e9 == pytest.approx(logged["time_to_first_token"], abs=1e-6)
        assert abs(span.end / 1e9 - time.time()) < 60


async def test_kept_connection_has_no_step_for_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            for _ in range(2):
                assert await ask(gateway, stream=True) == 200
            first, second = await roots(collector, 2)
        names = [[step.name for step in collector.children(span)] for span in (first, second)]
        assert names == [["queue", "connect", "first token", "stream"], ["queue", "first token", "stream"]]
        assert first.trace_id != second.trace_id
        assert (first.parent_id, second.parent_id) == ("", "")


async def test_plain_answer_has_one_step_at_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway, max_tokens=5) == 200
            (span,) = await roots(collector)
        assert [step.name for step in collector.children(span)] == ["queue", "connect", "answer"]
        assert span.attributes["gen_ai.request.stream"] is False
        assert "gen_ai.response.time_to_first_chunk" not in span.attributes


async def test_failures_have_their_error_and_status(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm", "runner_dies") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway) == 502
            assert await ask(gateway, model="unknown") == 404
            failed, refused = await roots(collector, 2)
        assert (failed.status, failed.attributes["error.type"], failed.attributes["http.response.status_code"]) == (
            ERROR,
            "status_5xx",
            502,
        )
        assert (refused.name, refused.status, refused.attributes["error.type"]) == ("chat", 0, "model_not_found")
        assert collector.children(refused) == []
        assert "gen_ai.request.model" not in refused.attributes


async def test_choices_of_a_request_are_spans_of_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway, TRACEPARENT, n=2) == 200
            (one,) = await roots(collector)
            await until(lambda: len(collector.named(one.name)) == 2)
            (other,) = [span for span in collector.children(one) if span.name == one.name]
        assert {one.trace_id, other.trace_id} == {TRACE_ID}
        assert one.parent_id == SPAN_ID
        assert other.kind != SERVER, "a backend for traces counts two requests"


@pytest.mark.parametrize(
    ("endpoint", "operation"),
    [
        ("chat", "chat"),
        ("messages", "chat"),
        ("responses", "chat"),
        ("ollama_chat", "chat"),
        ("completions", "text_completion"),
        ("ollama_generate", "text_completion"),
        ("embeddings", "embeddings"),
        ("ollama_embed", "embeddings"),
        ("rerank", "rerank"),
    ],
)
async def test_operation_follows_the_endpoint(endpoint: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = OtlpTracer()
        tracer.begin({}).recorder(lambda *_: None, "vllm")(exchange(endpoint=endpoint))
        await tracer.close()
        (span,) = collector.named(f"{operation} m")
        assert span.attributes["gen_ai.operation.name"] == operation


@pytest.mark.parametrize(
    ("variables", "header", "flag"),
    [
        ({"OTEL_TRACES_SAMPLER": "always_off"}, "", "00"),
        ({}, TRACEPARENT[:-1] + "0", "00"),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, TRACEPARENT, "01"),
    ],
    ids=["never", "the client did not sample", "the client has sampled"],
)
async def test_sampler_decides_for_the_engine_too(
    variables: dict[str, str], header: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch, **variables) as gateway:
            assert await ask(gateway, *filter(None, [header])) == 200
            (logged,) = gateway.exchanges()
        assert str(header_of(backend.requests[0], "traceparent")).endswith(f"-{flag}")
        assert len(collector.named(f"chat {MODEL}")) == int(flag)
        assert ("span_id" in logged) is bool(int(flag))
        assert len(logged["trace_id"]) == 32


async def test_standard_variables_name_the_service_and_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "OTEL_SERVICE_NAME": "our-gateway",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20collector-key",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch, **variables) as gateway:
            assert await ask(gateway) == 200
            (span,) = await roots(collector)
        assert span.resource["service.name"] == "our-gateway"
        assert span.resource["deployment.environment.name"] == "test"
        assert collector.heads[0].startswith(b"POST /v1/traces ")
        assert b"bearer collector-key" in collector.heads[0].lower()


async def test_service_has_a_name_without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway) == 200
            (span,) = await roots(collector)
        assert span.resource["service.name"] == "ollama-vllm-gateway"
        assert span.resource["service.version"]


async def test_no_span_contains_a_prompt_a_completion_or_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            messages = [{"role": "user", "content": CANARY}]
            for body in ({}, {"stream": True}, {"temperature": CANARY}, {"model": CANARY}):
                await ask(gateway, f"Authorization: Bearer {CANARY}", messages=messages, **body)
            await roots(collector, 4)
        received = b"".join(collector.bodies)
        assert received
        for secret in (CANARY.encode(), TEXT.encode(), TEXT[:5].encode()):
            assert secret not in received


async def test_traced_exchanges_are_exemplars_of_the_histograms_in_openmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Collector() as collector, FaultBackend("vllm") as backend:
        async with traced(collector, backend, monkeypatch) as gateway:
            assert await ask(gateway, TRACEPARENT, stream=True) == 200
            (span,) = await roots(collector)
            async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client:
                accept = {"accept": "application/openmetrics-text; version=1.0.0"}
                families = parse_openmetrics((await client.get("/metrics", headers=accept)).text)
                text = (await client.get("/metrics")).text
        exemplars = {
            family.name: sample.exemplar.labels
            for family in families
            for sample in family.samples
            if sample.exemplar is not None
        }
        ids = {"trace_id": TRACE_ID, "span_id": span.span_id}
        assert exemplars == {
            "gateway_request_duration_seconds": ids,
            "gateway_time_to_first_token_seconds": ids,
            "gateway_queue_wait_seconds": ids,
        }
        assert TRACE_ID not in text


# Without a collector


@pytest.mark.parametrize("mode", ["silent", "failing", "gone"])
async def test_collector_that_does_not_work_delays_nothing(
    mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "CLOSE_SECONDS", 0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")  # what goes on after that is found by the fixture
    caplog.set_level(logging.INFO)
    async with Collector("healthy" if mode == "gone" else mode) as collector, FaultBackend("vllm") as backend:  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        async with traced(collector, backend, monkeypatch, OTEL_BSP_MAX_QUEUE_SIZE="600") as gateway:
            if mode == "gone":
                collector._server.close()
            tracer = gateway.gateway._tracer
            assert isinstance(tracer, OtlpTracer)
            for _ in range(30):
                assert await ask(gateway) == 200
            await until(lambda: not tracer._ended)
            for _ in range(200):
                tracer.begin({}).recorder(lambda *_: None, "vllm")(exchange())
            await until(lambda: not tracer._ended)
            assert len(tracer._processor._batch_processor._queue) <= 600
            began = loop.time()
        assert loop.time() - began < 20
        assert len([message for message in caplog.messages if "traces cannot be sent" in message]) <= 1


async def test_exchanges_that_wait_for_their_spans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "MAX_ENDED", 5)
    monkeypatch.setattr(otlp, "EMIT_SECONDS", 60)
    async with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = OtlpTracer()
        for _ in range(20):
            tracer.begin({}).recorder(lambda *_: None, "vllm")(exchange())
        assert len(tracer._ended) == 5
        await tracer.close()
        assert len(collector.named("chat m")) == 5


async def test_log_says_once_that_traces_are_lost_and_that_they_are_sent_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    async with Collector("failing") as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracer = OtlpTracer()

        def finish() -> None:
            tracer.begin({}).recorder(lambda *_: None, "vllm")(exchange())

        for _ in range(3):
            finish()
            await until(lambda: any("cannot be sent" in message for message in caplog.messages))
        collector.mode = "healthy"
        finish()
        await until(lambda: any("can be sent again" in message for message in caplog.messages))
        await tracer.close()
        assert len([message for message in caplog.messages if "cannot be sent" in message]) == 1
