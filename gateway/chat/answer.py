"""Canonical answer: engines parse into it, client dialects render it. Pure: no I/O, no clock."""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

ReasoningField = Literal["reasoning", "reasoning_content", "both"]
"""Name of the field of chat completions with the reasoning. OpenAI's API has none."""
FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class Usage(Struct, frozen=True, gc=False):
    """Token counts reported by the backend."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


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
    logprobs: list[ChosenLogprob] | None


def assemble(deltas: Sequence[Delta]) -> Answer:
    """Combine the deltas of an answer."""
    if len(deltas) == 1 and deltas[0].calls is None:  # a plain answer
        whole = deltas[0]
        return Answer(whole.content, whole.reasoning, whole.finish or "stop", whole.usage, [], whole.logprobs)
    content: list[str] = []
    reasoning: list[str] = []
    finish: FinishReason = "stop"
    usage: Usage | None = None
    calls: dict[int, CallDelta] = {}
    logprobs: list[ChosenLogprob] | None = None
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        finish = delta.finish or finish
        usage = delta.usage or usage
        for piece in delta.calls or ():
            call = calls.setdefault(piece.index, CallDelta(piece.index))
            call.id, call.name, call.arguments = (
                call.id or piece.id,
                call.name or piece.name,
                call.arguments + piece.arguments,
            )
        if delta.logprobs is not None:
            logprobs = (logprobs or []) + delta.logprobs
    return Answer(
        "".join(content), "".join(reasoning), finish, usage, [calls[index] for index in sorted(calls)], logprobs
    )
