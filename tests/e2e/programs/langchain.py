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

from tests.e2e.programs.place import (
    OTHER_QUESTION,
    PET_QUESTION,
    ROOM,
    SAMPLING,
    SECONDS,
    WEATHER_QUESTION,
    Animal,
    Clock,
    Place,
    Program,
    Weather,
    beyond,
    check_arguments,
)

TALK: list[BaseMessage] = [SystemMessage("You answer in one sentence."), HumanMessage("Which animal is the largest?")]


@contextmanager
def chat(place: Place, max_tokens: int = 8, **more: Any) -> Iterator[ChatOpenAI]:
    """Its HTTP client is ours: those that it makes itself are kept for the process and never closed."""
    with openai.DefaultHttpxClient(timeout=SECONDS, trust_env=False) as http:
        yield _chat(place, max_tokens, http_client=http, **more)


def _chat(place: Place, max_tokens: int, **more: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "base_url": place.url,
        "api_key": place.key,
        "model": place.model,
        "max_tokens": max_tokens,
    }
    settings |= SAMPLING if max_tokens == ROOM else {"temperature": 0}
    return ChatOpenAI(**settings, max_retries=0, **more)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def prompt_tokens(message: BaseMessage) -> int:
    """The tokens of the prompt, once the figures have been found to fit."""
    assert isinstance(message, AIMessage)
    usage = message.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    return usage["input_tokens"]


def check_calls(message: BaseMessage, least: int = 1) -> None:
    """Whole calls of tools that were offered, each with an id of its own; nothing that LangChain could not read."""
    assert isinstance(message, AIMessage)
    assert message.invalid_tool_calls == []
    assert len(message.tool_calls) >= least
    for call in message.tool_calls:
        assert call["id"]
        check_arguments(call["name"], call["args"])
    assert len({call["id"] for call in message.tool_calls}) == len(message.tool_calls)


def invoke(place: Place) -> None:
    with chat(place) as llm:
        answer = llm.invoke(TALK)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == place.model
    prompt_tokens(answer)


def stream(place: Place) -> None:
    """No usage is asked for, so none may come."""
    with chat(place) as llm:
        whole = joined(list(llm.stream(TALK)))
        assert whole.content == llm.invoke(TALK).content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is None


async def astream_with_usage(place: Place) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=SECONDS, trust_env=False) as http:
        llm = _chat(place, 8, http_async_client=http, stream_usage=True)
        whole = joined([chunk async for chunk in llm.astream(TALK)])
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 8
    prompt_tokens(whole)


async def abatch_of_five(place: Place) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=SECONDS, trust_env=False) as http:
        llm = _chat(place, 8, http_async_client=http)
        answers = await llm.abatch([f"Say the number {number}." for number in range(5)])
    assert len({answer.id for answer in answers}) == 5
    for answer in answers:
        assert answer.response_metadata["finish_reason"] == "length"
        prompt_tokens(answer)


def structured_by_schema(place: Place) -> None:
    with chat(place, ROOM) as llm:
        animal = llm.with_structured_output(Animal, method="json_schema").invoke(PET_QUESTION)
    assert isinstance(animal, Animal)


def structured_by_function(place: Place) -> None:
    with chat(place, ROOM) as llm:
        animal = llm.with_structured_output(Animal, method="function_calling").invoke(PET_QUESTION)
    assert isinstance(animal, Animal)


def structured_by_json_mode(place: Place) -> None:
    """Any object will do. Noise may never close it, nor even open it, blanks being JSON too: then the client says what it says of OpenAI."""
    with chat(place, 64) as llm:
        structured = llm.with_structured_output(Animal.model_json_schema(), method="json_mode", include_raw=True)
        if not place.is_noise:
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


def any_tool(place: Place) -> None:
    with chat(place, ROOM) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="any").invoke(OTHER_QUESTION)
    check_calls(answer)
    assert answer.response_metadata["finish_reason"] == "tool_calls"


def named_tool(place: Place) -> None:
    """OpenAI ends such an answer with `stop`, others with `tool_calls`; LangChain looks at neither."""
    with chat(place, ROOM) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="Clock").invoke(OTHER_QUESTION)
    check_calls(answer)
    assert {call["name"] for call in answer.tool_calls} == {"Clock"}
    assert answer.response_metadata["finish_reason"] in ("stop", "tool_calls")


def free_tool(place: Place) -> None:
    with chat(place, 64) as llm:
        answer = llm.bind_tools([Weather, Clock]).invoke(WEATHER_QUESTION)
    if not place.is_noise:
        check_calls(answer)
        assert answer.response_metadata["finish_reason"] == "tool_calls"
    elif not answer.tool_calls:
        assert answer.content
        assert answer.response_metadata["finish_reason"] in ("stop", "length")


def tool_in_a_stream(place: Place) -> None:
    with chat(place, ROOM) as llm:
        whole = joined(list(llm.bind_tools([Weather, Clock], tool_choice="any").stream(OTHER_QUESTION)))  # type: ignore[arg-type]
    check_calls(whole)
    assert whole.response_metadata["finish_reason"] == "tool_calls"


def one_tool_at_a_time(place: Place) -> None:
    with chat(place, ROOM) as llm:
        answer = llm.bind_tools([Weather, Clock], tool_choice="any", parallel_tool_calls=False).invoke(OTHER_QUESTION)
    check_calls(answer)
    assert len(answer.tool_calls) == 1


def tool_result(place: Place) -> None:
    """That the model gets to read the result is seen by what the prompt costs."""
    call = {"name": "Weather", "args": {"city": "Paris", "days": 1}, "id": "call_1"}
    costs = []
    with chat(place, 8) as llm:
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


def image(place: Place) -> None:
    parts: list[Any] = [
        {"type": "text", "text": "Which colour is this?"},
        {"type": "image_url", "image_url": {"url": place.picture}},
    ]
    with chat(place) as llm:
        seen, blind = llm.invoke([HumanMessage(parts)]), llm.invoke([HumanMessage(parts[:1])])
    assert seen.content
    assert prompt_tokens(seen) > prompt_tokens(blind)


def overflow(place: Place) -> None:
    """LangChain's own error, which programs catch in order to shorten a talk."""
    with chat(place) as llm, pytest.raises(ContextOverflowError) as caught:
        llm.invoke(beyond(place))
    assert isinstance(caught.value, openai.BadRequestError)
    assert caught.value.code == "context_length_exceeded"


def effort(place: Place) -> None:
    """Taken from a program whatever the model can do with it."""
    for word in ("none", "low", "high"):
        with chat(place, reasoning_effort=word) as llm:
            answer = llm.invoke(TALK)
        assert answer.response_metadata["finish_reason"] == "length"
        prompt_tokens(answer)


PROGRAMS = tuple(
    Program("ChatOpenAI", does, run, sees=run is image)
    for does, run in (
        ("invoke", invoke),
        ("stream", stream),
        ("astream with usage", astream_with_usage),
        ("abatch of 5", abatch_of_five),
        ("structured output, json_schema", structured_by_schema),
        ("structured output, function_calling", structured_by_function),
        ("structured output, json_mode", structured_by_json_mode),
        ("tools, any must be called", any_tool),
        ("tools, a named one must be called", named_tool),
        ("tools, free", free_tool),
        ("tools, a forced call in a stream", tool_in_a_stream),
        ("tools, parallel_tool_calls=False", one_tool_at_a_time),
        ("tools, a result goes back", tool_result),
        ("image", image),
        ("context overflow is ContextOverflowError", overflow),
        ("reasoning_effort", effort),
    )
)
