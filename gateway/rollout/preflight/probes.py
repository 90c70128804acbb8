"""Tries a model on a backend with a handful of tiny requests, for the preflight: what comes back, and what is refused.

A request takes its place in the line as any other does, with the priority of a batch, so that clients go first. It counts in no metric, moves no
circuit and goes nowhere else when it fails. What the model says is not looked at, only its shape: a random or a small one says anything.
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
from gateway.chat.normalizer import THOUGHT_CLOSES, THOUGHT_OPENS, Normalizer
from gateway.chat.parameter_policy import ParameterPolicy
from gateway.chat.request import (
    Chat,
    Choice,
    ChosenFunction,
    Function,
    ImagePart,
    ImageUrl,
    Message,
    NamedSchema,
    RefusalPart,
    SchemaFormat,
    TextPart,
    Tool,
)
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
from gateway.upstream.connection import WireError
from gateway.upstream.failures import check_headers, upstream_error
from gateway.upstream.server import Server

KEY = "preflight"
"""Whose turn it is in the line; no key's id is of this form."""

MAX_ANSWER = 1024 * 1024
"""Bytes; so few tokens take no more, whatever a server wraps them in."""

ANSWER_TOKENS, SHAPE_TOKENS = 24, 48
"""Enough to see a thought begin, and to end an object of one field."""

LOOK_SECONDS = 0.5
"""How often a request that is not answered is asked about at the probes."""

AMENDMENTS = 2
"""Other ways of asking that are tried."""

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAT0lEQVR42u3PQQkAAAgEsEty/aMYywi+hcEKLNO+FgEBAQEB"
    "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQGBywLKp0DxvxLbjwAAAABJRU5ErkJggg=="
)
"""64 × 64 pixels of red: models of the Qwen family take nothing under 32."""

OBJECT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FUNCTION = Function("report", "Reports whether all is well.", OBJECT)


class Trait(Struct, frozen=True):
    """What is known of one side in one matter: `has` is None where it is not known, `value` says it in a few words."""

    has: bool | None
    value: str


Traits = dict[str, Trait]
"""By the matter: `answers`, `streaming`, `usage`, `reasoning`, `tools`, `forced_tools`, `structured_output`, `vision`, `parameters`; where there
was no time for all, `unfinished` says why."""

NOT_FOLLOWED, NONE_SEEN, IN_TEXT = "not followed", "none seen", "in the answer's text"
YES = Trait(True, "yes")
DROPPED = Trait(None, "the tier drops it")


class _ProbeAnswer(Struct):
    """An answer as a client would be shown it, and whether the engine had told thought from speech."""

    shown: Answer
    thought: Trait


class _Stopped(Exception):
    """Nothing more can be found out now; `trait` says why."""

    def __init__(self, has: bool | None, value: str) -> None:
        super().__init__(value)
        self.trait = Trait(has, value)


def reported_trait(backend: Backend, model: str, capability: str) -> Trait:
    """Whether `model` has what Ollama calls by that word, by the word of `backend`."""
    known = next((told for server in backend.servers if (told := server.facts(model).capabilities) is not None), None)
    return Trait(None, "not told") if known is None else YES if capability in known else Trait(False, "no")


class CapabilityProbe:
    """One model on one backend. `deadline` is on the loop's clock: nothing waits longer."""

    def __init__(
        self, context: RelayContext, destination: Destination, params: ParameterPolicy, deadline: float
    ) -> None:
        self._context = context
        self._destination = destination
        self._backend = destination.backend
        self._params = params
        self._deadline = deadline
        self._is_sent = False
        self._has_spoken = False

    async def run(self) -> Traits:
        """What could be found out; where the backend does not answer, that alone."""
        traits: Traits = {}
        try:
            await self._begin(traits)
            if "usage" in traits:
                await self._go_on(traits)
        except _Stopped as stop:
            traits["unfinished" if "answers" in traits else "answers"] = stop.trait
        return traits

    async def _begin(self, traits: Traits) -> None:
        """A plain stream, as most programs ask for it. It is the first request, and may find the model not loaded."""
        try:
            said = await self._ask(_chat("Say hello."), ANSWER_TOKENS)
        except GatewayError as error:
            traits["answers"] = Trait(self._has_spoken, "yes" if self._has_spoken else _reason(error))
            if self._has_spoken:
                traits["streaming"] = Trait(False, f"breaks off ({_reason(error)})")
            return
        traits["answers"] = traits["streaming"] = YES
        usage = said.shown.usage
        traits["usage"] = YES if usage is not None and usage.completion_tokens else Trait(False, "none")
        traits["reasoning"] = said.thought

    async def _go_on(self, traits: Traits) -> None:
        tools = [Tool(FUNCTION, "function")]
        traits["tools"] = await self._taken(
            _chat("Report.", tools=tools, tool_choice="auto"), lambda chat: bool(chat.offered)
        )
        forced = _chat("Report.", tools=tools, tool_choice=Choice(ChosenFunction(FUNCTION.name), "function"))
        traits["forced_tools"] = await self._shaped(forced, lambda chat: bool(chat.forced), _is_call)
        schema = SchemaFormat(NamedSchema("report", OBJECT, strict=True))
        asked = _chat("Is all well? Answer in JSON.", response_format=schema)
        traits["structured_output"] = await self._shaped(
            asked, lambda chat: chat.response_format is not None, _is_structured
        )
        traits["parameters"] = await self._taken(_sampled())
        traits["vision"] = await self._vision()

    # One matter

    async def _taken(self, chat: Chat, applies: Callable[[Chat], bool] = lambda chat: True) -> Trait:
        """Whether the request is taken at all."""
        return await self._tried(chat, 1, applies, lambda answer: True)

    async def _vision(self) -> Trait:
        """Where the backend tells, it is not asked: images may stand in a long line of their own."""
        told = reported_trait(self._backend, self._destination.route.model, "vision")
        return (
            await self._taken(_chat([TextPart("What is it?"), ImagePart(ImageUrl(PICTURE))]))
            if told.has is None
            else told
        )

    async def _shaped(
        self, chat: Chat, applies: Callable[[Chat], bool], fits: Callable[[Answer], bool | None]
    ) -> Trait:
        """Whether the answer has the shape that was asked for. A thought would use up the tokens; other servers may refuse the word."""
        if self._backend.kind != "openai":
            chat = msgspec.structs.replace(chat, reasoning_effort="none")
        return await self._tried(chat, SHAPE_TOKENS, applies, fits)

    async def _tried(
        self, chat: Chat, tokens: int, applies: Callable[[Chat], bool], fits: Callable[[Answer], bool | None]
    ) -> Trait:
        if not applies(self._params.apply(chat)):
            return DROPPED
        try:
            said = await self._ask(chat, tokens)
        except GatewayError as error:
            return Trait(False if isinstance(error, InvalidRequest) else None, _reason(error))
        has = fits(said.shown)
        return Trait(has, "not seen in so few tokens" if has is None else "yes" if has else NOT_FOLLOWED)

    # One request

    async def _ask(self, chat: Chat, tokens: int) -> _ProbeAnswer:
        """Raises `_Stopped` where no time is left or there is no room, else the error that a client would get."""
        chat = self._params.apply(msgspec.structs.replace(chat, max_tokens=tokens, stream=True))
        chat = msgspec.structs.replace(
            chat, max_tokens=None, max_completion_tokens=min(tokens, chat.token_limit or tokens)
        )
        seconds = max(0.0, self._deadline - self._context.loop.time())
        self._is_sent = self._has_spoken = False
        try:
            async with asyncio.timeout(seconds):
                raw = await self._while_alive(self._in_turn(chat, seconds))
        except (QueueTimeout, QueueFull):
            raise _Stopped(None, "busy: no slot came free in time") from None
        except BackendUnavailable:
            raise _Stopped(None, "it says that it is full") from None
        except TimeoutError:
            if not self._is_sent:
                raise _Stopped(None, "busy: no slot came free in time") from None
            raise _Stopped(False, f"{'no end' if self._has_spoken else 'no first piece'} in time") from None
        thought = _thought(raw)  # before the deltas are shaped, which changes them
        return _ProbeAnswer(assemble(Normalizer(chat).normalize(raw)), thought)

    async def _while_alive(self, work: Coroutine[Any, Any, list[Delta]]) -> list[Delta]:
        """Raises `_Stopped` when the probes have found every server dead: nobody need wait on."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait((task,), timeout=LOOK_SECONDS))[0]:
                if self._backend.is_down(self._destination.route.model):
                    raise _Stopped(False, "does not answer")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _in_turn(self, chat: Chat, seconds: float) -> list[Delta]:
        queue = self._destination.queues["vision" if chat.has_images else "text"]
        with Ticket(self._backend.admission, queue, Claim(KEY, is_batch=True, timeout=max(0.0, seconds))) as ticket:
            if ticket.placement is None:
                await ticket.wait()
            self._is_sent = True
            server = ticket.server
            assert isinstance(server, Server)
            for _ in range(AMENDMENTS):
                try:
                    return await self._exchange(chat, server, ticket.first_token)
                except InvalidRequest as refusal:
                    relaxed = self._backend.engine.relaxed(chat, refusal)
                    if relaxed is None:
                        raise
                    chat = relaxed
            return await self._exchange(chat, server, ticket.first_token)

    async def _exchange(self, chat: Chat, server: Server, spoke: Callable[[], None]) -> list[Delta]:
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
            if deltas and not self._has_spoken:
                self._has_spoken = True
                spoke()
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
        except WireError as fault:
            raise upstream_error(fault) from fault
        return deltas


def _chat(content: str | list[TextPart | ImagePart | RefusalPart], **more: Any) -> Chat:
    return Chat(model=KEY, messages=[Message("user", content)], **more)


def _sampled() -> Chat:
    """With the parameters that programs commonly send."""
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


def _reason(error: GatewayError) -> str:
    """In a few words, without a server's own."""
    if isinstance(error, UpstreamError):
        return f"fails ({error.reason})"
    if isinstance(error, ModelNotFound):
        return "the model is not there"
    return f"refused ({error.code}{f', {error.param}' if error.param else ''})"


def _thought(raw: list[Delta]) -> Trait:
    speech = "".join(delta.content for delta in raw)
    if any(delta.reasoning for delta in raw):
        return Trait(True, "split off")
    if speech.lstrip().startswith(THOUGHT_OPENS) or THOUGHT_CLOSES in speech:
        return Trait(False, IN_TEXT)
    return Trait(None, NONE_SEEN)


def _is_call(answer: Answer) -> bool | None:
    """A call of the function, its arguments an object as far as they came."""
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
