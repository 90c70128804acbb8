"""Several choices (`n`) or several prompts: as many exchanges with the backends, and one answer.

Each choice is a `ChatRelay` of its own, with its own ticket in the queue, failover and deadlines, on
either engine. So limits count what an engine really does, and a roll-out moves queued choices as it
moves any request. A vLLM computes the common prompt once (prefix caching). The client's exchange is
one, so there is one record of it.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs

from gateway.body_memory import HeldBody, shares
from gateway.chat.answer import CachedUsage, Usage
from gateway.chat.completion import Completion
from gateway.chat.request import Chat
from gateway.dialects.dialect import ChoiceForm, ChoicesForm
from gateway.dialects.long_answers import is_long
from gateway.errors import ClientLeft, Crash, GatewayError
from gateway.keys.hold import Hold
from gateway.relay.chat import ChatRelay
from gateway.relay.requests import ClientConnection
from gateway.relay.turns import in_turns
from gateway.telemetry.exchange import Attribution, Exchange

MakeRelay = Callable[["ChoiceConnection", Chat, ChoiceForm], ChatRelay]
"""Returns the relay of one choice, for the route that the roll-out chooses at that moment."""


def chats_of(chat: Chat) -> list[Chat]:
    """Return a chat for each choice, the choices of each prompt one after the other.

    With a seed, each choice of a prompt has another one, as vLLM does it.
    """
    if isinstance(chat, Completion) and len(chat.messages) > 1:
        return [choice for prompt in chat.for_each_prompt() for choice in chats_of(prompt)]
    one = structs.replace(chat, n=None)
    if chat.seed is None:
        return [one] * (chat.n or 1)
    return [structs.replace(one, seed=_wrapped(chat.seed + index)) for index in range(chat.n or 1)]


def _wrapped(seed: int) -> int:
    return seed if seed < 1 << 63 else seed - (1 << 64)


class ChoiceConnection:
    """The client's connection as one choice sees it: what is written goes to the one answer."""

    def __init__(self, choices: "ChoicesRelay", client: ClientConnection) -> None:
        self._choices = choices
        self._client = client
        self.gone = client.gone
        self.paused = client.paused
        self.notes: dict[str, Any] = {}
        self.on_leave: Callable[[], None] | None = None
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.header_lines = b""
        """Header lines of the answer or error of this choice."""

    @property
    def fields(self) -> Mapping[bytes, bytes]:
        return self._client.fields

    def whole_body(self) -> bytes | None:
        return None

    def open(self, status: int, header_lines: bytes) -> None:
        self._choices.open(header_lines)

    def write(self, data: bytes) -> None:
        self._choices.write(data)

    def chunk_line(self, size: int) -> None:
        """Return None: the pieces of one choice are written by `write` alone."""

    def write_chunk(self, chunk: bytes) -> None:
        raise AssertionError("the pieces of a choice are not framed")

    def end(self) -> None:
        pass

    def answer(self, status: int, header_lines: bytes, body: bytes | list[bytes]) -> None:
        self.header_lines = header_lines

    def leave(self) -> None:
        self.gone = True
        if self.on_leave is not None:
            self.on_leave()

    def pause(self) -> None:
        self.paused = True
        if self.on_pause is not None:
            self.on_pause()

    def resume(self) -> None:
        self.paused = False
        if self.on_resume is not None:
            self.on_resume()


class ChoicesRelay:
    """One answer with several choices. `await relay(held)` answers the client, like any relay.

    The first choice that fails ends the others, and the client gets its error.
    """

    def __init__(
        self,
        client: ClientConnection,
        chats: Sequence[Chat],
        form: ChoicesForm,
        id: str,
        created: int,
        make: MakeRelay,
        hold: Hold | None,
    ) -> None:
        self._client = client
        self._chats = chats
        self._form = form
        self._id = id
        self._created = created
        self._make = make
        self._hold = hold
        self._choices = [form.choice(index) for index in range(len(chats))]
        self._connections = [ChoiceConnection(self, client) for _ in chats]
        self._is_open = False
        self._failed: int | None = None
        """Index of the first choice that failed."""
        self._error: GatewayError | None = None
        self._exchanges: dict[int, Exchange] = {}
        """Records of the choices by their index."""
        self._attribution: Attribution | None = None
        self._on_exchange: Callable[[Exchange, Attribution | None], None] = lambda exchange, attribution: None

    def __repr__(self) -> str:
        return f"<ChoicesRelay of {len(self._chats)}>"

    async def __call__(self, held: HeldBody) -> None:
        client = self._client
        client.on_leave = self._leave
        client.on_pause, client.on_resume = self._pause, self._resume
        try:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, share in enumerate(shares(held, len(self._chats))):
                        group.create_task(self._run(index, share))
            finally:
                client.on_leave = client.on_pause = client.on_resume = None
            await self._finish()
        finally:
            self._record()

    async def _run(self, index: int, held: HeldBody) -> None:
        """Run one choice to its end. The route is chosen and the queue is joined without an await.

        The choices share the chat, so they share the memory that is counted for it.
        """
        if self._failed is not None:
            held.release()
            return
        choice = self._choices[index]
        try:
            relay = self._make(self._connections[index], self._chats[index], choice)
        except GatewayError as error:
            choice.error = error
        else:
            self._on_exchange, relay.on_exchange = relay.on_exchange, partial(self._keep, index)
            await relay(held)
        finally:
            held.release()
        if choice.is_complete or self._failed is not None:
            return
        self._failed, self._error = index, choice.error or (ClientLeft() if self._client.gone else Crash())
        for connection in self._connections:
            connection.leave()

    # The answer

    def open(self, header_lines: bytes) -> None:
        if not self._is_open and self._failed is None:
            self._is_open = True
            self._client.open(200, header_lines)

    def write(self, data: bytes) -> None:
        if data and self._failed is None:
            self._client.write(data)

    async def _finish(self) -> None:
        client, form, error = self._client, self._form, self._error
        if isinstance(error, ClientLeft) or client.gone:
            return
        usage = _total(self._chats, [choice.usage for choice in self._choices])
        if error is None and form.is_stream:
            client.write(form.choices_end(self._id, self._created, usage))
        elif error is None:
            body = await self._rendered(usage)
            if not self._is_open:
                client.answer(200, self._connections[0].header_lines, body)
                return
            for part in body if isinstance(body, list) else (body,):
                client.write(part)
        elif self._is_open:
            client.write(form.choices_error(error))
        else:
            lines = self._connections[self._failed or 0].header_lines
            client.answer(form.error_status(error), lines, form.error_body(error))
            return
        client.end()

    async def _rendered(self, usage: Usage | None) -> bytes | list[bytes]:
        answers = [choice.whole for choice in self._choices]
        if is_long(answers):
            return await in_turns(self._form.choices_answer_steps(self._id, self._created, answers, usage))
        return self._form.choices_answer(self._id, self._created, answers, usage)

    def _keep(self, index: int, exchange: Exchange, attribution: Attribution | None = None) -> None:
        """Keep the record of one choice. All choices have the same person and images."""
        self._exchanges[index] = exchange
        self._attribution = attribution

    def _record(self) -> None:
        """Record the exchange, if a choice has begun: as the choice that failed, or the one that took longest.

        The first token is the earliest of all choices, and the tokens are those of all of them.
        """
        if not self._exchanges:
            return
        exchanges, error = list(self._exchanges.values()), self._error
        record = max(exchanges, key=lambda exchange: exchange.duration)
        if self._failed is not None and self._failed in self._exchanges:
            record = self._exchanges[self._failed]
        elif error is not None:
            status = self._form.error_status(error)
            record = structs.replace(record, status=status, code=error.code, outcome=error.outcome)
        chats = [self._chats[index] for index in self._exchanges]
        usage = _total(chats, [one.usage for one in exchanges])
        if self._hold is not None:
            told = 0 if usage is None else usage.prompt_tokens
            self._hold.count_prompts_once(told, are_all_told=all(one.usage is not None for one in exchanges))
        first_tokens = [one.time_to_first_token for one in exchanges if one.time_to_first_token is not None]
        self._on_exchange(
            structs.replace(
                record,
                moved=any(one.moved for one in exchanges),
                empty=all(one.empty for one in exchanges),
                time_to_first_token=min(first_tokens, default=None),
                usage=usage,
                sent_tokens=sum(one.sent_tokens for one in exchanges),
                attempts=sum(one.attempts for one in exchanges),
            ),
            self._attribution,
        )

    # The client

    def _leave(self) -> None:
        for connection in self._connections:
            connection.leave()

    def _pause(self) -> None:
        for connection in self._connections:
            connection.pause()

    def _resume(self) -> None:
        for connection in self._connections:
            connection.resume()


def _total(chats: Sequence[Chat], usages: Sequence[Usage | None]) -> Usage | None:
    """Return the usage of one answer: each prompt counts once, as at OpenAI and vLLM.

    Of a prompt's cached tokens the least counts: the other choices have found what the first one left.
    """
    prompts: dict[int, int] = {}
    cached: dict[int, int] = {}
    completion = 0
    for chat, usage in zip(chats, usages, strict=True):
        if usage is not None:
            prompt = id(chat.messages)
            prompts[prompt] = max(prompts.get(prompt, 0), usage.prompt_tokens)
            completion += usage.completion_tokens
            if isinstance(usage, CachedUsage):
                cached[prompt] = min(cached.get(prompt, usage.cached_tokens), usage.cached_tokens)
    if not prompts:
        return None
    total = sum(prompts.values())
    return CachedUsage(total, completion, sum(cached.values())) if cached else Usage(total, completion)
