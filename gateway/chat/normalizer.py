"""Normalisation of answers, so that all engines look the same to a client. Pure.

It separates reasoning from content, puts tool calls into OpenAI's form and applies OpenAI's finish
reasons. `Normalizer` sits between an engine's `ResponseReader` and the dialect's renderer: it takes
deltas as they are read and returns the deltas to show.
"""

import json
import random
import re
from typing import Literal

import msgspec

from gateway.chat.answer import CallDelta, ChosenLogprob, Delta, FinishReason
from gateway.chat.conversation import ID_CHARACTERS, ID_LENGTH
from gateway.chat.request import Chat, JsonFormat, SchemaFormat
from gateway.chat.surrogates import HalfPairReplacer, text_without_halves
from gateway.chat.tool_names import client_names
from gateway.chat.tools import Choice
from gateway.errors import UpstreamError

THOUGHT_OPENS, THOUGHT_CLOSES = "<think>", "</think>"

MAX_LEADING_BLANKS = 32
"""Maximum number of whitespace characters before `<think>`.

Some models emit a few. A model that emits nothing else must not keep its client waiting.
"""

MAX_COMPARED, MAX_LOOKS = 64 * 1024, 8
"""Maximum length of the arguments of a call that are looked at, and how often, to find out whether a piece
with a name and without an id begins the next call. Servers that send such pieces send whole calls."""

LOST_CALL = "lost_call"
"""Reason of the failure when an engine reports a tool call that it does not send."""

_NAME = re.compile(r'"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_CALL_OPENS = "<tool_call>"
_json = json.JSONDecoder()


class ReasoningSplitter:
    """Splits reasoning and content where the engine did not.

    The text between `<think>` at the start of an answer and `</think>` is reasoning. vLLM without
    `--reasoning-parser`, and Ollama models whose template does not declare it, send answers like
    that.
    """

    __slots__ = ("_held", "_state", "over")

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["start", "reasoning", "after"] = "start"
        self.over = False
        """True if everything that follows is content."""

    def feed(self, text: str) -> tuple[str, str]:
        """Return the content and the reasoning in `text`.

        Text that may be part of a tag is held back. Whitespace between reasoning and content is
        dropped.
        """
        if self.over:
            return text, ""
        held, self._held = self._held + text, ""
        reasoning = ""
        if self._state == "start":
            beginning = held.lstrip()
            is_late = len(held) - len(beginning) > MAX_LEADING_BLANKS
            if not is_late and len(beginning) < len(THOUGHT_OPENS) and THOUGHT_OPENS.startswith(beginning):
                self._held = held
                return "", ""
            if is_late or not beginning.startswith(THOUGHT_OPENS):
                self.over = True
                return held, ""
            self._state = "reasoning"
            held = beginning[len(THOUGHT_OPENS) :]
        if self._state == "reasoning":
            reasoning, closed, held = held.partition(THOUGHT_CLOSES)
            if not closed:
                keep = _overlap(reasoning, THOUGHT_CLOSES)
                self._held = reasoning[len(reasoning) - keep :]
                return "", reasoning[: len(reasoning) - keep]
            self._state = "after"
        content = held.lstrip()
        self.over = bool(content)
        return content, reasoning

    def rest(self) -> tuple[str, str]:
        """Return the text that was held back, at the end of the answer."""
        held, self._held, self.over = self._held, "", True
        return ("", held) if self._state == "reasoning" else (held, "")


def _may_answer_in_reasoning(chat: Chat) -> bool:
    """Return whether the answer may arrive as reasoning.

    Ollama treats the output of a thinking model as reasoning even if the request turns thinking off
    and a grammar makes the model output the answer. The grammar's JSON distinguishes that from real
    reasoning, which a model may still produce.
    """
    return chat.effort == "none" and bool(chat.forced or isinstance(chat.output_format, JsonFormat | SchemaFormat))


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of `text` could be the start of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


class _BackendCall:
    """One call as the backend sends it. `number` is the gateway's index."""

    __slots__ = ("_halves", "_id", "_length", "_looks", "_pieces", "number")

    def __init__(self, number: int, id: str) -> None:
        self.number = number
        self._id = id
        self._pieces: list[str] = []
        """The arguments so far, as long as it can matter whether they are whole."""
        self._length = self._looks = 0
        self._halves = HalfPairReplacer()

    def add(self, arguments: str) -> str:
        """Return the arguments to show of this piece."""
        self._length += len(arguments)
        if self._length > MAX_COMPARED or self._looks >= MAX_LOOKS:
            self._pieces.clear()
        elif arguments:
            self._pieces.append(arguments)
        return self._halves.feed(arguments)

    def rest(self) -> str:
        return self._halves.rest()

    def precedes(self, piece: CallDelta) -> bool:
        """Return whether `piece`, which has the same index, begins another call.

        Some servers give all calls the index 0. Then the id tells them apart, or, without ids, a
        name after whole arguments.
        """
        if not piece.name:
            return False
        return piece.id != self._id if piece.id and self._id else bool(self._pieces) and self._is_whole()

    def _is_whole(self) -> bool:
        self._looks += 1
        try:
            json.loads("".join(self._pieces))
        except (ValueError, RecursionError):
            return False
        return True


class Normalizer:
    """Normaliser of one answer.

    For Ollama, a forced tool call is expressed as a grammar and arrives as plain text. From vLLM, a
    forced call that `max_tokens` cut off also arrives as text.
    """

    __slots__ = (
        "_answers_in_reasoning", "_backend_calls", "_call_text", "_calls", "_forced", "_halves", "_has_content",
        "_has_reasoning", "_is_named", "_is_single", "_logprobs", "_max_alternatives", "_names", "_normalizes_all",
        "_splitter", "_streams_arguments",
    )  # fmt: skip

    def __init__(self, chat: Chat) -> None:
        self._splitter = ReasoningSplitter()
        self._forced = chat.forced
        self._names = client_names(chat) if chat.tools else {}
        """The client's names of tools that have another name at the engine."""
        self._answers_in_reasoning: bool | None = None if _may_answer_in_reasoning(chat) else False
        """Unknown (None) until the first output."""
        self._is_named = isinstance(chat.tool_choice, Choice)
        self._is_single = chat.parallel_tool_calls is False
        self._max_alternatives = chat.top_logprobs or 0
        self._normalizes_all = bool(chat.tools or chat.logprobs)
        self._has_reasoning = self._has_content = False
        self._streams_arguments = False
        """True if the arguments of a forced call are streamed as they arrive."""
        self._call_text: list[str] = []
        """Text that becomes a forced call."""
        self._calls = 0
        self._backend_calls: dict[int, _BackendCall] = {}
        """The last call with each of the backend's indices."""
        self._halves = HalfPairReplacer()
        self._logprobs: list[ChosenLogprob] = []
        """Logprobs of text that is held back."""

    @staticmethod
    def is_needed(chat: Chat, first: list[Delta]) -> bool:
        """Return whether an answer that begins with `first` needs normalisation. Almost none does."""
        if not chat.is_plain and (chat.tools or chat.logprobs or _may_answer_in_reasoning(chat)):
            return True
        for delta in first:
            if delta.content or delta.reasoning:
                beginning = delta.content.lstrip()
                return not beginning or beginning[0] == "<"
        return True

    @property
    def passes(self) -> bool:
        """Return whether plain content needs no normalisation from here on."""
        return self._splitter.over and not self._forced and self._answers_in_reasoning is False

    def normalize(self, deltas: list[Delta]) -> list[Delta]:
        """Return the deltas to show. The given deltas are changed in place."""
        if self._splitter.over and not self._normalizes_all and self._answers_in_reasoning is False:
            return deltas
        normalized: list[Delta] = []
        for delta in deltas:
            self._normalize_delta(delta)
            if delta.is_piece or delta.finish is not None or delta.usage is not None:
                if self._logprobs:
                    delta.logprobs, self._logprobs = self._logprobs, []
                normalized.append(delta)
        return normalized

    def _normalize_delta(self, delta: Delta) -> None:
        if delta.logprobs is not None:
            self._logprobs += [_trimmed(logprob, self._max_alternatives) for logprob in delta.logprobs]
            delta.logprobs = None
        if self._answers_in_reasoning is None and (beginning := (delta.reasoning or delta.content).lstrip()):
            self._answers_in_reasoning = bool(delta.reasoning) and beginning.startswith(("{", "["))
        if self._answers_in_reasoning and delta.reasoning:
            delta.content, delta.reasoning = delta.reasoning + delta.content, ""
        if delta.content and not self._splitter.over:
            delta.content, reasoning = self._splitter.feed(delta.content)
            delta.reasoning += reasoning
        self._has_reasoning = self._has_reasoning or bool(delta.reasoning)
        if delta.calls:
            delta.calls = self._renumber(delta.calls)
        if delta.finish is not None:
            if not self._splitter.over:
                content, reasoning = self._splitter.rest()
                delta.content += content
                delta.reasoning += reasoning
            self._end(delta)
        elif self._forced and delta.content:
            self._add_to_call(delta)
        self._has_content = self._has_content or bool(delta.content)

    def _add_to_call(self, delta: Delta) -> None:
        """Turn content into a forced call.

        If only one function may be called, its arguments are streamed as they arrive.
        """
        text, delta.content = delta.content, ""
        if self._streams_arguments:
            delta.calls = _more_arguments(0, self._halves.feed(text))
        elif len(self._forced) == 1 and not self._call_text and not self._calls and text.lstrip().startswith("{"):
            self._streams_arguments = True
            delta.calls = self._new_call(self._forced[0].name, self._halves.feed(text.lstrip()))
        else:
            self._call_text.append(text)

    def _end(self, delta: Delta) -> None:
        assert delta.finish is not None
        if self._forced:
            if delta.content:
                self._add_to_call(delta)
            call_text = text_without_halves("".join(self._call_text))
            if not self._calls and (call_text or not (self._has_reasoning or delta.finish == "tool_calls")):
                delta.calls = self._call(call_text)
        rests = [
            *_more_arguments(0, self._halves.rest()),
            *(piece for call in self._backend_calls.values() for piece in _more_arguments(call.number, call.rest())),
        ]
        if rests:
            delta.calls = [*(delta.calls or ()), *(piece for piece in rests if not self._drops(piece.index))]
        self._has_content = self._has_content or bool(delta.content)
        delta.finish = self._finish_reason(delta.finish)

    def _finish_reason(self, finish: FinishReason) -> FinishReason:
        """Return OpenAI's finish reason.

        It is `tool_calls` for a call that the model chose, and `stop` for a function that the
        client named.

        Raises:
            UpstreamError: the engine says that the model called a tool, and sent neither a call nor
                text. Without an error, the answer would look complete and be empty.
        """
        if finish not in ("stop", "tool_calls"):
            return finish
        if finish == "tool_calls" and not (self._calls or self._has_content):
            raise UpstreamError(LOST_CALL, "The model backend reported a tool call, but did not send it.")
        return "tool_calls" if self._calls and not self._is_named else "stop"

    def _call(self, text: str) -> list[CallDelta]:
        """Return the forced call in `text`, or nothing if not even its name is complete.

        A truncated call has the arguments received so far, which may be empty.
        """
        name = self._forced[0].name if len(self._forced) == 1 else ""
        if name and not text.lstrip().startswith(_CALL_OPENS):
            return self._new_call(name, text.strip())
        found, arguments = _NAME.search(text), _ARGUMENTS.search(text)
        name = name or (found[1] if found else "")
        return self._new_call(name, _value(text, arguments.end()) if arguments else "") if name else []

    def _new_call(self, name: str, arguments: str) -> list[CallDelta]:
        """Return the pieces of a new call: the name, then the arguments, as OpenAI and vLLM do."""
        index = self._calls
        self._calls += 1
        name = self._names.get(name, name)
        return [CallDelta(index, _call_id(), name), *_more_arguments(index, arguments)]

    def _renumber(self, calls: list[CallDelta]) -> list[CallDelta]:
        """Return the calls with the gateway's ids and indices.

        Return only the first if the client disabled parallel calls.
        """
        renumbered: list[CallDelta] = []
        for piece in calls:
            call = self._backend_calls.get(piece.index)
            if call is None or call.precedes(piece):
                if not piece.name:
                    continue
                rest = [] if call is None else _more_arguments(call.number, call.rest())
                call = self._backend_calls[piece.index] = _BackendCall(self._calls, piece.id)
                pieces = rest + self._new_call(piece.name, call.add(piece.arguments))
            else:
                pieces = _more_arguments(call.number, call.add(piece.arguments))
            renumbered += [shown for shown in pieces if not self._drops(shown.index)]
        return renumbered

    def _drops(self, number: int) -> bool:
        """Return whether the client does not want the call with this index."""
        return number > 0 and self._is_single


def _more_arguments(number: int, arguments: str) -> list[CallDelta]:
    return [CallDelta(number, arguments=arguments)] if arguments else []


def _value(text: str, begin: int) -> str:
    """Return the JSON value in `text` from `begin`, unchanged. If it is truncated, return the rest."""
    try:
        _, end = _json.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return text[begin:]
    return text[begin:end]


def _trimmed(logprob: ChosenLogprob, max_alternatives: int) -> ChosenLogprob:
    """Keep the requested number of alternatives, and add the token's bytes if missing."""
    raw = list(logprob.token.encode("utf-8", "replace")) if logprob.bytes is None else logprob.bytes
    return msgspec.structs.replace(logprob, bytes=raw, top_logprobs=logprob.top_logprobs[:max_alternatives])


def _call_id() -> str:
    return "".join(random.choices(ID_CHARACTERS, k=ID_LENGTH))
