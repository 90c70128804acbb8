"""The requests that the API hands to a relay, and the client connection that a relay writes to."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from gateway.admission.fair_queue import Claim
from gateway.chat.embedding import Embedding
from gateway.chat.request import Chat
from gateway.chat.rerank import Rerank
from gateway.dialects.dialect import ChatForm, EmbeddingForm
from gateway.dialects.rerank import RerankForm
from gateway.keys.hold import Hold
from gateway.relay.route import Route


class ClientConnection(Protocol):
    """The client's side of an exchange. Writing never blocks.

    The HTTP server passes it in `scope["extensions"]["gateway.client"]`.
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
    def chunk_line(self, size: int) -> bytes | None: ...
    def write_chunk(self, chunk: bytes) -> None: ...
    def end(self) -> None: ...
    def answer(self, status: int, header_lines: bytes, body: bytes | list[bytes]) -> None: ...


class RelayRequest(Struct, frozen=True, gc=False):
    """A request as it is known when its relay begins. Times are in seconds."""

    id: str
    key_id: str
    claim: Claim
    size: int
    """Size of the request body, in bytes."""
    route: Route
    came_through: bytes
    """Header lines for the engine with the gateways and the trace that the request came through;
    empty for most requests."""
    read_timeout: float | None
    """Seconds that the client waits for a plain answer, if it says so."""
    extra_lines: bytes
    """Header lines that are sent with the answer, whatever it is."""
    hold: Hold | None
    """Hold on the limits of the client's key, which counts the tokens; None: the key has none."""


class ChatRequest(RelayRequest, frozen=True, gc=False):
    """A request for a chat completion."""

    chat: Chat
    form: ChatForm
    answer_id: str
    """Id in the body of the answer, without its prefix."""
    created: int
    """Time of arrival, in Unix time."""
    session: bytes = b""
    """The client's name for the conversation; empty if it gave none."""
    bucket: int | None = None
    """Canary bucket, if it can no longer be computed from `chat`."""
    names_stop: bool = False
    """True if the answer has to say which stop sequence ended it."""


class RerankRequest(RelayRequest, frozen=True, gc=False):
    """A request to rerank documents."""

    rerank: Rerank
    form: RerankForm
    answer_id: str
    """Id in the body of the answer, without its prefix."""


class EmbeddingRequest(RelayRequest, frozen=True, gc=False):
    """A request for embeddings."""

    embedding: Embedding
    form: EmbeddingForm
