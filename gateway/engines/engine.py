"""What the relay asks of a kind of server, and what the kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import msgspec
from msgspec import Struct

from gateway.chat.answer import Delta
from gateway.chat.request import Chat
from gateway.engines.lines import LineBuffer, LineTooLong
from gateway.errors import GatewayError, UpstreamError

MAX_ANSWER = 32 * 1024 * 1024
"""Bytes of a plain answer; more is no answer of a model."""

MAX_REFUSAL = 64 * 1024
"""Bytes read of an answer that is an error."""


class ModelFacts(Struct, frozen=True):
    """What a server tells of one of its models; None: it does not tell."""

    context_length: int | None = None
    """Tokens of prompt and answer together that a request has room for now."""
    capabilities: frozenset[str] | None = None
    """By Ollama's words: `completion`, `vision`, `tools`, `thinking`, `embedding`."""
    digest: str = ""
    """Changes when the model does."""

    def lacks(self, capability: str) -> bool:
        return self.capabilities is not None and capability not in self.capabilities


Models = dict[str, ModelFacts]
"""By each name that the server takes for the model."""

LoadedUntil = dict[str, float]
"""What a server has loaded: by canonical name, until when, in Unix time."""

Ask = Callable[[str, str, bytes | None], Awaitable[bytes | None]]
"""Method, path and body to the body of an answer with status 200, or None."""


class ResponseReader(Protocol):
    """Reads one streamed answer. `over` becomes True when the backend has said all."""

    done: bool
    malformed: int
    """Lines that were no event of this backend; dropped."""
    surplus: bool
    """Something came after the end."""
    failure: GatewayError | None
    """What went wrong behind the deltas that `feed` has returned: they came first, however the bytes were cut."""

    def feed(self, piece: bytes) -> list[Delta]:
        """The deltas in the next bytes of the body.

        Raises, when no delta came before it in `piece`; else it is in `failure`:
            UpstreamError: the backend reports a failure, or what it sends cannot be read.
            InvalidRequest: it finds fault with the request.
        """

    def plain_tokens(self, piece: bytes) -> list[bytes] | None:
        """The short way for what nearly every piece is: its tokens as the insides of JSON strings, when it holds nothing but whole events of
        plain content in the shape that this stream is known to have. None: it has to be fed."""

    def end(self) -> list[Delta]:
        """The body has ended.

        Raises:
            UpstreamError: it ended without the backend's mark of a normal end.
        """


class Engine(Protocol):
    """One kind of server."""

    chat_path: str
    """Below the server's prefix."""

    streams_only: bool
    """There is no other way of asking than for a stream."""

    stream_type: bytes
    """Media type of a streamed answer."""

    models_path: str

    health_path: str | None
    """Tells more than the list of models whether the server is well; None: nothing does."""

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        """The request's body, for `model` by the name that it has there, asking for a stream or not."""

    def relaxed(self, chat: Chat, refusal: GatewayError) -> Chat | None:
        """What may be asked instead, without a difference to the client, when the backend refused `chat`; None: nothing."""

    def reader(self) -> ResponseReader: ...

    def parse_answer(self, body: bytes) -> Delta:
        """A plain answer: all of it in one.

        Raises:
            UpstreamError: it is none.
        """

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """What an answer with a status other than 200 means to the client."""

    def canonical(self, name: str) -> str:
        """The one of a model's names that stands for all that the server takes for it."""

    def models(self, body: bytes) -> Models | None:
        """The models in the answer to `models_path`; None if it is no such answer."""

    async def probe_models(self, models: Models, before: Models, wanted: Iterable[str], ask: Ask) -> LoadedUntil | None:
        """Put into `models` what else can be found out about those that are `wanted`; `before` is what was known. Gives what is loaded; None: that
        is not told, or everything always is."""


class LineReader(ABC):
    """The part of a `Reading` that all kinds share: cutting lines, and stopping where the backend has said all."""

    __slots__ = ("_lines", "done", "failure", "malformed", "surplus")

    def __init__(self) -> None:
        self._lines = LineBuffer()
        self.done = False
        self.malformed = 0
        self.surplus = False
        self.failure: GatewayError | None = None

    def feed(self, piece: bytes) -> list[Delta]:
        try:
            lines = self._lines.feed(piece)
        except LineTooLong:
            raise UpstreamError("line_too_long") from None
        deltas: list[Delta] = []
        try:
            for line in lines:
                if self.done:
                    self.surplus = True
                    break
                self._read(line, deltas)
        except GatewayError as failure:
            if not deltas:
                raise
            self.failure = failure
        return deltas

    def end(self) -> list[Delta]:
        deltas: list[Delta] = []
        for line in self._lines.rest():
            if not self.done:
                self._read(line, deltas)
        if not self.done:
            self._end(deltas)
        return deltas

    def plain_tokens(self, piece: bytes) -> list[bytes] | None:
        return None

    @abstractmethod
    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        """Append what `line` says; set `over` at the backend's own mark of the end."""

    @abstractmethod
    def _end(self, deltas: list[Delta]) -> None:
        """The body ended without that mark: append what makes it a normal end all the same, or raise."""


def broken_off(reason: str) -> UpstreamError:
    """The backend failed in the middle of an answer."""
    return UpstreamError(reason, "The model backend failed while generating the response.")


T = TypeVar("T")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T | None:
    """The document in `body`, or None if it is not of the decoder's shape."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
