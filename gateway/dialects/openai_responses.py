"""OpenAI's Responses API: answers and the events of a stream. Pure: no I/O, no clock.

Events, their order and their sequence numbers are those of OpenAI (openai-python 2, types/responses).
An answer that was cut at its token limit is `incomplete`, in the object and in the last event.
"""

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import orjson
from msgspec import Raw, Struct

from gateway.chat.answer import MAX_LOGPROBS, MAX_TEXT, Answer, CallDelta, ChosenLogprob, Delta, FinishReason, Usage
from gateway.dialects.dialect import ChatCall, Clock, ErrorForm, OpenAiErrors, renamed
from gateway.dialects.json_body import Steps, completed
from gateway.dialects.json_text import escaped, json_text
from gateway.dialects.long_answers import (
    LONG_LOGPROBS,
    LONG_TEXT,
    Fillings,
    LongAnswers,
    array_slices,
    joined_slices,
    logprob_runs,
)
from gateway.dialects.openai_chat import STREAM_LINES
from gateway.dialects.responses_items import REASONING_PREFIX
from gateway.dialects.responses_request import parse_response
from gateway.errors import GatewayError, UpstreamError

_INCOMPLETE: dict[FinishReason, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}

MAX_ITEMS = 4096
"""Maximum number of runs of thoughts, of text or of a call in a streamed answer."""


def _usage(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _logprobs(logprobs: list[ChosenLogprob] | Raw | None) -> orjson.Fragment:
    return orjson.Fragment(bytes(logprobs) if isinstance(logprobs, Raw) else _logprobs_json(logprobs or []))


def _logprobs_json(logprobs: list[ChosenLogprob]) -> bytes:
    """Render the log probabilities. `bytes` is never null here, unlike in a chat completion."""
    # Quotes within strings are escaped, so this can only be the member.
    return msgspec.json.encode(logprobs).replace(b'"bytes":null', b'"bytes":[]')


def _reasoning_item(id: str, text: str, status: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}


def _text_part(text: str, logprobs: list[ChosenLogprob] | Raw | None = None) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": _logprobs(logprobs), "text": text}


def _message_item(id: str, parts: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": parts}


def _call_item(id: str, call: CallDelta, status: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "function_call",
        "status": status,
        "arguments": call.arguments,
        "call_id": call.id,
        "name": call.name,
    }


def _needs_message(kinds: set[str], is_cut: bool) -> bool:
    """Return whether an empty message has to be added to items of these kinds.

    Without a message or call, clients take an answer for unfinished. One of which only thoughts fit
    into the token limit is unfinished.
    """
    return not (kinds - {"reasoning", "nothing"}) and not (is_cut and "reasoning" in kinds)


class _Response:
    """The response object of one request."""

    __slots__ = ("_fields", "suffix")

    def __init__(self, id: str, created: int, model: str, echo: dict[str, Any]) -> None:
        self.suffix = id
        self._fields = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echo,
        }

    def item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self.suffix}{index:02x}"

    def begun(self) -> dict[str, Any]:
        return self._fields

    def ended(self, output: list[dict[str, Any]], finish: FinishReason | None, usage: Usage | None) -> dict[str, Any]:
        reason = None if finish is None else _INCOMPLETE.get(finish)
        return self._fields | {
            "status": "completed" if reason is None else "incomplete",
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            "usage": _usage(usage),
        }

    def failed(self, message: str) -> dict[str, Any]:
        return self._fields | {"status": "failed", "error": {"code": "server_error", "message": message}}


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
            return _reasoning_item(self.id, text, status)
        if self.kind == "message":
            return _message_item(self.id, [_text_part(text, self._whole_logprobs(fillings))], status)
        assert self.call is not None
        return _call_item(self.id, CallDelta(0, self.call.id, self.call.name, text), status)

    def _whole_logprobs(self, fillings: Fillings | None) -> Raw:
        if fillings is None or not self.logprobs:
            return Raw(b"[%b]" % b",".join(self.logprobs))
        return Raw(fillings.placeholder(lambda: joined_slices(self.logprobs)).encode())

    def begun(self) -> dict[str, Any]:
        if self.kind == "message":
            return _message_item(self.id, [], "in_progress")
        return self.whole("in_progress")


class EventRenderer:
    """Renders deltas as events. Each run of thoughts, of text or of a call is an item."""

    __slots__ = ("_fillings", "_finish", "_item", "_length", "_logprobs", "_number", "_output", "_response", "_usage")

    def __init__(self, response: _Response) -> None:
        self._length = self._logprobs = 0
        """Characters, and tokens and alternatives, that are kept for the events at the end."""
        self._fillings: Fillings | None = None
        """Texts and log probabilities of long items. Their events repeat them up to four times."""
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
        return self._event("response.in_progress", response=self._response.begun())

    def render(self, delta: Delta) -> bytes:
        parts: list[bytes] = []
        if delta.reasoning:
            parts += self._filled(self._open("reasoning", REASONING_PREFIX))
            parts.append(self._piece(b"response.reasoning_text.delta", delta.reasoning))
        if delta.content or delta.logprobs:
            parts += self._filled(self._open("message", "msg"))
            parts.append(self._text(delta.content, delta.logprobs))
        for call in delta.calls or ():
            parts += self._filled(self._open(f"call {call.index}", "fc", call))
            if call.arguments:
                parts.append(self._piece(b"response.function_call_arguments.delta", call.arguments, place=b""))
        self._finish = delta.finish or self._finish
        self._usage = delta.usage or self._usage
        return b"".join(parts)

    def end(self, clock: Clock) -> bytes:
        return b"".join(self._filled(self._end()))

    def end_steps(self, clock: Clock) -> Steps[list[bytes]] | None:
        return self._filled_in_steps() if self._is_long() else None

    def _end(self) -> bytes:
        is_cut = self._finish in _INCOMPLETE
        kinds = {item["type"] for item in self._output} | {self._item.kind if self._item else "nothing"}
        empty = self._open("message", "msg") if _needs_message(kinds, is_cut) else b""
        closed = self._close("incomplete" if is_cut else "completed")
        name = "response.incomplete" if is_cut else "response.completed"
        whole = self._response.ended(self._output, self._finish, self._usage)
        return empty + closed + self._event(name, response=whole)

    def _is_long(self) -> bool:
        return self._length > LONG_TEXT or self._logprobs > LONG_LOGPROBS

    def _filled(self, events: bytes) -> list[bytes]:
        return [events] if self._fillings is None or not events else completed(self._fillings.fill(events))

    def _filled_in_steps(self) -> Steps[list[bytes]]:
        events = self._end()
        yield
        return [events] if self._fillings is None else (yield from self._fillings.fill(events))

    def error(self, error: GatewayError) -> bytes:
        message = renamed(error.message, ResponseErrors.fields)
        param = None if error.param is None else renamed(error.param, ResponseErrors.fields)
        return self._event("error", code=error.code, message=message, param=param) + self._event(
            "response.failed", response=self._response.failed(message)
        )

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
            shown = escaped(_logprobs_json(logprobs))
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
        part = _text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
        return closed + added + self._part_event("response.content_part.added", item, part=part)

    def _part_event(self, name: str, /, item: _OpenItem, **fields: Any) -> bytes:
        return self._event(name, item_id=item.id, output_index=item.index, content_index=0, **fields)

    def _close(self, status: str) -> bytes:
        item, self._item = self._item, None
        if item is None:
            return b""
        if self._fillings is None and self._is_long():
            self._fillings = Fillings()
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


class ResponseErrors(OpenAiErrors):
    """OpenAI's error object with the names of this API's fields."""

    __slots__ = ()

    fields = (
        (re.compile(r"\btools\[(\d+)\]\.function\."), r"tools[\1]."),
        (re.compile(r"\bresponse_format\b(\.json_schema)?"), "text.format"),
        (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
        (re.compile(r"^messages$"), "input"),
    )


class ResponseForm(Struct, ResponseErrors, LongAnswers, frozen=True, gc=False):
    """A `response` object, or a stream of events."""

    endpoint: ClassVar[str] = "responses"
    shows_arguments_as_text: ClassVar[bool] = True
    stream_lines: ClassVar[bytes] = STREAM_LINES

    model: str
    is_stream: bool
    echo: dict[str, Any]

    def stream(self, id: str, created: int) -> EventRenderer:
        return EventRenderer(_Response(id, created, self.model, self.echo))

    def logprob_slices(self, logprobs: list[ChosenLogprob]) -> Iterator[bytes]:
        yield from array_slices(logprob_runs(logprobs), lambda run: escaped(_logprobs_json(run)))

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        response = _Response(id, created, self.model, self.echo)
        is_cut = answer.finish in _INCOMPLETE
        output: list[dict[str, Any]] = []
        if answer.reasoning:
            output.append(_reasoning_item(response.item_id(REASONING_PREFIX, 0), answer.reasoning, "completed"))
        kinds = {"reasoning" if answer.reasoning else "nothing", "call" if answer.calls else "nothing"}
        if answer.content or _needs_message(kinds, is_cut):
            parts = [_text_part(answer.content, answer.logprobs)]
            output.append(_message_item(response.item_id("msg", len(output)), parts, "completed"))
        output += [
            _call_item(response.item_id("fc", index), call, "completed")
            for index, call in enumerate(answer.calls, len(output))
        ]
        if is_cut:
            output[-1]["status"] = "incomplete"
        return escaped(orjson.dumps(response.ended(output, answer.finish, answer.usage)))


class OpenAiResponses:
    """`POST /v1/responses`."""

    endpoint = ResponseForm.endpoint
    errors: ErrorForm = ResponseErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        parsed = yield from parse_response(body, max_text_body)
        chat = parsed.chat
        form = ResponseForm(chat.model, bool(chat.stream), parsed.echo)
        return ChatCall(chat, form, image_paths=parsed.image_paths), parsed.text_size
