"""The trace that a request belongs to: W3C Trace Context from the client and to the engine.

No I/O, and nothing of OpenTelemetry: `otlp.py` makes and sends the spans, if tracing is on.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from msgspec import UNSET
from msgspec.structs import replace

from gateway.telemetry.exchange import Attribution, Exchange

TRACEPARENT = b"traceparent"
TRACESTATE = b"tracestate"

_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""https://www.w3.org/TR/trace-context/ section 3.2.2. Later versions may have more fields."""
_TRACESTATE = re.compile(rb"[\x20-\x7e]{1,512}")
_SAMPLED = 1


class RemoteSpan(NamedTuple):
    """The client's span, as its `traceparent` and `tracestate` name it. The ids are in hexadecimal."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: bytes


class Trace:
    """The trace of one request.

    `trace_id` and `span_id` are in hexadecimal. `span_id` is that of the gateway's own span, None
    if it makes none. `header_lines` go to the engine.
    """

    __slots__ = ("_on_end", "connects", "has_ended", "header_lines", "parent", "span_id", "trace_id")

    def __init__(
        self,
        trace_id: str,
        header_lines: bytes,
        parent: RemoteSpan | None = None,
        span_id: str | None = None,
        on_end: Callable[["EndedExchange"], None] | None = None,
    ) -> None:
        self.trace_id = trace_id
        self.header_lines = header_lines
        self.parent = parent
        self.span_id = span_id
        self._on_end = on_end
        self.connects: list[tuple[float, float]] = []
        """Begin and end of each new connection to a server, in seconds on the monotonic clock."""
        self.has_ended = False

    def connected(self, began: float, ended: float) -> None:
        if not self.has_ended:
            self.connects.append((began, ended))

    def recorder(self, record: Callable[..., None], engine: str | None, arrived: float = 0.0) -> Callable[..., None]:
        """Return a function that records an exchange that has just ended, with the ids of the trace.

        `engine` is the kind of its backend, None if the request was refused before. `arrived` is
        the time of its arrival on the monotonic clock. A request has one exchange, or one for each
        of its choices.
        """

        def record_traced(exchange: Exchange, attribution: Attribution | None = None) -> None:
            exchange = replace(
                exchange, trace_id=self.trace_id, span_id=UNSET if self.span_id is None else self.span_id
            )
            record(exchange) if attribution is None else record(exchange, attribution)
            if self._on_end is not None and self.span_id is not None:
                self._on_end(EndedExchange(self, exchange, engine, self.has_ended, time.time_ns(), arrived))
            self.has_ended = True

        return record_traced


class EndedExchange(NamedTuple):
    """An exchange of a sampled trace, and when it ended."""

    trace: Trace
    exchange: Exchange
    engine: str | None
    is_further: bool
    """True for the second choice of a request and those after it."""
    ended_ns: int
    """Time of the end in Unix time, in nanoseconds."""
    arrived: float
    """Time of the arrival on the monotonic clock, in seconds."""


class Tracer(Protocol):
    """Maker of spans."""

    on_exchanges: Callable[[Sequence[Exchange]], None]
    """Called with exchanges whose spans were made."""

    def begin(self, fields: Mapping[bytes, bytes]) -> Trace: ...
    async def close(self) -> None: ...


current_trace: ContextVar[Trace | None] = ContextVar("current_trace", default=None)
"""The trace of the request that the present task serves.

It is looked up only for requests with a trace, and when a connection is opened, so that others do
not pay for it.
"""


def parse(fields: Mapping[bytes, bytes]) -> RemoteSpan | None:
    """Return the client's span from its request headers, None if there is none or it is malformed."""
    given = fields.get(TRACEPARENT)
    match = None if given is None else _TRACEPARENT.fullmatch(given.strip())
    if match is None or (match[1] == b"00" and match[5]):
        return None
    state = fields.get(TRACESTATE, b"")
    if not _TRACESTATE.fullmatch(state):
        state = b""
    return RemoteSpan(match[2].decode(), match[3].decode(), bool(int(match[4], 16) & _SAMPLED), state)


def header_lines(trace_id: str, span_id: str, is_sampled: bool, state: bytes) -> bytes:
    """Return the header lines that name a span to the engine."""
    lines = b"traceparent: 00-%b-%b-%02x\r\n" % (trace_id.encode(), span_id.encode(), is_sampled)
    return b"%btracestate: %b\r\n" % (lines, state) if state else lines


def pass_on(fields: Mapping[bytes, bytes]) -> Trace | None:
    """Return the client's own trace, without a span of the gateway; None if the client sent none."""
    if TRACEPARENT not in fields:
        return None
    parent = parse(fields)
    return None if parent is None else Trace(parent.trace_id, header_lines(*parent))
