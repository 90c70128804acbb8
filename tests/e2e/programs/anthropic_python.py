"""Programs on anthropic-python."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message, ToolUseBlock

from tests.e2e.gateway import PLAIN_HTTP
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    HELLO,
    OTHER_QUESTION,
    PET_QUESTION,
    TIMEOUT_SECONDS,
    TOOLS,
    Program,
    Target,
    check_arguments,
    pet_schema,
)

FUNCTIONS: list[Any] = [
    {"name": name, "description": tool.__doc__, "input_schema": tool.model_json_schema()}
    for name, tool in TOOLS.items()
]
# anthropic-python 2 has no `temperature`, since Anthropic's newer models have none.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
SAMPLING: dict[str, Any] = {"extra_body": {"temperature": 1}}
OTHER: list[Any] = [{"role": "user", "content": OTHER_QUESTION}]


@contextmanager
def client_of(target: Target, key: str | None = None) -> Iterator[Anthropic]:
    with (
        anthropic.DefaultHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http,
        Anthropic(
            base_url=target.url.removesuffix("/v1"), api_key=key or target.key, max_retries=0, http_client=http
        ) as client,
    ):
        yield client


def stream_helper(target: Target) -> None:
    request: Any = {"model": target.model, "messages": HELLO, "max_tokens": 8, **GREEDY}
    with client_of(target) as client:
        answer = client.messages.create(**request)
        with client.messages.stream(**request) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
    assert text == text_of(streamed) == text_of(answer)
    for message in (answer, streamed):
        assert (message.stop_reason, message.model, message.usage.output_tokens) == ("max_tokens", target.model, 8)
    assert answer.usage.input_tokens == streamed.usage.input_tokens > 0


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def stop_sequence(target: Target) -> None:
    """Check that an answer ends before its last letter if that is a stop sequence, and names it."""
    request: Any = {"model": target.model, "messages": HELLO, "max_tokens": 12, **GREEDY}
    with client_of(target) as client:
        whole = text_of(client.messages.create(**request))
        letter = next(letter for letter in reversed(whole) if letter.isascii() and letter.isalnum())
        answer = client.messages.create(**request, stop_sequences=["never written", letter])
        with client.messages.stream(**request, stop_sequences=["never written", letter]) as stream:
            streamed = stream.get_final_message()
    for message in (answer, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", letter)
        assert text_of(message).rstrip() == whole[: whole.index(letter)].rstrip()


def forced_tools(target: Target) -> None:
    """Check that forced calls hold their schema, and that their results can be sent back."""
    choices: list[Any] = [{"type": "any"}, {"type": "tool", "name": "Clock"}]
    for choice, names in zip(choices, ({"Weather", "Clock"}, {"Clock"}), strict=True):
        request: Any = {"model": target.model, "max_tokens": ENOUGH_TOKENS, "tools": FUNCTIONS, **SAMPLING}
        with client_of(target) as client:
            answer = client.messages.create(messages=OTHER, tool_choice=choice, **request)
            with client.messages.stream(messages=OTHER, tool_choice=choice, **request) as stream:
                streamed = stream.get_final_message()
            for message in (answer, streamed):
                assert message.stop_reason == "tool_use"
                for call in calls_of(message):
                    assert call.name in names
                    check_arguments(call.name, dict(call.input))
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."} for call in calls_of(answer)
            ]
            messages: list[Any] = [
                *OTHER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results},
            ]  # fmt: skip
            after = client.messages.create(messages=messages, tool_choice={"type": "none"}, **request)
        assert not any(block.type == "tool_use" for block in after.content)


def calls_of(message: Message) -> list[ToolUseBlock]:
    calls = [block for block in message.content if block.type == "tool_use"]
    assert calls
    return calls


def parse(target: Target) -> None:
    with client_of(target) as client:
        answer = client.messages.parse(
            model=target.model,
            max_tokens=ENOUGH_TOKENS,
            messages=[{"role": "user", "content": PET_QUESTION}],
            output_format=pet_schema(target),
            **SAMPLING,
        )
    assert isinstance(answer.parsed_output, pet_schema(target))


def count_tokens(target: Target) -> None:
    with client_of(target) as client:
        counted = client.messages.count_tokens(model=target.model, messages=HELLO)
        answer = client.messages.create(model=target.model, messages=HELLO, max_tokens=2)
    assert counted.input_tokens == answer.usage.input_tokens


def image(target: Target) -> None:
    assert target.image_url is not None
    data = target.image_url.partition(",")[2]
    content: list[Any] = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "text", "text": "What is this?"},
    ]
    with client_of(target) as client:
        counts = [
            client.messages.create(
                model=target.model, max_tokens=2, messages=[{"role": "user", "content": parts}]
            ).usage.input_tokens
            for parts in (content[1:], content)
        ]
    assert counts[0] < counts[1]


def errors(target: Target) -> None:
    cases: list[tuple[type[anthropic.APIStatusError], str, Any, str | None]] = [
        (anthropic.NotFoundError, "not_found_error", {"model": "claude-99"}, None),
        (anthropic.BadRequestError, "invalid_request_error", {"max_tokens": -1}, None),
        (anthropic.AuthenticationError, "authentication_error", {}, "wrong"),
    ]
    for kind, name, fields, key in cases:
        for is_stream in (False, True):
            with client_of(target, key) as client, pytest.raises(kind) as caught:
                client.messages.create(
                    **{"model": target.model, "messages": HELLO, "max_tokens": 2, "stream": is_stream, **fields}
                )
            body: Any = caught.value.body
            assert (body["type"], body["error"]["type"]) == ("error", name)
            assert caught.value.request_id == caught.value.response.headers["x-request-id"]


PROGRAMS = (
    Program("anthropic-python", "create and stream helper", stream_helper),
    Program("anthropic-python", "stop_sequences", stop_sequence),
    Program("anthropic-python", "forced tools and their results", forced_tools),
    Program("anthropic-python", "parse into a model", parse),
    Program("anthropic-python", "count_tokens", count_tokens),
    Program("anthropic-python", "errors", errors),
    Program("anthropic-python", "image", image, needs_vision=True),
)
