"""State of one exchange, its answer and its record.

Nothing here decides: `base.py` carries out the exchange, `supervised.py` is what others see of it
and `deadlines.py` ends it in time.
"""

from typing import ClassVar

from msgspec import structs

from gateway.admission.fair_queue import Claim
from gateway.admission.limits import LaneName
from gateway.admission.ticket import Ticket
from gateway.chat.answer import Timings
from gateway.dialects.dialect import Form
from gateway.errors import ClientLeft, GatewayError, UpstreamError
from gateway.relay.cancel_scope import CancelScope
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.relay.failover import Failover
from gateway.relay.request_shape import shape_of
from gateway.relay.requests import ClientConnection, RelayRequest
from gateway.telemetry.exchange import Attribution, Exchange, Meter, Workload
from gateway.telemetry.trace_context import current_trace
from gateway.upstream.server import Server


class RelayState:
    """The parts of one exchange. Answers are plain JSON unless a subclass overrides that."""

    workload: ClassVar[Workload]
    text_field: ClassVar[str]
    """Request field with the text that has to fit the model's context."""
    can_be_empty: ClassVar[bool] = False
    """True if an answer in which the model says nothing is recorded as empty."""

    __slots__ = (
        "_backend",
        "_cancel_scope",
        "_client",
        "_context",
        "_destination",
        "_failover",
        "_form",
        "_goes_first",
        "_is_late",
        "_is_stream",
        "_is_streamed_upstream",
        "_lane",
        "_limits",
        "_meter",
        "_moved",
        "_next_keepalive",
        "_request",
        "_server",
        "_started",
        "_ticket",
        "awaits_first_token",
        "check_at",
        "on_exchange",
    )  # fmt: skip

    def __init__(
        self, context: RelayContext, client: ClientConnection, request: RelayRequest, form: Form, lane: LaneName
    ) -> None:
        self._context = context
        self.on_exchange = context.on_exchange
        """Receives the record of the exchange when it ends."""
        self._client = client
        self._request = request
        self._form = form
        self._destination = destination = context.destination(request.route, self.workload)
        self._backend = destination.backend
        self._limits = destination.limits
        self._failover: Failover | None = None
        self._is_stream = False
        self._is_streamed_upstream = False
        self._server: Server | None = None
        self._lane = lane
        self._moved = False
        """True if the roll-out moved the request to another backend's queue."""
        self._ticket = Ticket(self._backend.admission, destination.queues[lane], request.claim)
        self._meter = Meter(context.clock, destination.metrics.gaps.observe_gap)
        self._cancel_scope = CancelScope(client, context.loop)
        self.awaits_first_token = False
        """True while the request is at a server that loads models, until its answer begins."""
        self._goes_first = True
        self._is_late = False
        """True once the attempt's `first_token_timeout` has passed."""
        self.check_at = 0.0
        self._started = False
        self._next_keepalive: float | None = None
        """None until the first check: most exchanges end before it."""

    def __repr__(self) -> str:
        return f"<Relay {self._destination.route} {self._meter.phase}>"

    def _claim(self) -> Claim:
        """Return the request's claim, with the time that the client's deadline still leaves."""
        claim = self._request.claim
        if claim.timeout is not None:
            claim = structs.replace(
                claim, timeout=max(0.0, self._meter.arrived + claim.timeout - self._context.clock())
            )
        return claim

    def _retarget(self, destination: Destination) -> None:
        self._destination = destination
        self._backend, self._limits = destination.backend, destination.limits
        self._meter.observe_gap = destination.metrics.gaps.observe_gap

    # Answer

    def _answer_json(self, body: bytes | list[bytes]) -> None:
        if self._started:
            for part in body if isinstance(body, list) else (body,):
                self._client.write(part)
            self._client.end()
        else:
            self._started = True
            self._client.answer(200, self._header_lines(self._form.json_lines), body)

    def _answer_error(self, error: GatewayError) -> None:
        """Send a status before the first byte, and one last event or the JSON after it.

        A client that left gets nothing.
        """
        if isinstance(error, ClientLeft):
            return
        if not self._started:
            form = self._form
            lines = self._header_lines(form.json_lines) + form.error_lines(error)
            self._client.answer(form.error_status(error), lines, form.error_body(error))
            return
        self._client.write(self._trailing_error(error))
        self._client.end()

    def _trailing_error(self, error: GatewayError) -> bytes:
        """Render `error` to follow what was already sent."""
        return self._form.error_body(error)

    def _start(self, content_lines: bytes) -> None:
        self._started = True
        self._client.open(200, self._header_lines(content_lines))

    def _header_lines(self, content_lines: bytes) -> bytes:
        request, meter = self._request, self._meter
        queue_ms = ((self._context.clock() if meter.admitted is None else meter.admitted) - meter.arrived) * 1000
        return b"%b%bx-request-id: %b\r\n%bx-gateway-queue-ms: %d\r\nx-gateway-attempts: %d\r\n" % (
            content_lines,
            request.extra_lines,
            request.id.encode(),
            self._destination.header_lines,
            queue_ms,
            meter.attempts,
        )

    # Meter

    def _timings(self) -> Timings:
        """Return the times so far, for the forms that show them."""
        meter = self._meter
        now = self._context.clock()
        sent = now if meter.sent is None else meter.sent
        first = now if meter.first_piece is None else meter.first_piece
        last = max(first, meter.last_piece)
        return Timings(now - meter.arrived, sent - meter.arrived, first - sent, last - first)

    def _record(self, error: GatewayError | None) -> None:
        meter, request, route = self._meter, self._request, self._destination.route
        duration, queue_wait, upstream, time_to_first_token = meter.times()
        hold = request.hold
        if hold is not None:
            was_left = error is not None and self._was_left(error)
            prompt, completion = meter.counted(was_left=was_left)
            hold.count(prompt, completion + self._unseen_tokens() if was_left else completion)
        exchange = Exchange(
            request_id=request.id,
            key_id=request.key_id,
            key="" if hold is None else hold.account.name,
            endpoint=self._form.endpoint,
            tier=route.tier,
            backend=route.backend,
            chosen=request.route.backend,
            moved=self._moved,
            model=route.model,
            lane=self._lane,
            stream=self._is_stream,
            status=200 if error is None else self._form.error_status(error),
            code=None if error is None else error.code,
            reason=error.reason if isinstance(error, UpstreamError) else None,
            outcome="ok" if error is None else error.outcome,
            empty=error is None and self.can_be_empty and not meter.has_said,
            phase=meter.phase,
            duration=duration,
            queue_wait=queue_wait,
            upstream=upstream,
            time_to_first_token=time_to_first_token,
            usage=meter.usage,
            sent_tokens=0 if meter.usage is not None else meter.pieces,
            attempts=meter.attempts,
        )
        record = self.on_exchange
        if request.came_through and (trace := current_trace.get()) is not None:
            record = trace.recorder(record, self._backend.kind, meter.arrived)
        record(exchange, self._attribution())
        if (recording := self._context.recording) is not None:
            recording.add(exchange, shape_of(request, recording))

    def _was_left(self, error: GatewayError) -> bool:
        """Return whether the client ended the exchange: it has left, or the deadline that it set has passed."""
        timeout = self._request.claim.timeout
        return error.outcome == "cancelled" or (
            timeout is not None and self._context.clock() >= self._meter.arrived + timeout
        )

    def _unseen_tokens(self) -> int:
        """Return about how many tokens a backend has generated of which nothing has arrived."""
        return 0

    def _attribution(self) -> Attribution | None:
        """Return what usage needs to know beside the record; None if there is nothing."""
        person = self._person()
        return Attribution(person) if person else None

    def _person(self) -> str:
        """Return the person who asked, if the key may name persons."""
        hold = self._request.hold
        return self._request.claim.person if hold is None or hold.account.policy.is_trusted else ""
