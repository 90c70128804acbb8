"""One of several choices of an answer (`n`), as the forms of OpenAI's APIs keep it. Pure."""

from gateway.chat.answer import Answer, Usage
from gateway.dialects.dialect import Clock, OpenAiErrors
from gateway.dialects.json_body import Steps
from gateway.errors import GatewayError


class KeptChoice(OpenAiErrors):
    """Base of the form of one choice: it keeps what belongs to the whole answer, and writes nothing."""

    __slots__ = ("_index", "error", "is_complete", "usage", "whole")

    def __init__(self, index: int) -> None:
        self._index = index
        self.whole: Answer | None = None
        self.usage: Usage | None = None
        self.error: GatewayError | None = None
        self.is_complete = False

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        self.whole, self.usage, self.is_complete = answer, answer.usage, True
        return b""

    def answer_steps(self, id: str, created: int, answer: Answer, clock: Clock) -> Steps[list[bytes]]:
        self.answer(id, created, answer, clock)
        yield
        return []

    def error_body(self, error: GatewayError) -> bytes:
        self.error = error
        return b""
