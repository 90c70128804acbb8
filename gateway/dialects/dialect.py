"""Interface between the relay and a client API: how a client's answers and errors are written.

A dialect parses a request into a `ChatCall`: the canonical chat, and the form in which its client
wants the answer. The relay sees only the interfaces of this module, so admission, roll-out,
failover and metrics work alike for every client API. Pure: no I/O, no clock.
"""

import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

from msgspec import Struct

from gateway.chat.answer import Answer, Delta, Timings, Usage
from gateway.chat.embedding import Embedding, EncodedVector
from gateway.chat.request import Chat
from gateway.dialects.json_body import Steps
from gateway.errors import GatewayError, envelope

JSON_LINES = b"content-type: application/json\r\n"

Clock = Callable[[], Timings]
"""Returns the times of the exchange so far. Called only by forms that show them."""


FieldNames = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns for fields of chat completions in errors, and how another client API names these fields."""


def renamed(text: str, names: FieldNames) -> str:
    """Return a message, or the name of a field, with the names of another client API."""
    for pattern, name in names:
        text = pattern.sub(name, text)
    return text


class ErrorForm(Protocol):
    """Form in which a client API writes an error before the first byte of an answer."""

    json_lines: ClassVar[bytes]
    """Header lines of an error, and of a plain answer."""

    id_header: ClassVar[bytes]
    """Name of a header with the request's id, beside `x-request-id`. Empty if there is none."""

    def error_status(self, error: GatewayError) -> int:
        """Return the HTTP status."""

    def error_lines(self, error: GatewayError) -> bytes:
        """Return the header lines that belong to the error."""

    def error_body(self, error: GatewayError) -> bytes:
        """Return the JSON body."""


class Form(ErrorForm, Protocol):
    """The form in which a client wants the answer to one request."""

    endpoint: ClassVar[str]
    """Label of the endpoint in the metrics."""


class OpenAiErrors:
    """OpenAI's error object with the status of the error itself."""

    __slots__ = ()

    json_lines: ClassVar[bytes] = JSON_LINES
    id_header: ClassVar[bytes] = b""
    fields: ClassVar[FieldNames] = ()

    def error_status(self, error: GatewayError) -> int:
        return error.status

    def error_lines(self, error: GatewayError) -> bytes:
        return error.header_lines()

    def error_body(self, error: GatewayError) -> bytes:
        if not self.fields:
            return error.envelope()
        param = None if error.param is None else renamed(error.param, self.fields)
        return envelope(renamed(error.message, self.fields), error.type, param, error.code)


class StreamRenderer(Protocol):
    """Renders one streamed answer. Each method returns bytes to send, perhaps none."""

    @property
    def around_text(self) -> tuple[bytes, bytes] | None:
        """The bytes before and after a plain text, given as the content of a JSON string.

        None if this form has no fixed bytes around a text; `splice` is not called then.
        """

    def opening(self) -> bytes:
        """Return what precedes the first delta. Called once."""

    def keepalive(self) -> bytes:
        """Return something without content, so that proxies and clients keep waiting."""

    def render(self, delta: Delta) -> bytes: ...

    def splice(self, texts: list[bytes]) -> bytes:
        """Return plain texts, each given as the content of a JSON string."""

    def end(self, clock: Clock) -> bytes:
        """Return what follows the last delta of a complete answer."""

    def end_steps(self, clock: Clock) -> Steps[list[bytes]] | None:
        """Do the same as `end` in steps if it takes long, with a result in parts. None if it is short."""

    def error(self, error: GatewayError) -> bytes:
        """Return what ends a stream that failed; it must not look complete."""


class ChatForm(Form, Protocol):
    """The form in which a client wants the answer to one chat.

    `id` is random and without a prefix, `created` is the arrival in Unix time.
    """

    stream_lines: ClassVar[bytes]
    """Header lines of a streamed answer."""

    @property
    def is_stream(self) -> bool: ...

    def stream(self, id: str, created: int) -> StreamRenderer:
        """Return the renderer of a streamed answer."""

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        """Return the JSON of a plain answer."""

    def answer_steps(self, id: str, created: int, answer: Answer, clock: Clock) -> Steps[list[bytes]]:
        """Render a long plain answer in steps, as its parts."""


class ChoiceForm(ChatForm, Protocol):
    """The form of one of several choices. It keeps what belongs to the whole answer."""

    whole: Answer | None
    """The choice, if it is not streamed."""
    usage: Usage | None
    error: GatewayError | None
    """The error that ended the choice. Nothing of it is written."""
    is_complete: bool


class ChoicesForm(ChatForm, Protocol):
    """A form that can have several choices."""

    def choice(self, index: int) -> ChoiceForm:
        """Return the form of one choice. A stream of it has neither usage nor end."""

    def choices_answer(self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None) -> bytes:
        """Return the JSON of a plain answer."""

    def choices_answer_steps(
        self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None
    ) -> Steps[list[bytes]]:
        """Render a long plain answer in steps, as its parts."""

    def choices_end(self, id: str, created: int, usage: Usage | None) -> bytes:
        """Return what follows the last delta of all choices."""

    def choices_error(self, error: GatewayError) -> bytes:
        """Return what follows what was already sent, if a choice failed."""


class ChatCall(Struct, frozen=True, gc=False):
    """A chat, and the form in which its client wants the answer."""

    chat: Chat
    form: ChatForm
    action: Literal["chat", "load", "unload"] = "chat"
    """`load` only waits until the model is ready to serve; `unload` does nothing."""
    names_stop: bool = False
    """True if the answer has to say which stop sequence ended it."""
    image_paths: Sequence[str] = ()
    """Paths of the images in the request, in their order, if they differ from those of a chat completion."""


class ChatDialect(Protocol):
    """A client API for chats."""

    endpoint: str
    """Label of the endpoint in the metrics."""
    errors: ErrorForm
    needs_media_type: bool
    """True if a body without `Content-Type: application/json` is refused."""

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        """Parse a request of ordinary size. Return it, and how many bytes of it are text.

        Raises:
            GatewayError: the request is invalid, or has something that no engine can serve.
        """

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        """Do the same for a long body in steps of some milliseconds."""


class EmbeddingForm(Form, Protocol):
    """The form in which a client wants its embeddings."""

    def answer(self, vectors: list[EncodedVector], prompt_tokens: int, clock: Clock) -> Steps[list[bytes]]:
        """Render the JSON of the answer in steps, as its parts. The vectors are encoded as requested."""


class EmbeddingCall(Struct, frozen=True, gc=False):
    """A request for embeddings, and the form in which its client wants them."""

    embedding: Embedding
    form: EmbeddingForm


class EmbeddingDialect(Protocol):
    """A client API for embeddings.

    `check_model` is called with the name of the model as early as possible, and may raise.
    """

    endpoint: str
    """Label of the endpoint in the metrics."""
    errors: ErrorForm
    needs_media_type: bool
    """True if a body without `Content-Type: application/json` is refused."""

    def parse(self, body: bytes, max_text_body: int, check_model: Callable[[str], object]) -> EmbeddingCall:
        """Parse a request of ordinary size.

        Raises:
            GatewayError: the request is invalid, or has something that no engine can serve.
        """

    def parse_steps(self, body: bytes, check_model: Callable[[str], object]) -> Steps[EmbeddingCall]:
        """Do the same for a long body in steps of some milliseconds."""
