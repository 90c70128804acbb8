"""Hub of the replicas on one machine: what they share, in the memory of the process that started them.

It holds the slots of all limits, the shared documents and the state file, and passes questions and
news from one replica to the others. It decides nothing else and knows no request.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct

from gateway.replicas.key_quotas import KeyQuotas, SavedTokens
from gateway.replicas.messages import (
    Answer,
    Answers,
    Ask,
    Asked,
    Document,
    Gave,
    Granted,
    Hello,
    Keep,
    Opened,
    Order,
    Persist,
    Persisted,
    Put,
    Quotas,
    Read,
    Serving,
    ShareLimits,
    Tell,
    Told,
    ToParent,
    Totals,
    Wants,
    Write,
    Written,
    decode_to_parent,
)
from gateway.replicas.slot_pool import SlotPool, Step
from gateway.state_file import StateFile

GRACE_SECONDS = 0.5
"""Time after a replica's death in which servers notice that the connections of its requests are closed."""

KEYS = "keys"
"""Section of the state file to which each replica adds (`api/named_keys.py`)."""

_log = logging.getLogger(__name__)


class Member(Protocol):
    """A replica as the hub sees it."""

    number: int
    name: str
    """Different from any other replica's, also after a restart."""
    is_open: bool

    def send(self, message: Struct) -> None: ...


class _Question:
    """Question that some replicas have not answered yet."""

    def __init__(self, asker: Member, number: int, expected: set[int], timer: asyncio.TimerHandle) -> None:
        self.asker = asker
        self.number = number
        self.expected = expected
        self.timer = timer
        self.answers: dict[int, Any] = {}


class Hub:
    """What the replicas share. `on_open` is called when one accepts connections.

    `documents` maps the names of shared documents to sections of the state file, which keep them
    over a restart.
    """

    def __init__(
        self, replicas: int, state: StateFile, on_open: Callable[[Member, str], None] = lambda member, active: None
    ) -> None:
        self._state = state
        self._on_open = on_open
        self._pool = SlotPool(replicas)
        self._members: dict[int, Member] = {}
        self._grants: dict[int, int] = {}
        self._documents: dict[str, tuple[int, bytes]] = {}
        self._news: dict[tuple[int, str], Told] = {}
        self._key_quotas = KeyQuotas()
        self._saved_tokens = SavedTokens()
        self._questions: dict[int, _Question] = {}
        self._last_question = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: dict[type[ToParent], Callable[[Member, Any], None]] = {
            Wants: self._take_wants,
            Gave: self._take_slots,
            Totals: self._take_totals,
            Opened: self._open,
            Ask: self._ask,
            Answer: self._take_answer,
            Tell: self._pass_on,
            Read: self._read,
            Write: self._write,
            ShareLimits: self._share_limits,
            Put: self._put,
            Persist: self._tell_when_persisted,
        }

    def __repr__(self) -> str:
        return f"<Hub of {len(self._members)} replicas, {self._pool}>"

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    # Replicas

    def join(self, member: Member, hello: Hello) -> None:
        """Greet a replica that was started."""
        self._members[member.number] = member
        self._grants[member.number] = 0
        member.send(hello)
        for told in self._news.values():
            member.send(told)

    def leave(self, member: Member) -> None:
        """Go on without a replica, which has died. Its slots are free after `GRACE_SECONDS`."""
        number = member.number
        del self._members[number]
        self._key_quotas.end(member.name)
        self._pool.leave(number)
        for key in [key for key in self._news if key[0] == number]:
            del self._news[key]
        for question in list(self._questions.values()):
            if question.asker is member:
                question.timer.cancel()
                self._questions = {key: other for key, other in self._questions.items() if other is not question}
        for identity, question in list(self._questions.items()):
            question.expected.discard(number)
            self._finish_if_complete(identity, question)
        self._count()

    def free_slots(self, number: int) -> None:
        """Free the slots of a replica that has left."""
        self._tell(self._pool.forget(number))

    def order(self, name: str) -> None:
        """Give all replicas an order: `drain`, `cut off` or `reload`."""
        for member in self.members:
            member.send(Order(name))

    def receive(self, member: Member, content: bytes) -> None:
        """Process a message of `member`."""
        message = decode_to_parent(content)
        self._handlers[type(message)](member, message)

    def _take_wants(self, member: Member, message: Wants) -> None:
        # Others were sent before the last grant arrived; the replica says anew what it wants then.
        if message.grants == self._grants[member.number]:
            self._tell(self._pool.set_wants(member.number, message.wants))

    def _take_slots(self, member: Member, message: Gave) -> None:
        self._tell(self._pool.give(member.number, message.slots))

    def _take_totals(self, member: Member, message: Totals) -> None:
        self._tell(self._pool.set_totals(member.number, message.totals))

    def _open(self, member: Member, message: Opened) -> None:
        member.is_open = True
        self._count()
        self._on_open(member, message.active)

    def _pass_on(self, member: Member, message: Tell) -> None:
        told = self._news[member.number, message.subject] = Told(member.number, message.subject, message.content)
        self._send_to_others(member, told)

    def _read(self, member: Member, message: Read) -> None:
        member.send(Document(message.number, *self._document(message.name)))

    def _share_limits(self, member: Member, message: ShareLimits) -> None:
        shares = self._key_quotas.share(member.name, message.names, message.arguments)
        member.send(Quotas(message.number, [len(self._members), *shares]))

    def _put(self, member: Member, message: Put) -> None:
        value = message.value
        if message.section == KEYS:
            value = self._saved_tokens.merged(member.name, value)
        self._state.put(message.section, value)

    def _tell_when_persisted(self, member: Member, message: Persist) -> None:
        task = asyncio.get_running_loop().create_task(self._persist(member, message.number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send_to_others(self, member: Member, message: Struct) -> None:
        for other in self.members:
            if other is not member:
                other.send(message)

    def _count(self) -> None:
        serving = sorted(member.number for member in self.members if member.is_open)
        for member in self.members:
            member.send(Serving(serving))

    def _tell(self, step: Step) -> None:
        for number, slots in step.granted.items():
            if number in self._members:
                self._grants[number] += 1
                self._members[number].send(Granted(slots))
        for number, keep in step.keep.items():
            if number in self._members:
                self._members[number].send(Keep(keep))

    # Questions

    def _ask(self, member: Member, ask: Ask) -> None:
        others = [other for other in self.members if other is not member and other.is_open]
        self._last_question += 1
        identity = self._last_question
        timer = asyncio.get_running_loop().call_later(ask.seconds, self._finish, identity)
        question = _Question(member, ask.number, {other.number for other in others}, timer)
        self._questions[identity] = question
        for other in others:
            other.send(Asked(identity, ask.subject, ask.argument))
        self._finish_if_complete(identity, question)

    def _take_answer(self, member: Member, message: Answer) -> None:
        question = self._questions.get(message.number)
        if question is not None and member.number in question.expected:
            question.expected.discard(member.number)
            question.answers[member.number] = message.answer
            self._finish_if_complete(message.number, question)

    def _finish_if_complete(self, identity: int, question: _Question) -> None:
        if not question.expected:
            self._finish(identity)

    def _finish(self, identity: int) -> None:
        question = self._questions.pop(identity, None)
        if question is not None:
            question.timer.cancel()
            question.asker.send(Answers(question.number, question.answers))

    # Documents and the state file

    def _document(self, name: str) -> tuple[int, bytes]:
        return self._documents.get(name, (0, b""))

    def _write(self, member: Member, write: Write) -> None:
        version, content = self._document(write.name)
        is_current = version == write.version
        if is_current:
            # Versions go on from the time, so that none comes again after the gateway was restarted.
            version, content = max(version + 1, time.time_ns()), write.content
            self._documents[write.name] = version, content
        member.send(Document(write.number, version, content if not is_current else b"", is_current))
        if is_current:
            for other in self.members:
                other.send(Written(write.name))

    async def _persist(self, member: Member, number: int) -> None:
        member.send(Persisted(number, await self._state.persisted()))

    async def close(self) -> None:
        """Wait until the state file is written."""
        for task in list(self._tasks):
            task.cancel()
        await self._state.close()
