"""The requests that the API hands to a relay, and the client connection that a relay writes to."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from gateway.admission.fair_queue import Claim
from gateway.chat.embedding import Embedding
from gateway.chat.request import Chat
from gateway.relay.route import Route


class ClientConnection(Protocol):
    """The client's side of an exchange: the HTTP server puts it into `scope["extensions"]["gateway.client"]`.

    Writing never blocks.
    """

    gone: bool
    paused: bool
    notes: dict[str, Any]
    on_leave: Callable[[], None] | None
    on_pause: Callable[[], None] | None
    on_resume: Callable[[], None] | None

    @property
    def fields(self) -> Mapping[bytes, bytes]:
        """Request header fields, names in lower case."""

    def whole_body(self) -> bytes | None: ...
    def open(self, status: int, header_lines: bytes) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...
    def answer(self, status: int, header_lines: bytes, body: bytes) -> None: ...


class RelayRequest(Struct, frozen=True, gc=False):
    """What was known of a request when its forwarding began. Times in seconds."""

    id: str
    key_id: str
    claim: Claim
    size: int
    """Bytes of the request's body."""
    route: Route
    came_through: bytes
    read_timeout: float | None
    """How long the client waits for a plain answer, where it says so."""
    extra_lines: bytes
    """Header lines sent with the answer, whatever it is."""


class ChatRequest(RelayRequest, frozen=True, gc=False):
    """One for a chat completion."""

    chat: Chat
    answer_id: str
    """The `id` in the answer's body."""
    created: int
    """Unix time."""
    session: bytes = b""
    """The client's name for the conversation; empty without one."""
    bucket: int | None = None
    """Of a canary, where it cannot be told from `chat` any more."""


class EmbeddingRequest(RelayRequest, frozen=True, gc=False):
    """One for embeddings."""

    embedding: Embedding
