"""Canonical answer: engines parse into it, client dialects render it. Pure: no I/O, no clock."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Raw, Struct

from gateway.errors import UpstreamError

MAX_TEXT = 3_000_000
"""Maximum number of characters in an answer that is assembled. No model writes more."""
MAX_ARGUMENTS, MAX_BRACKETS = 1_000_000, 20_000
"""Maximum number of characters, and of opening brackets, in the arguments of all calls of an answer. Each
client API renders them in one step, and Ollama's and Anthropic's parse them."""
MAX_LOGPROBS = 200_000
"""Maximum number of tokens and alternatives with log probabilities in an answer that is assembled: 9,500
tokens with 20 alternatives."""
MAX_CALLS = 1024
"""Maximum number of tool calls in an answer."""

ReasoningField = Literal["reasoning", "reasoning_content", "both"]
"""Name of the field of chat completions with the reasoning. OpenAI's API has none."""
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class Usage(Struct, frozen=True, gc=False):
    """Token counts reported by the backend."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class CachedUsage(Usage, frozen=True, gc=False):
    """Token counts of a prompt that the engine had in its cache, or a part of it."""

    cached_tokens: int = 0
    """Tokens of the prompt that came from the cache."""


class TimedUsage(Usage, frozen=True, gc=False):
    """Token counts, and times by the backend's own clock in seconds."""

    load_seconds: float = 0.0
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0

    @property
    def counts(self) -> Usage:
        """The counts alone, as they are recorded."""
        return Usage(self.prompt_tokens, self.completion_tokens)


class Timings(Struct, frozen=True, gc=False):
    """Times of one exchange so far, in seconds."""

    total: float
    """From the arrival of the request."""
    load: float
    """From the arrival to the request at the backend: the queue and the load of the model."""
    prompt: float
    """From the request at the backend to the first token."""
    completion: float
    """From the first token to the last."""


class TokenLogprob(Struct, frozen=True, gc=False):
    """One of the tokens that the model considered."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChosenLogprob(Struct, gc=False):
    """The token that the model chose, and the likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] = []


class CallDelta(Struct, gc=False):
    """Piece of a tool call.

    Only the first piece of a call has `id` and `name`. The `arguments` of all pieces are
    concatenated.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(Struct, gc=False):
    """Addition to the answer by one event of a backend."""

    content: str = ""
    reasoning: str = ""
    finish: FinishReason | None = None
    usage: Usage | None = None
    calls: list[CallDelta] | None = None
    logprobs: list[ChosenLogprob] | None = None
    stop_sequence: str | None = None
    """The stop sequence that ended the answer, beside `finish`, if the engine says it."""

    @property
    def is_piece(self) -> bool:
        """Return whether the delta contains model output."""
        return bool(self.content or self.reasoning or self.calls or self.logprobs)


class Answer(Struct):
    """Complete answer."""

    content: str
    reasoning: str
    finish: FinishReason
    usage: Usage | None
    calls: list[CallDelta]
    logprobs: list[ChosenLogprob] | Raw | None
    """Raw: what a form is to write in their place."""
    stop_sequence: str | None = None


class _CallParts:
    """A tool call as it comes."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self) -> None:
        self.id = self.name = ""
        self.arguments: list[str] = []


class Assembler:
    """Combines the deltas of an answer as they come, in linear time."""

    __slots__ = (
        "_arguments_length", "_brackets", "_calls", "_content", "_finish", "_logprobs", "_reasoning",
        "_stop_sequence", "_usage", "logprob_count", "text_length",
    )  # fmt: skip

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._finish: FinishReason = "stop"
        self._usage: Usage | None = None
        self._calls: dict[int, _CallParts] = {}
        self._logprobs: list[ChosenLogprob] | None = None
        self._stop_sequence: str | None = None
        self.text_length = 0
        """Number of characters of content, reasoning and the arguments of calls."""
        self.logprob_count = 0
        """Number of tokens and alternatives."""
        self._arguments_length = self._brackets = 0

    def check_size(self) -> None:
        """Check that the answer so far is not too large to be rendered.

        Raises:
            UpstreamError: it is.
        """
        if (
            self.text_length > MAX_TEXT
            or self._arguments_length > MAX_ARGUMENTS
            or self._brackets > MAX_BRACKETS
            or len(self._calls) > MAX_CALLS
            or self.logprob_count > MAX_LOGPROBS
        ):
            raise UpstreamError("too_large")

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if delta.content:
                self._content.append(delta.content)
                self.text_length += len(delta.content)
            if delta.reasoning:
                self._reasoning.append(delta.reasoning)
                self.text_length += len(delta.reasoning)
            self._finish = delta.finish or self._finish
            self._usage = delta.usage or self._usage
            self._stop_sequence = delta.stop_sequence or self._stop_sequence
            for piece in delta.calls or ():
                self.add_call(piece)
            if delta.logprobs is not None:
                self._logprobs = self._logprobs or []
                self._logprobs += delta.logprobs
                self.logprob_count += sum(1 + len(logprob.top_logprobs) for logprob in delta.logprobs)

    def add_call(self, piece: CallDelta) -> None:
        """Add a piece of a tool call."""
        call = self._calls.get(piece.index)
        if call is None:
            call = self._calls[piece.index] = _CallParts()
        call.id, call.name = call.id or piece.id, call.name or piece.name
        if piece.arguments:
            call.arguments.append(piece.arguments)
            self.text_length += len(piece.arguments)
            self._arguments_length += len(piece.arguments)
            self._brackets += piece.arguments.count("{") + piece.arguments.count("[")

    def calls(self) -> list[CallDelta]:
        """Return the tool calls so far."""
        return [
            CallDelta(index, call.id, call.name, "".join(call.arguments)) for index, call in sorted(self._calls.items())
        ]

    def answer(self) -> Answer:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        return Answer(content, reasoning, self._finish, self._usage, self.calls(), self._logprobs, self._stop_sequence)


def assemble(deltas: Sequence[Delta]) -> Answer:
    """Combine the deltas of an answer.

    Raises:
        UpstreamError: its tool calls are too large to be rendered.
    """
    if len(deltas) == 1 and deltas[0].calls is None:  # a plain answer
        whole = deltas[0]
        return Answer(
            whole.content,
            whole.reasoning,
            whole.finish or "stop",
            whole.usage,
            [],
            whole.logprobs,
            whole.stop_sequence,
        )
    assembler = Assembler()
    assembler.add(deltas)
    assembler.check_size()
    return assembler.answer()
