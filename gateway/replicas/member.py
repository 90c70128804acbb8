"""A replica's end of the hub: slots, documents, questions to the other replicas, and the state file."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from gateway.replicas.link_down import LinkDown
from gateway.replicas.messages import (
    Answer,
    Answers,
    Ask,
    Asked,
    Channel,
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
    ToReplica,
    Totals,
    Want,
    Wants,
    Write,
    Written,
    decode_to_replica,
)
from gateway.replicas.shared_document import Snapshot, Unreachable

STORE_SECONDS = 0.5
"""Longest wait for the hub's answer about a document."""
ASK_SECONDS = 1.0
"""Longest wait for the other replicas' answers."""

Respond = Callable[[Any], Awaitable[Any]]
"""Returns the answer to a question of another replica, of types that MessagePack has."""


class SlotHolder(Protocol):
    """Part of the replica that starts requests in the slots of the hub."""

    def granted(self, slots: Mapping[str, int]) -> None:
        """Add slots to those that the replica holds."""

    def keep(self, slots: Mapping[str, int | None]) -> None:
        """Give back all unused slots beyond these, now and as requests end; None: keep all."""


class HubMember:
    """This replica among those of its machine."""

    def __init__(self) -> None:
        self.hello: Hello
        self.serving: frozenset[int] = frozenset()
        """Numbers of the replicas that serve now."""
        self.slot_holder: SlotHolder | None = None
        self.respond: dict[str, Respond] = {}
        """Answers to the questions of other replicas, by subject."""
        self.on_told: dict[str, Callable[[int, Any], None]] = {}
        """Functions for the news of other replicas, by subject; they get the replica's number."""
        self._on_order: dict[str, Callable[[], None]] = {}
        self._orders: list[str] = []
        """Orders that nobody follows yet."""
        self._channel = Channel(self._receive, self._lost)
        self._greeted = asyncio.get_running_loop().create_future()
        self._documents: dict[str, HubDocument] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._grants = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._early: list[ToReplica] = []
        self._is_started = False
        self.is_up = True
        self._handlers: dict[type[ToReplica], Callable[[Any], None]] = {
            Granted: self._take_slots,
            Keep: self._keep_slots,
            Serving: self._count,
            Asked: self._reply,
            Told: self._hear,
            Answers: lambda message: self._resolve(message.number, message.answers),
            Document: lambda message: self._resolve(message.number, message),
            Persisted: lambda message: self._resolve(message.number, message.is_persisted),
            Quotas: lambda message: self._resolve(message.number, message.answer),
            Written: self._wake,
            Order: self._follow,
        }

    def __repr__(self) -> str:
        return f"<HubMember {self.number}, serving {sorted(self.serving)}>"

    @property
    def number(self) -> int:
        """Number of this replica, from 1 on."""
        return self.hello.number

    @property
    def channel(self) -> Channel:
        """The protocol to connect to the hub's socket."""
        return self._channel

    async def greeting(self) -> Hello:
        """Wait for the hub's first message.

        Raises:
            ConnectionError: The parent is gone.
        """
        self.hello = await self._greeted
        return self.hello

    def start(self) -> None:
        """Process the messages that came since the greeting: all parts of the gateway are there now."""
        early, self._early = self._early, []
        self._is_started = True
        for message in early:
            self._process(message)

    def follow_orders(self, functions: Mapping[str, Callable[[], None]]) -> None:
        """Call these functions for the orders `drain`, `cut off`, `reload`, and `orphaned`: the parent is gone.

        Those that have come before are followed at once.
        """
        self._on_order |= functions
        orders, self._orders = self._orders, []
        for name in orders:
            self._follow(Order(name))

    def _receive(self, content: bytes) -> None:
        message = decode_to_replica(content)
        if isinstance(message, Hello):
            self._greeted.set_result(message)
        elif self._is_started:
            self._process(message)
        else:
            self._early.append(message)

    def _process(self, message: ToReplica) -> None:
        self._handlers[type(message)](message)

    def _take_slots(self, message: Granted) -> None:
        self._grants += 1
        if self.slot_holder is not None:
            self.slot_holder.granted(message.slots)

    def _keep_slots(self, message: Keep) -> None:
        if self.slot_holder is not None:
            self.slot_holder.keep(message.slots)

    def _count(self, message: Serving) -> None:
        self.serving = frozenset(message.replicas)

    def _reply(self, message: Asked) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear(self, message: Told) -> None:
        if (on_told := self.on_told.get(message.subject)) is not None:
            on_told(message.replica, message.content)

    def _wake(self, message: Written) -> None:
        if (document := self._documents.get(message.name)) is not None:
            document.wake()

    def _follow(self, message: Order) -> None:
        if (function := self._on_order.get(message.name)) is not None:
            function()
        else:
            self._orders.append(message.name)

    def _lost(self) -> None:
        self.is_up = False
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionError("the parent process is gone"))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(Unreachable())
        self._follow(Order("orphaned"))

    # Calls

    async def _call(self, build: Callable[[int], Struct], seconds: float) -> Any:
        if not self.is_up:
            raise Unreachable
        self._number += 1
        number = self._number
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(build(number))
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            raise Unreachable from None
        finally:
            del self._answers[number]

    def _resolve(self, number: int, value: Any) -> None:
        future = self._answers.get(number)
        if future is not None and not future.done():
            future.set_result(value)

    async def ask(self, subject: str, argument: Any = None) -> dict[int, Any]:
        """Return the answers of the other replicas, by number; those that do not answer are missing."""
        try:
            answers: dict[int, Any] = await self._call(
                lambda number: Ask(number, subject, argument, ASK_SECONDS), 2 * ASK_SECONDS
            )
        except Unreachable:
            return {}
        return answers

    async def _answer(self, asked: Asked) -> None:
        respond = self.respond.get(asked.subject)
        if respond is not None:
            self._channel.send(Answer(asked.number, await respond(asked.argument)))

    def tell(self, subject: str, content: Any) -> None:
        """Tell all other replicas something, also those that start later."""
        self._channel.send(Tell(subject, content))

    def opened(self, active: str) -> None:
        """Report that this replica accepts connections."""
        self._channel.send(Opened(active))

    # Slots

    def set_totals(self, totals: Mapping[str, int]) -> None:
        """Report the limits of the settings, by the names of their slots."""
        self._channel.send(Totals(dict(totals)))

    def want(self, wants: Sequence[tuple[int, list[tuple[str, ...]]]]) -> None:
        """Ask for slots for a number of requests each, in place of what was asked before."""
        self._channel.send(Wants([Want(requests, ways) for requests, ways in wants], self._grants))

    def give(self, slots: Mapping[str, int]) -> None:
        """Give back slots, by name."""
        self._channel.send(Gave(dict(slots)))

    # Documents and the state file

    def document(self, name: str) -> "HubDocument":
        """Return the shared document `name`."""
        if name not in self._documents:
            self._documents[name] = HubDocument(self, name)
        return self._documents[name]

    async def read(self, name: str) -> Document:
        document: Document = await self._call(lambda number: Read(number, name), STORE_SECONDS)
        return document

    async def write(self, name: str, content: bytes, version: int) -> Document:
        document: Document = await self._call(lambda number: Write(number, name, content, version), STORE_SECONDS)
        return document

    async def share_limits(self, names: Sequence[str], arguments: Sequence[Any]) -> list[int]:
        answer: list[int] = await self._call(
            lambda number: ShareLimits(number, list(names), list(arguments)), STORE_SECONDS
        )
        return answer

    def put(self, section: str, value: Any) -> None:
        """Put a section into the state file, which the parent writes."""
        self._channel.send(Put(section, value))

    async def persisted(self) -> bool:
        """Wait until the parent has written the state file; return whether all is on the disk."""
        try:
            return bool(await self._call(Persist, 10))
        except Unreachable:
            return False


class HubLink:
    """The hub in place of Redis, for the limits of keys (`key_limits.py`)."""

    def __init__(self, member: HubMember) -> None:
        self.replica = member.hello.name
        self._member = member

    def __repr__(self) -> str:
        return f"<HubLink of {self._member}>"

    @property
    def is_up(self) -> bool:
        """True while the parent runs."""
        return self._member.is_up

    def watch(self, on_up: Callable[[], None], on_down: Callable[[], None]) -> None:
        """Do nothing: without the parent, this replica ends."""

    async def call(self, operation: str, keys: Sequence[str], arguments: Sequence[Any]) -> list[int]:
        """Run the operation `share_limits`, as `operations.lua` describes it.

        Raises:
            LinkDown: The parent did not answer in time.
        """
        assert operation == "share_limits"
        try:
            return await self._member.share_limits(keys[1:], arguments[2:])
        except Unreachable:
            raise LinkDown from None


class HubDocument:
    """`SharedDocument` in the memory of the parent."""

    def __init__(self, member: HubMember, name: str) -> None:
        self.replica = member.hello.name
        self._member = member
        self._name = name
        self._wake: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<HubDocument {self._name}>"

    @property
    def is_up(self) -> bool:
        """True while the parent runs."""
        return self._member.is_up

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` after another replica has written."""
        self._wake = wake

    def wake(self) -> None:
        self._wake()

    async def read(self) -> Snapshot:
        """Return the document.

        Raises:
            Unreachable: The parent did not answer in time.
        """
        document = await self._member.read(self._name)
        return Snapshot(document.version, document.content)

    async def write(self, content: bytes, version: int) -> bool:
        """Replace the document if its version is still `version`; return whether it was replaced.

        Raises:
            Unreachable: The parent did not answer in time.
        """
        return (await self._member.write(self._name, content, version)).is_written

    def now(self) -> float:
        """Return the Unix time: all replicas have the same clock."""
        return time.time()
