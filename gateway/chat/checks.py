"""Checks of a `Chat` that its field types cannot express. Pure: no I/O, no clock."""

from collections.abc import Iterator

from gateway.chat import json_schema
from gateway.chat.constraints import ChoiceFormat, GrammarFormat, RegexFormat, check_nesting, given
from gateway.chat.message import ImagePart, Message
from gateway.chat.request import Chat, PlainFormat, SchemaFormat
from gateway.chat.schema_repair import repair
from gateway.chat.tools import AllowedTools, Choice, Function
from gateway.errors import InvalidRequest, UnsupportedParameter

MAX_SCHEMAS = 128 * 1024
"""Maximum size of all JSON Schemas in a request, in bytes."""
MAX_PROCESSOR_NUMBER = 2**24
"""Maximum of a number in `mm_processor_kwargs`. Qwen-VL's own `max_pixels` is 12,845,056."""
MAX_PROCESSOR_VALUES = 32
_WORK_PER_STEP, _WORK_PER_CALL = 16 * 1024, 64
"""Characters of the arguments that are read in one step, and how many a call counts for besides."""


def needs_steps(chat: Chat) -> bool:
    """Return whether a long chat may take `check` more than some milliseconds."""
    return chat.has_schemas or not chat.has_plain_messages


def check_in_steps(chat: Chat) -> Iterator[None]:
    """Do the same as `check` in steps, each of which takes at most some milliseconds."""
    yield from _check_tools(chat)
    yield from _read_arguments(chat)
    check(chat, are_tools_checked=True)


def _read_arguments(chat: Chat) -> Iterator[None]:
    """Find out the form of the arguments of earlier calls, which every engine needs."""
    work = 0
    for message in () if chat.has_plain_messages else chat.messages:
        for call in message.tool_calls or ():
            work += len(call.function.arguments) + _WORK_PER_CALL
            if work > _WORK_PER_STEP:
                yield
                work = 0
            call.function.form  # noqa: B018 - kept by the function


def check(chat: Chat, *, are_tools_checked: bool = False) -> None:
    """Check what the field types cannot express.

    Raises:
        InvalidRequest: fields are missing or contradict each other, or a JSON Schema is rejected.
        UnsupportedParameter: the request asks for something that no backend serves.
    """
    if not chat.is_plain:
        _check_rare_fields(chat, are_tools_checked)
    if not chat.has_plain_messages:
        for index, message in enumerate(chat.messages):
            is_text = type(message.content) is str
            if (message.role == "tool") if is_text else (message.role != "user" or message.content is None):
                _check_message(message, f"messages[{index}]")


def _check_rare_fields(chat: Chat, are_tools_checked: bool) -> None:
    _check_supported(chat)
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest("'top_logprobs' requires 'logprobs' to be true.", param="top_logprobs")
    if (chat.tools is not None or chat.tool_choice is not None) and not are_tools_checked:
        for _ in _check_tools(chat):
            pass
    if chat.continue_final_message is not None or chat.add_generation_prompt is not None:
        _check_continuation(chat)
    if chat.min_tokens is not None and chat.token_limit is not None and chat.min_tokens > chat.token_limit:
        raise InvalidRequest("'min_tokens' must not be more than 'max_tokens'.", param="min_tokens")
    if chat.mm_processor_kwargs is not None:
        _check_processor_options(chat.mm_processor_kwargs)
    if chat.sets_format:
        _check_format(chat)


def _check_supported(chat: Chat) -> None:
    unsupported: str | None = None
    if chat.functions or chat.function_call is not None:
        raise UnsupportedParameter(
            "'functions' and 'function_call' are not supported: send 'tools' and 'tool_choice' instead.",
            param="functions",
        )
    if chat.audio is not None:
        unsupported = "audio"
    elif chat.modalities is not None and chat.modalities != ["text"]:
        unsupported = "modalities"
    if unsupported is not None:
        raise UnsupportedParameter(
            f"'{unsupported}' is not supported by this gateway on any backend. Leave it out.", param=unsupported
        )


def _check_format(chat: Chat) -> None:
    names = given(chat.structured_outputs, chat.guided)
    if chat.response_format is not None and not isinstance(chat.response_format, PlainFormat):
        names.append("response_format")
    if len(names) > 1:
        raise InvalidRequest(f"'{names[0]}' and '{names[1]}' exclude each other. Send one.", param=names[0])
    wanted = chat.output_format
    if isinstance(wanted, SchemaFormat):
        param = names[0] if names[0] != "response_format" else "response_format.json_schema.schema"
        repair(wanted.json_schema.schema)
        json_schema.check(wanted.json_schema.schema, param)
    elif isinstance(wanted, ChoiceFormat | RegexFormat | GrammarFormat):
        if chat.forced:
            raise InvalidRequest(
                f"'{wanted.param}' cannot be combined with a 'tool_choice' that requires a call.", param=wanted.param
            )
        if isinstance(wanted, ChoiceFormat):
            json_schema.check({"enum": wanted.choices}, wanted.param)
        else:
            check_nesting(wanted.pattern if isinstance(wanted, RegexFormat) else wanted.grammar, wanted.param)


def _check_continuation(chat: Chat) -> None:
    """Check vLLM's fields for an answer that continues the last message."""
    if not chat.continue_final_message:
        if chat.add_generation_prompt is False:
            raise UnsupportedParameter(
                "'add_generation_prompt' can only be false together with 'continue_final_message'.",
                param="add_generation_prompt",
            )
        return
    if chat.add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    last = chat.messages[-1]
    if last.role != "assistant" or last.tool_calls or not last.text.strip():
        raise InvalidRequest(
            "'continue_final_message' requires the last message to be a text with role 'assistant'.",
            param="continue_final_message",
        )


def _check_processor_options(options: dict[str, object]) -> None:
    """Check the options of vLLM's image processor, which could make it use too much memory."""
    values: list[object] = [options]
    for value in values:  # grows while it is read
        if isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
        elif isinstance(value, int | float) and not abs(value) <= MAX_PROCESSOR_NUMBER:
            raise InvalidRequest(
                f"A number in 'mm_processor_kwargs' is more than {MAX_PROCESSOR_NUMBER}.", param="mm_processor_kwargs"
            )
        if len(values) > MAX_PROCESSOR_VALUES:
            raise InvalidRequest(
                f"'mm_processor_kwargs' has more than {MAX_PROCESSOR_VALUES} values.", param="mm_processor_kwargs"
            )


def _check_tools(chat: Chat) -> Iterator[None]:
    tools = chat.tools or []
    constrained = chat.constrained
    names = set()
    size = 0
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            raise InvalidRequest(
                f"'tools[{index}].function.name' repeats the name of an earlier tool.",
                param=f"tools[{index}].function.name",
            )
        names.add(tool.function.name)
        if tool.function.parameters is not None:
            size += _check_parameters(tool.function, f"tools[{index}].function.parameters", constrained)
            if size > MAX_SCHEMAS:
                raise InvalidRequest(
                    f"The schemas in 'tools' have more than {MAX_SCHEMAS} bytes in total.", param="tools"
                )
            yield
    if isinstance(chat.tool_choice, Choice) and chat.tool_choice.function.name not in names:
        raise InvalidRequest("'tool_choice' names a function that is not in 'tools'.", param="tool_choice")
    if isinstance(chat.tool_choice, AllowedTools):
        allowed = chat.tool_choice.names
        if not allowed <= names:
            raise InvalidRequest("'tool_choice' allows a function that is not in 'tools'.", param="tool_choice")
        if not allowed and chat.tool_choice.allowed_tools.mode == "required":
            raise InvalidRequest("'tool_choice' requires a call, but allows no tool.", param="tool_choice")
    if chat.tool_choice == "required" and not names:
        raise InvalidRequest("'tool_choice' requires 'tools'.", param="tool_choice")


def _check_parameters(function: Function, param: str, constrained: frozenset[str]) -> int:
    """Repair the schema in place, and check it as far as it matters. Return its size in bytes.

    Only a schema that a grammar is made of has to be right. The model is shown any other as text.
    """
    parameters, owner = function.parameters, f" of the function '{function.name}'"
    assert parameters is not None
    repair(parameters)
    if function.name not in constrained:
        return json_schema.check_size(parameters, param, owner)
    if parameters.get("type", "object") != "object":
        raise InvalidRequest(f"'{param}'{owner} must be the JSON Schema of an object.", param=param)
    return json_schema.check(parameters, param, owner)


def _check_message(message: Message, path: str) -> None:
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(f"Missing required parameter: '{path}.tool_call_id'.", param=f"{path}.tool_call_id")
    if message.content is None and message.role not in ("assistant", "tool"):
        raise InvalidRequest(f"Missing required parameter: '{path}.content'.", param=f"{path}.content")
    if message.role in ("system", "developer") and isinstance(message.content, list):
        for position, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                param = f"{path}.content[{position}].type"
                raise UnsupportedParameter(
                    f"'{param}' must be 'text': a message with role '{message.role}' cannot contain images.",
                    param=param,
                )
