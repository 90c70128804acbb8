"""The relay of one request, whose route is decided: admits, forwards, answers and meters it.

The base class carries out what all exchanges have in common. What differs between the endpoints,
sending the request to a server and reading the answer, is in `chat.py` and `embeddings.py`.
"""

import asyncio
import logging
import traceback
from abc import ABC, abstractmethod

from gateway.admission.ticket import Ticket
from gateway.body_memory import HeldBody, weight
from gateway.chat.prompt_blocks import PromptBlocks
from gateway.errors import (
    ContextLengthExceeded,
    Crash,
    GatewayError,
    InvalidRequest,
    ModelUnloaded,
    ServerHangs,
    UpstreamError,
    without_frames,
)
from gateway.relay.deadlines import TimedRelay
from gateway.relay.destinations import Destination
from gateway.relay.failover import Failover
from gateway.upstream.failures import UNRESPONSIVE, upstream_error
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

_log = logging.getLogger(__name__)

SMALLEST_CONTEXT = 256
"""Tokens. No model worth serving has a smaller context: the length of a request that fits into it
is not checked."""

MOST_BYTES_PER_TOKEN = 16
"""Upper bound for text: only runs of blanks have as many bytes in a token. A text with more bytes
than this for each token of the context is refused at once; Ollama 0.24 takes 17 s to find out."""


class Relay(TimedRelay, ABC):
    """One exchange. `await relay(held)` answers the client; it raises only if cancelled from outside.

    `held` counts the memory of the request while it waits; it is released when the request gets a
    slot, and its owner releases it at the end.

    A subclass implements `_exchange`: it sends the request to a server and reads the answer.
    """

    __slots__ = ()

    async def __call__(self, held: HeldBody) -> None:
        error: GatewayError | None = None
        self._context.in_flight.add(self)
        try:
            with self._cancel_scope:
                self._backend.budget.count(self._meter.arrived)
                while True:
                    try:
                        self._refuse_hopeless()
                        if self._backend.admission.affinity is not None:
                            self._ticket.prompt = self._prompt()
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

    def _prompt(self) -> PromptBlocks | None:
        """Return the blocks of the prompt. Called only if the backend has several servers whose caches matter."""
        return None

    def _refuse_hopeless(self) -> None:
        """Refuse at once what the backend would certainly refuse after the queue."""
        model, backend = self._destination.route.model, self._backend
        if backend.is_restrained and self._failover is None:
            has_fallback = self._destination.fallback is not None
            is_accepted = self._ticket.enters_again and backend.turn == "leaving"  # what ran there ends there
            availability = backend.availability
            refuses = availability.accepts_none if has_fallback else availability.refuses_all
            if not is_accepted and refuses(model, self._lane):
                raise availability.error(model, self._lane)
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

    # Queue again

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
        self._ticket = Ticket(self._backend.admission, self._destination.queues[self._lane], self._claim())

    def _follow_rollout(self, destination: Destination) -> Destination:
        """Return the destination to queue at in place of `destination`; here always the same."""
        return destination

    # Forward

    async def _forward(self, ticket: Ticket) -> None:
        scope, meter = self._cancel_scope, self._meter
        while True:
            placement = ticket.placement
            assert placement is not None
            server = placement.server
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
                if meter.upstream_ended is None:
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
        prompt, usage = ticket.prompt, meter.usage
        if prompt is not None and prompt.is_counted and usage is not None and usage.prompt_tokens:
            server.prefixes.learn(prompt.size, usage.prompt_tokens)

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


def _is_answer(error: GatewayError) -> bool:
    """Return whether the server gave an answer, though a broken one.

    A 5xx is a refusal to answer, and so is the `abort` of a vLLM that is told to end. From a server
    that is given up nothing came.
    """
    return isinstance(error, UpstreamError) and error.reason not in ("status_5xx", "aborted", UNRESPONSIVE)
