"""The relay of one chat request: gets the completion from a server, streams it or answers whole."""

import asyncio
import math
from functools import partial

from msgspec import structs

from gateway.admission.wait_estimates import WaitEstimate
from gateway.chat.answer import Answer, Assembler, Delta, TimedUsage, Usage, assemble
from gateway.chat.constraints import ChoiceFormat, GrammarFormat, RegexFormat
from gateway.chat.normalizer import Normalizer
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import LARGE_SCHEMAS
from gateway.chat.stop_sequences import StopMatcher
from gateway.dialects.dialect import ChatForm, StreamRenderer
from gateway.dialects.json_body import LONG_BODY
from gateway.dialects.long_answers import LONG_LOGPROBS, LONG_TEXT, logprob_runs
from gateway.engines.completions import Completer
from gateway.engines.engine import (
    MAX_ANSWER,
    MAX_PLAIN_ANSWER,
    MAX_REFUSAL,
    Engine,
    ResponseReader,
    estimated_tokens,
)
from gateway.engines.long_strings import render_images
from gateway.errors import GatewayError, InvalidRequest, UnsupportedParameter, UpstreamError
from gateway.relay.context import RelayContext
from gateway.relay.requests import ChatRequest, ClientConnection
from gateway.relay.requeueable import RequeueableRelay
from gateway.relay.splicing import splicer
from gateway.relay.turns import YIELD_BYTES, in_turns
from gateway.telemetry.exchange import CHAT, Attribution
from gateway.upstream.connection import Connection
from gateway.upstream.failures import JSON, check_headers, upstream_error, with_retry_after
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

SHORT_ANSWER = 1024
"""Tokens. A plain answer that may be longer is requested as a stream and assembled, so that a
backend that is generating can be told from one that hangs. A shorter one stays plain, which is
cheaper, and has to arrive within `first_token_timeout`."""
UNSEEN_TOKENS_PER_SECOND = 100
"""Tokens that a key pays for each second of a plain answer that its client left before it arrived: the
speed of a fast engine, so that leaving early is not cheaper than reading to the end."""


class ChatRelay(RequeueableRelay):
    """One chat completion."""

    workload = CHAT
    text_field = "messages"
    can_be_empty = True
    _request: ChatRequest
    _form: ChatForm

    __slots__ = (
        "_around_text",
        "_chat",
        "_collected",
        "_collected_bytes",
        "_is_passthrough",
        "_normalizer",
        "_renderer",
        "_silent_since",
        "_splices",
        "_stops",
    )

    def __init__(self, context: RelayContext, client: ClientConnection, request: ChatRequest) -> None:
        self._chat = chat = request.chat
        form = request.form
        self._renderer = renderer = form.stream(request.answer_id, request.created) if form.is_stream else None
        super().__init__(
            context, client, request, form, "vision" if not chat.has_plain_messages and chat.has_images else "text"
        )
        self._normalizer: Normalizer | None = None
        self._is_stream = renderer is not None
        self._is_passthrough = False
        """True once it is known that the answer needs no normalising."""
        self._splices = False
        """True while plain content of a stream may go to the client without being parsed into
        deltas."""
        self._around_text = None if renderer is None else renderer.around_text
        self._silent_since: float | None = None
        """Time since which pieces have arrived without anything to show; None: there was
        something."""
        self._collected: Assembler | None = None
        self._collected_bytes = 0
        self._stops: StopMatcher | None = None
        """Matcher of stop sequences, if the engine cannot do what the answer needs."""

    def _reroute(self, failure: GatewayError) -> None:
        super()._reroute(failure)
        self._chat = self._request.chat
        self._collected_bytes = 0

    def _refuse_hopeless(self) -> None:
        super()._refuse_hopeless()
        if not self._chat.is_plain and self._chat.needs_check:
            self._backend.engine.check(self._chat)
        if self._lane == "vision" and self._backend.lacks(self._destination.route.model, "vision"):
            raise UnsupportedParameter("This model does not accept images.", param="messages")

    @property
    def may_be_silent(self) -> bool:
        """True if the engine may hold back output: Ollama sends a tool call as a whole."""
        return bool(self._chat.tools)

    def _prompt(self) -> PromptBlocks | None:
        return prompt_blocks(self._chat, self._destination.route.model)

    def _text_length(self) -> int:
        return sum(len(message.text) for message in self._chat.messages)

    def _relax_request(self, refusal: InvalidRequest) -> bool:
        relaxed = self._backend.engine.relaxed(self._chat, refusal)
        if relaxed is not None:
            self._chat = relaxed
        elif refusal.param == "response_format" and isinstance(
            wanted := self._chat.output_format, ChoiceFormat | RegexFormat | GrammarFormat
        ):
            refusal.param = wanted.param
        return relaxed is not None

    # Forward

    async def _exchange(self, server: Server) -> None:
        engine, head = self._endpoint(server)
        chat, facts = self._chat, server.facts(model := self._destination.route.model)
        limit = chat.token_limit
        streams = self._renderer is not None or engine.streams_only or limit is None or limit > SHORT_ANSWER
        if chat.stop is not None:
            self._choose_matcher(chat.stops)
            if self._stops is not None:
                chat, streams = structs.replace(chat, stop=None), True  # so that it can be ended
        self._is_streamed_upstream = streams
        if self._request.size > LARGE_SCHEMAS and chat.has_schemas:
            await asyncio.sleep(0)
        body: bytes | list[bytes]
        if self._lane == "vision":
            body = await in_turns(render_images(chat, partial(engine.render, model=model, facts=facts, stream=streams)))
        else:
            body = engine.render(chat, model, facts, streams)
            if len(body) > YIELD_BYTES:
                await asyncio.sleep(0)
        asking = server.pool.request(head, body, self._count_stale, self._limits.connect_timeout)
        del body
        with await asking as response:
            if response.status != 200:
                raise with_retry_after(engine.client_error(response.status, await response.read(MAX_REFUSAL)), response)
            media_type = engine.stream_type if streams else JSON
            if check_headers(response, media_type, self._renderer is None and not engine.streams_only):
                await self._pump(response, engine.reader(self._chat))
                return
            whole = response.whole(MAX_PLAIN_ANSWER)
            if whole is None:
                whole = await response.read(MAX_PLAIN_ANSWER)
            delta = engine.parse_answer(whole)
            self._meter.usage, self._meter.has_said = delta.usage, bool(delta.content) or delta.is_piece
            size = len(whole)
            is_long = size > LONG_BODY and (size > YIELD_BYTES or delta.logprobs is not None)
            deltas = await self._normalized_in_turns(delta) if is_long else self._normalized([delta])
            answer = assemble(deltas if self._stops is None else self._until_stop(deltas, self._stops))
            if is_long:
                await self._answer_in_turns(answer)
            else:
                self._answer_json(self._rendered(answer))

    def _choose_matcher(self, stops: list[str]) -> None:
        """Have the gateway look for stop sequences that the engine cannot name, or if there are too many for it."""
        engine, renderer = self._backend.engine, self._renderer
        is_left_to_engine = engine.names_stop or not self._request.names_stop
        is_left_to_engine &= engine.max_stops is None or len(stops) <= engine.max_stops
        self._stops = None if is_left_to_engine else StopMatcher(stops)
        # A spliced token is not read, so no sequence would be found in it.
        self._around_text = None if renderer is None or self._stops is not None else renderer.around_text

    def _endpoint(self, server: Server) -> tuple[Engine | Completer, bytes]:
        """Return what renders and reads the exchange with `server`, and the head of the request."""
        return self._backend.engine, server.chat_head(self._request.came_through, self._context.gateway_id)

    async def _pump(self, response: Connection, reader: ResponseReader) -> None:
        renderer, write = self._renderer, self._client.write
        is_silent = has_shortcut = True

        def on_piece(piece: bytes) -> None:
            """Handle one piece. Most tokens come through `splicing.py` instead, from the third one on."""
            nonlocal is_silent, has_shortcut
            if self._splices and renderer is not None and (texts := reader.plain_tokens(piece)) is not None:
                self._meter.piece(len(texts))
                write(renderer.splice(texts))
                if response.on_chunks is None and has_shortcut:
                    gaps = self._destination.metrics.gaps
                    response.on_chunks = splicer(self._client, reader, renderer, self._meter, gaps)
                    has_shortcut = response.on_chunks is not None
                return
            is_silent = False
            self._take(piece, reader, response)
            if not self._splices:
                response.on_chunks = None

        def on_resume() -> None:
            self._meter.last_piece = self._context.clock()
            self.check_at = 0.0
            response.resume()

        self._client.on_pause, self._client.on_resume = response.pause, on_resume
        if self._client.paused:
            response.pause()
        try:
            await response.stream(on_piece)
            if not (reader.done or (self._stops is not None and self._stops.found is not None)):
                self._deliver(reader.end())
        except TransportError as fault:
            if is_silent:  # the head of a stream is not an answer: vLLM sends it before it has queued the request
                raise TransportError(fault.fault) from fault
            # What has arrived counts as an answer: Ollama's last line may need no line end.
            raise upstream_error(fault) from fault
        if renderer is not None:
            await self._end_stream(renderer)
        else:
            collected = self._collected or Assembler()
            is_long = collected.text_length > LONG_TEXT or collected.logprob_count > LONG_LOGPROBS
            if is_long:
                await self._answer_in_turns(collected.answer())
            else:
                self._answer_json(self._rendered(collected.answer()))

    async def _end_stream(self, renderer: StreamRenderer) -> None:
        if (steps := renderer.end_steps(self._timings)) is None:
            self._client.write(renderer.end(self._timings))
        else:
            self._meter.end_upstream()
            for part in await in_turns(steps):
                self._client.write(part)
        self._client.end()

    def _unseen_tokens(self) -> int:
        """Estimate what was generated of an answer that was to arrive as a whole."""
        meter, limit = self._meter, self._chat.token_limit
        if self._is_streamed_upstream or meter.sent is None or meter.usage is not None or limit is None:
            return 0
        return min(limit, int((self._context.clock() - meter.last_piece) * UNSEEN_TOKENS_PER_SECOND))

    # Stream back

    def _take(self, piece: bytes, reader: ResponseReader, response: Connection) -> None:
        if self._renderer is None:
            self._collected_bytes += len(piece)
            if self._collected_bytes > MAX_ANSWER:
                raise UpstreamError("too_large")
        deltas = reader.feed(piece)
        if deltas:
            self._deliver(deltas)
        if reader.failure is not None:
            raise reader.failure
        if reader.surplus:
            response.mark_unusable()
        if reader.done:
            response.stop()
        elif self._stops is not None and self._stops.found is not None:
            response.mark_unusable()  # the engine goes on; closing the connection ends it
            response.stop()

    def _deliver(self, deltas: list[Delta]) -> None:
        meter = self._meter
        is_first = meter.first_piece is None
        meter.piece(sum(1 for delta in deltas if delta.is_piece))
        if (usage := deltas[-1].usage) is not None:
            meter.usage = usage.counts if isinstance(usage, TimedUsage) else usage
        if is_first:
            self.check_at = 0.0
            self._ticket.first_token()
            self._note_first_token()
            assert self._server is not None
            if self._server.circuit.is_troubled:
                self._server.circuit.begin_answer()
            placement = self._ticket.placement
            if placement is not None and placement.gate.restrains:
                placement.gate.begin_answer()
        deltas = self._normalized(deltas)
        if self._stops is not None:
            deltas = self._until_stop(deltas, self._stops)
        renderer = self._renderer
        if renderer is None:
            self._collect(deltas)
            return
        if not self._started:
            self._start(self._form.stream_lines)
            self._client.write(renderer.opening())
        self._client.write(b"".join([renderer.render(delta) for delta in deltas]))

    def _collect(self, deltas: list[Delta]) -> None:
        collected = self._collected
        if collected is None:
            collected = self._collected = Assembler()
        collected.add(deltas)
        collected.check_size()

    def _until_stop(self, deltas: list[Delta], stops: StopMatcher) -> list[Delta]:
        """Return the deltas before a stop sequence, and at one the end of the answer.

        The counts of an engine that is stopped never come. Each piece is about a token, and the
        prompt's tokens are estimated.
        """
        if stops.found is not None:
            return []
        shown = stops.feed(deltas)
        if stops.found is not None:
            counted = self._meter.usage
            prompt = max(1, estimated_tokens(self._chat.messages)) if counted is None else counted.prompt_tokens
            self._meter.usage = usage = Usage(prompt, stops.pieces)
            shown.append(Delta(usage=usage))
        return shown

    def _normalized(self, deltas: list[Delta]) -> list[Delta]:
        if self._is_passthrough:
            return deltas
        if self._normalizer is None:
            if not Normalizer.is_needed(self._chat, deltas):
                self._is_passthrough = True
                self._splices = self._around_text is not None
                return deltas
            self._normalizer = Normalizer(self._chat)
        normalized = self._normalizer.normalize(deltas)
        self._splices = self._normalizer.passes and self._around_text is not None
        if not normalized:
            self._silent_since = self._silent_since or self._meter.last_piece
        else:
            self._silent_since = None
        return normalized

    async def _normalized_in_turns(self, delta: Delta) -> list[Delta]:
        """Normalise a long plain answer: its log probabilities take longest, and come in slices."""
        logprobs, delta.logprobs = delta.logprobs, None
        deltas: list[Delta] = []
        for run in logprob_runs(logprobs or []):
            await asyncio.sleep(0)
            if run:
                deltas += self._normalized([Delta(logprobs=run)])
        return deltas + self._normalized([delta])

    def _rendered(self, answer: Answer) -> bytes:
        """Render the whole answer, once nothing more of it comes."""
        self._meter.end_upstream()
        request = self._request
        return self._form.answer(request.answer_id, request.created, answer, self._timings)

    async def _answer_in_turns(self, answer: Answer) -> None:
        """Render a long answer in steps, and send it."""
        self._meter.end_upstream()
        request = self._request
        steps = self._form.answer_steps(request.answer_id, request.created, answer, self._timings)
        self._answer_json(await in_turns(steps))

    def _trailing_error(self, error: GatewayError) -> bytes:
        return super()._trailing_error(error) if self._renderer is None else self._renderer.error(error)

    # Time

    def _keepalive_after(self) -> float:
        return super()._keepalive_after() if self._renderer is None else self._context.commit_after

    def _active_until(self) -> float:
        if self._renderer is None or self._meter.first_piece is None:
            return -math.inf
        last_shown = self._meter.last_piece if self._silent_since is None else self._silent_since
        return last_shown + self._keepalive_after()

    def _send_keepalive(self) -> None:
        if self._renderer is None:
            super()._send_keepalive()
        elif not self._client.paused:
            note = self._context.waiting_note and self._ticket.is_queued
            if not self._started:
                self._start(self._form.stream_lines)
                self._client.write(self._renderer.opening())
            elif not note:
                self._client.write(self._renderer.keepalive())
            if note:
                text = waiting_note(self._ticket.wait_estimate(), is_waking=self._backend.turn == "waking")
                self._client.write(self._renderer.render(Delta(reasoning=text)))

    def _attribution(self) -> Attribution | None:
        request, is_vision = self._request, self._lane == "vision"
        if not (request.claim.person or is_vision):
            return None
        images = sum(len(message.images) for message in request.chat.messages) if is_vision else 0
        return Attribution(self._person(), images)


def waiting_note(estimate: WaitEstimate, *, is_waking: bool = False) -> str:
    """Return the note that tells a person the position in the queue and the expected wait.

    `is_waking` means that the engine does not have the GPU yet.
    """
    if estimate.is_loading:
        return "The model is loading.\n"
    if is_waking:
        about = "" if estimate.seconds is None else f", about {_duration(estimate.seconds)} to wait"
        return f"The model's engine is starting: queued at position {estimate.position}{about}.\n"
    if estimate.seconds is None:
        return f"Queued at position {estimate.position}.\n"
    return f"Queued at position {estimate.position}, about {_duration(estimate.seconds)} to wait.\n"


def _duration(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds <= 90 else f"{math.ceil(seconds / 60)} min"
