"""Functions that a model may call, and the choice among them."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_TOOLS = 128
FunctionName = Annotated[str, Meta(pattern=r"^(?:[a-zA-Z0-9_.-]|[^\x00-\x9f\s]){1,64}$(?!\n)")]
"""OpenAI's names, and those in letters of any language: see `tool_names.py`."""


class Function(Struct, frozen=True, omit_defaults=True):
    """Function that the model may call.

    `parameters` is the JSON Schema of an object, or None if the function has no parameters.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    function: Function
    type: Literal["function"]


class ChosenFunction(Struct, frozen=True):
    name: str


class Choice(Struct, frozen=True, tag="function"):
    """Choice of the function that the model must call."""

    function: ChosenFunction


class AllowedTool(Struct, frozen=True):
    function: ChosenFunction
    type: Literal["function"]


class AllowedList(Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(max_length=MAX_TOOLS)]


class AllowedTools(Struct, frozen=True, tag="allowed_tools"):
    """Choice of some of the tools, of which the model may or must call one."""

    allowed_tools: AllowedList

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.allowed_tools.tools)
