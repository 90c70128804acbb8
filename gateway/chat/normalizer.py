"""Makes the answers of all engines one: thought apart from speech, tool calls in OpenAI's form, finish reasons by OpenAI's rules. Pure.

`Shaping` stands between a backend's `Reading` and the client's view; it takes deltas as they were read, and gives those to be shown.
"""

import json
import random
import re
from typing import Literal

import msgspec

from gateway.chat.answer import CallDelta, ChosenLogprob, Delta, FinishReason
from gateway.chat.request import Chat, Choice, JsonFormat, SchemaFormat

THOUGHT_OPENS, THOUGHT_CLOSES = "<think>", "</think>"

MOST_BLANKS = 32
"""Characters before `<think>`. Some models write a few; one that says nothing but blanks must not keep its client waiting."""

_NAME = re.compile(r'"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_CALL_OPENS = "<tool_call>"
_json = json.JSONDecoder()


class ReasoningSplitter:
    """Takes an answer's text apart where the engine did not: what stands between `<think>` at its beginning and `</think>` is thought.

    vLLM without `--reasoning-parser` and Ollama models whose template does not tell send it so.
    """

    __slots__ = ("_held", "_state", "over")

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["begins", "thinks", "has thought"] = "begins"
        self.over = False
        """All that comes is speech."""

    def feed(self, text: str) -> tuple[str, str]:
        """The speech and the thought in `text`; what may be part of a mark is held back, and the blanks between thought and speech go."""
        if self.over:
            return text, ""
        held, self._held = self._held + text, ""
        thought = ""
        if self._state == "begins":
            begun = held.lstrip()
            is_late = len(held) - len(begun) > MOST_BLANKS
            if not is_late and len(begun) < len(THOUGHT_OPENS) and THOUGHT_OPENS.startswith(begun):
                self._held = held
                return "", ""
            if is_late or not begun.startswith(THOUGHT_OPENS):
                self.over = True
                return held, ""
            self._state = "thinks"
            held = begun[len(THOUGHT_OPENS) :]
        if self._state == "thinks":
            thought, closed, held = held.partition(THOUGHT_CLOSES)
            if not closed:
                keep = _overlap(thought, THOUGHT_CLOSES)
                self._held = thought[len(thought) - keep :]
                return "", thought[: len(thought) - keep]
            self._state = "has thought"
        speech = held.lstrip()
        self.over = bool(speech)
        return speech, thought

    def rest(self) -> tuple[str, str]:
        """What was held back, when nothing follows."""
        held, self._held, self.over = self._held, "", True
        return ("", held) if self._state == "thinks" else (held, "")


def _may_speak_in_thought(chat: Chat) -> bool:
    """Ollama takes what a model that thinks says for thought, also when it was told not to think and a grammar has it say the answer. The
    grammar's JSON tells that from thought proper, which a model may go on with all the same."""
    return chat.effort == "none" and bool(chat.forced or isinstance(chat.response_format, JsonFormat | SchemaFormat))


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` could be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class Normalizer:
    """One answer. A choice of tool that the client forces is had from Ollama by a grammar, and comes as plain text that is the call; from vLLM
    a forced call that `max_tokens` cut off comes as text too."""

    __slots__ = (
        "_calls", "_forced", "_has_thought", "_ids", "_is_named", "_is_single", "_is_spelt", "_logprobs", "_shapes_all",
        "_speaks_in_thought", "_split", "_spoken", "_tops",
    )  # fmt: skip

    def __init__(self, chat: Chat) -> None:
        self._split = ReasoningSplitter()
        self._forced = chat.forced
        self._speaks_in_thought: bool | None = None if _may_speak_in_thought(chat) else False
        """None: not known yet."""
        self._is_named = isinstance(chat.tool_choice, Choice)
        self._is_single = chat.parallel_tool_calls is False
        self._tops = chat.top_logprobs or 0
        self._shapes_all = bool(chat.tools or chat.logprobs)
        self._has_thought = False
        self._is_spelt = False
        """A forced call's arguments are shown as they come."""
        self._spoken: list[str] = []
        """Text that is to become a forced call."""
        self._calls = 0
        self._ids: dict[int, int] = {}
        """The backend's index of a call to ours."""
        self._logprobs: list[ChosenLogprob] = []
        """Of text that is held back."""

    @staticmethod
    def is_needed(chat: Chat, first: list[Delta]) -> bool:
        """Whether an answer that begins with `first` has anything to shape: nearly none has."""
        if chat.tools or chat.logprobs or _may_speak_in_thought(chat):
            return True
        begun = next((delta.content for delta in first if delta.content or delta.reasoning), "")
        return not begun or begun.isspace() or begun.lstrip().startswith("<")

    @property
    def passes(self) -> bool:
        """Plain content needs no shaping from here on."""
        return self._split.over and not self._forced and self._speaks_in_thought is False

    def normalize(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas to be shown for those that were read. They are changed in place."""
        if self._split.over and not self._shapes_all and self._speaks_in_thought is False:
            return deltas
        shaped: list[Delta] = []
        for delta in deltas:
            self._normalize_delta(delta)
            if delta.is_piece or delta.finish is not None or delta.usage is not None:
                if self._logprobs:
                    delta.logprobs, self._logprobs = self._logprobs, []
                shaped.append(delta)
        return shaped

    def _normalize_delta(self, delta: Delta) -> None:
        if delta.logprobs is not None:
            self._logprobs += [_trimmed(logprob, self._tops) for logprob in delta.logprobs]
            delta.logprobs = None
        if self._speaks_in_thought is None and (begun := (delta.reasoning or delta.content).lstrip()):
            self._speaks_in_thought = bool(delta.reasoning) and begun.startswith(("{", "["))
        if self._speaks_in_thought and delta.reasoning:
            delta.content, delta.reasoning = delta.reasoning + delta.content, ""
        if delta.content and not self._split.over:
            delta.content, thought = self._split.feed(delta.content)
            delta.reasoning += thought
        self._has_thought = self._has_thought or bool(delta.reasoning)
        if delta.calls:
            delta.calls = self._numbered(delta.calls)
        if delta.finish is not None:
            if not self._split.over:
                speech, thought = self._split.rest()
                delta.content += speech
                delta.reasoning += thought
            self._end(delta)
        elif self._forced and delta.content:
            self._speak(delta)

    def _speak(self, delta: Delta) -> None:
        """Where only one function may be called, its arguments can be shown as they come."""
        text, delta.content = delta.content, ""
        if self._is_spelt:
            delta.calls = [CallDelta(0, arguments=text)]
        elif len(self._forced) == 1 and not self._spoken and not self._calls and text.lstrip().startswith("{"):
            self._is_spelt = True
            delta.calls = self._new_call(self._forced[0].name, text.lstrip())
        else:
            self._spoken.append(text)

    def _end(self, delta: Delta) -> None:
        assert delta.finish is not None
        if self._forced:
            if delta.content:
                self._speak(delta)
            spoken = "".join(self._spoken)
            if not self._calls and not (self._has_thought and not spoken):
                delta.calls = self._call(spoken)
        delta.finish = self._finish_reason(delta.finish)

    def _finish_reason(self, finish: FinishReason) -> FinishReason:
        """OpenAI says `tool_calls` for a call that the model chose, and `stop` for a function that the client named."""
        if finish not in ("stop", "tool_calls"):
            return finish
        return "tool_calls" if self._calls and not self._is_named else "stop"

    def _call(self, text: str) -> list[CallDelta]:
        """The forced call that `text` is, if it got as far as its name; one that was cut off has the arguments so far, which may be none."""
        name = self._forced[0].name if len(self._forced) == 1 else ""
        if name and not text.lstrip().startswith(_CALL_OPENS):
            return self._new_call(name, text.strip())
        found, begun = _NAME.search(text), _ARGUMENTS.search(text)
        name = name or (found[1] if found else "")
        return self._new_call(name, _value(text, begun.end()) if begun else "") if name else []

    def _new_call(self, name: str, arguments: str) -> list[CallDelta]:
        """First the name, then the arguments: the order that OpenAI and vLLM keep."""
        index = self._calls
        self._calls += 1
        return [CallDelta(index, _call_id(), name), *([CallDelta(index, arguments=arguments)] if arguments else [])]

    def _numbered(self, calls: list[CallDelta]) -> list[CallDelta]:
        """The calls under our own ids and numbers; only the first where the client wants one at a time."""
        shown: list[CallDelta] = []
        for call in calls:
            ours = self._ids.get(call.index)
            if ours is None:
                if not call.name:
                    continue
                ours = self._ids[call.index] = self._calls
                pieces = self._new_call(call.name, call.arguments)
            else:
                pieces = [CallDelta(ours, arguments=call.arguments)] if call.arguments else []
            if not (ours and self._is_single):
                shown += pieces
        return shown


def _value(text: str, begin: int) -> str:
    """The JSON value in `text` from `begin` on, as it was written; all of the rest where it was cut off."""
    try:
        _, end = _json.raw_decode(text, begin)
    except (ValueError, RecursionError):
        return text[begin:]
    return text[begin:end]


def _trimmed(logprob: ChosenLogprob, tops: int) -> ChosenLogprob:
    """With as many alternatives as were asked for, and the token's bytes where the engine leaves them out."""
    raw = list(logprob.token.encode("utf-8", "replace")) if logprob.bytes is None else logprob.bytes
    return msgspec.structs.replace(logprob, bytes=raw, top_logprobs=logprob.top_logprobs[:tops])


def _call_id() -> str:
    return f"call_{random.getrandbits(96):024x}"
