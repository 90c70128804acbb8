"""Changes that make a right server wrong: of its answers, of single fields, and of what it is asked."""

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

from gateway.bench.verify.history_checks import CODE
from tests.bench.verify.wrong_server import CHAT, Answer, Body, Wrong

HANGUL_FIELD = "문장"


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
