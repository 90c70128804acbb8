"""Interface between the relay and an engine, and the code that the engines share."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import msgspec
from msgspec import Raw, Struct

from gateway.chat.answer import Delta
from gateway.chat.message import Message
from gateway.chat.request import Chat
from gateway.chat.surrogates import without_halves
from gateway.engines.lines import LineBuffer, LineTooLong
from gateway.errors import GatewayError, UnsupportedParameter, UpstreamError

MAX_ANSWER = 32 * 1024 * 1024
"""Maximum size of a streamed answer that is assembled for a client, in bytes of its events."""

MAX_PLAIN_ANSWER = 4 * 1024 * 1024
"""Maximum size of a plain answer in bytes. It is parsed in one step."""

MAX_OBJECTS = 30_000
"""Maximum number of JSON objects in a plain answer, such as log probabilities. Each takes 1 µs."""

MAX_VALUES = 250_000
"""Maximum number of commas in a plain answer, such as those between the bytes of tokens."""

MAX_ESCAPES = 500_000
"""Maximum number of backslashes in a plain answer."""

BYTES_PER_TOKEN = 4
"""Estimated bytes of prompt per token."""

IMAGE_TOKENS = 1024
"""Minimum tokens per image of Ollama 0.33 (llama.cpp's `--image-min-tokens`)."""

MAX_REFUSAL = 64 * 1024
"""Maximum number of bytes read of an error answer."""

UNREADABLE = "malformed"
"""Reason of the failure when an event cannot be read."""


class ModelFacts(Struct, frozen=True):
    """Facts that a server reports about one of its models. None means not reported."""

    context_length: int | None = None
    """Number of tokens for prompt and answer together, as the model is served now."""
    capabilities: frozenset[str] | None = None
    """Capabilities in Ollama's words: `completion`, `vision`, `tools`, `thinking`, `embedding`."""
    digest: str = ""
    """Digest that changes when the model changes."""

    def lacks(self, capability: str) -> bool:
        return self.capabilities is not None and capability not in self.capabilities


Models = dict[str, ModelFacts]
"""Models by every name that the server accepts for them."""

LoadedUntil = dict[str, float]
"""Loaded models: canonical name to the Unix time at which the server unloads the model."""

Ask = Callable[[str, str, bytes | None], Awaitable[bytes | None]]
"""Callable from method, path and body to the body of an answer with status 200, or None."""


def estimated_tokens(messages: Iterable[Message]) -> int:
    """Return about how many tokens the messages have."""
    return sum(len(message.text) // BYTES_PER_TOKEN + IMAGE_TOKENS * len(message.images) for message in messages)


class ResponseReader(Protocol):
    """Reader of one streamed answer. Sets `done` when the backend has sent everything."""

    done: bool
    surplus: bool
    """True if anything followed the end of the answer."""
    failure: GatewayError | None
    """Failure that follows the deltas returned by `feed`.

    The deltas come first, however the bytes were split.
    """

    def feed(self, piece: bytes) -> list[Delta]:
        """Return the deltas in the next bytes of the body.

        If deltas precede the failure in `piece`, it is stored in `failure` instead of raised.

        Raises:
            UpstreamError: the backend reports a failure, or sends something unreadable.
            InvalidRequest: the backend rejects the request.
        """

    known_texts: set[bytes]
    """Texts that `is_plain_text` has accepted, in any stream. Models mostly repeat a small number of tokens."""

    @property
    def around_text(self) -> tuple[bytes, bytes] | None:
        """The bytes before and after the text of an event of plain content in this stream.

        None until the first such event, and for engines whose events have no fixed form.
        """

    def is_plain_text(self, text: bytes) -> bool:
        """Return whether `text`, found between those bytes, is the whole content of a JSON string.

        False also if it has a character that a dialect escapes.
        """

    def plain_tokens(self, piece: bytes) -> list[bytes] | None:
        """Return the tokens of `piece` as the contents of JSON strings, or None.

        This is a shortcut: it works if `piece` consists of whole events of plain content, in the
        form already seen in this stream. On None, call `feed`.
        """

    def end(self) -> list[Delta]:
        """Finish reading at the end of the body.

        Raises:
            UpstreamError: the body ended without the backend's end-of-answer marker.
        """


class Engine(Protocol):
    """Engine: the code for one kind of server."""

    chat_path: str
    """Path below the server's prefix."""

    streams_only: bool
    """True if the engine can only be asked for a stream."""

    names_stop: bool
    """True if an answer says which stop sequence ended it."""

    max_stops: int | None
    """Number of stop sequences that a request may have, or None if there is no limit."""

    stream_type: bytes
    """Media type of a streamed answer."""

    models_path: str

    health_path: str | None
    """Path with more information about the server's health than the model list, or None."""

    metrics_path: str | None
    """Path of metrics that tell the size of the prefix cache (`vllm_metrics.py`), or None."""

    def check(self, chat: Chat) -> None:
        """Check that `render` can express `chat`, if `chat.needs_check`. Called before it waits.

        Raises:
            SchemaTooComplex: converting its schemas would take too much work.
            UnsupportedParameter: the engine lacks a feature, without which the answer would be another.
        """

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        """Return the request body for `model`, which is the name that the server uses.

        `stream` selects a streamed or a plain answer.
        """

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None:
        """Return a request to send instead after the backend refused `chat`.

        The client must not notice the difference. Return None if no such request exists.
        """

    def reader(self, chat: Chat | None = None) -> ResponseReader:
        """Return a reader of the answer to `chat`, as it was rendered."""

    def parse_answer(self, body: bytes) -> Delta:
        """Parse a plain answer into a single delta.

        Raises:
            UpstreamError: the body is not an answer.
        """

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """Map an answer with a status other than 200 to the error that the client gets."""

    def canonical(self, name: str) -> str:
        """Return the one name that represents all names the server accepts for the model."""

    def models(self, body: bytes) -> Models | None:
        """Parse the answer to `models_path`. Return None if it is not a model list."""

    async def probe_models(
        self, models: Models, before: Models, wanted: Iterable[str], ask: Ask, others: Iterable[str] = ()
    ) -> LoadedUntil | None:
        """Add to `models` what else the server reports about the `wanted` models.

        Do the same for `others`, a few of them in each probe. `before` holds the facts from the
        previous probe. Returns the loaded models, or None if the server does not report them or
        keeps every model loaded.
        """


class LineReader(ABC):
    """Base of all response readers: splits lines, and stops at the backend's end of the answer."""

    known_texts: set[bytes]

    __slots__ = ("_lines", "done", "failure", "surplus")

    def __init__(self) -> None:
        self._lines = LineBuffer()
        self.done = False
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
                try:
                    self._read(line, deltas)
                except UpstreamError as error:
                    raise broken_off("truncated") if error.reason == UNREADABLE else error from None
        if not self.done:
            self._end(deltas)
        return deltas

    @property
    def around_text(self) -> tuple[bytes, bytes] | None:
        return None

    def plain_tokens(self, piece: bytes) -> list[bytes] | None:
        return None

    def is_plain_text(self, text: bytes) -> bool:
        return False

    @abstractmethod
    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        """Append the deltas in `line`. Set `done` at the backend's end-of-answer marker."""

    @abstractmethod
    def _end(self, deltas: list[Delta]) -> None:
        """Handle a body without that marker: append the deltas of a normal end, or raise."""


_NO_ERRORS = frozenset([b"null", b"false", b'""', b"0", b"{}", b"[]"])


def is_error(value: Raw) -> bool:
    """Return whether the `error` of a stream's event says that there is one."""
    return bytes(memoryview(value)[:6]) not in _NO_ERRORS


def broken_off(reason: str, engine_reason: str | None = None) -> UpstreamError:
    """Return the error for a backend that failed in the middle of an answer."""
    error = UpstreamError(reason, "The model backend failed while generating the response.")
    error.engine_reason = engine_reason
    return error


def unreadable() -> UpstreamError:
    """Return the error for an event that cannot be read. What it said is missing in the answer."""
    return broken_off(UNREADABLE)


MAX_TOKENS = 1_000_000_000
"""Maximum number of tokens that is believed. No context is so long, and no answer."""
_numbers = msgspec.json.Decoder()


def token_count(text: bytes | Raw) -> int:
    """Return the number of tokens in a backend's JSON, 0 if it is anything but a possible one."""
    return possible_tokens(decode(_numbers, text)) or 0


def possible_tokens(value: object) -> int | None:
    """Return the backend's number of tokens, None if it is anything but a possible one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TOKENS:
        return None
    return int(value)


STOP_TOKEN_IDS = ("stop_token_ids", "Its token ids are not known: send the texts as 'stop'.")
"""Field and advice for `unsupported`, on all engines but vLLM."""


def unsupported(name: str, advice: str) -> UnsupportedParameter:
    """Return the error for a field that this engine cannot follow, but others can."""
    return UnsupportedParameter(f"'{name}' is not supported by the backend of this model. {advice}", param=name)


T = TypeVar("T")
FEW_MEMBERS = 60_000
"""Bytes of an answer up to which it cannot have too many members."""


def check_members(body: bytes, most_values: int = MAX_VALUES) -> None:
    """Check that a plain answer, or a line of a stream, of more than `FEW_MEMBERS` bytes is not too costly to decode.

    Raises:
        UpstreamError: it has too many objects, values or escapes.
    """
    if body.count(b"{") > MAX_OBJECTS or body.count(b",") > most_values or body.count(b"\\") > MAX_ESCAPES:
        raise UpstreamError("too_large")


def decode(decoder: msgspec.json.Decoder[T], body: bytes | Raw) -> T | None:
    """Decode `body`. Return None if it does not match the decoder's type.

    Half surrogate pairs in it become U+FFFD.
    """
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        mended = without_halves(given := bytes(body))
    if mended is given:
        return None
    try:
        return decoder.decode(mended)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
