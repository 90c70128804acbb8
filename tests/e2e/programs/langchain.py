"""Programs on LangChain's ChatOpenAI."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.e2e.gateway import PLAIN_HTTP
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    OTHER_QUESTION,
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
    overlong_prompt,
)

CONVERSATION: list[BaseMessage] = [
    SystemMessage("You answer in one sentence."),
    HumanMessage("Which animal is the largest?"),
]


@contextmanager
def chat(target: Target, max_tokens: int = 8, **more: Any) -> Iterator[ChatOpenAI]:
    """Create a ChatOpenAI with an HTTP client that is closed at the end.

    The clients that ChatOpenAI creates itself are never closed.
    """
    with openai.DefaultHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http:
        yield _chat(target, max_tokens, http_client=http, **more)


def _chat(target: Target, max_tokens: int, **more: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "base_url": target.url,
        "api_key": target.key,
        "model": target.model,
        "max_tokens": max_tokens,
    }
    settings |= SAMPLING if max_tokens == ENOUGH_TOKENS else {"temperature": 0}
    return ChatOpenAI(**settings, max_retries=0, **more)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def prompt_tokens(message: BaseMessage) -> int:
    """Check that the token counts add up, and return the prompt's."""
    assert isinstance(message, AIMessage)
    usage = message.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    return usage["input_tokens"]


def check_calls(message: BaseMessage, least: int = 1) -> None:
    """Check that all tool calls are complete, have distinct ids and fit their tools."""
    assert isinstance(message, AIMessage)
    assert message.invalid_tool_calls == []
    assert len(message.tool_calls) >= least
    for call in message.tool_calls:
        assert call["id"]
        check_arguments(call["name"], call["args"])
    assert len({call["id"] for call in message.tool_calls}) == len(message.tool_calls)


def invoke(target: Target) -> None:
    with chat(target) as llm:
        answer = llm.invoke(CONVERSATION)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == target.model
    prompt_tokens(answer)


def stream(target: Target) -> None:
    """Check that a stream has no usage unless it is requested."""
    with chat(target) as llm:
        whole = joined(list(llm.stream(CONVERSATION)))
        assert whole.content == llm.invoke(CONVERSATION).content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is None


async def astream_with_usage(target: Target) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http:
        llm = _chat(target, 8, http_async_client=http, stream_usage=True)
        whole = joined([chunk async for chunk in llm.astream(CONVERSATION)])
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 8
    prompt_tokens(whole)


async def abatch_of_five(target: Target) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http:
        llm = _chat(target, 8, http_async_client=http)
        answers = await llm.abatch([f"Say the number {number}." for number in range(5)])
    assert len({answer.id for answer in answers}) == 5
    for answer in answers:
        assert answer.response_metadata["finish_reason"] == "length"
        prompt_tokens(answer)


def structured_by_schema(target: Target) -> None:
    with chat(target, ENOUGH_TOKENS) as llm:
        animal = llm.with_structured_output(Animal, method="json_schema").invoke(PET_QUESTION)
    assert isinstance(animal, Animal)


def structured_by_function(target: Target) -> None:
    with chat(target, ENOUGH_TOKENS) as llm:
        animal = llm.with_structured_output(Animal, method="function_calling").invoke(PET_QUESTION)
    assert isinstance(animal, Animal)


def structured_by_json_mode(target: Target) -> None:
    """Check that the answer is a JSON object.

    With random weights the object may never be closed, or never begin, because whitespace is JSON,
    too. The client then raises the error that it raises for OpenAI.
    """
    with chat(target, 64) as llm:
        structured = llm.with_structured_output(Animal.model_json_schema(), method="json_mode", include_raw=True)
        if not target.has_random_weights:
            found = structured.invoke(PET_QUESTION)
            assert isinstance(found, dict)
            assert isinstance(found["parsed"], dict)
            return
        try:
            found = structured.invoke(PET_QUESTION)
        except openai.LengthFinishReasonError as exc:
            content = exc.completion.choices[0].message.content or ""
        else:
            assert isinstance(found, dict)
            content = found["raw"].content
            assert isinstance(json.loads(content), dict)
    assert content.lstrip()[:1] in ("", "{")


def any_tool(target: Target) -> None:
    with chat(target, ENOUGH_TOKENS) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="any").invoke(OTHER_QUESTION)
    check_calls(answer)
    assert answer.response_metadata["finish_reason"] == "tool_calls"


def named_tool(target: Target) -> None:
    """OpenAI ends such an answer with `stop`, others with `tool_calls`; LangChain ignores both."""
    with chat(target, ENOUGH_TOKENS) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="Clock").invoke(OTHER_QUESTION)
    check_calls(answer)
    assert {call["name"] for call in answer.tool_calls} == {"Clock"}
    assert answer.response_metadata["finish_reason"] in ("stop", "tool_calls")


def optional_tool(target: Target) -> None:
    with chat(target, 64) as llm:
        answer = llm.bind_tools([Weather, Clock]).invoke(WEATHER_QUESTION)
    if not target.has_random_weights:
        check_calls(answer)
        assert answer.response_metadata["finish_reason"] == "tool_calls"
    elif not answer.tool_calls:
        assert answer.content
        assert answer.response_metadata["finish_reason"] in ("stop", "length")


def tool_in_a_stream(target: Target) -> None:
    with chat(target, ENOUGH_TOKENS) as llm:
        whole = joined(list(llm.bind_tools([Weather, Clock], tool_choice="any").stream(OTHER_QUESTION)))  # type: ignore[arg-type]
    check_calls(whole)
    assert whole.response_metadata["finish_reason"] == "tool_calls"


def one_tool_at_a_time(target: Target) -> None:
    with chat(target, ENOUGH_TOKENS) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="any", parallel_tool_calls=False).invoke(OTHER_QUESTION)
    check_calls(answer)
    assert len(answer.tool_calls) == 1


def tool_result(target: Target) -> None:
    """Check that the model reads the result: a longer result makes the prompt longer."""
    call = {"name": "Weather", "args": {"city": "Paris", "days": 1}, "id": "call_1"}
    costs = []
    with chat(target, 8) as llm:
        for result in ("Sun.", "Sun, then some rain, then snow, and at last a strong wind from the east."):
            talk = [
                HumanMessage(WEATHER_QUESTION),
                AIMessage("", tool_calls=[call]),
                ToolMessage(result, tool_call_id="call_1"),
            ]
            answer = llm.bind_tools([Weather]).invoke(talk)
            assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")
            costs.append(prompt_tokens(answer))
    assert costs[1] > costs[0]


def image(target: Target) -> None:
    parts: list[Any] = [
        {"type": "text", "text": "Which colour is this?"},
        {"type": "image_url", "image_url": {"url": target.image_url}},
    ]
    with chat(target) as llm:
        seen, blind = llm.invoke([HumanMessage(parts)]), llm.invoke([HumanMessage(parts[:1])])
    assert seen.content
    assert prompt_tokens(seen) > prompt_tokens(blind)


def overflow(target: Target) -> None:
    """Check for LangChain's own error, which programs catch in order to shorten a conversation."""
    with chat(target) as llm, pytest.raises(ContextOverflowError) as caught:
        llm.invoke(overlong_prompt(target))
    assert isinstance(caught.value, openai.BadRequestError)
    assert caught.value.code == "context_length_exceeded"


def effort(target: Target) -> None:
    """Check that the parameter is accepted, whether or not the model supports it."""
    for word in ("none", "low", "high"):
        with chat(target, reasoning_effort=word) as llm:
            answer = llm.invoke(CONVERSATION)
        assert answer.response_metadata["finish_reason"] == "length"
        prompt_tokens(answer)


PROGRAMS = tuple(
    Program("ChatOpenAI", action, run, needs_vision=run is image)
    for action, run in (
        ("invoke", invoke),
        ("stream", stream),
        ("astream with usage", astream_with_usage),
        ("abatch of 5", abatch_of_five),
        ("structured output, json_schema", structured_by_schema),
        ("structured output, function_calling", structured_by_function),
        ("structured output, json_mode", structured_by_json_mode),
        ("tools, any must be called", any_tool),
        ("tools, a named one must be called", named_tool),
        ("tools, the model may call one", optional_tool),
        ("tools, a forced call in a stream", tool_in_a_stream),
        ("tools, parallel_tool_calls=False", one_tool_at_a_time),
        ("tools, a result goes back", tool_result),
        ("image", image),
        ("context overflow is ContextOverflowError", overflow),
        ("reasoning_effort", effort),
    )
)
