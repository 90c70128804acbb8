"""Table of wrong servers: for each check of `gateway verify`, ways in which a server fails it."""

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.bench.verify.history_checks import CODE
from tests.bench.verify.wrong_server import CHAT, Answer, Body, Wrong

HANGUL_FIELD = "문장"


@dataclass(frozen=True)
class Fault:
    """A wrong server and the check that it fails.

    `reason` is the key of the reason; `kind` is what the server claims to be, if not a vLLM.
    """

    check: str
    reason: str
    wrong: Wrong
    kind: str = ""
    key: str | None = None
    server_key: str = ""
    tokens_per_second: float = 0.0
    answer_tokens: int = 32

    def __str__(self) -> str:
        return f"{self.check}-{self.reason}{'-' + self.kind if self.kind else ''}"


# Changes of answers


def on(path: str, change: Callable[[Answer], None]) -> Wrong:
    def answered(answer: Answer) -> None:
        if answer.path == path:
            change(answer)

    return Wrong(answered=answered)


def plain(change: Callable[[Body], object]) -> Wrong:
    """A change of the JSON of plain chat answers."""

    def answered(answer: Answer) -> None:
        if answer.status == 200 and not answer.is_stream:
            value = answer.json
            change(value)
            answer.say(200, value)

    return on(CHAT, answered)


def streamed(change: Callable[[list[Body]], list[Body] | None]) -> Wrong:
    """A change of the chunks of streams."""

    def answered(answer: Answer) -> None:
        if answer.is_stream:
            events = answer.events
            answer.stream(change(events) or events)

    return on(CHAT, answered)


def raw_stream(change: Callable[[bytes], bytes]) -> Wrong:
    def answered(answer: Answer) -> None:
        if answer.is_stream:
            answer.body = change(answer.body)

    return on(CHAT, answered)


def text(change: Callable[[str], str]) -> Wrong:
    """A change of the content of plain answers."""

    def changed(body: Body) -> None:
        message = body["choices"][0]["message"]
        message["content"] = change(message["content"] or "")

    return plain(changed)


def errors(change: Callable[[Answer], None]) -> Wrong:
    """A change of answers that are errors."""

    def answered(answer: Answer) -> None:
        if answer.status >= 400:
            change(answer)

    return Wrong(answered=answered)


def refuses(when: Callable[[Body], bool], status: int = 422) -> Wrong:
    """Refusal of chats for which `when` holds."""

    def answered(answer: Answer) -> None:
        if when(answer.asked):
            answer.say(status, error("It is not allowed."))

    return on(CHAT, answered)


def error(message: str, **fields: Any) -> Body:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **fields}}


# Changes of requests


def without(*names: str) -> Wrong:
    def asked(body: Body) -> None:
        for name in names:
            body.pop(name, None)

    return Wrong(asked=asked)


def only_last_message(body: Body) -> None:
    if isinstance(body.get("messages"), list):
        body["messages"] = body["messages"][-1:]


def short_prompt(body: Body) -> None:
    for message in body.get("messages") or ():
        if isinstance(message.get("content"), str):
            message["content"] = message["content"][:2000]


def without_images(body: Body) -> None:
    for message in body.get("messages") or ():
        if isinstance(message.get("content"), list):
            message["content"] = [part for part in message["content"] if part.get("type") != "image_url"]


# Changes of single fields


def delta(event: Body) -> Body:
    choices = event.get("choices") or [{}]
    found: Body = choices[0].get("delta") or {}
    return found


def one_piece(events: list[Body]) -> list[Body]:
    """Return the stream with its whole text in the first chunk that has some."""
    full = [event for event in events if delta(event).get("content")]
    delta(full[0])["content"] = "".join(delta(event)["content"] for event in full)
    return [event for event in events if event not in full[1:]]


def no_finish(events: list[Body]) -> None:
    for event in events:
        for choice in event.get("choices") or ():
            choice["finish_reason"] = None


def late_text(events: list[Body]) -> None:
    events.append({**events[-1], "choices": [{"index": 0, "delta": {"content": "more"}, "finish_reason": None}]})


def other_ids(events: list[Body]) -> None:
    for number, event in enumerate(events):
        event["id"] = f"chatcmpl-{number}"


def no_role(events: list[Body]) -> None:
    for event in events:
        delta(event).pop("role", None)


def broken_syllables(events: list[Body]) -> None:
    for event in events:
        if delta(event).get("content"):
            delta(event)["content"] = delta(event)["content"].replace("다", "\ufffd")


def cut_bytes(body: bytes) -> bytes:
    return body.replace("람".encode(), "람".encode()[:2])


def unasked_usage(events: list[Body]) -> None:
    events[-1]["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def no_usage_chunk(events: list[Body]) -> list[Body]:
    return [event for event in events if event.get("choices")]


def usage_with_choices(events: list[Body]) -> list[Body]:
    """Put the usage into the chunk that finishes."""
    last = events[-1]
    if last.get("choices") == []:
        events[-2]["usage"] = last["usage"]
        return events[:-1]
    return events


def broken_value(content: str) -> str:
    """Replace syllables of the JSON value, as a server does that decodes bytes one by one."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    return json.dumps({HANGUL_FIELD: value[HANGUL_FIELD].replace("깻", "\ufffd")}, ensure_ascii=False)


def broken_values(events: list[Body]) -> list[Body]:
    if not any(delta(event).get("content") for event in events):
        return events
    events = one_piece(events)
    for event in events:
        if delta(event).get("content"):
            delta(event)["content"] = broken_value(delta(event)["content"])
    return events


def forgets(answer: Answer) -> None:
    """Answer the question about the fact from the last message alone."""
    if answer.path == CHAT and answer.status == 200:
        value = answer.json
        found = CODE in str(answer.asked["messages"][-1].get("content"))
        value["choices"][0]["message"]["content"] = CODE if found else "I do not know."
        answer.say(200, value)


def calls(change: Callable[[Body], object]) -> Wrong:
    """A change of the calls of plain answers."""

    def changed(body: Body) -> None:
        for call in body["choices"][0]["message"].get("tool_calls") or ():
            change(call)

    return plain(changed)


def stream_calls(change: Callable[[Body], object]) -> Wrong:
    def changed(events: list[Body]) -> None:
        for event in events:
            for call in delta(event).get("tool_calls") or ():
                change(call)

    return streamed(changed)


def a_call(body: Body) -> None:
    function = {"name": "get_weather", "arguments": "{}"}
    body["choices"][0]["message"]["tool_calls"] = [{"id": "a", "type": "function", "function": function}]


def logprob(body: Body) -> Body:
    found: Body = body["choices"][0]["logprobs"]["content"][0]
    return found


def vectors(change: Callable[[list[Body]], list[Body] | None]) -> Wrong:
    def answered(answer: Answer) -> None:
        if answer.status == 200:
            value = answer.json
            value["data"] = change(value["data"]) or value["data"]
            answer.say(200, value)

    return on("/v1/embeddings", answered)


def same_vectors(data: list[Body]) -> None:
    for item in data:
        item["embedding"] = data[0]["embedding"]


def narrow_vector(data: list[Body]) -> None:
    data[-1]["embedding"] = data[-1]["embedding"][:-1]


def swapped(data: list[Body]) -> None:
    for item in data:
        item["index"] = len(data) - 1 - item["index"]


def shifted_base64(data: list[Body]) -> None:
    for item in data:
        if isinstance(item["embedding"], str):
            item["embedding"] = base64.b64encode(struct.pack("<16f", *[1.0] * 16)).decode()


def accepts_anything(answer: Answer) -> None:
    if answer.path == "/v1/embeddings" and answer.status != 200:
        answer.say(200, {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [1.0]}]})


ACCEPTED = errors(lambda answer: answer.say(200, {"object": "chat.completion", "choices": []}))
CRASHED = errors(lambda answer: answer.say(500, error("Internal Server Error")))
IN_FASTAPIS_SHAPE = errors(lambda answer: answer.say(answer.status, {"detail": [{"msg": "Field required"}]}))
WITHOUT_JSON = errors(lambda answer: setattr(answer, "body", b"Bad Request"))
NUMBERED = errors(lambda answer: answer.say(answer.status, error("No.", code=answer.status)))
OTHER_CODE = errors(lambda answer: answer.say(answer.status, error("No.", code="something_else")))
ERROR_CHECKS = (
    "bad_json", "unknown_model", "missing_messages", "wrong_type", "wrong_request_streamed", "says_what_is_wrong",
    "bad_image", "too_long",
)  # fmt: skip


def _error_faults() -> list[Fault]:
    faults = []
    for check in ERROR_CHECKS:
        accepted = "prompt_cut" if check == "too_long" else "accepted"
        faults += [
            Fault(check, accepted, ACCEPTED),
            Fault(check, "wrong_status", CRASHED),
            Fault(check, "wrong_error_shape", IN_FASTAPIS_SHAPE),
            Fault(check, "wrong_error_shape", WITHOUT_JSON),
            Fault(check, "wrong_error_shape", NUMBERED, kind="gateway"),
            Fault(check, "wrong_code", OTHER_CODE, kind="gateway"),
        ]
    return faults


FAULTS: list[Fault] = [
    # server
    Fault("lists_models", "no_model_list", on("/v1/models", lambda answer: answer.say(500, {}))),
    Fault("lists_models", "no_model_list", on("/v1/models", lambda answer: answer.say(200, {"models": []}))),
    Fault("lists_models", "no_models", on("/v1/models", lambda answer: answer.say(200, {"data": []}))),
    Fault("lists_models", "key_refused", Wrong(), server_key="sk-right", key="sk-wrong"),
    Fault("answers", "no_chat", refuses(lambda body: True, 500)),
    Fault("answers", "wrong_shape", plain(lambda body: body.pop("id"))),
    Fault("answers", "wrong_shape", plain(lambda body: body["choices"][0].update(finish_reason=None))),
    Fault("shows_its_model", "wrong_model_entry", Wrong(), kind="gateway"),
    # streaming
    Fault("comes_piece_by_piece", "buffered", Wrong(buffers=True), tokens_per_second=320),
    Fault("comes_piece_by_piece", "one_piece", streamed(one_piece)),
    Fault("comes_piece_by_piece", "not_a_stream", without("stream")),
    Fault("comes_piece_by_piece", "no_pieces", streamed(lambda events: events[-1:])),
    Fault("ends_with_done", "no_done", raw_stream(lambda body: body.removesuffix(b"data: [DONE]\n\n"))),
    Fault("ends_with_done", "unreadable_events", raw_stream(lambda body: b"data: {cut\n\n" + body)),
    Fault("says_why_it_ended", "finishes", streamed(no_finish)),
    Fault("says_why_it_ended", "finishes", streamed(lambda events: [*events, events[-1]])),
    Fault("says_why_it_ended", "text_after_finish", streamed(late_text)),
    Fault("has_the_shape_of_chunks", "wrong_shape", streamed(other_ids)),
    Fault("has_the_shape_of_chunks", "wrong_shape", streamed(no_role)),
    # Korean
    Fault("keeps_hangul_in_chunks", "broken_in_chunks", streamed(broken_syllables)),
    Fault("keeps_hangul_in_chunks", "invalid_utf8", raw_stream(cut_bytes)),
    Fault("returns_hangul", "hangul_broken", text(broken_value)),
    Fault("returns_hangul", "hangul_differs", without("response_format")),
    Fault("returns_hangul_streamed", "hangul_broken", streamed(broken_values)),
    Fault("returns_hangul_streamed", "hangul_differs", without("response_format")),
    Fault("repeats_korean", "hangul_broken", text(lambda content: content.replace("깻", "\ufffd"))),
    Fault("takes_korean_names", "refused", refuses(lambda body: not str(body.get("user", "")).isascii())),
    # history
    Fault("counts_earlier_turns", "history_not_counted", Wrong(asked=only_last_message)),
    Fault("recalls_a_fact", "not_recalled", Wrong(answered=forgets)),
    # errors
    *_error_faults(),
    Fault("missing_model", "accepted", Wrong(), kind="openai"),
    Fault("missing_model", "wrong_status", refuses(lambda body: "model" not in body, 500)),
    Fault("unknown_path", "wrong_status", CRASHED),
    Fault("unknown_path", "wrong_error_shape", IN_FASTAPIS_SHAPE, kind="gateway"),
    Fault("wrong_key", "any_key_taken", Wrong(key=b"Bearer sk-right"), key="sk-right", server_key="sk-right"),
    Fault("wrong_key", "wrong_status", CRASHED, key="sk-right", server_key="sk-right"),
    # concurrency
    Fault("answers_at_once", "not_all_answered", Wrong(most=5), tokens_per_second=800),
    Fault("answers_at_once", "not_all_answered", raw_stream(lambda body: body.removesuffix(b"data: [DONE]\n\n"))),
    # dialect
    Fault("usage", "no_usage", plain(lambda body: body.pop("usage"))),
    Fault("usage", "wrong_usage", plain(lambda body: body["usage"].update(total_tokens=0))),
    Fault("stream_options", "no_stream_usage", streamed(no_usage_chunk)),
    Fault("stream_options", "usage_with_choices", streamed(usage_with_choices)),
    Fault("stream_options", "usage_unasked", streamed(unasked_usage)),
    Fault("max_tokens", "too_many_tokens", without("max_tokens")),
    Fault("max_tokens", "wrong_finish", plain(lambda body: body["choices"][0].update(finish_reason="stop"))),
    Fault("max_completion_tokens", "too_many_tokens", without("max_completion_tokens")),
    Fault("stop", "stop_ignored", without("stop")),
    Fault("stop", "wrong_finish", plain(lambda body: body["choices"][0].update(finish_reason="length"))),
    Fault("several_choices", "choices_missing", without("n")),
    Fault("several_choices", "choices_not_numbered", plain(lambda body: body["choices"][-1].update(index=0))),
    Fault("logprobs", "no_logprobs", without("logprobs", "top_logprobs")),
    Fault(
        "logprobs",
        "wrong_logprobs",
        plain(lambda body: body["choices"][0]["logprobs"] and logprob(body).update(logprob=2)),
    ),
    Fault(
        "logprobs",
        "wrong_top_logprobs",
        plain(lambda body: body["choices"][0]["logprobs"] and logprob(body).update(top_logprobs=[])),
    ),
    Fault("roles", "refused", refuses(lambda body: body["messages"][0]["role"] == "developer", 400)),
    Fault("harmless_fields", "refused", refuses(lambda body: "unknown_field_of_verify" in body, 400)),
    Fault("image", "image_ignored", Wrong(asked=without_images)),
    Fault("image", "refused", refuses(lambda body: isinstance(body["messages"][-1]["content"], list), 500)),
    # tools
    Fault("named_tool", "no_call", without("tools", "tool_choice")),
    Fault("named_tool", "wrong_call", calls(lambda call: call["function"].update(name="get_time"))),
    Fault("named_tool", "wrong_call_shape", calls(lambda call: call.pop("id"))),
    Fault("named_tool", "arguments_not_json", calls(lambda call: call["function"].update(arguments="{"))),
    Fault(
        "named_tool", "arguments_off_schema", calls(lambda call: call["function"].update(arguments='{"city": "Paris"}'))
    ),
    Fault("named_tool_streamed", "no_call", without("tools", "tool_choice")),
    Fault("named_tool_streamed", "wrong_call_shape", stream_calls(lambda call: call.pop("id", None))),
    Fault("required_tool", "no_call", without("tools", "tool_choice")),
    Fault("no_tool", "called_anyway", plain(a_call)),
    Fault("tool_result", "refused", refuses(lambda body: body["messages"][-1]["role"] == "tool", 500)),
    Fault("json_schema", "not_json", without("response_format")),
    Fault("json_schema", "off_schema", text(lambda content: '{"colour": "green", "count": 1}')),
    Fault("json_object", "not_an_object", text(lambda content: "[1]")),
    Fault("json_object", "not_json", without("response_format")),
]

EMBEDDING_FAULTS: list[Fault] = [
    Fault("vectors", "vectors_missing", vectors(lambda data: data[:1])),
    Fault("vectors", "wrong_vectors", vectors(narrow_vector)),
    Fault("vectors", "same_vectors", vectors(same_vectors)),
    Fault("order_of_vectors", "vectors_out_of_order", vectors(swapped)),
    Fault("base64_vectors", "base64_differs", vectors(shifted_base64)),
    Fault("wrong_input", "accepted", Wrong(answered=accepts_anything)),
]
