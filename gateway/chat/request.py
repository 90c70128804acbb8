"""Canonical chat request, with the fields of OpenAI's chat completions. Pure: no I/O, no clock.

`dialects/openai_chat_request.py` decodes a `Chat` from bytes.

Fields are on an allow-list and are rendered anew for each backend, so an invented field never
reaches one. Unknown fields are ignored, as OpenAI's clients expect. Unsupported fields that would
change the shape of the answer are rejected by name.
"""

from operator import attrgetter
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gateway.chat.constraints import (
    Choices,
    Constraint,
    Grammar,
    Pattern,
    StructuredOutputs,
    constraint,
    schema_of,
)
from gateway.chat.derived import derived
from gateway.chat.message import ImagePart, Message
from gateway.chat.tools import MAX_TOOLS, AllowedTools, Choice, Function, FunctionName, Tool

Penalty = Annotated[float, Meta(ge=-2, le=2)]
PositiveInt = Annotated[int, Meta(ge=1, le=10_000_000)]
MAX_MESSAGES, MAX_BIASES = 2048, 1024
MAX_CHOICES = 8
"""Maximum of `n`. Each choice is a request to the engine."""
MAX_STOP_IDS, MAX_TOKEN_ID = 64, 10_000_000
REFUSED = frozenset({"functions", "function_call", "audio"})
"""Fields that are only read to reject them."""
LARGE_SCHEMAS = 8 * 1024
"""Size in bytes from which other requests get a turn between the steps on JSON Schemas."""
UNUSED = frozenset({"logit_bias"})
"""Fields that are checked and then dropped.

The engines number their tokens differently, and Ollama has no such field.
"""
Effort = Literal["none", "low", "medium", "high"]
"""Reasoning efforts in OpenAI's words that all engines support."""


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class NamedSchema(Struct, frozen=True, omit_defaults=True):
    name: FunctionName
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class PlainFormat(Struct, frozen=True, tag="text"):
    pass


class JsonFormat(Struct, frozen=True, tag="json_object"):
    pass


class SchemaFormat(Struct, frozen=True, tag="json_schema"):
    json_schema: NamedSchema


FORMAT_FIELDS = (
    "response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar",
)  # fmt: skip
"""Fields that set the format of the answer, of which a request may have one."""


def _schema_format(json: dict[str, Any] | str, param: str) -> SchemaFormat:
    return SchemaFormat(NamedSchema("structured_outputs", schema_of(json, param)))


class Reasoning(Struct, frozen=True):
    """Reasoning options in the form of OpenAI's Responses API, which some programs send here too.

    `enabled` is OpenRouter's.
    """

    effort: str | None = None
    enabled: bool | None = None


class Thinking(Struct, frozen=True):
    """Switch in the form of Anthropic, Z.ai and DeepSeek. `adaptive` and `auto` are no switch."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]


class TemplateOptions(Struct, frozen=True):
    """Chat template options that clients may set: the two names for whether the model thinks."""

    enable_thinking: bool | None = None
    thinking: bool | None = None

    @property
    def thinks(self) -> bool | None:
        return self.thinking if self.enable_thinking is None else self.enable_thinking


class TierTemplateOptions(TemplateOptions, frozen=True):
    """Chat template options with further words of the template, which only a tier can set."""

    words: dict[str, Any] = {}


_EFFORTS: dict[str, Effort] = {
    "none": "none", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high",
    "ultra": "high",
}  # fmt: skip
THINKING_FIELDS = ("reasoning_effort", "reasoning", "think", "thinking", "enable_thinking", "chat_template_kwargs")
"""Fields that control thinking, the first of which takes precedence."""
EffortWord = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


_FIRST_ROLES = frozenset({"system", "user", "assistant"})
_LATER_ROLES = frozenset({"user", "assistant"})


class Chat(Struct, frozen=True, kw_only=True, dict=True):
    """One parsed request.

    While queued it is kept in this form; it is rendered when a backend admits it. The fields from
    `logprobs` on are set by few requests.
    """

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=4)]
        | None
    ) = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | JsonFormat | SchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_choice: Choices | None = None
    guided_regex: Pattern | None = None
    guided_grammar: Grammar | None = None
    reasoning_effort: EffortWord | None = None
    reasoning: Reasoning | None = None
    think: bool | EffortWord | None = None
    thinking: bool | Thinking | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]], Meta(max_length=MAX_STOP_IDS)] | None
    ) = None
    mm_processor_kwargs: dict[str, Any] | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None

    @derived
    def is_plain(self) -> bool:
        """True if the request sets none of the rare fields, as almost all. So no step has to look at them."""
        return _rare_values(self) == _NO_VALUES

    @derived
    def has_plain_messages(self) -> bool:
        """True if the messages are texts of system, user and assistant alone, only the first of the system.

        Engines with OpenAI's API get such messages as they are.
        """
        roles = _FIRST_ROLES
        for message in self.messages:
            if (
                type(message.content) is not str
                or message.role not in roles
                or message.tool_calls is not None
                or message.tool_call_id is not None
                or message.reasoning is not None
                or message.reasoning_content is not None
            ):
                return False
            roles = _LATER_ROLES
        return True

    @property
    def token_limit(self) -> int | None:
        """Return the token limit. The newer name takes precedence, as at OpenAI and vLLM."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_images(self) -> bool:
        for message in self.messages:
            if type(message.content) is list and any(isinstance(part, ImagePart) for part in message.content):
                return True
        return False

    @property
    def effort(self) -> Effort | bool | None:
        """Return the reasoning effort.

        True leaves the effort to the model, and None means that the request does not set it.
        OpenAI's field takes precedence over the engines' own.
        """
        if self.reasoning_effort is not None:
            return _EFFORTS[self.reasoning_effort]
        if self.reasoning is not None:
            if self.reasoning.effort in _EFFORTS:
                return _EFFORTS[self.reasoning.effort]
            if self.reasoning.enabled is not None:
                return self.reasoning.enabled or "none"
        if self.think is not None:
            return _EFFORTS[self.think] if isinstance(self.think, str) else self.think or "none"
        if self.thinking is not None:
            if isinstance(self.thinking, bool):
                return self.thinking or "none"
            if self.thinking.type in ("enabled", "disabled"):
                return self.thinking.type == "enabled" or "none"
        if self.enable_thinking is not None:
            return self.enable_thinking or "none"
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.thinks is not None:
            return self.chat_template_kwargs.thinks or "none"
        return None

    @property
    def template_words(self) -> dict[str, Any]:
        """Return the tier's words for the chat template, other than those that control thinking."""
        options = self.chat_template_kwargs
        return options.words if isinstance(options, TierTemplateOptions) else {}

    @property
    def output_format(self) -> PlainFormat | JsonFormat | SchemaFormat | Constraint | None:
        """Return the format of the answer, from whichever field. `checks` allows only one."""
        outputs = self.structured_outputs
        if outputs is not None:
            if outputs.json is not None:
                return _schema_format(outputs.json, "structured_outputs.json")
            if outputs.json_object:
                return JsonFormat()
            if (found := constraint(outputs, "structured_outputs.")) is not None:
                return found
        if self.guided_json is not None:
            return _schema_format(self.guided_json, "guided_json")
        if self.guided_choice is not None or self.guided_regex is not None or self.guided_grammar is not None:
            guided = StructuredOutputs(choice=self.guided_choice, regex=self.guided_regex, grammar=self.guided_grammar)
            return constraint(guided, "guided_")
        return self.response_format

    @property
    def guided(self) -> dict[str, Any]:
        """Return vLLM's older fields for structured output by name."""
        return {
            "guided_json": self.guided_json, "guided_choice": self.guided_choice, "guided_regex": self.guided_regex,
            "guided_grammar": self.guided_grammar,
        }  # fmt: skip

    @property
    def has_schemas(self) -> bool:
        return bool(self.tools) or isinstance(self.output_format, SchemaFormat)

    @property
    def needs_check(self) -> bool:
        """Return whether the request has something that an engine may be unable to express."""
        return bool(self.tools or self.sets_format or self.stop_token_ids or self.continue_final_message)

    @property
    def sets_format(self) -> bool:
        """True if a field sets the format of the answer. Almost none does, so this comes before `output_format`."""
        return (
            self.response_format is not None
            or self.structured_outputs is not None
            or self.guided_json is not None
            or self.guided_choice is not None
            or self.guided_regex is not None
            or self.guided_grammar is not None
        )

    @property
    def offered(self) -> list[Tool]:
        """Return the tools offered to the model."""
        if self.tools is None or self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, AllowedTools):
            names = self.tool_choice.names
            return [tool for tool in self.tools if tool.function.name in names]
        return self.tools

    @property
    def forced(self) -> list[Function]:
        """Return the functions of which the model must call one. Empty if it may choose freely."""
        if self.tools is None:
            return []
        choice = self.tool_choice
        if isinstance(choice, Choice):
            name = choice.function.name
            return [tool.function for tool in self.tools if tool.function.name == name][:1]
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        return [tool.function for tool in self.offered] if mode == "required" else []

    @property
    def constrained(self) -> frozenset[str]:
        """Return the names of the functions whose arguments a grammar forces to follow the schema."""
        strict = {tool.function.name for tool in self.tools or () if tool.function.strict}
        return frozenset(strict.union(function.name for function in self.forced))


RARE_FIELDS = frozenset(Chat.__struct_fields__[Chat.__struct_fields__.index("logprobs") :])
_rare_values = attrgetter(*RARE_FIELDS)
_NO_VALUES = (None,) * len(RARE_FIELDS)
