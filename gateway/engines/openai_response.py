"""Reader of OpenAI-compatible answers: `chat.completion.chunk` events and plain answers. Pure."""

import re
from typing import ClassVar

import msgspec
from msgspec import Raw, Struct

from gateway.chat.answer import MAX_CALLS, MAX_TEXT, CachedUsage, CallDelta, ChosenLogprob, Delta, FinishReason, Usage
from gateway.engines.engine import (
    FEW_MEMBERS,
    MAX_REFUSAL,
    MAX_TOKENS,
    LineReader,
    broken_off,
    check_members,
    decode,
    is_error,
    possible_tokens,
    token_count,
    unreadable,
)
from gateway.engines.engine_reason import engine_reason
from gateway.engines.error_mapping import message_of
from gateway.engines.lines import DONE, data_of
from gateway.errors import UpstreamError


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(Struct, gc=False):
    function: _Function | None = None
    index: int | None = None
    id: str | None = None


class _Delta(Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprobs(Struct, gc=False):
    content: list[ChosenLogprob] | None = None


_NO_REASON = Raw(b"null")


class _Choice(Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: Raw = _NO_REASON


NO_USAGE = Raw(b"null")
NO_ERROR = Raw(b"null")


class _Usage(Struct, gc=False):
    prompt_tokens: Raw = Raw(b"0")
    completion_tokens: Raw = Raw(b"0")


class _PromptDetails(Struct, gc=False):
    cached_tokens: int = 0


class _UsageDetails(Struct, gc=False):
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] | None = []
    usage: Raw = NO_USAGE
    error: Raw = NO_ERROR


class _AnswerChoice(Struct):
    message: _Delta
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: str | int | None = None


class _Answer(Struct):
    choices: list[_AnswerChoice]
    usage: Usage | None = None


class _OddChoice(Struct):
    message: _Delta
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: Raw = _NO_REASON


class _OddAnswer(Struct):
    """A plain answer, whatever its usage and stop reason are."""

    choices: list[_OddChoice]
    usage: Raw = NO_USAGE


_NO_DELTA = _Delta()

_chunks = msgspec.json.Decoder(_Chunk)
_answers = msgspec.json.Decoder(_Answer)
_odd_answers = msgspec.json.Decoder(_OddAnswer)
_usages = msgspec.json.Decoder(_Usage)
_stop_sequences = msgspec.json.Decoder(str)
_exact_usages = msgspec.json.Decoder(Usage)
_details = msgspec.json.Decoder(_UsageDetails)

_json_text = re.compile(rb'[^"\\\x00-\x1f]*+(?:\\["\\/bfnrt][^"\\\x00-\x1f]*+)*+')
# A sixth of the cost of `_is_json_text`, and enough for almost every token.
_special = re.compile(rb'["\\\x00-\x1f]').search
_is_json_text = _json_text.fullmatch
_has_line_end = re.compile(rb"\xe2\x80[\xa8\xa9]|\xc2\x85").search
"""U+2028, U+2029 and U+0085, which some clients take for line ends."""

_SHORT_TEXT = 32
_MAX_KNOWN = 10_000
"""Maximum number of remembered valid token texts of at most 32 bytes: about 1 MiB."""

_FINISH: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter", "tool_calls": "tool_calls"}


def finish_reason(reason: str) -> FinishReason:
    """Map the finish reason.

    vLLM adds `abort` (its engine gave up the request) and `repetition` to OpenAI's reasons.
    """
    if reason == "abort":
        raise broken_off("aborted")
    return _FINISH.get(reason, "stop")


def _stop_sequence(reason: Raw) -> str | None:
    """Return the stop sequence in vLLM's `stop_reason`. A number there is the id of a token."""
    return None if reason == _NO_REASON else decode(_stop_sequences, reason)


def usage_of(text: bytes | Raw) -> Usage | None:
    """Return the usage in the backend's JSON.

    It is decoded apart, so that nothing in it can make the answer around it unreadable.
    """
    try:
        usage = _exact_usages.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _possible_usage(text)
    usage = _within_bounds(usage)
    return usage if b'"cached_tokens"' not in bytes(text) else _with_cache(usage, text)


def _within_bounds(usage: Usage) -> Usage:
    """Return `usage` with 0 for a number that cannot be."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if 0 <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS:
        return usage
    return Usage(possible_tokens(prompt) or 0, possible_tokens(completion) or 0)


def _with_cache(usage: Usage, text: bytes | Raw) -> Usage:
    """Return `usage` with the number of cached tokens, if it is a possible one.

    vLLM reports it with `--enable-prompt-tokens-details`.
    """
    details = decode(_details, text)
    cached = None if details is None or details.prompt_tokens_details is None else details.prompt_tokens_details
    if cached is None or not 0 <= cached.cached_tokens <= usage.prompt_tokens:
        return usage
    return CachedUsage(usage.prompt_tokens, usage.completion_tokens, cached.cached_tokens)


def _possible_usage(text: bytes | Raw) -> Usage | None:
    """Return the usage in odd JSON, each count 0 if it is anything but a possible one."""
    usage = decode(_usages, text)
    return None if usage is None else Usage(token_count(usage.prompt_tokens), token_count(usage.completion_tokens))


def _calls(calls: list[_Call]) -> list[CallDelta]:
    """Convert the calls in an event. `CallNumbers` tells those with the same index apart."""
    return [
        CallDelta(
            number if call.index is None else call.index,
            call.id or "",
            call.function.name or "",
            call.function.arguments or "",
        )
        for number, call in enumerate(calls)
        if call.function is not None
    ]


def _whole_calls(calls: list[_Call]) -> list[CallDelta]:
    """Convert the calls of a plain answer, which are told apart by their place in it.

    Raises:
        UpstreamError: they are too many.
    """
    if len(calls) > MAX_CALLS:
        raise UpstreamError("too_large")
    for number, call in enumerate(calls):
        call.index = number
    return _calls(calls)


def _is_shown_as_is(text: bytes) -> bool:
    """Return whether `text` is UTF-8 and has no character that a dialect escapes."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return not _has_line_end(text)


class OpenAiReader(LineReader):
    """Reader of `chat.completion.chunk` events.

    The answer ends at `[DONE]`, or at the end of the body after a finish reason.

    Within a stream, plain content events are identical except for the text. The reader therefore
    decodes the first one and keeps the bytes before and after its text. A later piece that starts
    and ends with these bytes, and has only JSON text in between, needs no decoding.
    """

    __slots__ = ("_after", "_before", "_between", "_finished", "_skip", "_stop", "_usage", "known_texts")

    before_text: ClassVar[bytes] = b'"delta":{"content":"'
    """Bytes before the text of a plain content event."""

    def __init__(self, known: set[bytes] | None = None) -> None:
        """Initialise the reader.

        `known` holds contents of JSON strings that were found valid in any stream. Models mostly
        repeat a small number of tokens.
        """
        super().__init__()
        self._finished = False
        self._usage: Usage | None = None
        self._before = b""
        self._after = b""
        self._between = b""
        self._skip = self._stop = 0
        self.known_texts = set() if known is None else known

    @property
    def around_text(self) -> tuple[bytes, bytes] | None:
        return (self._before, self._after) if self._skip else None

    def plain_tokens(self, piece: bytes) -> list[bytes] | None:
        skip, stop = self._skip, self._stop
        # Slices are cheaper than startswith.
        if not skip or piece[:skip] != self._before or piece[stop:] != self._after or self._lines.held:
            return None
        text = piece[skip:stop]
        if text in self.known_texts:
            return [text]
        texts = text.split(self._between)
        return texts if all(map(self.is_plain_text, texts)) else None

    def is_plain_text(self, text: bytes) -> bool:
        if not ((_special(text) is None or _is_json_text(text)) and (text.isascii() or _is_shown_as_is(text))):
            return False
        if len(text) <= _SHORT_TEXT and len(self.known_texts) < _MAX_KNOWN:
            self.known_texts.add(text)
        return True

    def _learn_frame(self, line: bytes) -> None:
        """Remember the bytes around the text of `line`, which was decoded to content alone."""
        mark = self.before_text
        start = line.find(mark) + len(mark)
        text = _json_text.match(line, start)
        if text is not None and line.count(mark) == 1 and line.startswith(b'"', text.end()):
            self._before, self._after = line[:start], line[text.end() :] + b"\n\n"
            self._between = self._after + self._before
            self._skip, self._stop = len(self._before), -len(self._after)

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        data = data_of(line)
        if data is None:
            if line.startswith(b"{"):  # an event without `data:`, such as an error
                raise unreadable()
            return
        chunk = None if data == DONE else decode(_chunks, data)
        if chunk is None:
            if data.strip() == DONE:
                self._end(deltas)
                self.done = True
            elif data.strip():
                raise unreadable()
            return
        if chunk.error is not NO_ERROR and is_error(chunk.error):
            raise broken_off("stream_error", engine_reason(message_of(data[:MAX_REFUSAL])))
        usage = None if chunk.usage is NO_USAGE else usage_of(chunk.usage)
        if usage is not None:  # reported last and once, since a server may send it on every chunk
            self._usage = usage
        choices = chunk.choices or ()
        for choice in choices:
            delta = choice.delta or _NO_DELTA
            finish = None if choice.finish_reason is None else finish_reason(choice.finish_reason)
            self._finished = self._finished or finish is not None
            content, reasoning = delta.content or "", delta.reasoning or delta.reasoning_content or ""
            calls = None if delta.tool_calls is None else _calls(delta.tool_calls)
            logprobs = None if choice.logprobs is None else choice.logprobs.content
            # A role chunk does not count: it may precede the first token by a long time.
            if content or reasoning or finish or calls or logprobs:
                stop = None if finish is None else _stop_sequence(choice.stop_reason)
                deltas.append(Delta(content, reasoning, finish, None, calls, logprobs, stop))
            if (
                content
                and not (self._before or reasoning or finish or calls or logprobs or usage)
                and len(choices) == 1
            ):
                self._learn_frame(line)

    def _end(self, deltas: list[Delta]) -> None:
        if not self._finished:
            raise broken_off("truncated")
        if self._usage is not None:
            deltas.append(Delta(usage=self._usage))


def parse_answer(body: bytes) -> Delta:
    """Parse a plain answer.

    Raises:
        UpstreamError: the body is not an answer, or has too many objects.
    """
    if len(body) > FEW_MEMBERS:
        check_members(body)
    try:
        parsed: _Answer | None = _answers.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        parsed = _odd_answer(body)
    choice = parsed.choices[0] if parsed is not None and parsed.choices else None
    if parsed is None or choice is None or choice.finish_reason is None:
        raise UpstreamError("malformed", "The model backend returned an invalid response.")
    message = choice.message
    content, reasoning = message.content or "", message.reasoning or message.reasoning_content or ""
    if len(content) + len(reasoning) > MAX_TEXT:
        raise UpstreamError("too_large")
    return Delta(
        content,
        reasoning,
        finish_reason(choice.finish_reason),
        None if parsed.usage is None else _within_bounds(parsed.usage),
        _whole_calls(message.tool_calls) if message.tool_calls else None,
        None if choice.logprobs is None else choice.logprobs.content,
        choice.stop_reason if type(choice.stop_reason) is str else None,
    )


def _odd_answer(body: bytes) -> _Answer | None:
    """Parse a plain answer with an odd usage or stop reason, or with half surrogate pairs."""
    odd = decode(_odd_answers, body)
    if odd is None:
        return None
    choices = [
        _AnswerChoice(choice.message, choice.finish_reason, choice.logprobs, _stop_sequence(choice.stop_reason))
        for choice in odd.choices[:1]
    ]
    return _Answer(choices, usage_of(odd.usage))
