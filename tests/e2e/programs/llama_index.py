"""Programs on LlamaIndex's OpenAILike; importing this needs llama-index-llms-openai-like, which needs openai 2."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.e2e.programs.place import (
    OTHER_QUESTION,
    PET_QUESTION,
    ROOM,
    SAMPLING,
    SECONDS,
    WEATHER_QUESTION,
    Animal,
    Place,
    Program,
    Weather,
    check_arguments,
)

TALK = [
    ChatMessage(role="system", content="You answer in one sentence."),
    ChatMessage(role="user", content="Which animal is the largest?"),
]
PET = PromptTemplate(PET_QUESTION)


@contextmanager
def llm_of(place: Place, max_tokens: int = 8, **more: Any) -> Iterator[OpenAILike]:
    with openai.DefaultHttpxClient(timeout=SECONDS, trust_env=False) as http:
        yield _llm(place, max_tokens, http_client=http, **more)


def _llm(place: Place, max_tokens: int, **more: Any) -> OpenAILike:
    settings: dict[str, Any] = {
        "api_base": place.url,
        "api_key": place.key,
        "model": place.model,
        "max_tokens": max_tokens,
        **more,
    }
    settings |= (
        {"temperature": 1, "additional_kwargs": {"seed": SAMPLING["seed"]}}
        if max_tokens == ROOM
        else {"temperature": 0}
    )
    kinds = {"is_chat_model": True, "is_function_calling_model": True, "context_window": place.context}
    return OpenAILike(max_retries=0, timeout=SECONDS, **kinds, **settings)


def weather_tool() -> FunctionTool:
    def weather(city: str, days: int) -> str:
        raise AssertionError(f"nobody asked to run it: {city}, {days}")

    return FunctionTool.from_defaults(weather, name="Weather", description=Weather.__doc__, fn_schema=Weather)


def complete(place: Place) -> None:
    with llm_of(place) as llm:
        answer = llm.complete("Which animal is the largest?")
    assert answer.text
    assert answer.raw.choices[0].finish_reason == "length"


def chat(place: Place) -> None:
    with llm_of(place) as llm:
        answer = llm.chat(TALK)
    assert answer.message.role == "assistant"
    assert answer.message.content
    counts = answer.additional_kwargs
    assert counts["completion_tokens"] == 8
    assert counts["total_tokens"] == counts["prompt_tokens"] + 8


def stream_chat(place: Place) -> None:
    with llm_of(place) as llm:
        pieces = list(llm.stream_chat(TALK))
        assert pieces[-1].message.content == llm.chat(TALK).message.content
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content


async def astream_chat(place: Place) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=SECONDS, trust_env=False) as http:
        llm = _llm(place, 8, async_http_client=http)
        pieces = [piece async for piece in await llm.astream_chat(TALK)]
    assert pieces[-1].message.content
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content


def structured_by_function(place: Place) -> None:
    with llm_of(place, ROOM) as llm:
        assert isinstance(llm.structured_predict(Animal, PET), Animal)


def structured_by_schema(place: Place) -> None:
    with llm_of(place, ROOM, should_use_structured_outputs=True) as llm:
        assert isinstance(llm.structured_predict(Animal, PET), Animal)


def required_tool(place: Place) -> None:
    with llm_of(place, ROOM) as llm:
        answer = llm.chat_with_tools([weather_tool()], OTHER_QUESTION, tool_required=True)
        (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_id
    check_arguments(call.tool_name, call.tool_kwargs)


def tool_result(place: Place) -> None:
    """A round as an agent makes it. That the model gets to read the result is seen by what the prompt costs."""
    costs = []
    with llm_of(place, ROOM) as llm:
        answer = llm.chat_with_tools([weather_tool()], OTHER_QUESTION, tool_required=True)
        (call,) = llm.get_tool_calls_from_response(answer)
    with llm_of(place) as llm:  # short: where an Ollama gives up a repetition it counts nothing
        for told in ("Sun.", "Sun, then some rain, then snow, and at last a strong wind from the east."):
            result = ChatMessage(role="tool", content=told, additional_kwargs={"tool_call_id": call.tool_id})
            last = llm.chat([ChatMessage(role="user", content=WEATHER_QUESTION), answer.message, result])
            assert last.raw.choices[0].finish_reason in ("stop", "length")
            costs.append(last.additional_kwargs["prompt_tokens"])
    assert costs[1] > costs[0]


def image(place: Place) -> None:
    assert place.picture
    data = base64.b64decode(place.picture.partition(",")[2])
    question = TextBlock(text="Which colour is this?")
    with llm_of(place) as llm:
        seen = llm.chat(
            [ChatMessage(role="user", blocks=[question, ImageBlock(image=data, image_mimetype="image/png")])]
        )
        blind = llm.chat([ChatMessage(role="user", blocks=[question])])
    assert seen.additional_kwargs["prompt_tokens"] > blind.additional_kwargs["prompt_tokens"]


PROGRAMS = tuple(
    Program("OpenAILike", does, run, sees=run is image)
    for does, run in (
        ("complete", complete),
        ("chat", chat),
        ("stream_chat", stream_chat),
        ("astream_chat", astream_chat),
        ("structured output by a function", structured_by_function),
        ("structured output by response_format", structured_by_schema),
        ("chat_with_tools, required", required_tool),
        ("a tool's result goes back", tool_result),
        ("image", image),
    )
)
