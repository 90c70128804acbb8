"""Rendering of long plain answers in steps, as parts that are sent one after the other. Pure.

An answer of 3 million characters or 200,000 log probabilities takes 40 to 220 ms to render, and one
may have several choices. So a form renders the answer with a short placeholder for each long text
and for the log probabilities, which follow in slices, as for requests (engines/long_strings.py).
"""

import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import msgspec
from msgspec import Raw, structs

from gateway.chat.answer import Answer, ChosenLogprob, Usage
from gateway.dialects.dialect import Clock
from gateway.dialects.json_body import Steps
from gateway.dialects.json_text import escaped, json_value

MIN_LENGTH, MIN_ARGUMENTS = 4 * 1024, 512
"""Minimum length of a text, and of the arguments of a call, that are rendered apart, in characters."""
SLICE = 256 * 1024
"""Characters that are rendered in one step. Control characters, the slowest, take 4 ms."""
STEP = 32 * 1024
"""Bytes after which others get a turn, since log probabilities take longer than text."""
LOGPROBS_PER_SLICE = 2000
"""Tokens and alternatives that are rendered in one step."""
LONG_TEXT, LONG_LOGPROBS = 256 * 1024, 4000
"""Characters, or tokens and alternatives, of an answer above which it is rendered in steps."""


class Fillings:
    """Texts and log probabilities that placeholders in an answer stand for, in slices."""

    __slots__ = ("_places", "_prefix", "_slice", "_slices")

    def __init__(self, characters: int = SLICE) -> None:
        """Texts are rendered in slices of this many `characters`."""
        self._slice = characters
        self._prefix = secrets.token_hex(16)
        """No model can have written it, because it is random."""
        self._places = re.compile(b"%b([0-9]{6})" % self._prefix.encode())
        self._slices: list[Callable[[], Iterable[bytes]]] = []

    def placeholder(self, slices: Callable[[], Iterable[bytes]]) -> str:
        """Return a placeholder for `slices`."""
        self._slices.append(slices)
        return f"{self._prefix}{len(self._slices) - 1:06}"

    def text(self, text: str, min_length: int = MIN_LENGTH) -> str:
        """Return `text`, or a placeholder for it if it is long."""
        return text if len(text) < min_length else self.placeholder(lambda: text_slices(text, self._slice))

    def pieces(self, rendered: bytes) -> Iterator[bytes]:
        """Render what the placeholders in `rendered` stand for, piece by piece."""
        for position, piece in enumerate(self._places.split(rendered)):
            if position % 2:
                yield from self._slices[int(piece)]()
            else:
                yield piece

    def fill(self, rendered: bytes) -> Steps[list[bytes]]:
        """Return `rendered` in parts, with what its placeholders stand for."""
        return in_parts(self.pieces(rendered))


def in_parts(pieces: Iterable[bytes]) -> Steps[list[bytes]]:
    """Render all pieces in steps. Return them in parts: thousands of short ones become one."""
    parts, part = list[bytes](), list[bytes]()
    size = work = 0
    for piece in pieces:
        part.append(piece)
        size += len(piece)
        work += len(piece)
        if size >= SLICE:
            parts.append(b"".join(part))
            part, size = [], 0
        if work >= STEP:
            work = 0
            yield
    parts.append(b"".join(part))
    return parts


class Backlog:
    """Events of a stream that wait behind long ones, which are rendered piece by piece.

    Each event ends with an empty line.
    """

    __slots__ = ("_is_within_event", "_pieces")

    def __init__(self) -> None:
        self._pieces: deque[Iterator[bytes]] = deque()
        self._is_within_event = False

    def add(self, pieces: Iterator[bytes]) -> None:
        """Append whole events, in pieces."""
        self._pieces.append(pieces)

    def take(self, size: int) -> bytes:
        """Return the next pieces, until they have `size` bytes."""
        taken: list[bytes] = []
        for piece in self._rest():
            taken.append(piece)
            size -= len(piece)
            if size <= 0:
                break
        if taken and taken[-1]:
            self._is_within_event = not taken[-1].endswith(b"\n\n")
        return b"".join(taken)

    def take_all(self) -> Steps[list[bytes]]:
        """Return everything in parts, in steps."""
        return in_parts(self._rest())

    def cut(self) -> bytes:
        """Return the rest of the event that has begun, if one has, and forget those after it."""
        taken: list[bytes] = []
        if self._is_within_event:
            for piece in self._rest():
                head, end, _ = piece.partition(b"\n\n")
                taken += head, end
                if end:
                    break
        self._pieces.clear()
        self._is_within_event = False
        return b"".join(taken)

    def _rest(self) -> Iterator[bytes]:
        while self._pieces:
            piece = next(self._pieces[0], None)  # not `yield from`, which would end it with this iterator
            if piece is None:
                self._pieces.popleft()
            elif piece:
                yield piece


def is_long(answers: Iterable[Answer | None]) -> bool:
    """Return whether to render the choices of one answer in steps."""
    text = logprobs = 0
    for answer in answers:
        if answer is not None:
            text += len(answer.content) + len(answer.reasoning) + sum(len(call.arguments) for call in answer.calls)
            if isinstance(answer.logprobs, list):
                logprobs += sum(1 + len(chosen.top_logprobs) for chosen in answer.logprobs)
    return text > LONG_TEXT or logprobs > LONG_LOGPROBS


class LongAnswers:
    """Base of the forms that render long answers in steps."""

    __slots__ = ()
    shows_arguments_as_text: ClassVar[bool] = False
    """True if the arguments of a call are a JSON string, and not a JSON object."""

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        raise NotImplementedError

    def logprob_slices(self, logprobs: list[ChosenLogprob]) -> Iterator[bytes]:
        """Render the log probabilities in slices, as this form shows them."""
        yield from array_slices(logprob_runs(logprobs), json_value)

    def answer_steps(self, id: str, created: int, answer: Answer, clock: Clock) -> Steps[list[bytes]]:
        """Do the same as `answer` in steps. The result is in parts."""
        fillings = Fillings()
        rendered = self.answer(id, created, self.shortened(answer, fillings), clock)
        yield
        return (yield from fillings.fill(rendered))

    def shortened(self, answer: Answer, fillings: Fillings) -> Answer:
        """Return `answer` with placeholders, which are added to `fillings`."""
        logprobs = answer.logprobs
        if isinstance(logprobs, list) and logprobs:
            placeholder = fillings.placeholder(lambda: self.logprob_slices(logprobs))
            answer = structs.replace(answer, logprobs=Raw(placeholder.encode()))
        if self.shows_arguments_as_text:
            calls = [
                structs.replace(call, arguments=fillings.text(call.arguments, MIN_ARGUMENTS)) for call in answer.calls
            ]
            answer = structs.replace(answer, calls=calls)
        return structs.replace(answer, content=fillings.text(answer.content), reasoning=fillings.text(answer.reasoning))


class LongChoices(LongAnswers):
    """Base of the forms that can have several choices."""

    __slots__ = ()

    def choices_answer(self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None) -> bytes:
        raise NotImplementedError

    def choices_answer_steps(
        self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None
    ) -> Steps[list[bytes]]:
        """Do the same as `choices_answer` in steps. The result is in parts."""
        fillings = Fillings()
        short = [None if answer is None else self.shortened(answer, fillings) for answer in answers]
        rendered = self.choices_answer(id, created, short, usage)
        yield
        return (yield from fillings.fill(rendered))


def logprob_runs(logprobs: list[ChosenLogprob]) -> Iterator[list[ChosenLogprob]]:
    """Return the log probabilities in runs of about `LOGPROBS_PER_SLICE` tokens and alternatives."""
    begin = size = 0
    for index, chosen in enumerate(logprobs):
        size += 1 + len(chosen.top_logprobs)
        if size >= LOGPROBS_PER_SLICE:
            yield logprobs[begin : index + 1]
            begin, size = index + 1, 0
    yield logprobs[begin:]


def array_slices(
    runs: Iterable[list[ChosenLogprob]], render: Callable[[list[ChosenLogprob]], bytes]
) -> Iterator[bytes]:
    """Render one JSON array in slices. `render` returns an array for each run."""
    before = b"["
    for run in runs:
        if run:
            yield before + render(run)[1:-1]
            before = b","
    yield b"]" if before == b"," else b"[]"


def joined_slices(elements: list[bytes]) -> Iterator[bytes]:
    """Render one JSON array of rendered elements in slices."""
    before, run, size = b"[", list[bytes](), 0
    for element in elements:
        run.append(element)
        size += len(element)
        if size >= STEP:
            yield before + b",".join(run)
            before, run, size = b",", [], 0
    if run:
        yield before + b",".join(run)
    yield b"]" if elements else b"[]"


def text_slices(text: str, characters: int = SLICE) -> Iterator[bytes]:
    """Render the content of a JSON string in slices."""
    for start in range(0, len(text), characters):
        yield escaped(msgspec.json.encode(text[start : start + characters]))[1:-1]
