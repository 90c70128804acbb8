"""Carries out one chat request: admit, forward, stream back, meter. Owns all that the request holds; `api.py` has decided where it goes."""

import asyncio
import logging
import math
import traceback

from msgspec import structs

from gateway.admission import Outlook, Ticket
from gateway.backends.backend import Backend, Server
from gateway.backends.base import MAX_ANSWER, MAX_REFUSAL, Reading
from gateway.connection import Connection, WireError
from gateway.errors import (
    ClientLeft,
    ContextLengthExceeded,
    Crash,
    GatewayError,
    InvalidRequest,
    UnsupportedParameter,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.forwarding import Detour, with_pause
from gateway.metering import CHAT, Exchange, Meter, microseconds
from gateway.protocol import LARGE_SCHEMAS
from gateway.shaping import Shaping
from gateway.surroundings import Client, Destination, Request, Surroundings
from gateway.turns import Claim
from gateway.views import Answer, Delta, StreamView, assemble, render_answer
from gateway.watch import Watch

_log = logging.getLogger("gateway.relay")

SHORT_ANSWER = 1024
"""Tokens. A plain answer that may be longer is asked for as a stream and put together: a backend at work on it can then be told from one that
hangs. A shorter one stays plain, which is cheaper, and has to come within `first_token_timeout`."""

NO_FIRST_PIECE = "no first piece"

JSON = b"application/json"

LARGE = 256 * 1024
"""Bytes of a body from which on the steps of its treatment let others run in between."""

SMALLEST_CONTEXT = 256
"""Tokens. No model worth serving has less; a request that fits any is not looked at further."""

MOST_BYTES_PER_TOKEN = 16
"""Of text, on the safe side: no text but runs of blanks has so many. What has more for each token of the context is refused at once: Ollama
0.24 takes 17 s to find out."""

EARLY = 0.8
"""A plain answer is kept alive from this share of its client's read timeout on."""

STREAM_LINES = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
JSON_LINES = b"content-type: application/json\r\n"


class Relay:
    """One exchange. `await relay()` answers the client, whatever happens; it raises only when it is cancelled from outside."""

    __slots__ = (
        "_backend", "_chat", "_client", "_collected", "_collected_bytes", "_destination", "_detour", "_lane", "_limits", "_meter", "_next_beat",
        "_passes", "_request", "_server", "_shaping", "_shared", "_silent_since", "_splices", "_started", "_ticket", "_view", "_watch", "look_at",
    )  # fmt: skip

    def __init__(self, shared: Surroundings, client: Client, request: Request) -> None:
        self._shared = shared
        self._client = client
        self._request = request
        self._chat = chat = request.chat
        self._destination = destination = shared.destination(request.route)
        self._backend = destination.backend
        self._limits = destination.limits
        self._detour: Detour | None = None
        self._server: Server | None = None
        self._lane = "vision" if chat.has_images else "text"
        self._ticket = self._new_ticket(request.claim)
        self._meter = Meter(shared.clock, destination.metrics.gaps.observe_gap)
        self._watch = Watch(client, shared.loop)
        self.look_at = 0.0
        self._view = StreamView(request.answer_id, request.created, chat.model, chat.wants_usage) if chat.stream else None
        self._shaping: Shaping | None = None
        self._passes = False
        """There is nothing to shape."""
        self._splices = False
        """Plain content of a stream may pass by as it is."""
        self._silent_since: float | None = None
        """Pieces come, but nothing that could be shown yet."""
        self._collected: list[Delta] = []
        self._collected_bytes = 0
        self._started = False
        self._next_beat = self._meter.arrived + self._silence_allowed()

    def __repr__(self) -> str:
        return f"<Relay {self._destination.route} {self._meter.phase}>"

    async def __call__(self) -> None:
        error: GatewayError | None = None
        self._shared.sweep.add(self)
        try:
            with self._watch:
                self._backend.budget.count(self._meter.arrived)
                while True:
                    try:
                        self._refuse_hopeless()
                        with self._ticket as ticket:
                            if ticket.place is None:
                                await ticket.wait()
                                self.look_at = 0.0
                            self._meter.admit()
                            await self._forward(ticket)
                        break
                    except GatewayError as failure:
                        self._go_on(failure)
        except GatewayError as raised:
            error = raised
            self._answer_error(error)
        except Exception as crash:
            error = Crash()
            self._answer_error(error)
            places = "".join(traceback.format_tb(crash.__traceback__))  # never its words: they may be the client's
            _log.error("a relay failed by %s:\n%s", type(crash).__name__, places)
        finally:
            self._shared.sweep.live.discard(self)
            self._client.on_pause = self._client.on_resume = None
            self._record(error)

    def cut_off(self, error: GatewayError) -> None:
        """End with `error`: the gateway is stopping."""
        self._watch.end(error)

    def leave_line(self, backend: Backend) -> None:
        """`backend` is away: who waits for it and may go elsewhere does so."""
        way, model = self._destination.fallback, self._destination.route.model
        if way is None or backend is not self._backend or not backend.is_away(model):
            return
        if not self._shared.backends[way.backend].is_away(way.model):
            self._ticket.refuse(backend.unavailable())

    def _go_on(self, failure: GatewayError) -> None:
        """Aim where the request goes after `failure`; raises where it goes nowhere."""
        if self._detour is None:
            if self._destination.fallback is None:
                raise failure
            self._detour = Detour(self._shared, self._destination)
        destination: Destination = self._detour.after(failure, self._meter)
        self._destination = destination
        self._backend, self._limits = destination.backend, destination.limits
        self._meter.observe_gap = destination.metrics.gaps.observe_gap
        self._meter.wait_again()
        self._chat = self._request.chat
        self._collected_bytes = 0
        claim = self._request.claim
        if claim.timeout is not None:  # from now on
            claim = structs.replace(claim, timeout=max(0.0, self._meter.arrived + claim.timeout - self._shared.clock()))
        self._ticket = self._new_ticket(claim)

    def _new_ticket(self, claim: Claim) -> Ticket:
        return self._backend.admission.ticket(self._destination.queues[self._lane], claim)

    def _refuse_hopeless(self) -> None:
        """What the backend would refuse for certain does not wait in its line."""
        chat, model, backend = self._chat, self._destination.route.model, self._backend
        if backend.is_restrained and self._detour is None:
            may_go = self._destination.fallback is not None
            if backend.takes_none(model) if may_go else backend.is_away(model):
                raise backend.unavailable()
        if self._request.size > MOST_BYTES_PER_TOKEN * SMALLEST_CONTEXT:
            context = self._backend.context_length(model)
            if context is not None and sum(len(message.text) for message in chat.messages) > MOST_BYTES_PER_TOKEN * context:
                raise ContextLengthExceeded(context)
        if self._lane == "vision" and self._backend.lacks(model, "vision"):
            raise UnsupportedParameter("This model does not take images.", param="messages")

    # Forward

    async def _forward(self, ticket: Ticket) -> None:
        while True:
            server = ticket.station
            assert isinstance(server, Server)
            self._server = server
            self._meter.send()
            sent = self._meter.last_piece
            self.look_at = 0.0
            try:
                await self._exchange(server)
                ticket.is_served = True
                if server.circuit.is_troubled:
                    server.circuit.succeed()
                return
            except WireError as fault:
                error = _upstream_error(fault)
                if not self._moves(ticket, server, error, sent, fault.answered):
                    raise error from fault
            except InvalidRequest as refusal:
                amended = self._backend.dialect.amended(self._chat, refusal)
                if amended is None or self._meter.first_piece is not None:
                    self._moves(ticket, server, refusal, sent, True)
                    raise self._completed(refusal, server) from None
                self._chat = amended
            except GatewayError as error:
                if not self._moves(ticket, server, error, sent, isinstance(error, UpstreamError)):
                    raise
            finally:
                self._meter.end_upstream()

    def _moves(self, ticket: Ticket, server: Server, error: GatewayError, sent: float, answered: bool) -> bool:
        if self._detour is None:
            self._detour = Detour(self._shared, self._destination)
        return self._detour.moves(ticket, server, error, self._meter, sent=sent, answered=answered)

    def _completed(self, refusal: InvalidRequest, server: Server) -> InvalidRequest:
        """Ollama 0.24 does not say how long a prompt may be."""
        if isinstance(refusal, ContextLengthExceeded) and refusal.limit is None:
            return ContextLengthExceeded(server.facts(self._destination.route.model).context_length)
        return refusal

    async def _exchange(self, server: Server) -> None:
        dialect = self._backend.dialect
        limit = self._chat.token_limit
        streams = self._view is not None or dialect.streams_only or limit is None or limit > SHORT_ANSWER
        model = self._destination.route.model
        if self._request.size > LARGE_SCHEMAS and self._chat.has_schemas:
            body = await self._shared.in_thread(dialect.render, self._chat, model, server.facts(model), streams)
        else:
            body = dialect.render(self._chat, model, server.facts(model), streams)
        exchange = server.pool.exchange(server.chat_head(self._request.came_through, self._shared.gateway_id), body, self._count_stale)
        if len(body) > LARGE:
            await asyncio.sleep(0)
        del body
        async with exchange as response:
            if response.status != 200:
                raise with_pause(dialect.refusal(response.status, await response.read(MAX_REFUSAL)), response)
            streams = _check_headers(response, dialect.stream_type if streams else JSON, self._view is None and not dialect.streams_only)
            if not streams:
                delta = dialect.parse_answer(await response.read(MAX_ANSWER))
                self._meter.usage = delta.usage
                self._answer(assemble(self._shaped([delta])))
                return
            await self._pump(response, dialect.reading())

    def _count_stale(self) -> None:
        self._meter.attempts += 1
        self._shared.metrics.retries.labels(self._backend.name, "stale").inc()

    async def _pump(self, response: Connection, reading: Reading) -> None:
        meter, view, write = self._meter, self._view, self._client.write
        clock, observe_gap = self._shared.clock, self._destination.metrics.gaps.observe_gap

        def on_piece(piece: bytes) -> None:
            texts = reading.texts(piece) if self._splices else None
            if texts is None:
                self._take(piece, reading, response)
                return
            now = clock()
            observe_gap(now - meter.last_piece, len(texts))
            meter.last_piece = now
            write(view.splice(texts))  # type: ignore[union-attr]  # spliced only where there is a view

        def on_resume() -> None:
            self._meter.last_piece = self._shared.clock()
            self.look_at = 0.0
            response.resume()

        self._client.on_pause, self._client.on_resume = response.pause, on_resume
        if self._client.paused:
            response.pause()
        try:
            await response.pump(on_piece)
            if not reading.over:
                self._deliver(reading.end())
        except WireError as fault:  # what the backend said before is not lost: Ollama's last line may need no line end
            raise _upstream_error(fault) from fault
        finally:
            if reading.malformed:
                self._shared.metrics.upstream_errors.labels(self._backend.name, "malformed").inc(reading.malformed)
        if view is not None:
            write(view.done())
            self._client.end()
        else:
            self._answer(assemble(self._collected))

    # Stream back

    def _take(self, piece: bytes, reading: Reading, response: Connection) -> None:
        if self._view is None:
            self._collected_bytes += len(piece)
            if self._collected_bytes > MAX_ANSWER:
                raise UpstreamError("too_large")
        deltas = reading.feed(piece)
        if deltas:
            self._deliver(deltas)
        if reading.failure is not None:
            raise reading.failure
        if reading.surplus:
            response.spoil()
        if reading.over:
            response.stop()

    def _deliver(self, deltas: list[Delta]) -> None:
        meter = self._meter
        is_first = meter.first_piece is None
        meter.piece(sum(1 for delta in deltas if delta.is_piece))
        if deltas[-1].usage is not None:
            meter.usage = deltas[-1].usage
        if is_first:
            self.look_at = 0.0
            self._ticket.spoke()
            assert self._server is not None
            if self._server.circuit.is_troubled:
                self._server.circuit.begin_answer()
        deltas = self._shaped(deltas)
        view = self._view
        if view is None:
            self._collected += deltas
            return
        if not self._started:
            self._start(STREAM_LINES)
            self._client.write(view.opening())
        self._client.write(b"".join([view.render(delta) for delta in deltas]))

    def _shaped(self, deltas: list[Delta]) -> list[Delta]:
        if self._passes:
            return deltas
        if self._shaping is None:
            if not Shaping.is_needed(self._chat, deltas):
                self._passes = True
                self._splices = self._view is not None
                return deltas
            self._shaping = Shaping(self._chat)
        shaped = self._shaping.take(deltas)
        self._splices = self._shaping.passes and self._view is not None
        if not shaped:
            self._silent_since = self._silent_since or self._meter.last_piece
        else:
            self._silent_since = None
        return shaped

    def _answer(self, answer: Answer) -> None:
        request = self._request
        self._meter.end_upstream()
        body = render_answer(request.answer_id, request.created, self._chat.model, answer)
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
        self._client.write(b"data: %b\n\n" % error.envelope() if self._view is not None else error.envelope())
        self._client.end()

    def _start(self, content_lines: bytes) -> None:
        self._started = True
        self._client.open(200, self._header_lines(content_lines))

    def _header_lines(self, content_lines: bytes) -> bytes:
        request, meter = self._request, self._meter
        queue_ms = ((self._shared.clock() if meter.admitted is None else meter.admitted) - meter.arrived) * 1000
        return b"%b%bx-request-id: %b\r\n%bx-gateway-queue-ms: %d\r\nx-gateway-attempts: %d\r\n" % (
            content_lines,
            request.extra_lines,
            request.id.encode(),
            self._destination.header_lines,
            queue_ms,
            meter.attempts,
        )

    # Time

    def look(self, now: float) -> None:
        """End the exchange when a deadline has passed, keep a silent one alive. A new phase sets `look_at` to zero: its deadline may be nearer."""
        deadline, phase = self._deadline()
        if now >= deadline:
            if phase == NO_FIRST_PIECE and self._server is not None:
                self._server.circuit.fail("no_first_piece", self._meter.last_piece)
            self._watch.end(UpstreamTimeout(phase))
            self.look_at = math.inf
            return
        if self._view is not None and self._meter.first_piece is not None:
            shown = self._meter.last_piece if self._silent_since is None else self._silent_since
            self._next_beat = max(self._next_beat, shown + self._silence_allowed())
        if now >= self._next_beat:
            self._beat()
            self._next_beat = now + self._shared.heartbeat
        self.look_at = min(deadline, self._next_beat)

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

    def _silence_allowed(self) -> float:
        """Seconds after which a silent answer is kept alive."""
        if self._view is not None:
            return self._shared.commit_after
        return math.inf if self._request.read_timeout is None else EARLY * self._request.read_timeout

    def _beat(self) -> None:
        if self._client.paused:
            return
        if self._view is None:
            if not self._started:
                self._start(JSON_LINES)
            self._client.write(b" ")
            return
        note = self._shared.waiting_note and self._ticket.is_in_line
        if not self._started:
            self._start(STREAM_LINES)
            self._client.write(self._view.opening())
        elif not note:
            self._client.write(self._view.beat())
        if note:
            self._client.write(self._view.render(Delta(reasoning=waiting_note(self._ticket.outlook()))))

    # Meter

    def _record(self, error: GatewayError | None) -> None:
        meter, request, route = self._meter, self._request, self._destination.route
        now = self._shared.clock()
        self._shared.on_exchange(
            Exchange(
                request_id=request.id,
                key_id=request.key_id,
                endpoint=CHAT,
                tier=route.tier,
                backend=route.backend,
                model=route.model,
                lane=self._lane,
                stream=self._view is not None,
                status=200 if error is None else error.status,
                code=None if error is None else error.code,
                reason=error.reason if isinstance(error, UpstreamError) else None,
                outcome="ok" if error is None else error.outcome,
                phase=meter.phase,
                duration=microseconds(now - meter.arrived),
                queue_wait=microseconds(meter.queue_wait),
                upstream=microseconds(meter.upstream_seconds),
                time_to_first_token=microseconds(meter.time_to_first_token),
                usage=meter.usage,
                attempts=meter.attempts,
            )
        )


def waiting_note(outlook: Outlook) -> str:
    """What a person who waits is told."""
    if outlook.seconds is None:
        return f"Waiting in line: place {outlook.place}.\n"
    estimate = f"{math.ceil(outlook.seconds)} s" if outlook.seconds <= 90 else f"{math.ceil(outlook.seconds / 60)} min"
    return f"Waiting in line: place {outlook.place}, about {estimate}.\n"


def _check_headers(response: Connection, media_type: bytes, takes_plain: bool) -> bool:
    """Whether the answer is a stream. A server may answer a wish for a stream plainly, which does for who `takes_plain`."""
    fields = response.fields
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UpstreamError("content_encoding", "The model backend returned an invalid response.")
    found = fields.get(b"content-type", media_type).lower()
    if found.startswith(media_type):
        return media_type != JSON
    if takes_plain and found.startswith(JSON):
        return False
    raise UpstreamError("content_type", "The model backend returned an invalid response.")


def _upstream_error(fault: WireError) -> UpstreamError:
    return UpstreamError(fault.fault)
