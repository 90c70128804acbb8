"""Spans of finished exchanges, made with OpenTelemetry's SDK and sent by OTLP over HTTP.

Attribute names follow the GenAI semantic conventions (open-telemetry/semantic-conventions-genai,
November 2026). No span contains a prompt, a completion or a key.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.telemetry.exchange import NONE, Exchange
from gateway.telemetry.trace_context import EndedExchange, RemoteSpan, Trace, header_lines, parse

SERVICE = "ollama-vllm-gateway"
"""Value of `service.name`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another."""

EMIT_SECONDS = 0.2
"""Longest time from the end of an exchange to its spans."""
MAX_ENDED = 10_000
"""Exchanges that may wait for their spans; spans of further ones are dropped."""
SLICE = 50
"""Exchanges whose spans are made without a break. Each takes some 0.2 ms."""
CLOSE_SECONDS = 1.5
"""Longest time to send the last spans when the gateway stops."""
MAX_REASON = 200
"""Characters of the exporter's own message in the log."""

OPERATIONS = {
    "embeddings": "embeddings",
    "ollama_embed": "embeddings",
    "ollama_embeddings": "embeddings",
    "completions": "text_completion",
    "ollama_generate": "text_completion",
    "rerank": "rerank",
}
"""`gen_ai.operation.name` of each endpoint that is not `chat`. `rerank` is a custom value."""

_log = logging.getLogger(__name__)


class OtlpTracer:
    """Begins the traces of requests, and makes and sends their spans.

    An exporter that does not answer delays nothing: the SDK's queue is bounded and drops spans
    (OTEL_BSP_MAX_QUEUE_SIZE), and a thread of its own sends them.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self._ids = _PresetIds()
        self._provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
        self._exporter = _ReportingExporter(exporter or OTLPSpanExporter())
        self._processor = BatchSpanProcessor(self._exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("gateway", __version__)
        self._loop = asyncio.get_running_loop()
        self._ended: list[EndedExchange] = []
        self._timer: asyncio.TimerHandle | None = None
        self.on_exchanges: Callable[[Sequence[Exchange]], None] = _ignore

    def __repr__(self) -> str:
        return f"<OtlpTracer {len(self._ended)} to emit>"

    def begin(self, fields: Mapping[bytes, bytes]) -> Trace:
        """Begin the trace of a request, as a child of the client's span if its headers name one."""
        parent = parse(fields)
        trace_id = _random_hex(128) if parent is None else parent.trace_id
        span_id = _random_hex(64)
        sampled = self._provider.sampler.should_sample(_context_of(parent), int(trace_id, 16), "chat")
        is_sampled = sampled.decision is Decision.RECORD_AND_SAMPLE
        lines = header_lines(trace_id, span_id, is_sampled, b"" if parent is None else parent.state)
        return Trace(trace_id, lines, parent, span_id if is_sampled else None, self._end)

    async def close(self) -> None:
        """Make the remaining spans and send them, for at most `CLOSE_SECONDS`."""
        if self._timer is not None:
            self._timer.cancel()
        while self._ended:
            self._emit_slice()
            await asyncio.sleep(0)
        done = asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with suppress(RuntimeError):  # nobody waits any more, and the loop is closed
                self._loop.call_soon_threadsafe(done.set)

        # A daemon: if the collector does not answer, the process does not wait for it.
        threading.Thread(target=shut_down, name="end of traces", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await done.wait()
        except TimeoutError:
            self._exporter.shutdown()  # or it would go on trying for up to 10 s (OTEL_EXPORTER_OTLP_TIMEOUT)
            _log.warning("the last traces could not be sent within %.1f s", CLOSE_SECONDS)

    def _end(self, ended: EndedExchange) -> None:
        if len(self._ended) < MAX_ENDED:
            self._ended.append(ended)
        if self._timer is None:
            self._timer = self._loop.call_later(EMIT_SECONDS, self._emit)

    def _emit(self) -> None:
        self._timer = None
        self._emit_slice()
        if self._ended:
            self._timer = self._loop.call_later(0, self._emit)

    def _emit_slice(self) -> None:
        some, self._ended = self._ended[:SLICE], self._ended[SLICE:]
        for ended in some:
            self._make_spans(ended)
        self.on_exchanges([ended.exchange for ended in some])

    def _make_spans(self, ended: EndedExchange) -> None:
        trace, exchange = ended.trace, ended.exchange
        begin_ns = ended.ended_ns - round(exchange.duration * 1e9)
        assert trace.span_id is not None
        if ended.is_further:
            self._ids.preset = (trace.trace_id, _random_hex(64))
            parent: RemoteSpan | None = RemoteSpan(trace.trace_id, trace.span_id, True, b"")
        else:
            self._ids.preset = (trace.trace_id, trace.span_id)
            parent = trace.parent
        span = self._tracer.start_span(
            _name(exchange),
            _context_of(parent) or Context(),
            SpanKind.INTERNAL if ended.is_further else SpanKind.SERVER,  # one request is one span of a server
            dict(_attributes(exchange, ended.engine)),
            start_time=begin_ns,
        )
        self._ids.preset = None
        if exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR, exchange.code or exchange.outcome))
        self._make_children(span, ended, begin_ns)
        span.end(ended.ended_ns)

    def _make_children(self, span: Span, ended: EndedExchange, begin_ns: int) -> None:
        context = set_span_in_context(span, Context())
        for name, begin, end in _steps(ended):
            child = self._tracer.start_span(name, context, start_time=begin_ns + round(begin * 1e9))
            child.end(begin_ns + round(end * 1e9))


class _PresetIds(IdGenerator):
    """Source of ids: those that were decided when the request arrived, or random ones."""

    def __init__(self) -> None:
        self.preset: tuple[str, str] | None = None
        """Trace id and span id of the next span."""

    def generate_trace_id(self) -> int:
        return int(_random_hex(128) if self.preset is None else self.preset[0], 16)

    def generate_span_id(self) -> int:
        return int(_random_hex(64) if self.preset is None else self.preset[1], 16)


class _ReportingExporter(SpanExporter):
    """Exporter that logs when spans cannot be sent any more, and when they can again.

    The SDK itself would log every failed attempt.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._is_failing = False
        self._is_shut_down = False
        self._messages = _LastMessage()
        library = logging.getLogger("opentelemetry")
        library.propagate = False
        library.addHandler(self._messages)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed and not self._is_failing:
            _log.warning("traces cannot be sent, and are lost: %s", self._messages.last[:MAX_REASON])
        elif self._is_failing and not has_failed:
            _log.info("traces can be sent again")
        self._is_failing = has_failed
        return result

    def shutdown(self) -> None:
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._exporter.shutdown()
        logging.getLogger("opentelemetry").removeHandler(self._messages)

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastMessage(logging.Handler):
    """Handler that keeps the last message of the SDK, as the reason of a failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = "no reason is known"

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _steps(ended: EndedExchange) -> Iterator[tuple[str, float, float]]:
    """Yield the steps of an exchange: name, begin and end, in seconds from its arrival.

    `connect` is there only if a connection had to be opened. An answer that is not seen as it
    comes has the step `answer` in place of `first token` and `stream`.
    """
    exchange = ended.exchange
    queued = exchange.duration if exchange.queue_wait is None else exchange.queue_wait
    if exchange.backend == NONE:
        return
    yield "queue", 0.0, queued
    if exchange.queue_wait is None or not exchange.attempts:
        return
    sent, upstream_ended = queued, min(queued + exchange.upstream, exchange.duration)
    connects = [(began - ended.arrived, done - ended.arrived) for began, done in ended.trace.connects]
    for began, done in connects:
        if queued <= began + 1e-6 and done <= upstream_ended + 1e-6:  # the record's times are rounded
            yield "connect", began, done
            sent = done
    first = exchange.time_to_first_token
    if first is None:
        yield "answer", sent, max(sent, upstream_ended)
    else:
        yield "first token", min(sent, first), first
        yield "stream", first, max(first, upstream_ended)


def _name(exchange: Exchange) -> str:
    operation = OPERATIONS.get(exchange.endpoint, "chat")
    return operation if exchange.model == NONE else f"{operation} {exchange.model}"


def _attributes(exchange: Exchange, engine: str | None) -> Iterator[tuple[str, AttributeValue]]:
    """Yield the attributes of an exchange's span, with names of the GenAI conventions where they have one."""
    yield "gen_ai.operation.name", OPERATIONS.get(exchange.endpoint, "chat")
    if engine is not None:
        yield "gen_ai.provider.name", engine
        yield "gen_ai.request.model", exchange.model
        yield "gateway.tier", exchange.tier
        yield "gateway.backend", exchange.backend
        yield "gateway.lane", exchange.lane
        yield "gateway.attempts", exchange.attempts
    yield "gen_ai.request.stream", exchange.stream
    if exchange.usage is not None:
        yield "gen_ai.usage.input_tokens", exchange.usage.prompt_tokens
        yield "gen_ai.usage.output_tokens", exchange.usage.completion_tokens
    if exchange.stream and exchange.time_to_first_token is not None:
        yield "gen_ai.response.time_to_first_chunk", exchange.time_to_first_token
    if exchange.outcome != "ok":
        yield "error.type", exchange.reason or exchange.code or exchange.outcome
    yield "http.response.status_code", exchange.status
    yield "gateway.endpoint", exchange.endpoint
    yield "gateway.outcome", exchange.outcome
    yield "gateway.request_id", exchange.request_id


def _context_of(parent: RemoteSpan | None) -> Context | None:
    if parent is None:
        return None
    state = TraceState.from_header([parent.state.decode("ascii")]) if parent.state else None
    flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
    span = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags, state)
    return set_span_in_context(NonRecordingSpan(span), Context())


def _resource() -> Resource:
    """Return what sends the spans: this program, and what OTEL_RESOURCE_ATTRIBUTES says about it."""
    found = Resource.create()
    own = {SERVICE_VERSION: found.attributes.get(SERVICE_VERSION, __version__)}
    if str(found.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        own[SERVICE_NAME] = SERVICE
    return found.merge(Resource(own))


def _random_hex(bits: int) -> str:
    """Return a random number other than 0 in hexadecimal, with all its digits."""
    return (random.getrandbits(bits) or 1).to_bytes(bits // 8).hex()


def _ignore(exchanges: Sequence[Exchange]) -> None:
    """Do nothing with exchanges whose spans were made."""
