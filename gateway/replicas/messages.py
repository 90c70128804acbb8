"""Messages between the replicas of one machine and the process that started them, and their framing.

Each direction is a stream of frames: four bytes of length, then a message in MessagePack. The two
ends run the same version of the gateway and trust each other.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import msgspec
from msgspec import Struct

_LENGTH_BYTES = 4


class Want(Struct, array_like=True):
    """Requests that wait for slots: how many, and the ways to serve one of them.

    A way is the names of all the slots that one request takes at once.
    """

    requests: int
    ways: list[tuple[str, ...]]


# From the parent to a replica


class Hello(Struct, tag=True, array_like=True):
    """First message to a replica: what it is, and what the gateway's process knew at its start."""

    number: int
    """From 1 on, the same again after a restart."""
    name: str
    """Different from any other replica's, also after a restart."""
    replicas: int
    """Number of replicas that were asked for."""
    settings: bytes
    """Pickled `Settings`."""
    admin_token: str | None
    sections: dict[str, Any]
    """Content of the state file."""


class Granted(Struct, tag=True, array_like=True):
    """Slots that the replica holds from now on, by name."""

    slots: dict[str, int]


class Keep(Struct, tag=True, array_like=True):
    """Slots that others wait for: how many the replica may keep. None: nobody waits any more."""

    slots: dict[str, int | None]


class Serving(Struct, tag=True, array_like=True):
    """Numbers of the replicas that serve now."""

    replicas: list[int]


class Asked(Struct, tag=True, array_like=True):
    """Question of another replica, to answer with `Answer`."""

    number: int
    subject: str
    argument: Any


class Answers(Struct, tag=True, array_like=True):
    """Answers to the question `number`, by replica; those that did not answer in time are missing."""

    number: int
    answers: dict[int, Any]


class Told(Struct, tag=True, array_like=True):
    """News that another replica told all."""

    replica: int
    subject: str
    content: Any


class Document(Struct, tag=True, array_like=True):
    """Answer to `Read` or `Write`. `is_written` is False if the version had changed."""

    number: int
    version: int
    content: bytes
    is_written: bool = False


class Written(Struct, tag=True, array_like=True):
    """Notice that a replica has written the document `name`."""

    name: str


class Persisted(Struct, tag=True, array_like=True):
    """Answer to `Persist`."""

    number: int
    is_persisted: bool


class Quotas(Struct, tag=True, array_like=True):
    """Answer to `ShareLimits`."""

    number: int
    answer: list[int]


class Order(Struct, tag=True, array_like=True):
    """Order of the operator's: `drain`, `cut off` or `reload`."""

    name: str


# From a replica to the parent


class Opened(Struct, tag=True, array_like=True):
    """Notice that the replica accepts connections. `active` describes the roll-out in force."""

    active: str


class Totals(Struct, tag=True, array_like=True):
    """Limits of the settings that the replica has in force, by the names of their slots."""

    totals: dict[str, int]


class Wants(Struct, tag=True, array_like=True):
    """All that the replica waits for, in its order, in place of what it said before.

    `grants` is the number of `Granted` that it had received.
    """

    wants: list[Want]
    grants: int


class Gave(Struct, tag=True, array_like=True):
    """Slots that the replica no longer holds, by name."""

    slots: dict[str, int]


class Ask(Struct, tag=True, array_like=True):
    """Question for all other replicas, which have `seconds` for their answers."""

    number: int
    subject: str
    argument: Any
    seconds: float


class Answer(Struct, tag=True, array_like=True):
    number: int
    answer: Any


class Tell(Struct, tag=True, array_like=True):
    """News for all other replicas, also for those that start later. Only the last of a subject counts."""

    subject: str
    content: Any


class Read(Struct, tag=True, array_like=True):
    number: int
    name: str


class Write(Struct, tag=True, array_like=True):
    number: int
    name: str
    content: bytes
    version: int


class ShareLimits(Struct, tag=True, array_like=True):
    """Use of limits of keys (`key_quotas.py`)."""

    number: int
    names: list[str]
    arguments: list[str | int]


class Put(Struct, tag=True, array_like=True):
    """Section of the state file."""

    section: str
    value: Any


class Persist(Struct, tag=True, array_like=True):
    """Question whether all sections put so far are on the disk."""

    number: int


ToReplica = Hello | Granted | Keep | Serving | Asked | Answers | Told | Document | Written | Persisted | Quotas | Order
ToParent = Opened | Totals | Wants | Gave | Ask | Answer | Tell | Read | Write | ShareLimits | Put | Persist

decode_to_replica: Callable[[bytes], ToReplica] = msgspec.msgpack.Decoder(ToReplica).decode
decode_to_parent: Callable[[bytes], ToParent] = msgspec.msgpack.Decoder(ToParent).decode
_encode = msgspec.msgpack.Encoder().encode


class Channel(asyncio.Protocol):
    """One end of the stream. `on_message` gets each frame's content, `on_lost` is called at the end."""

    def __init__(self, on_message: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's transports are not subclasses of it

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        begin = 0
        while len(buffer) - begin >= _LENGTH_BYTES:
            body = begin + _LENGTH_BYTES
            end = body + int.from_bytes(buffer[begin:body])
            if len(buffer) < end:
                break
            message, begin = bytes(buffer[body:end]), end
            self._on_message(message)
        del buffer[:begin]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def send(self, message: Struct) -> None:
        """Send a message; nothing happens if the other end is gone."""
        if self._transport is not None and not self._transport.is_closing():
            content = _encode(message)
            self._transport.write(len(content).to_bytes(_LENGTH_BYTES) + content)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
