"""Capability probes of the preflight check: tries a model on a backend with a few tiny requests.

A probe queues like any other request, with batch priority, so that clients go first. It counts in
no metric, moves no circuit breaker and does not fail over. Only the shape of an answer is judged,
never its words: a random or a small model may say anything.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import orjson
from msgspec import Struct

from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.chat.answer import Answer, Delta, assemble
from gateway.chat.message import ImagePart, ImageUrl, Message, RefusalPart, Role, TextPart
from gateway.chat.normalizer import THOUGHT_CLOSES, THOUGHT_OPENS, Normalizer
from gateway.chat.parameter_policy import ParameterPolicy
from gateway.chat.request import Chat, NamedSchema, SchemaFormat
from gateway.chat.tools import Choice, ChosenFunction, Function, Tool
from gateway.engines.engine import MAX_REFUSAL
from gateway.errors import (
    BackendUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    UpstreamError,
)
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destination
from gateway.upstream.backend import Backend
from gateway.upstream.failures import NO_FIRST_PIECE, check_headers, upstream_error
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

KEY = "preflight"
"""Key of the probes in the fair queue. No API key has an id of this form."""

MAX_ANSWER = 1024 * 1024
"""Bytes. So few tokens take less, whatever a server wraps them in."""

ANSWER_TOKENS, SHAPE_TOKENS = 24, 48
"""Enough for reasoning to begin, and for an object with one field to end."""

CHECK_SECONDS = 0.5
"""Interval at which a pending probe checks whether health checks have found its servers down."""

MAX_RELAXATIONS = 2
"""Number of times that a refused request is relaxed and sent again."""

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAT0lEQVR42u3PQQkAAAgEsEty/aMYywi+hcEKLNO+"
    "FgEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQGBywLKp0DxvxLbjwAAAABJRU5ErkJggg=="
)
"""64 × 64 red pixels: models of the Qwen family accept nothing under 32."""

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FUNCTION = Function("report", "Reports whether all is well.", SCHEMA)


class Trait(Struct, frozen=True):
    """One capability of one side, in a few words. `has` is None if it is unknown."""

    has: bool | None
    value: str


Traits = dict[str, Trait]
"""Traits by name: `answers`, `streaming`, `usage`, `reasoning`, `tools`, `forced_tools`,
`structured_output`, `vision`, `parameters`, `conversations`. If the probes did not reach all of them, `unfinished`
says why."""

NOT_FOLLOWED, NONE_SEEN, IN_TEXT = "not followed", "none seen", "in the answer's text"
YES = Trait(True, "yes")
DROPPED = Trait(None, "the tier drops it")
JOINED = Trait(True, "with joined turns")


class _ProbeAnswer(Struct):
    """An answer as a client would see it, and whether the engine had separated the reasoning."""

    answer: Answer
    reasoning: Trait


class _Unfinished(Exception):
    """The probes cannot go on; `trait` says why."""

    def __init__(self, has: bool | None, value: str) -> None:
        super().__init__(value)
        self.trait = Trait(has, value)


def reported_trait(backend: Backend, model: str, capability: str) -> Trait:
    """Return whether `backend` reports `capability`, as Ollama names it, for `model`."""
    known = next((found for server in backend.servers if (found := server.facts(model).capabilities) is not None), None)
    return Trait(None, "not reported") if known is None else YES if capability in known else Trait(False, "no")


class CapabilityProbe:
    """Probes one model on one backend, until `deadline` at most, on the event loop's clock."""

    def __init__(
        self, context: RelayContext, destination: Destination, params: ParameterPolicy, deadline: float
    ) -> None:
        self._context = context
        self._destination = destination
        self._backend = destination.backend
        self._params = params
        self._deadline = deadline
        self._is_sent = False
        self._has_started = False
        self._has_joined = False
        """True if the last request was sent again with other messages, after a refusal."""

    async def run(self) -> Traits:
        """Return the traits that could be determined; only `answers` if there is no answer."""
        traits: Traits = {}
        try:
            await self._probe_stream(traits)
            if "usage" in traits:
                await self._probe_capabilities(traits)
        except _Unfinished as unfinished:
            traits["unfinished" if "answers" in traits else "answers"] = unfinished.trait
        return traits

    async def _probe_stream(self, traits: Traits) -> None:
        """Probe a plain stream, which most programs use. This first request may load the model."""
        try:
            probed = await self._ask(_chat("Say hello."), ANSWER_TOKENS)
        except GatewayError as error:
            traits["answers"] = Trait(self._has_started, "yes" if self._has_started else _reason(error))
            if self._has_started:
                traits["streaming"] = Trait(False, f"breaks off ({_reason(error)})")
            return
        traits["answers"] = traits["streaming"] = YES
        usage = probed.answer.usage
        traits["usage"] = YES if usage is not None and usage.completion_tokens else Trait(False, "none")
        traits["reasoning"] = probed.reasoning

    async def _probe_capabilities(self, traits: Traits) -> None:
        tools = [Tool(FUNCTION, "function")]
        traits["tools"] = await self._accepted(
            _chat("Report.", tools=tools, tool_choice="auto"), lambda chat: bool(chat.offered)
        )
        forced = _chat("Report.", tools=tools, tool_choice=Choice(ChosenFunction(FUNCTION.name)))
        traits["forced_tools"] = await self._conforms(forced, lambda chat: bool(chat.forced), _is_call)
        schema = SchemaFormat(NamedSchema("report", SCHEMA, strict=True))
        asked = _chat("Is all well? Answer in JSON.", response_format=schema)
        traits["structured_output"] = await self._conforms(
            asked, lambda chat: chat.response_format is not None, _is_structured
        )
        traits["parameters"] = await self._accepted(_sampled())
        traits["conversations"] = await self._conversations()
        traits["vision"] = await self._vision()

    # One capability

    async def _accepted(self, chat: Chat, applies: Callable[[Chat], bool] = lambda chat: True) -> Trait:
        """Return whether the backend accepts the request."""
        return await self._probe(chat, 1, applies, lambda answer: True)

    async def _conversations(self) -> Trait:
        """Return whether turns are accepted that some chat templates refuse, and how."""
        found = await self._accepted(_conversation())
        return JOINED if found.has and self._has_joined else found

    async def _vision(self) -> Trait:
        """Return whether images are accepted. The backend's own report is used if there is one.

        Probes with images might wait in a long queue.
        """
        reported = reported_trait(self._backend, self._destination.route.model, "vision")
        return (
            await self._accepted(_chat([TextPart("What is it?"), ImagePart(ImageUrl(IMAGE))]))
            if reported.has is None
            else reported
        )

    async def _conforms(
        self, chat: Chat, applies: Callable[[Chat], bool], conforms: Callable[[Answer], bool | None]
    ) -> Trait:
        """Return whether the answer has the shape that was asked for.

        Reasoning is turned off, since it would use up the tokens. Servers of kind `openai` may
        refuse that parameter, so they do not get it.
        """
        if self._backend.kind != "openai":
            chat = msgspec.structs.replace(chat, reasoning_effort="none")
        return await self._probe(chat, SHAPE_TOKENS, applies, conforms)

    async def _probe(
        self, chat: Chat, tokens: int, applies: Callable[[Chat], bool], conforms: Callable[[Answer], bool | None]
    ) -> Trait:
        if not applies(self._params.apply(chat)):
            return DROPPED
        try:
            probed = await self._ask(chat, tokens)
        except GatewayError as error:
            return Trait(False if isinstance(error, InvalidRequest) else None, _reason(error))
        has = conforms(probed.answer)
        return Trait(has, "not seen in so few tokens" if has is None else "yes" if has else NOT_FOLLOWED)

    # One request

    async def _ask(self, chat: Chat, tokens: int) -> _ProbeAnswer:
        """Send one request and return its answer.

        Raises:
            _Unfinished: no time is left, or there is no room.
            GatewayError: the error that a client would get.
        """
        chat = self._params.apply(msgspec.structs.replace(chat, max_tokens=tokens, stream=True))
        chat = msgspec.structs.replace(
            chat, max_tokens=None, max_completion_tokens=min(tokens, chat.token_limit or tokens)
        )
        seconds = max(0.0, self._deadline - self._context.loop.time())
        self._is_sent = self._has_started = self._has_joined = False
        try:
            async with asyncio.timeout(seconds):
                deltas = await self._while_alive(self._queue_and_send(chat, seconds))
        except (QueueTimeout, QueueFull):
            raise _Unfinished(None, "busy: no slot came free in time") from None
        except BackendUnavailable:
            raise _Unfinished(None, "it reports that it is full") from None
        except TimeoutError:
            if not self._is_sent:
                raise _Unfinished(None, "busy: no slot came free in time") from None
            raise _Unfinished(False, f"{'no end' if self._has_started else NO_FIRST_PIECE} in time") from None
        reasoning = _reasoning(deltas)  # before the normaliser changes the deltas
        return _ProbeAnswer(assemble(Normalizer(chat).normalize(deltas)), reasoning)

    async def _while_alive(self, work: Coroutine[Any, Any, list[Delta]]) -> list[Delta]:
        """Return the result of `work`.

        Raises:
            _Unfinished: health checks have found every server down in the meantime.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait((task,), timeout=CHECK_SECONDS))[0]:
                if self._backend.availability.is_down(self._destination.route.model):
                    raise _Unfinished(False, "does not answer")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _queue_and_send(self, chat: Chat, seconds: float) -> list[Delta]:
        queue = self._destination.queues["vision" if chat.has_images else "text"]
        with Ticket(self._backend.admission, queue, Claim(KEY, is_batch=True, timeout=max(0.0, seconds))) as ticket:
            if ticket.placement is None:
                await ticket.wait()
            self._is_sent = True
            server = ticket.server
            assert isinstance(server, Server)
            for _ in range(MAX_RELAXATIONS):
                try:
                    return await self._exchange(chat, server, ticket.first_token)
                except InvalidRequest as refusal:
                    relaxed = self._backend.engine.relaxed(chat, refusal)
                    if relaxed is None:
                        raise
                    self._has_joined = self._has_joined or relaxed.messages is not chat.messages
                    chat = relaxed
            return await self._exchange(chat, server, ticket.first_token)

    async def _exchange(self, chat: Chat, server: Server, on_first_token: Callable[[], None]) -> list[Delta]:
        engine, model = self._backend.engine, self._destination.route.model
        body = engine.render(chat, model, server.facts(model), True)
        reader = engine.reader()
        deltas: list[Delta] = []
        size = 0

        def on_piece(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            if size > MAX_ANSWER:
                raise UpstreamError("too_large")
            deltas.extend(reader.feed(piece))
            if deltas and not self._has_started:
                self._has_started = True
                on_first_token()
            if reader.failure is not None:
                raise reader.failure
            if reader.done:
                response.stop()

        try:
            with await server.pool.request(server.chat_head(b"", self._context.gateway_id), body) as response:
                if response.status != 200:
                    raise engine.client_error(response.status, await response.read(MAX_REFUSAL))
                check_headers(response, engine.stream_type)
                await response.stream(on_piece)
                if not reader.done:
                    deltas.extend(reader.end())
        except TransportError as fault:
            raise upstream_error(fault) from fault
        return deltas


def _chat(content: str | list[TextPart | ImagePart | RefusalPart], **more: Any) -> Chat:
    return Chat(model=KEY, messages=[Message("user", content)], **more)


def _sampled() -> Chat:
    """Return a chat with the parameters that programs commonly send."""
    return _chat(
        "Say hello.",
        temperature=0.5,
        top_p=0.9,
        seed=1,
        stop=["###"],
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logprobs=True,
        top_logprobs=2,
    )


def _conversation() -> Chat:
    """Return a chat with late system messages, and with roles that do not take turns."""
    roles: tuple[Role, ...] = ("system", "system", "user", "assistant", "system", "user", "user")
    return Chat(model=KEY, messages=[Message(role, "Hello.") for role in roles])


def _reason(error: GatewayError) -> str:
    """Describe `error` in a few words, without the server's own."""
    if isinstance(error, UpstreamError):
        return f"fails ({error.reason})"
    if isinstance(error, ModelNotFound):
        return "the model is missing"
    return f"refused ({error.code}{f', {error.param}' if error.param else ''})"


def _reasoning(deltas: list[Delta]) -> Trait:
    content = "".join(delta.content for delta in deltas)
    if any(delta.reasoning for delta in deltas):
        return Trait(True, "separate")
    if content.lstrip().startswith(THOUGHT_OPENS) or THOUGHT_CLOSES in content:
        return Trait(False, IN_TEXT)
    return Trait(None, NONE_SEEN)


def _is_call(answer: Answer) -> bool | None:
    """Return whether the function was called with an object; None if cut off before that."""
    if not answer.calls:
        return None if answer.finish == "length" and not answer.content else False
    return answer.calls[0].name == FUNCTION.name and _is_object(answer.calls[0].arguments, answer)


def _is_structured(answer: Answer) -> bool | None:
    return _is_object(answer.content, answer)


def _is_object(text: str, answer: Answer) -> bool | None:
    text = text.lstrip()
    if answer.finish == "length":  # it was cut off
        return text.startswith("{") if text else None
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
