"""Events of a streamed answer of OpenAI's Responses API. Pure: no I/O, no clock.

Events, their order and their sequence numbers are those of OpenAI (openai-python 2, types/responses).
"""

from typing import Any

import orjson
from msgspec import Raw

from gateway.chat.answer import MAX_LOGPROBS, MAX_TEXT, CallDelta, ChosenLogprob, Delta, FinishReason, Usage
from gateway.dialects.dialect import Clock, renamed
from gateway.dialects.json_body import Steps, completed
from gateway.dialects.json_text import escaped, json_text
from gateway.dialects.long_answers import (
    LONG_LOGPROBS,
    LONG_TEXT,
    STEP,
    Backlog,
    Fillings,
    joined_slices,
)
from gateway.dialects.responses_items import REASONING_PREFIX
from gateway.dialects.responses_objects import (
    INCOMPLETE,
    ResponseErrors,
    ResponseObject,
    call_item,
    logprobs_json,
    message_item,
    needs_message,
    reasoning_item,
    text_part,
)
from gateway.errors import GatewayError, UpstreamError

MAX_ITEMS = 4096
"""Maximum number of runs of thoughts, of text or of a call in a streamed answer."""
SENT_AT_ONCE = 64 * 1024
"""Bytes of long events that are sent with each further delta."""


class _OpenItem:
    """An item of the output that is being streamed."""

    __slots__ = ("call", "id", "index", "kind", "logprobs", "pieces")

    def __init__(self, kind: str, id: str, index: int, call: CallDelta | None = None) -> None:
        self.kind = kind
        self.id = id
        self.index = index
        self.call = call
        self.pieces: list[str] = []
        self.logprobs: list[bytes] = []
        """Log probabilities of each delta, as the elements of a JSON array."""

    def whole(self, status: str, fillings: Fillings | None = None) -> dict[str, Any]:
        """Return the item with all of its text, or with placeholders."""
        text = "".join(self.pieces)
        if fillings is not None:
            text = fillings.text(text)
        if self.kind == "reasoning":
            return reasoning_item(self.id, text, status)
        if self.kind == "message":
            return message_item(self.id, [text_part(text, self._whole_logprobs(fillings))], status)
        assert self.call is not None
        return call_item(self.id, CallDelta(0, self.call.id, self.call.name, text), status)

    def _whole_logprobs(self, fillings: Fillings | None) -> Raw:
        if fillings is None or not self.logprobs:
            return Raw(b"[%b]" % b",".join(self.logprobs))
        return Raw(fillings.placeholder(lambda: joined_slices(self.logprobs)).encode())

    def begun(self) -> dict[str, Any]:
        if self.kind == "message":
            return message_item(self.id, [], "in_progress")
        return self.whole("in_progress")


class EventRenderer:
    """Renders deltas as events. Each run of thoughts, of text or of a call is an item."""

    __slots__ = (
        "_backlog",
        "_fillings",
        "_finish",
        "_item",
        "_length",
        "_logprobs",
        "_number",
        "_output",
        "_response",
        "_usage",
    )

    def __init__(self, response: ResponseObject) -> None:
        self._length = self._logprobs = 0
        """Characters, and tokens and alternatives, that are kept for the events at the end."""
        self._fillings: Fillings | None = None
        """Texts and log probabilities of long items. Their events repeat them up to four times."""
        self._backlog = Backlog()
        """Events that are not sent yet, because a long item has ended before the stream."""
        self._response = response
        self._number = 0
        self._item: _OpenItem | None = None
        self._output: list[dict[str, Any]] = []
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None

    @property
    def around_text(self) -> None:
        return None

    def splice(self, texts: list[bytes]) -> bytes:
        raise NotImplementedError

    def opening(self) -> bytes:
        response = self._response.begun()
        return self._event("response.created", response=response) + self.keepalive()

    def keepalive(self) -> bytes:
        """Return a part of what waits, if anything does: an event of its own could fall into the middle of another."""
        return self._backlog.take(SENT_AT_ONCE) or self._event("response.in_progress", response=self._response.begun())

    def render(self, delta: Delta) -> bytes:
        parts: list[bytes] = []
        if delta.reasoning:
            parts.append(self._open("reasoning", REASONING_PREFIX))
            parts.append(self._piece(b"response.reasoning_text.delta", delta.reasoning))
        if delta.content or delta.logprobs:
            parts.append(self._open("message", "msg"))
            parts.append(self._text(delta.content, delta.logprobs))
        for call in delta.calls or ():
            parts.append(self._open(f"call {call.index}", "fc", call))
            if call.arguments:
                parts.append(self._piece(b"response.function_call_arguments.delta", call.arguments, place=b""))
        self._finish = delta.finish or self._finish
        self._usage = delta.usage or self._usage
        events = b"".join(parts)
        if self._fillings is None:
            return events
        self._backlog.add(self._fillings.pieces(events))
        return self._backlog.take(SENT_AT_ONCE)

    def end(self, clock: Clock) -> bytes:
        return b"".join(completed(self._end_steps()))

    def end_steps(self, clock: Clock) -> Steps[list[bytes]] | None:
        return self._end_steps() if self._is_long() else None

    def _end(self) -> bytes:
        is_cut = self._finish in INCOMPLETE
        kinds = {item["type"] for item in self._output} | {self._item.kind if self._item else "nothing"}
        empty = self._open("message", "msg") if needs_message(kinds, is_cut) else b""
        closed = self._close("incomplete" if is_cut else "completed")
        name = "response.incomplete" if is_cut else "response.completed"
        whole = self._response.ended(self._output, self._finish, self._usage)
        return empty + closed + self._event(name, response=whole)

    def _is_long(self) -> bool:
        return self._length > LONG_TEXT or self._logprobs > LONG_LOGPROBS

    def _end_steps(self) -> Steps[list[bytes]]:
        events = self._end()
        yield
        if self._fillings is None:
            return [events]
        self._backlog.add(self._fillings.pieces(events))
        return (yield from self._backlog.take_all())

    def error(self, error: GatewayError) -> bytes:
        message = renamed(error.message, ResponseErrors.fields)
        param = None if error.param is None else renamed(error.param, ResponseErrors.fields)
        failed = self._event("error", code=error.code, message=message, param=param)
        return self._backlog.cut() + failed + self._event("response.failed", response=self._response.failed(message))

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), escaped(orjson.dumps(data)))

    def _piece(self, name: bytes, text: str, logprobs: bytes = b"", place: bytes = b',"content_index":0') -> bytes:
        item = self._item
        assert item is not None
        item.pieces.append(text)
        self._length += len(text)
        if self._length > MAX_TEXT:
            raise UpstreamError("too_large")
        self._number += 1
        return (
            b'event: %b\ndata: {"type":"%b","sequence_number":%d,"item_id":"%b","output_index":%d%b,"delta":%b%b}\n\n'
        ) % (name, name, self._number - 1, item.id.encode(), item.index, place, json_text(text), logprobs)

    def _text(self, text: str, logprobs: list[ChosenLogprob] | None) -> bytes:
        assert self._item is not None
        shown = b"[]"
        if logprobs:
            shown = escaped(logprobs_json(logprobs))
            self._item.logprobs.append(shown[1:-1])
            self._logprobs += sum(1 + len(chosen.top_logprobs) for chosen in logprobs)
            if self._logprobs > MAX_LOGPROBS:
                raise UpstreamError("too_large")
        return self._piece(b"response.output_text.delta", text, b',"logprobs":' + shown)

    def _open(self, kind: str, prefix: str, call: CallDelta | None = None) -> bytes:
        """Begin an item of this kind, unless it has begun. Return the events of that, perhaps with placeholders."""
        if self._item is not None and self._item.kind == kind:
            return b""
        closed = self._close("completed")
        index = len(self._output)
        if index >= MAX_ITEMS:
            raise UpstreamError("too_large")
        item = self._item = _OpenItem(kind, self._response.item_id(prefix, index), index, call)
        added = self._event("response.output_item.added", output_index=index, item=item.begun())
        if call is not None:
            return closed + added
        part = text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
        return closed + added + self._part_event("response.content_part.added", item, part=part)

    def _part_event(self, name: str, /, item: _OpenItem, **fields: Any) -> bytes:
        return self._event(name, item_id=item.id, output_index=item.index, content_index=0, **fields)

    def _close(self, status: str) -> bytes:
        item, self._item = self._item, None
        if item is None:
            return b""
        if self._fillings is None and self._is_long():
            self._fillings = Fillings(STEP)
        whole = item.whole(status, self._fillings)
        self._output.append(whole)
        if item.kind.startswith("call"):
            name, arguments = whole["name"], whole["arguments"]
            done = self._event(
                "response.function_call_arguments.done",
                item_id=item.id,
                output_index=item.index,
                name=name,
                arguments=arguments,
            )
        elif item.kind == "message":
            part = whole["content"][0]
            done = self._part_event(
                "response.output_text.done", item, text=part["text"], logprobs=part["logprobs"]
            ) + self._part_event("response.content_part.done", item, part=part)
        else:
            text = whole["content"][0]["text"] if whole["content"] else ""
            done = self._part_event("response.reasoning_text.done", item, text=text)
            done += self._part_event("response.content_part.done", item, part={"type": "reasoning_text", "text": text})
        return done + self._event("response.output_item.done", output_index=item.index, item=whole)
