"""Programs on openai-python."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.e2e.gateway import PLAIN_HTTP
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    HELLO,
    PET_QUESTION,
    SAMPLING,
    TIMEOUT_SECONDS,
    WEATHER_QUESTION,
    Animal,
    Clock,
    Program,
    Target,
    Weather,
    check_arguments,
)

PET: list[Any] = [{"role": "user", "content": PET_QUESTION}]
WEATHER: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": tool.__name__, "description": tool.__doc__, "parameters": tool.model_json_schema()},
    }
    for tool in (Weather, Clock)
]
WITH_USAGE: Any = {"include_usage": True}


@contextmanager
def client_of(target: Target, key: str | None = None) -> Iterator[OpenAI]:
    with (
        openai.DefaultHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http,
        OpenAI(
            base_url=target.url, api_key=key or target.key, max_retries=0, timeout=TIMEOUT_SECONDS, http_client=http
        ) as client,
    ):
        yield client


def parse(target: Target) -> None:
    with client_of(target) as client:
        answer = client.chat.completions.parse(
            model=target.model, messages=PET, response_format=Animal, max_tokens=ENOUGH_TOKENS, **SAMPLING
        )
    assert isinstance(answer.choices[0].message.parsed, Animal)
    assert answer.choices[0].finish_reason == "stop"


def parse_tool(target: Target) -> None:
    with client_of(target) as client:
        answer = client.chat.completions.parse(
            model=target.model,
            messages=HELLO,
            tools=[openai.pydantic_function_tool(Weather)],
            tool_choice="required",
            max_tokens=ENOUGH_TOKENS,
            **SAMPLING,
        )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in calls)


def stream_helper(target: Target) -> None:
    with (
        client_of(target) as client,
        client.chat.completions.stream(model=target.model, messages=HELLO, max_tokens=8, temperature=0) as stream,
    ):
        events = list(stream)
        # `get_final_completion` would raise, because the answer ends at its length.
        final = stream.current_completion_snapshot
    full_text = "".join(event.delta for event in events if event.type == "content.delta")
    (done,) = [event for event in events if event.type == "content.done"]
    assert full_text == done.content == final.choices[0].message.content
    assert final.choices[0].finish_reason == "length"
    assert final.model == target.model


def stream_helper_with_a_schema(target: Target) -> None:
    with (
        client_of(target) as client,
        client.chat.completions.stream(
            model=target.model, messages=PET, response_format=Animal, max_tokens=ENOUGH_TOKENS, **SAMPLING
        ) as stream,
    ):
        (done,) = [event for event in stream if event.type == "content.done"]
    assert isinstance(done.parsed, Animal)


def stream_helper_with_a_tool(target: Target) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    request: dict[str, Any] = {
        "model": target.model,
        "messages": HELLO,
        "tools": tools,
        "tool_choice": "required",
        "max_tokens": ENOUGH_TOKENS,
        **SAMPLING,
    }
    with client_of(target) as client, client.chat.completions.stream(**request) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert done
    assert all(isinstance(event.parsed_arguments, Weather) for event in done)


def bad_request(target: Target) -> None:
    error = _refusal(target, openai.BadRequestError, messages=HELLO, temperature=9)
    assert (error.code, error.param, error.type) == ("invalid_value", "temperature", "invalid_request_error")


def bad_image(target: Target) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.png"}},
    ]
    error = _refusal(target, openai.BadRequestError, messages=[{"role": "user", "content": parts}])
    assert (error.code, error.type) == ("invalid_image_url", "invalid_request_error")


def unknown_model(target: Target) -> None:
    error = _refusal(target, openai.NotFoundError, messages=HELLO, model="gpt-99")
    assert (error.code, error.type) == ("model_not_found", "invalid_request_error")


def wrong_key(target: Target) -> None:
    error = _refusal(target, openai.AuthenticationError, key="wrong", messages=HELLO)
    assert (error.code, error.type) == ("invalid_api_key", "authentication_error")


def _refusal(
    target: Target, expected: type[openai.APIStatusError], *, key: str | None = None, **request: Any
) -> openai.APIStatusError:
    """Check that a plain request and a stream are refused with the same error, and return it."""
    errors = []
    for is_stream in (False, True):
        with client_of(target, key) as client, pytest.raises(expected) as caught:
            client.chat.completions.create(**{"model": target.model, "max_tokens": 2, "stream": is_stream, **request})
        errors.append(caught.value)
    plain, streamed = errors
    assert (plain.message, plain.code, plain.param, plain.type) == (
        streamed.message,
        streamed.code,
        streamed.param,
        streamed.type,
    )
    return plain


def seed(target: Target) -> None:
    with client_of(target) as client:
        answers = [
            client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=8, temperature=1, seed=7)
            for _ in range(2)
        ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def logprobs(target: Target) -> None:
    request: dict[str, Any] = {
        "model": target.model,
        "messages": HELLO,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    with client_of(target) as client:
        answer = client.chat.completions.create(**request)
        chunks = list(client.chat.completions.create(**request, stream=True))
    whole = answer.choices[0].logprobs
    assert whole is not None
    pieces = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    for content in (whole.content, [entry for piece in pieces for entry in piece.content or ()]):
        assert content is not None
        assert len(content) == 6
        for entry in content:
            assert entry.logprob <= 0
            assert entry.bytes is None or all(0 <= byte < 256 for byte in entry.bytes)
            assert len(entry.top_logprobs) == 2


def logprobs_without_alternatives(target: Target) -> None:
    with client_of(target) as client:
        answer = client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=4, logprobs=True)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content
    assert all(entry.top_logprobs == [] for entry in found.content)


def stop(target: Target) -> None:
    """Check that an answer ends before its last word if that is the stop string."""
    request: dict[str, Any] = {"model": target.model, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    with client_of(target) as client:
        full_text = client.chat.completions.create(**request).choices[0].message.content or ""
        words = re.findall(r"[!-~]+", full_text)  # ASCII characters, which no tokenizer splits
        assert words, f"no word to stop at in {full_text!r}"
        for form in (words[-1], [words[-1], "never written"]):
            answer = client.chat.completions.create(**request, stop=form)
            streamed = list(client.chat.completions.create(**request, stop=form, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
            assert text == (answer.choices[0].message.content or "")
            assert (
                text.rstrip() == full_text[: full_text.index(words[-1])].rstrip()
            )  # Ollama removes a space before it, too
            assert answer.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "stop"


def max_completion_tokens(target: Target) -> None:
    with client_of(target) as client:
        answer = client.chat.completions.create(
            model=target.model, messages=HELLO, max_completion_tokens=5, temperature=0
        )
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def usage_of_a_stream(target: Target) -> None:
    request: dict[str, Any] = {"model": target.model, "messages": HELLO, "max_tokens": 5, "temperature": 0}
    with client_of(target) as client:
        plain = client.chat.completions.create(**request)
        *chunks, last = client.chat.completions.create(**request, stream=True, stream_options=WITH_USAGE)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert plain.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        plain.usage.prompt_tokens,
        plain.usage.completion_tokens,
    )


def tool_stream(target: Target) -> None:
    """Check that each call begins with its id and name, followed by pieces of its arguments."""
    with client_of(target) as client:
        chunks = list(
            client.chat.completions.create(
                model=target.model,
                messages=HELLO,
                tools=TOOLS,
                tool_choice="required",
                max_tokens=ENOUGH_TOKENS,
                stream=True,
                **SAMPLING,
            )
        )
    calls = _joined_calls(chunks)
    assert calls
    assert sorted(calls) == list(range(len(calls)))
    for call in calls.values():
        check_arguments(call["name"], call["arguments"])
        assert isinstance(json.loads(call["arguments"]), dict)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == [
        "tool_calls"
    ]


def _joined_calls(chunks: list[ChatCompletionChunk]) -> dict[int, dict[str, str]]:
    """Return the name and the joined arguments of each call by its index."""
    calls: dict[int, dict[str, str]] = {}
    for delta in (choice.delta for chunk in chunks for choice in chunk.choices):
        for piece in delta.tool_calls or ():
            function = piece.function
            assert function is not None
            if piece.index not in calls:
                assert piece.id
                assert piece.type == "function"
                assert function.name
                calls[piece.index] = {"name": function.name, "arguments": ""}
            calls[piece.index]["arguments"] += function.arguments or ""
    return calls


def no_tool(target: Target) -> None:
    request: dict[str, Any] = {
        "model": target.model,
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": "none",
        "max_tokens": 16,
    }
    with client_of(target) as client:
        choice = client.chat.completions.create(**request).choices[0]
        chunks = list(client.chat.completions.create(**request, stream=True))
    assert choice.message.tool_calls is None
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert not any(choice.delta.tool_calls for chunk in chunks for choice in chunk.choices)


def developer_message(target: Target) -> None:
    """Check that a developer message is treated as a system message: the prompt has equal
    tokens.
    """
    with client_of(target) as client:
        costs = []
        for role in ("system", "developer"):
            talk: Any = [{"role": role, "content": "You answer in one short sentence, without an adjective."}, *HELLO]
            usage = client.chat.completions.create(model=target.model, messages=talk, max_tokens=2).usage
            assert usage is not None
            costs.append(usage.prompt_tokens)
        bare = client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=2).usage
    assert bare is not None
    assert costs[0] == costs[1] > bare.prompt_tokens


def models(target: Target) -> None:
    with client_of(target) as client:
        listed = {model.id: model for model in client.models.list()}
        found = client.models.retrieve(target.model)
    assert found == listed[target.model]
    assert found.object == "model"
    assert found.created > 0


async def async_stream(target: Target) -> None:
    request: dict[str, Any] = {"model": target.model, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    async with (
        openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http,
        AsyncOpenAI(
            base_url=target.url, api_key=target.key, max_retries=0, timeout=TIMEOUT_SECONDS, http_client=http
        ) as client,
    ):
        plain = await client.chat.completions.create(**request)
        chunks = [chunk async for chunk in await client.chat.completions.create(**request, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1


PROGRAMS = tuple(
    Program("openai-python", action, run)
    for action, run in (
        ("asynchronous stream", async_stream),
        ("usage at the end of a stream", usage_of_a_stream),
        ("parse into a model", parse),
        ("parse a tool's arguments", parse_tool),
        ("stream helper", stream_helper),
        ("stream helper with response_format", stream_helper_with_a_schema),
        ("stream helper with a tool", stream_helper_with_a_tool),
        ("stream of a forced tool call, pieces joined", tool_stream),
        ('tool_choice "none"', no_tool),
        ("a value out of range is BadRequestError", bad_request),
        ("an image by URL is BadRequestError", bad_image),
        ("an unknown model is NotFoundError", unknown_model),
        ("a wrong key is AuthenticationError", wrong_key),
        ("seed", seed),
        ("logprobs and top_logprobs", logprobs),
        ("logprobs alone", logprobs_without_alternatives),
        ("stop", stop),
        ("max_completion_tokens", max_completion_tokens),
        ("developer message", developer_message),
        ("models.list and retrieve", models),
    )
)
