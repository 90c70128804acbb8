"""Programs on LiteLLM as a client, with each of its providers that speaks an API of the gateway.

They need litellm, which only `make test-clients` installs.
"""

import json
import os
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    HELLO,
    OTHER_QUESTION,
    PET_QUESTION,
    TIMEOUT_SECONDS,
    WEATHER_QUESTION,
    Program,
    Target,
    Weather,
    check_arguments,
    pet_schema,
)

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise the import asks the internet for prices
import litellm

Run = Callable[[Target], Coroutine[Any, Any, None]]
PROVIDERS = ("openai", "anthropic", "ollama_chat", "ollama")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "Weather", "description": Weather.__doc__, "parameters": Weather.model_json_schema()},
}
FORCED: dict[str, Any] = {"type": "function", "function": {"name": "Weather"}}


async def ask(target: Target, provider: str, messages: list[Any], model: str = "", **fields: Any) -> Any:
    base = target.url if provider == "openai" else target.url.removesuffix("/v1")
    return await litellm.acompletion(
        f"{provider}/{model or target.model}", messages, base_url=base, api_key=target.key,
        timeout=TIMEOUT_SECONDS, num_retries=0, max_retries=0, **fields,
    )  # fmt: skip


def without_warnings(run: Run) -> Run:
    """Run without the warnings that LiteLLM and pydantic give at the first calls."""

    async def quiet(target: Target) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await run(target)

    return quiet


def plain_and_streamed(provider: str) -> Run:
    async def run(target: Target) -> None:
        answer = await ask(target, provider, HELLO, max_tokens=8, temperature=0)
        pieces = [piece async for piece in await ask(target, provider, HELLO, max_tokens=8, temperature=0, stream=True)]
        # LiteLLM itself says so of every answer by `/api/generate`.
        finish = "stop" if provider == "ollama" else "length"
        assert answer.choices[0].finish_reason == finish
        assert answer.usage.completion_tokens == 8
        assert answer.usage.prompt_tokens > 0
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == answer.choices[0].message.content
        assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == finish

    return run


def tools(provider: str) -> Run:
    """Check a round with a tool. Ollama's own API has no parameter that forces a call.

    `ollama/` does not send the tools: it asks for JSON and takes it for a call if it looks like one.
    """

    async def run(target: Target) -> None:
        may_force = not provider.startswith("ollama")
        fields: dict[str, Any] = {"tools": [TOOL], "max_tokens": ENOUGH_TOKENS, "temperature": 1}
        if may_force:
            fields["tool_choice"] = FORCED
        question = OTHER_QUESTION if may_force else WEATHER_QUESTION
        answer = await ask(target, provider, [{"role": "user", "content": question}], **fields)
        message = answer.choices[0].message
        if provider == "ollama" or (target.has_random_weights and not may_force):
            return
        assert message.tool_calls
        for call in message.tool_calls:
            check_arguments(call.function.name, call.function.arguments)
        results = [{"role": "tool", "tool_call_id": call.id, "content": "Sun."} for call in message.tool_calls]
        conversation = [{"role": "user", "content": question}, message.model_dump(exclude_none=True), *results]
        fields.pop("tool_choice", None)
        after = await ask(target, provider, conversation, **fields)
        assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")

    return run


def schema(provider: str) -> Run:
    async def run(target: Target) -> None:
        answer = await ask(
            target, provider, [{"role": "user", "content": PET_QUESTION}], response_format=pet_schema(target),
            max_tokens=ENOUGH_TOKENS, temperature=1,
        )  # fmt: skip
        pet_schema(target).model_validate(json.loads(answer.choices[0].message.content))

    return run


def unknown_model(provider: str) -> Run:
    async def run(target: Target) -> None:
        with pytest.raises(litellm.NotFoundError):
            await ask(target, provider, HELLO, "no-such-model")

    return run


PROGRAMS = tuple(
    Program(f"LiteLLM {provider}/", action, without_warnings(make(provider)))
    for provider in PROVIDERS
    for action, make in (
        ("plain and streamed with usage", plain_and_streamed),
        ("tools and their results", tools),
        ("response_format with a model", schema),
        ("an unknown model is an error", unknown_model),
    )
)
