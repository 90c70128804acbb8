"""The relay of one request, whose route is decided: admits, forwards, answers and meters it.

The base class owns everything that a request holds. What differs between the endpoints, sending the
request to a server and reading the answer, is in `chat.py` and `embeddings.py`.
"""

import asyncio
import logging
import math
import traceback
from abc import ABC, abstractmethod
from typing import ClassVar

from msgspec import structs

from gateway.admission.fair_queue import Claim
from gateway.admission.model_residency import ModelState
from gateway.admission.queues import LaneName
from gateway.admission.ticket import Ticket
from gateway.body_memory import HeldBody, weight
from gateway.chat.answer import Timings
from gateway.dialects.dialect import Form
from gateway.errors import (
    ClientLeft,
    ContextLengthExceeded,
    Crash,
    GatewayError,
    InvalidRequest,
    ModelUnloaded,
    ServerHangs,
    UpstreamError,
    UpstreamTimeout,
    without_frames,
)
from gateway.relay.cancel_scope import CancelScope
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.relay.failover import Failover
from gateway.relay.in_flight import Requeueable
from gateway.relay.requests import ClientConnection, RelayRequest
from gateway.relay.route import Route
from gateway.relay.stalls import Attempt
from gateway.telemetry.exchange import Attribution, Exchange, Meter, Workload
from gateway.upstream.backend import Backend
from gateway.upstream.connection import TransportError
from gateway.upstream.failures import NO_FIRST_PIECE, NO_NEXT_PIECE, upstream_error
from gateway.upstream.outlier_detection import HANG, OutlierDetector
from gateway.upstream.server import Server

_log = logging.getLogger(__name__)

YIELD_BYTES = 256 * 1024
"""Bodies larger than this (bytes) yield to the event loop between steps."""

SMALLEST_CONTEXT = 256
"""Tokens. No model worth serving has a smaller context: the length of a request that fits into it
is not checked."""

MOST_BYTES_PER_TOKEN = 16
"""Upper bound for text: only runs of blanks have as many bytes in a token. A text with more bytes
than this for each token of the context is refused at once; Ollama 0.24 takes 17 s to find out."""

KEEPALIVE_SHARE = 0.8
"""Share of the client's read timeout after which a plain answer is kept alive."""


class Relay(ABC):
    """One exchange. `await relay(held)` answers the client; it raises only if cancelled from outside.

    `held` counts the memory of the request while it waits; it is released when the request gets a
    slot, and its owner releases it at the end.

    A subclass implements `_exchange`: it sends the request to a server and reads the answer.
    Answers are plain JSON unless the subclass overrides that.
    """

    workload: ClassVar[Workload]
    text_field: ClassVar[str]
    """Request field with the text that has to fit the model's context."""

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
        "_is_streamed_upstream",
        "_lane",
        "_limits",
        "_meter",
        "_next_keepalive",
        "_request",
        "_server",
        "_started",
        "_ticket",
        "awaits_first_token",
        "check_at",
    )  # fmt: skip

    def __init__(
        self, context: RelayContext, client: ClientConnection, request: RelayRequest, form: Form, lane: LaneName
    ) -> None:
        self._context = context
        self._client = client
        self._request = request
        self._form = form
        self._destination = destination = context.destination(request.route, self.workload)
        self._backend = destination.backend
        self._limits = destination.limits
        self._failover: Failover | None = None
        self._is_streamed_upstream = False
        self._server: Server | None = None
        self._lane = lane
        self._ticket = self._new_ticket(request.claim)
        self._meter = Meter(context.clock, destination.metrics.gaps.observe_gap)
        self._cancel_scope = CancelScope(client, context.loop)
        self.awaits_first_token = False
        """True while the request is at a server that loads models, until its answer begins."""
        self._goes_first = True
        self._is_late = False
        """True once the attempt's `first_token_timeout` has passed."""
        self.check_at = 0.0
        self._started = False
        self._next_keepalive = self._meter.arrived + self._keepalive_after()

    def __repr__(self) -> str:
        return f"<Relay {self._destination.route} {self._meter.phase}>"

    async def __call__(self, held: HeldBody) -> None:
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
                                self._hold(held)
                                await ticket.wait()
                                self.check_at = 0.0
                            if held.size:
                                held.release()
                            self._meter.admit()
                            await self._forward(ticket)
                        break
                    except GatewayError as failure:
                        self._reroute(without_frames(failure))
        except GatewayError as raised:
            error = without_frames(raised)
            self._answer_error(error)
        except Exception as crash:
            error = Crash()
            self._answer_error(error)
            trace = "".join(traceback.format_tb(crash.__traceback__))  # without the message: it may quote the client
            _log.error("a relay failed with %s:\n%s", type(crash).__name__, trace)
            without_frames(crash)
        finally:
            self._context.in_flight.discard(self)
            self._client.on_pause = self._client.on_resume = None
            self._record(error)

    def _hold(self, held: HeldBody) -> None:
        """Count the memory of a request that has to wait.

        A request that had a slot before is not refused when it waits again.

        Raises:
            QueueFull: There is no memory for it.
        """
        size = weight(self._request.size, self._request)
        held.resize(size, may_refuse=not (self._meter.attempts or self._ticket.enters_again))

    @property
    def route(self) -> Route:
        """The route that the roll-out chose."""
        return self._request.route

    @property
    def arrived(self) -> float:
        """Time of arrival, on the clock that all relays share."""
        return self._meter.arrived

    @property
    def is_stranded(self) -> bool:
        """True if the request is queued for servers that are all down."""
        return (
            self._ticket.is_queued
            and self._backend.is_restrained
            and self._backend.is_down(self._destination.route.model)
        )

    @property
    def model_state(self) -> ModelState | None:
        """State of the model that the request is in flight for; None if the server loads no models."""
        placement = self._ticket.placement
        return None if placement is None else placement.state

    @property
    def place(self) -> tuple[Backend, Server]:
        """Backend and server of the request in flight."""
        assert self._server is not None
        return self._backend, self._server

    @property
    def sent_at(self) -> float:
        """Time at which the attempt in flight began."""
        return self._ticket.started

    @property
    def first_token_timeout(self) -> float:
        return self._limits.first_token_timeout

    @property
    def may_be_silent(self) -> bool:
        """True if the engine may hold back output for a long time."""
        return False

    @property
    def patience(self) -> float:
        """Seconds in which a first token is to be expected."""
        state = self.model_state
        return math.inf if state is None else state.activity.patience(self._lane, self._request.size)

    def last_heard(self, now: float) -> float:
        """Return the time of the last piece of the answer, or `now` if the client does not read."""
        if self._client.paused:
            return now
        return -math.inf if self._meter.first_piece is None else self._meter.last_piece

    def as_requeueable(self) -> Requeueable | None:
        return None

    def cut_off(self, error: GatewayError) -> None:
        """End the relay with `error`: the gateway stops, or `rollback_cutoff` has passed."""
        self._cancel_scope.end(error)

    @property
    def generation(self) -> int:
        """Generation of the settings that the request's destination belongs to."""
        return self._destination.generation

    def leave_queue(self, backend: Backend) -> None:
        """Stop waiting for `backend` if it accepts no requests and a fallback is up."""
        fallback, model = self._destination.fallback, self._destination.route.model
        if fallback is None or backend is not self._backend or not backend.accepts_none(model, self._lane):
            return
        if not self._context.destination(fallback, self.workload).backend.refuses_all(fallback.model, self._lane):
            self._ticket.refuse(backend.unavailable(model, self._lane))

    def leave_hung_server(self) -> None:
        """Go elsewhere if the request waits for the first token of a server that hangs."""
        server, ticket = self._server, self._ticket
        if not self._backend.is_restrained or server is None or ticket.placement is None or self._client.paused:
            return
        detector = self._detector(server)
        if self._meter.first_piece is not None or not detector.is_hung or ticket.started > detector.ejected_at:
            return  # one that was sent after the ejection is on trial
        if self._failover is None:
            self._failover = Failover(self._context, self._destination, self._lane)
        if self._cancel_scope.may_interrupt and self._failover.leave(ticket, server, self._meter):
            self._meter.last_piece = self._context.clock()  # its time for a first token begins anew
            self.check_at = 0.0
            self._cancel_scope.interrupt(ServerHangs())

    def attempt(self) -> Attempt | None:
        """Return the request's present attempt, or None if it is not at a server that can be judged by it."""
        server, meter = self._server, self._meter
        if server is None or server.residency is not None or self._ticket.placement is None or self._client.paused:
            return None
        return Attempt(
            server,
            self._detector(server),
            self._is_streamed_upstream,
            meter.first_piece is None,
            self._ticket.is_trial,
            meter.last_piece,
            self._request.size,
            self._limits.first_token_timeout,
            self._request.claim,
            self._has_alternative,
        )

    def _detector(self, server: Server) -> OutlierDetector:
        return server.gate(self._destination.route.model, self._lane)

    def _has_alternative(self) -> bool:
        """Return whether another server, or the fallback, could serve the request now."""
        model, fallback = self._destination.route.model, self._destination.fallback
        if any(
            other is not self._server and other.serves(model) and other.is_up() and self._detector(other).accepts()
            for other in self._backend.servers
        ):
            return True
        if fallback is None:
            return False
        return not self._context.destination(fallback, self.workload).backend.refuses_all(fallback.model, self._lane)

    def send_again(self, *, is_first: bool = True) -> bool:
        """Send the request again, from the queue on, if its answer has not begun.

        There it comes before all others, or with `is_first` false, after them. Return whether the
        request is sent again. Only requests to servers that load models can be.
        """
        if not self.awaits_first_token or not self._cancel_scope.interrupt(ModelUnloaded()):
            return False
        self._goes_first = is_first
        return True

    def _requeue(self) -> None:
        """Give the request a new ticket, since its model was unloaded before it was served.

        That did not use up one of its attempts.
        """
        self._context.metrics.retries.labels(self._backend.name, "unloaded").inc()
        self._meter.attempts -= 1 + self._meter.met_stale
        self._queue_at(self._destination)
        self._ticket.enter_again(self._goes_first)

    def _queue_at(self, destination: Destination) -> None:
        """Give the request a new ticket for `destination`, or for where the roll-out leads instead."""
        self._meter.requeue()
        self._retarget(self._follow_rollout(destination))
        self._server = None
        self._ticket = self._new_ticket(self._claim())

    def _reroute(self, failure: GatewayError) -> None:
        """Retarget the request after `failure` and give it a new ticket.

        Raises:
            GatewayError: the request has nowhere else to go; this is what the client gets.
        """
        if isinstance(failure, ModelUnloaded):
            self._requeue()
            return
        if self._failover is None:
            if self._destination.fallback is None:
                raise failure
            self._failover = Failover(self._context, self._destination, self._lane)
        had_slot = self._failover.returns_to_queue
        self._queue_at(self._failover.destination_after(failure, self._meter))
        if had_slot:
            self._ticket.enter_again(goes_first=True)

    def _follow_rollout(self, destination: Destination) -> Destination:
        """Return the destination to queue at in place of `destination`; here always the same."""
        return destination

    def _retarget(self, destination: Destination) -> None:
        self._destination = destination
        self._backend, self._limits = destination.backend, destination.limits
        self._meter.observe_gap = destination.metrics.gaps.observe_gap

    def _claim(self) -> Claim:
        """Return the request's claim, with the time that the client's deadline still leaves."""
        claim = self._request.claim
        if claim.timeout is not None:
            claim = structs.replace(
                claim, timeout=max(0.0, self._meter.arrived + claim.timeout - self._context.clock())
            )
        return claim

    def _new_ticket(self, claim: Claim) -> Ticket:
        return Ticket(self._backend.admission, self._destination.queues[self._lane], claim)

    def _refuse_hopeless(self) -> None:
        """Refuse at once what the backend would certainly refuse after the queue."""
        model, backend = self._destination.route.model, self._backend
        if backend.is_restrained and self._failover is None:
            has_fallback = self._destination.fallback is not None
            if (backend.accepts_none if has_fallback else backend.refuses_all)(model, self._lane):
                raise backend.unavailable(model, self._lane)
        if self._request.size > MOST_BYTES_PER_TOKEN * SMALLEST_CONTEXT:
            limit = backend.context_length(model)
            if self._is_longer_than(limit):
                raise ContextLengthExceeded(limit, self.text_field)

    def _is_longer_than(self, limit: int | None) -> bool:
        """Return whether the text certainly has more than `limit` tokens."""
        return limit is not None and self._text_length() > MOST_BYTES_PER_TOKEN * limit

    @abstractmethod
    def _text_length(self) -> int:
        """Return the length, in characters, of the text that has to fit the model's context.

        Of several texts, the longest counts.
        """

    @abstractmethod
    async def _exchange(self, server: Server) -> None:
        """Send the request to `server` and answer the client.

        Raises:
            TransportError, GatewayError: the exchange failed. What the client has received by then was
                sent through this relay's own methods.
        """

    def _relax_request(self, refusal: InvalidRequest) -> bool:
        """Relax the request so that the server need not refuse it again.

        Return False if there is no other way to ask.
        """
        return False

    # Forward

    async def _forward(self, ticket: Ticket) -> None:
        scope, meter = self._cancel_scope, self._meter
        while True:
            server = ticket.server
            assert isinstance(server, Server)
            self._server = server
            meter.start_attempt()
            sent = meter.last_piece
            self.check_at = 0.0
            self.awaits_first_token, self._is_late = server.residency is not None, False
            scope.may_interrupt = True
            try:
                await self._exchange(server)
            except asyncio.CancelledError:
                failure = scope.absorbed()
            except (TransportError, GatewayError) as error:
                failure = error
            else:
                ticket.is_served = True
                self._record_success(ticket, server, sent)
                return
            finally:
                scope.may_interrupt = self.awaits_first_token = False
                meter.end_upstream()
            try:
                self._handle(failure, ticket, server, sent)
            finally:
                del failure  # its traceback has this frame

    def _handle(self, failure: BaseException, ticket: Ticket, server: Server, sent: float) -> None:
        """Handle the failure of the attempt at `server` that was sent at the time `sent`.

        Raises:
            GatewayError, asyncio.CancelledError: the request is not sent to the server of `ticket` now.
        """
        if isinstance(failure, ServerHangs):
            if ticket.server is server:
                raise failure
            assert self._failover is not None
            self._failover.count_move(self._context.clock())
        elif isinstance(failure, TransportError):
            error = upstream_error(failure)
            if not self._retry_elsewhere(ticket, server, error, sent, failure.answered):
                raise error from failure
        elif isinstance(failure, InvalidRequest):
            if self._meter.first_piece is not None or not self._relax_request(failure):
                self._retry_elsewhere(ticket, server, failure, sent, True)
                raise self._with_context_limit(failure, server) from None
        elif (
            isinstance(failure, ModelUnloaded)
            or not isinstance(failure, GatewayError)
            or not self._retry_elsewhere(ticket, server, failure, sent, _is_answer(failure))
        ):
            raise failure

    def _record_success(self, ticket: Ticket, server: Server, sent: float) -> None:
        """Record that `server` has answered the request, which was sent at the time `sent`."""
        placement, meter = ticket.placement, self._meter
        if server.circuit.is_troubled:
            server.circuit.succeed()
        if placement is not None:
            seconds = None if meter.first_piece is None else meter.first_piece - sent
            placement.gate.succeed(ticket.claim, self._request.size, seconds, ticket.is_trial)

    def _retry_elsewhere(
        self, ticket: Ticket, server: Server, error: GatewayError, sent: float, answered: bool
    ) -> bool:
        if self._failover is None:
            self._failover = Failover(self._context, self._destination, self._lane)
        return self._failover.retry_elsewhere(ticket, server, error, self._meter, sent=sent, answered=answered)

    def _with_context_limit(self, refusal: InvalidRequest, server: Server) -> InvalidRequest:
        """Add the context length to `refusal`, since Ollama 0.24 does not state it, and the field."""
        if isinstance(refusal, ContextLengthExceeded) and (refusal.limit is None or refusal.param != self.text_field):
            limit = refusal.limit or server.facts(self._destination.route.model).context_length
            return ContextLengthExceeded(limit, self.text_field)
        return refusal

    def _note_first_token(self) -> None:
        """Record the first token, or a whole answer without tokens, as a sign of life of its model."""
        state = self.model_state
        if state is None:
            return
        self.awaits_first_token = False
        now = self._context.clock()
        state.activity.first_token(self._lane, now - self._ticket.started, self._request.size, now)
        residency = None if self._server is None else self._server.residency
        if not state.is_loaded and residency is not None and residency.heard(state):
            self._backend.refresh()

    def _count_stale(self) -> None:
        self._meter.attempts += 1
        self._meter.met_stale = True
        self._context.metrics.retries.labels(self._backend.name, "stale").inc()

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

    # Time

    def check_deadlines(self, now: float) -> None:
        """End the exchange if a deadline has passed; send a keep-alive if it has been silent.

        A new phase resets `check_at` to zero, because its deadline may be earlier.
        """
        deadline, phase = self._deadline()
        if now >= deadline and phase == NO_FIRST_PIECE and self._may_be_frozen():
            deadline, phase = self._end_deadline()  # without a first token it fails only if its model is not unloaded
        if now >= deadline:
            self._cancel_scope.end(UpstreamTimeout(phase))
            self.check_at = math.inf
            self._record_timeout(phase)
            return
        self._next_keepalive = max(self._next_keepalive, self._active_until())
        if now >= self._next_keepalive:
            self._send_keepalive()
            self._next_keepalive = now + self._context.heartbeat
        self.check_at = now if self._is_late and self.awaits_first_token else min(deadline, self._next_keepalive)

    def _record_timeout(self, phase: str) -> None:
        """Record a timeout that is the server's fault."""
        server, placement, since = self._server, self._ticket.placement, self._meter.last_piece
        if server is None or placement is None or phase not in (NO_FIRST_PIECE, NO_NEXT_PIECE):
            return
        if phase == NO_FIRST_PIECE:
            server.circuit.fail(HANG, since)
        if not server.circuit.is_open:
            reason = HANG if phase == NO_FIRST_PIECE else "no_next_piece"
            placement.gate.fail(reason, since, self._request.claim, self._ticket.is_trial)

    def _may_be_frozen(self) -> bool:
        """Return whether it is still being found out whether the model has frozen."""
        if not self.awaits_first_token:
            return False
        frozen_models = self._context.frozen_models
        if not self._is_late:
            self._is_late = True
            frozen_models.suspect(self)
        return frozen_models.is_deciding(self)

    def _deadline(self) -> tuple[float, str]:
        """Return the deadline of the current phase, and what to tell the client when it passes.

        While the client does not read, the backend's own deadlines do not count.
        """
        meter, limits = self._meter, self._limits
        if meter.sent is None:
            return math.inf, ""
        ends = self._end_deadline()
        if self._client.paused:
            return ends
        if meter.first_piece is None:
            return min(ends, (meter.last_piece + limits.first_token_timeout, NO_FIRST_PIECE))
        return min(ends, (meter.last_piece + limits.idle_timeout, NO_NEXT_PIECE))

    def _end_deadline(self) -> tuple[float, str]:
        """Return the deadline of the whole answer, once it was sent."""
        meter, timeout = self._meter, self._request.claim.timeout
        assert meter.sent is not None
        ends = meter.sent + self._limits.total_timeout, "no end"
        if timeout is not None:
            ends = min(ends, (meter.arrived + timeout, "no end within the client's timeout"))
        return ends

    def _keepalive_after(self) -> float:
        """Return the seconds of silence after which an answer is kept alive."""
        return math.inf if self._request.read_timeout is None else KEEPALIVE_SHARE * self._request.read_timeout

    def _active_until(self) -> float:
        """Return the time until which no keep-alive is needed, as something has been sent."""
        return -math.inf

    def _send_keepalive(self) -> None:
        if self._client.paused:
            return
        if not self._started:
            self._start(self._form.json_lines)
        self._client.write(b" ")

    @property
    def _is_stream(self) -> bool:
        return False

    @property
    def _has_moved(self) -> bool:
        """True if the roll-out moved the request to another backend's queue."""
        return False

    @property
    def _is_empty(self) -> bool:
        """True if the model said nothing."""
        return False

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
            hold.count(*meter.counted(error))
        attribution = self._attribution()
        self._context.on_exchange(
            Exchange(
                request_id=request.id,
                key_id=request.key_id,
                key="" if hold is None else hold.account.name,
                endpoint=self._form.endpoint,
                tier=route.tier,
                backend=route.backend,
                chosen=request.route.backend,
                moved=self._has_moved,
                model=route.model,
                lane=self._lane,
                stream=self._is_stream,
                status=200 if error is None else self._form.error_status(error),
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
                sent_tokens=0 if meter.usage is not None else meter.pieces,
                attempts=meter.attempts,
            ),
            attribution,
        )

    def _attribution(self) -> Attribution | None:
        """Return what usage needs to know beside the record; None if there is nothing."""
        person = self._person()
        return Attribution(person) if person else None

    def _person(self) -> str:
        """Return the person who asked, if the key may name persons."""
        hold = self._request.hold
        return self._request.claim.person if hold is None or hold.account.policy.is_trusted else ""


def _is_answer(error: GatewayError) -> bool:
    """Return whether the server gave an answer, though a broken one.

    A 5xx is a refusal to answer, and so is the `abort` of a vLLM that is told to end.
    """
    return isinstance(error, UpstreamError) and error.reason not in ("status_5xx", "aborted")
