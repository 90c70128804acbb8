"""Carries out one request: admit, forward, answer, meter. Owns all that the request holds; `api.py` has decided where it goes.

What differs between the endpoints, asking a server and reading what it says, is in `chat_relay.py` and `embedding_relay.py`.
"""

import logging
import math
import traceback
from abc import ABC, abstractmethod
from typing import ClassVar

from msgspec import structs

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import LaneName
from gateway.admission.ticket import Ticket
from gateway.errors import (
    ClientLeft,
    ContextLengthExceeded,
    Crash,
    GatewayError,
    InvalidRequest,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.relay.cancel_scope import CancelScope
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.relay.failover import Failover
from gateway.relay.in_flight import Requeueable
from gateway.relay.requests import ClientConnection, RelayRequest
from gateway.relay.route import Route
from gateway.telemetry.exchange import Exchange, Meter
from gateway.upstream.backend import Backend
from gateway.upstream.connection import WireError
from gateway.upstream.failures import upstream_error
from gateway.upstream.server import Server

_log = logging.getLogger("gateway.relay")

NO_FIRST_PIECE = "no first piece"


YIELD_BYTES = 256 * 1024
"""Bytes of a body from which on the steps of its treatment let others run in between."""

SMALLEST_CONTEXT = 256
"""Tokens. No model worth serving has less; a request that fits any is not looked at further."""

MOST_BYTES_PER_TOKEN = 16
"""Of text, on the safe side: no text but runs of blanks has so many. What has more for each token of the context is refused at once: Ollama
0.24 takes 17 s to find out."""

KEEPALIVE_SHARE = 0.8
"""A plain answer is kept alive from this share of its client's read timeout on."""

JSON_LINES = b"content-type: application/json\r\n"


class Relay(ABC):
    """One exchange. `await relay()` answers the client, whatever happens; it raises only when it is cancelled from outside.

    A subclass says what is asked of a server and how its answer is read: `_exchange`. It answers plainly, with JSON, if not told otherwise.
    """

    endpoint: ClassVar[str]
    """Its label in the metrics."""
    text_field: ClassVar[str]
    """The request's field with the text that has to fit the model's context."""

    __slots__ = (
        "_backend",
        "_cancel_scope",
        "_client",
        "_context",
        "_destination",
        "_failover",
        "_lane",
        "_limits",
        "_meter",
        "_next_keepalive",
        "_request",
        "_server",
        "_started",
        "_ticket",
        "check_at",
    )  # fmt: skip

    def __init__(self, context: RelayContext, client: ClientConnection, request: RelayRequest, lane: LaneName) -> None:
        self._context = context
        self._client = client
        self._request = request
        self._destination = destination = context.destination(request.route, self.endpoint)
        self._backend = destination.backend
        self._limits = destination.limits
        self._failover: Failover | None = None
        self._server: Server | None = None
        self._lane = lane
        self._ticket = self._new_ticket(request.claim)
        self._meter = Meter(context.clock, destination.metrics.gaps.observe_gap)
        self._cancel_scope = CancelScope(client, context.loop)
        self.check_at = 0.0
        self._started = False
        self._next_keepalive = self._meter.arrived + self._keepalive_after()

    def __repr__(self) -> str:
        return f"<Relay {self._destination.route} {self._meter.phase}>"

    async def __call__(self) -> None:
        error: GatewayError | None = None
        self._context.in_flight.add(self)
        try:
            with self._cancel_scope:
                self._backend.budget.count(self._meter.arrived)
                while True:
                    try:
                        self._refuse_hopeless()
                        with self._ticket as ticket:
                            if ticket.placement is None:
                                await ticket.wait()
                                self.check_at = 0.0
                            self._meter.admit()
                            await self._forward(ticket)
                        break
                    except GatewayError as failure:
                        self._reroute(failure)
        except GatewayError as raised:
            error = raised
            self._answer_error(error)
        except Exception as crash:
            error = Crash()
            self._answer_error(error)
            places = "".join(traceback.format_tb(crash.__traceback__))  # never its words: they may be the client's
            _log.error("a relay failed by %s:\n%s", type(crash).__name__, places)
        finally:
            self._context.in_flight.discard(self)
            self._client.on_pause = self._client.on_resume = None
            self._record(error)

    @property
    def route(self) -> Route:
        """What the roll-out chose."""
        return self._request.route

    @property
    def arrived(self) -> float:
        """By the clock of all."""
        return self._meter.arrived

    @property
    def is_stranded(self) -> bool:
        """It waits for servers that are all dead."""
        return (
            self._ticket.is_queued
            and self._backend.is_restrained
            and self._backend.is_down(self._destination.route.model)
        )

    def as_requeueable(self) -> Requeueable | None:
        return None

    def cut_off(self, error: GatewayError) -> None:
        """End with `error`: the gateway is stopping."""
        self._cancel_scope.end(error)

    @property
    def generation(self) -> int:
        """Of the settings under which it is where it is."""
        return self._destination.generation

    def leave_queue(self, backend: Backend) -> None:
        """`backend` takes nothing: who waits for it and may go elsewhere does so."""
        way, model = self._destination.fallback, self._destination.route.model
        if way is None or backend is not self._backend or not backend.accepts_none(model):
            return
        if not self._context.destination(way, self.endpoint).backend.is_down(way.model):
            self._ticket.refuse(backend.unavailable())

    def _reroute(self, failure: GatewayError) -> None:
        """Aim where the request goes after `failure`; raises where it goes nowhere."""
        if self._failover is None:
            if self._destination.fallback is None:
                raise failure
            self._failover = Failover(self._context, self._destination)
        self._retarget(self._follow_rollout(self._failover.destination_after(failure, self._meter)))
        self._meter.requeue()
        self._ticket = self._new_ticket(self._claim())

    def _follow_rollout(self, destination: Destination) -> Destination:
        """Where a request gets in line that was to do so at `destination`."""
        return destination

    def _retarget(self, destination: Destination) -> None:
        self._destination = destination
        self._backend, self._limits = destination.backend, destination.limits
        self._meter.observe_gap = destination.metrics.gaps.observe_gap

    def _claim(self) -> Claim:
        """With what is left of the client's time."""
        claim = self._request.claim
        if claim.timeout is not None:
            claim = structs.replace(
                claim, timeout=max(0.0, self._meter.arrived + claim.timeout - self._context.clock())
            )
        return claim

    def _new_ticket(self, claim: Claim) -> Ticket:
        return Ticket(self._backend.admission, self._destination.queues[self._lane], claim)

    def _refuse_hopeless(self) -> None:
        """What the backend would refuse for certain does not wait in its line."""
        model, backend = self._destination.route.model, self._backend
        if backend.is_restrained and self._failover is None:
            may_go = self._destination.fallback is not None
            if backend.accepts_none(model) if may_go else backend.is_down(model):
                raise backend.unavailable()
        if self._request.size > MOST_BYTES_PER_TOKEN * SMALLEST_CONTEXT:
            limit = backend.context_length(model)
            if self._is_longer_than(limit):
                raise ContextLengthExceeded(limit, self.text_field)

    def _is_longer_than(self, limit: int | None) -> bool:
        """For certain."""
        return limit is not None and self._text_length() > MOST_BYTES_PER_TOKEN * limit

    @abstractmethod
    def _text_length(self) -> int:
        """Of the longest text that has to fit the model's context."""

    @abstractmethod
    async def _exchange(self, server: Server) -> None:
        """Ask `server` and answer the client.

        Raises:
            WireError, GatewayError: it could not; whatever was sent to the client was sent by this relay's own methods.
        """

    def _relax_request(self, refusal: InvalidRequest) -> bool:
        """Change what will be asked so that the server need not refuse it again; False: there is no other way to ask."""
        return False

    # Forward

    async def _forward(self, ticket: Ticket) -> None:
        while True:
            server = ticket.server
            assert isinstance(server, Server)
            self._server = server
            self._meter.start_attempt()
            sent = self._meter.last_piece
            self.check_at = 0.0
            try:
                await self._exchange(server)
                ticket.is_served = True
                if server.circuit.is_troubled:
                    server.circuit.succeed()
                return
            except WireError as fault:
                error = upstream_error(fault)
                if not self._retry_elsewhere(ticket, server, error, sent, fault.answered):
                    raise error from fault
            except InvalidRequest as refusal:
                if self._meter.first_piece is not None or not self._relax_request(refusal):
                    self._retry_elsewhere(ticket, server, refusal, sent, True)
                    raise self._with_context_limit(refusal, server) from None
            except GatewayError as error:
                if not self._retry_elsewhere(ticket, server, error, sent, isinstance(error, UpstreamError)):
                    raise
            finally:
                self._meter.end_upstream()

    def _retry_elsewhere(
        self, ticket: Ticket, server: Server, error: GatewayError, sent: float, answered: bool
    ) -> bool:
        if self._failover is None:
            self._failover = Failover(self._context, self._destination)
        return self._failover.retry_elsewhere(ticket, server, error, self._meter, sent=sent, answered=answered)

    def _with_context_limit(self, refusal: InvalidRequest, server: Server) -> InvalidRequest:
        """Ollama 0.24 does not say how long a prompt may be."""
        if isinstance(refusal, ContextLengthExceeded) and refusal.limit is None:
            return ContextLengthExceeded(server.facts(self._destination.route.model).context_length, self.text_field)
        return refusal

    def _count_stale(self) -> None:
        self._meter.attempts += 1
        self._meter.met_stale = True
        self._context.metrics.retries.labels(self._backend.name, "stale").inc()

    # Answer

    def _answer_json(self, body: bytes) -> None:
        if self._started:
            self._client.write(body)
            self._client.end()
        else:
            self._started = True
            self._client.answer(200, self._header_lines(JSON_LINES), body)

    def _answer_error(self, error: GatewayError) -> None:
        """A status before the first byte, one last event or the JSON after it; nothing to a client that left."""
        if isinstance(error, ClientLeft):
            return
        if not self._started:
            self._client.answer(error.status, self._header_lines(JSON_LINES) + error.header_lines(), error.envelope())
            return
        self._client.write(self._trailing_error(error))
        self._client.end()

    def _trailing_error(self, error: GatewayError) -> bytes:
        """`error` behind what was sent already."""
        return error.envelope()

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

    # Time

    def check_deadlines(self, now: float) -> None:
        """End the exchange when a deadline has passed, keep a silent one alive. A new phase sets `check_at` to zero: its deadline may be nearer."""
        deadline, phase = self._deadline()
        if now >= deadline:
            if phase == NO_FIRST_PIECE and self._server is not None:
                self._server.circuit.fail("no_first_piece", self._meter.last_piece)
            self._cancel_scope.end(UpstreamTimeout(phase))
            self.check_at = math.inf
            return
        self._next_keepalive = max(self._next_keepalive, self._active_until())
        if now >= self._next_keepalive:
            self._send_keepalive()
            self._next_keepalive = now + self._context.heartbeat
        self.check_at = min(deadline, self._next_keepalive)

    def _deadline(self) -> tuple[float, str]:
        """When the present phase has lasted too long, and its name. A client that does not read stops the backend's clock."""
        meter, limits = self._meter, self._limits
        if meter.sent is None:
            return math.inf, ""
        ends = meter.sent + limits.total_timeout, "no end"
        timeout = self._request.claim.timeout
        if timeout is not None:
            ends = min(ends, (meter.arrived + timeout, "no end in the time that the client gave"))
        if self._client.paused:
            return ends
        if meter.first_piece is None:
            return min(ends, (meter.last_piece + limits.first_token_timeout, NO_FIRST_PIECE))
        return min(ends, (meter.last_piece + limits.idle_timeout, "no next piece"))

    def _keepalive_after(self) -> float:
        """Seconds after which a silent answer is kept alive."""
        return math.inf if self._request.read_timeout is None else KEEPALIVE_SHARE * self._request.read_timeout

    def _active_until(self) -> float:
        """Before then it need not be: the client has seen something of late."""
        return -math.inf

    def _send_keepalive(self) -> None:
        if self._client.paused:
            return
        if not self._started:
            self._start(JSON_LINES)
        self._client.write(b" ")

    @property
    def _is_stream(self) -> bool:
        return False

    @property
    def _has_moved(self) -> bool:
        """The roll-out has led it elsewhere while it waited."""
        return False

    @property
    def _is_empty(self) -> bool:
        """The model has said nothing."""
        return False

    # Meter

    def _record(self, error: GatewayError | None) -> None:
        meter, request, route = self._meter, self._request, self._destination.route
        duration, queue_wait, upstream, time_to_first_token = meter.times()
        self._context.on_exchange(
            Exchange(
                request_id=request.id,
                key_id=request.key_id,
                endpoint=self.endpoint,
                tier=route.tier,
                backend=route.backend,
                chosen=request.route.backend,
                moved=self._has_moved,
                model=route.model,
                lane=self._lane,
                stream=self._is_stream,
                status=200 if error is None else error.status,
                code=None if error is None else error.code,
                reason=error.reason if isinstance(error, UpstreamError) else None,
                outcome="ok" if error is None else error.outcome,
                empty=error is None and self._is_empty,
                phase=meter.phase,
                duration=duration,
                queue_wait=queue_wait,
                upstream=upstream,
                time_to_first_token=time_to_first_token,
                usage=meter.usage,
                attempts=meter.attempts,
            )
        )
