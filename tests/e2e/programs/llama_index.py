"""Programs on LlamaIndex's OpenAILike. Needs llama-index-llms-openai-like, which needs openai 2."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.e2e.gateway import PLAIN_HTTP
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    OTHER_QUESTION,
    PET_QUESTION,
    SAMPLING,
    TIMEOUT_SECONDS,
    WEATHER_QUESTION,
    Animal,
    Program,
    Target,
    Weather,
    check_arguments,
)

CONVERSATION = [
    ChatMessage(role="system", content="You answer in one sentence."),
    ChatMessage(role="user", content="Which animal is the largest?"),
]
PET = PromptTemplate(PET_QUESTION)


@contextmanager
def llm_of(target: Target, max_tokens: int = 8, **more: Any) -> Iterator[OpenAILike]:
    with openai.DefaultHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http:
        yield _llm(target, max_tokens, http_client=http, **more)


def _llm(target: Target, max_tokens: int, **more: Any) -> OpenAILike:
    settings: dict[str, Any] = {
        "api_base": target.url,
        "api_key": target.key,
        "model": target.model,
        "max_tokens": max_tokens,
        **more,
    }
    settings |= (
        {"temperature": 1, "additional_kwargs": {"seed": SAMPLING["seed"]}}
        if max_tokens == ENOUGH_TOKENS
        else {"temperature": 0}
    )
    kinds = {"is_chat_model": True, "is_function_calling_model": True, "context_window": target.context}
    return OpenAILike(max_retries=0, timeout=TIMEOUT_SECONDS, **kinds, **settings)


def weather_tool() -> FunctionTool:
    def weather(city: str, days: int) -> str:
        raise AssertionError(f"the tool must not be run: {city}, {days}")

    return FunctionTool.from_defaults(weather, name="Weather", description=Weather.__doc__, fn_schema=Weather)


def complete(target: Target) -> None:
    with llm_of(target) as llm:
        answer = llm.complete("Which animal is the largest?")
    assert answer.text
    assert answer.raw.choices[0].finish_reason == "length"


def chat(target: Target) -> None:
    with llm_of(target) as llm:
        answer = llm.chat(CONVERSATION)
    assert answer.message.role == "assistant"
    assert answer.message.content
    counts = answer.additional_kwargs
    assert counts["completion_tokens"] == 8
    assert counts["total_tokens"] == counts["prompt_tokens"] + 8


def stream_chat(target: Target) -> None:
    with llm_of(target) as llm:
        pieces = list(llm.stream_chat(CONVERSATION))
        assert pieces[-1].message.content == llm.chat(CONVERSATION).message.content
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content


async def astream_chat(target: Target) -> None:
    async with openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http:
        llm = _llm(target, 8, async_http_client=http)
        pieces = [piece async for piece in await llm.astream_chat(CONVERSATION)]
    assert pieces[-1].message.content
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content


def structured_by_function(target: Target) -> None:
    with llm_of(target, ENOUGH_TOKENS) as llm:
        assert isinstance(llm.structured_predict(Animal, PET), Animal)


def structured_by_schema(target: Target) -> None:
    with llm_of(target, ENOUGH_TOKENS, should_use_structured_outputs=True) as llm:
        assert isinstance(llm.structured_predict(Animal, PET), Animal)


def required_tool(target: Target) -> None:
    with llm_of(target, ENOUGH_TOKENS) as llm:
        answer = llm.chat_with_tools([weather_tool()], OTHER_QUESTION, tool_required=True)
        (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_id
    check_arguments(call.tool_name, call.tool_kwargs)


def tool_result(target: Target) -> None:
    """Do a round as an agent does, and check that the model reads the result: a longer result makes
    the prompt longer.
    """
    costs = []
    with llm_of(target, ENOUGH_TOKENS) as llm:
        answer = llm.chat_with_tools([weather_tool()], OTHER_QUESTION, tool_required=True)
        (call,) = llm.get_tool_calls_from_response(answer)
    with llm_of(target) as llm:  # short, because an Ollama that aborts a repetition counts no tokens
        for text in ("Sun.", "Sun, then some rain, then snow, and at last a strong wind from the east."):
            result = ChatMessage(role="tool", content=text, additional_kwargs={"tool_call_id": call.tool_id})
            last = llm.chat([ChatMessage(role="user", content=WEATHER_QUESTION), answer.message, result])
            assert last.raw.choices[0].finish_reason in ("stop", "length")
            costs.append(last.additional_kwargs["prompt_tokens"])
    assert costs[1] > costs[0]


def image(target: Target) -> None:
    assert target.image_url
    data = base64.b64decode(target.image_url.partition(",")[2])
    question = TextBlock(text="Which colour is this?")
    with llm_of(target) as llm:
        seen = llm.chat(
            [ChatMessage(role="user", blocks=[question, ImageBlock(image=data, image_mimetype="image/png")])]
        )
        blind = llm.chat([ChatMessage(role="user", blocks=[question])])
    assert seen.additional_kwargs["prompt_tokens"] > blind.additional_kwargs["prompt_tokens"]


PROGRAMS = tuple(
    Program("OpenAILike", action, run, needs_vision=run is image)
    for action, run in (
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
