"""OpenAI's Responses API. Pure: no I/O, no clock.

An answer that was cut at its token limit is `incomplete`, in the object and in the last event.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import orjson
from msgspec import Struct

from gateway.chat.answer import Answer, ChosenLogprob
from gateway.dialects.dialect import ChatCall, Clock, ErrorForm
from gateway.dialects.json_body import Steps, completed
from gateway.dialects.json_text import escaped
from gateway.dialects.long_answers import LongAnswers, array_slices, logprob_runs
from gateway.dialects.openai_chat import STREAM_LINES
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
from gateway.dialects.responses_request import parse_response
from gateway.dialects.responses_stream import EventRenderer


class ResponseForm(Struct, ResponseErrors, LongAnswers, frozen=True, gc=False):
    """A `response` object, or a stream of events."""

    endpoint: ClassVar[str] = "responses"
    shows_arguments_as_text: ClassVar[bool] = True
    stream_lines: ClassVar[bytes] = STREAM_LINES

    model: str
    is_stream: bool
    echo: dict[str, Any]

    def stream(self, id: str, created: int) -> EventRenderer:
        return EventRenderer(ResponseObject(id, created, self.model, self.echo))

    def logprob_slices(self, logprobs: list[ChosenLogprob]) -> Iterator[bytes]:
        yield from array_slices(logprob_runs(logprobs), lambda run: escaped(logprobs_json(run)))

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        response = ResponseObject(id, created, self.model, self.echo)
        is_cut = answer.finish in INCOMPLETE
        output: list[dict[str, Any]] = []
        if answer.reasoning:
            output.append(reasoning_item(response.item_id(REASONING_PREFIX, 0), answer.reasoning, "completed"))
        kinds = {"reasoning" if answer.reasoning else "nothing", "call" if answer.calls else "nothing"}
        if answer.content or needs_message(kinds, is_cut):
            parts = [text_part(answer.content, answer.logprobs)]
            output.append(message_item(response.item_id("msg", len(output)), parts, "completed"))
        output += [
            call_item(response.item_id("fc", index), call, "completed")
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
