"""Programs on openai-agents, by the Responses API and by chat completions.

They need openai-agents, which only `make test-clients` installs.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import agents
import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner
from openai import AsyncOpenAI
from openai.types.shared import Reasoning

from tests.e2e.gateway import PLAIN_HTTP
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    PET_QUESTION,
    TIMEOUT_SECONDS,
    WEATHER_QUESTION,
    Program,
    Target,
    Weather,
    pet_schema,
)

WITHOUT_TRACES = RunConfig(tracing_disabled=True)
Make = Callable[[str, AsyncOpenAI], agents.Model]
Run = Callable[[Target], Coroutine[Any, Any, None]]


@asynccontextmanager
async def agent_of(target: Target, make: Make, **fields: Any) -> AsyncIterator[Agent[None]]:
    async with (
        openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, **PLAIN_HTTP) as http,
        AsyncOpenAI(base_url=target.url, api_key=target.key, max_retries=0, http_client=http) as client,
    ):
        settings = {"max_tokens": ENOUGH_TOKENS, "temperature": 1, "reasoning": Reasoning(effort="none")}
        settings |= fields.pop("settings", {})
        yield Agent(name="a", model=make(target.model, client), model_settings=ModelSettings(**settings), **fields)


def structured(make: Make) -> Run:
    async def run(target: Target) -> None:
        async with agent_of(target, make, output_type=pet_schema(target)) as agent:
            result = await Runner.run(agent, PET_QUESTION, run_config=WITHOUT_TRACES)
            streamed = Runner.run_streamed(agent, PET_QUESTION, run_config=WITHOUT_TRACES)
            events = [event async for event in streamed.stream_events()]
        assert isinstance(result.final_output, pet_schema(target))
        assert isinstance(streamed.final_output, pet_schema(target))
        assert any(event.type == "raw_response_event" for event in events)

    return run


def tool_round(make: Make) -> Run:
    """Check a round with a tool: the model calls it, and answers to its result."""

    async def run(target: Target) -> None:
        asked: list[Weather] = []

        def weather(city: str, days: int) -> str:
            """Tell the weather of the coming days in a city."""
            asked.append(Weather.model_validate({"city": city, "days": days}))
            return "Sun."

        async def call(context: Any, arguments: str) -> str:
            return weather(**Weather.model_validate_json(arguments).model_dump())

        tool = agents.FunctionTool("Weather", Weather.__doc__ or "", Weather.model_json_schema(), call)
        # A model with random weights calls a tool only if it must, and ends only under a grammar.
        forced: dict[str, Any] = {"settings": {"tool_choice": "Weather"}} if target.has_random_weights else {}
        behaviour = "stop_on_first_tool" if target.has_random_weights else "run_llm_again"
        async with agent_of(target, make, tools=[tool], tool_use_behavior=behaviour, **forced) as agent:
            result = await Runner.run(agent, WEATHER_QUESTION, run_config=WITHOUT_TRACES)
            streamed = Runner.run_streamed(agent, WEATHER_QUESTION, run_config=WITHOUT_TRACES)
            kinds = [
                event.item.type async for event in streamed.stream_events() if event.type == "run_item_stream_event"
            ]
        assert len(asked) == 2
        assert result.final_output
        assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]

    return run


def _responses(model: str, client: AsyncOpenAI) -> agents.Model:
    return OpenAIResponsesModel(model, client)


def _chat(model: str, client: AsyncOpenAI) -> agents.Model:
    return OpenAIChatCompletionsModel(model, client)


PROGRAMS = (
    Program("openai-agents", "output_type, plain and streamed, by responses", structured(_responses)),
    Program("openai-agents", "a round with a tool by responses", tool_round(_responses)),
    Program("openai-agents", "output_type, plain and streamed, by chat", structured(_chat)),
    Program("openai-agents", "a round with a tool by chat", tool_round(_chat)),
)
