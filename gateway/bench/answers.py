"""Readers of streamed and plain answers: what arrived when, and what the server counted.

Pure: they take bytes and the time of their arrival.

A piece is a part of a stream that stands for generated tokens. A chunk that only names the role is none
(vLLM sends it together with the first token), nor is a chunk with an empty delta, with which a gateway
keeps a silent stream alive. A chunk with an empty `content` and no role is one: vLLM sends it for a token
whose bytes are not yet a whole character, as is usual in Korean.
"""

import re
from collections.abc import Mapping
from typing import Any

import orjson

SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError)
"""Errors of reading an answer in which a field has a type that no known API gives it."""
_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")


def error_code(body: Any) -> str:
    """Return the code of an error object, empty if it has none that is a plain word.

    The message is never returned: it may quote the request.
    """
    error = body.get("error") if isinstance(body, Mapping) else None
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def _count(value: Any) -> int | None:
    """Return a number of tokens, None if it is not one."""
    return value if isinstance(value, int) and value >= 0 else None


class AnswerReader:
    """State of one answer that is being read.

    Attributes:
        first, last: times of the first and the last piece.
        error: kind of failure found in the body, empty for none.
        is_complete: the answer's own end was seen.
    """

    def __init__(self, *, stream: bool, keeps_text: bool) -> None:
        self._stream = stream
        self._keeps_text = keeps_text
        self._rest = b""
        self._read_at = 0.0
        self._is_stream = False
        self._texts: list[str] = []
        self.first: float | None = None
        self.last: float | None = None
        self.gaps: list[float] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.load_seconds: float | None = None
        self.finish = ""
        self.error = ""
        self.is_complete = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def feed(self, data: bytes, now: float) -> None:
        """Take the next part of the body."""
        self._rest += data
        self._read_at = now
        if not self._stream:
            self.last = now
            return
        *events, self._rest = self._rest.split(b"\n")
        for line in events:
            if line := line.strip():
                self._line(line, now)

    def close(self) -> None:
        """Take the end of the body.

        Sets `error` to `cut` for a stream that broke off, and to `invalid_answer` for a body that is neither
        a stream nor the JSON of an answer, such as a web page.
        """
        if self._stream:
            self._close_stream()
        else:
            self._close_plain()

    def _close_stream(self) -> None:
        if rest := self._rest.strip():
            self._line(rest, self._read_at)
        if not self.is_complete:
            self.error = self.error or ("cut" if self._is_stream or not self._read_at else "invalid_answer")

    def _close_plain(self) -> None:
        try:
            body = orjson.loads(self._rest)
        except orjson.JSONDecodeError:
            body = None
        if isinstance(body, dict) and body.get("error"):
            self._fail(body)
        elif not isinstance(body, dict) or not self._is_plain(body):
            self.error = "invalid_answer"

    def _is_plain(self, body: dict[str, Any]) -> bool:
        try:
            return self._plain(body)
        except SHAPE_ERRORS:
            return False

    def _line(self, line: bytes, now: float) -> None:
        try:
            body = orjson.loads(line)
        except orjson.JSONDecodeError:
            self.error = self.error or "invalid_answer"
            return
        if isinstance(body, dict) and body.get("error"):
            self._fail(body)
        elif isinstance(body, dict):
            self._is_stream = True
            try:
                self._event(body, now)
            except SHAPE_ERRORS:
                self.error = self.error or "invalid_answer"

    def _fail(self, body: Mapping[str, Any]) -> None:
        self.error = f"stream_error {error_code(body)}".rstrip()

    def _piece(self, text: str, now: float) -> None:
        if self.first is None:
            self.first = now
        elif self.last is not None:
            self.gaps.append(now - self.last)
        self.last = now
        if self._keeps_text and text:
            self._texts.append(text)

    def _event(self, body: dict[str, Any], now: float) -> None:
        raise NotImplementedError

    def _plain(self, body: dict[str, Any]) -> bool:
        """Take a plain answer; return whether it is one."""
        raise NotImplementedError


class OpenAIReader(AnswerReader):
    """Reader of `/v1/chat/completions` and `/v1/completions`."""

    def _line(self, line: bytes, now: float) -> None:
        if not line.startswith(b"data:"):
            if line.startswith(b"{"):  # a status of 200 with a plain error
                super()._line(line, now)
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_complete = True
            return
        super()._line(data, now)

    def _event(self, body: dict[str, Any], now: float) -> None:
        if usage := body.get("usage"):
            self._usage(usage)
        if not (choices := body.get("choices")):
            return
        choice = choices[0]
        delta = choice.get("delta")
        finish = choice.get("finish_reason")
        if delta is None:  # a text completion
            text: str = choice.get("text") or ""
            is_piece = bool(text) or not finish
            shown = text
        else:
            shown = delta.get("content") or ""
            text = shown or delta.get("reasoning") or delta.get("reasoning_content") or ""
            is_withheld = not finish and "content" in delta and not delta.get("role")
            is_piece = bool(text or delta.get("tool_calls")) or is_withheld
        if is_piece:
            self._piece(shown, now)
        if finish:
            self.finish = finish
            self.is_complete = True
            self.last = now

    def _usage(self, usage: dict[str, Any]) -> None:
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.completion_tokens = _count(usage.get("completion_tokens"))
        self.cached_tokens = _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))

    def _plain(self, body: dict[str, Any]) -> bool:
        if not (choices := body.get("choices")):
            return False
        self._usage(body.get("usage") or {})
        self.finish = choices[0].get("finish_reason") or ""
        self.is_complete = True
        if self._keeps_text:
            self._texts.append(choices[0].get("text") or (choices[0].get("message") or {}).get("content") or "")
        return True


class OllamaReader(AnswerReader):
    """Reader of `/api/chat` and `/api/generate`."""

    def _event(self, body: dict[str, Any], now: float) -> None:
        message = body.get("message") or body
        shown: str = message.get("content") or body.get("response") or ""
        if shown or message.get("thinking") or message.get("tool_calls"):
            self._piece(shown, now)
        if body.get("done"):
            self._counts(body)
            self.last = now

    def _counts(self, body: dict[str, Any]) -> None:
        self.is_complete = True
        self.finish = body.get("done_reason") or ""
        self.prompt_tokens = _count(body.get("prompt_eval_count"))
        self.completion_tokens = _count(body.get("eval_count"))
        if loaded := body.get("load_duration"):
            self.load_seconds = loaded / 1e9

    def _plain(self, body: dict[str, Any]) -> bool:
        if not body.get("done"):
            return False
        self._counts(body)
        if self._keeps_text:
            self._texts.append((body.get("message") or {}).get("content") or body.get("response") or "")
        return True
