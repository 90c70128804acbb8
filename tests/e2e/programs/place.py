"""Where a client program is pointed, and the questions, tools and shapes that all of them use."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

SECONDS = 120.0
"""The longest wait of a client; the first answer of a real engine may have a load before it."""
ROOM = 480
"""Tokens that the forced answers below always fit into, blanks included, even where each token is one byte."""

SAMPLING: dict[str, Any] = {"temperature": 1, "seed": 3}
"""For forced answers: at temperature 0 random weights write blanks for ever wherever a grammar lets them (vLLM's for tools does)."""

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
PET_QUESTION = "Describe a pet as JSON."  # names no tool: who answers with a call was made to
OTHER_QUESTION = "Say hello."  # likewise
WEATHER_QUESTION = "How is the weather in Paris?"  # names one, so that a stand-in calls it when it is free to


@dataclass(frozen=True)
class Place:
    """An address with `/v1`, and what a program has to know there.

    `context` is in tokens, `picture` a `data:` URL, None where the model sees nothing. `is_noise`: the model has random weights, so
    nothing is promised about its words, nor that it uses a tool that it is free to leave.
    """

    url: str
    key: str
    model: str
    context: int
    picture: str | None
    is_noise: bool


class Program(NamedTuple):
    """One thing that a program built on `client` does. `run` raises where the promise is broken."""

    client: str
    does: str
    run: Callable[[Place], Coroutine[Any, Any, None] | None]
    sees: bool = False


# Bounded in every field, so that a model which writes noise under a grammar comes to an end.


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


TOOLS: dict[str, type[BaseModel]] = {"Weather": Weather, "Clock": Clock}


def check_arguments(name: str, arguments: str | dict[str, Any]) -> None:
    """That `name` is a tool that was offered, and `arguments` (an object, or JSON) fit it."""
    tool = TOOLS[name]
    if isinstance(arguments, str):
        tool.model_validate_json(arguments)
    else:
        tool.model_validate(arguments)


def beyond(place: Place) -> str:
    """A prompt of twice the context: few enough bytes a token that only the engine can tell."""
    return "hello " * (2 * place.context)
