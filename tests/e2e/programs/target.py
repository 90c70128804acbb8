"""Target of a client program, and the questions, tools and schemas that all programs use."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

TIMEOUT_SECONDS = 120.0
"""Longest wait of a client; a real engine may have to load its model first."""
ENOUGH_TOKENS = 480
"""Enough for all forced answers below, with whitespace, even if each token is one byte."""

SAMPLING: dict[str, Any] = {"temperature": 1, "seed": 3}
"""For forced answers: at temperature 0, random weights write whitespace without end wherever a
grammar allows it, as vLLM's grammar for tools does.
"""

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
PET_QUESTION = "Describe a pet as JSON."  # names no tool, so a tool is called only if it is forced
OTHER_QUESTION = "Say hello."  # likewise
WEATHER_QUESTION = "How is the weather in Paris?"  # names a tool, so a stand-in calls it if it may


@dataclass(frozen=True)
class Target:
    """A base URL with `/v1`, and what a program must know about it.

    `context` is in tokens. `image_url` is a `data:` URL, or None if the model does not accept
    images. `has_random_weights`: nothing is promised about the model's text, nor that it calls a
    tool that it need not call.
    """

    url: str
    key: str
    model: str
    context: int
    image_url: str | None
    has_random_weights: bool


class Program(NamedTuple):
    """One action of a program built on `client`. `run` raises if a promise is broken."""

    client: str
    action: str
    run: Callable[[Target], Coroutine[Any, Any, None] | None]
    needs_vision: bool = False


# Every field is bounded, so that a model with random weights comes to an end under a grammar.


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog", "fish"]
    legs: int = Field(ge=0, le=8)
    tame: bool
    name: str = Field(max_length=8)


class Weather(BaseModel):
    """Tell the weather of the coming days in a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=7)


class Clock(BaseModel):
    """Tell the time in a zone."""

    zone: Literal["UTC", "CET"]


def pet_schema(target: Target) -> type[BaseModel]:
    """Return the model of the answer to `PET_QUESTION`, for clients that send no seed or leave bounds out.

    xgrammar, vLLM's default, lets control characters into a string with `maxLength`. Random weights
    write them in one of six answers.
    """
    return Clock if target.has_random_weights else Animal


TOOLS: dict[str, type[BaseModel]] = {"Weather": Weather, "Clock": Clock}


def check_arguments(name: str, arguments: str | dict[str, Any]) -> None:
    """Check that `name` is one of the tools, and that `arguments` (an object or JSON) fit its
    schema.
    """
    tool = TOOLS[name]
    if isinstance(arguments, str):
        tool.model_validate_json(arguments)
    else:
        tool.model_validate(arguments)


def overlong_prompt(target: Target) -> str:
    """Return a prompt of twice the context, with so few bytes for each token that only the engine
    notices.
    """
    return "hello " * (2 * target.context)
