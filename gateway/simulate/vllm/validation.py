"""vLLM's validation of a chat body: vLLM's own checks first, then the type of each field. Pure."""

from collections.abc import Iterator
from typing import Any

from gateway.simulate.text import tool_name
from gateway.simulate.vllm.errors import ErrorDetail, bad_request, error_detail, validation_failed

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_STOPS = 4
_MAX_SEED = 2**63 - 1
_YES, _NO = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
_FORMATS = ("text", "json_object", "json_schema")
# In the order of vLLM's pydantic model, which is the order of the errors. Other fields are not
# validated.
_FIELDS = {
    "messages": "list",
    "model": "string",
    "frequency_penalty": "float",
    "logit_bias": "dict",
    "logprobs": "bool",
    "top_logprobs": "int",
    "max_tokens": "int",
    "max_completion_tokens": "int",
    "n": "int",
    "presence_penalty": "float",
    "response_format": "format",
    "seed": "int",
    "stop": "stop",
    "stream": "bool",
    "stream_options": "model",
    "temperature": "float",
    "top_p": "float",
    "tools": "tools",
    "reasoning_effort": "effort",
    "parallel_tool_calls": "bool",
    "user": "string",
    "top_k": "int",
    "min_p": "float",
    "repetition_penalty": "float",
    "min_tokens": "int",
    "ignore_eos": "bool",
    "add_generation_prompt": "bool",
    "continue_final_message": "bool",
    "chat_template_kwargs": "dict",
    "mm_processor_kwargs": "dict",
    "structured_outputs": "dict",
}


def validate(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with each value converted to its field's type ("6" to a number, "yes" to
    true).

    Raises:
        VllmApiError: a value is not valid; the message is vLLM's.
    """
    _check_tool_choice(body)
    _check_logprobs(body)
    if body.get("stream_options") and not body.get("stream"):
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    form = body.get("response_format")
    if isinstance(form, dict) and form.get("type") == "json_schema" and form.get("json_schema") is None:
        raise bad_request(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.", "response_format"
        )
    if "messages" not in body:
        raise validation_failed(error_detail("missing", "body.messages", "Field required", body))
    if body["messages"] is None:
        raise bad_request("'NoneType' object is not iterable")
    coerced = dict(body)
    errors: list[ErrorDetail] = []
    for key, kind in _FIELDS.items():
        if coerced.get(key) is not None:
            coerced[key] = _coerce(kind, f"body.{key}", coerced[key], errors)
    seed = coerced.get("seed")
    if not errors and seed is not None and seed > _MAX_SEED:
        message = f"Input should be less than or equal to {_MAX_SEED}"
        errors.append(error_detail("less_than_equal", "body.seed", message, seed, le=_MAX_SEED))
    errors += _message_errors(coerced["messages"])
    if errors:
        raise validation_failed(*errors)
    return coerced


def _check_tool_choice(body: dict[str, Any]) -> None:
    if body.get("tools") == []:
        raise bad_request(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools"
        )
    choice = body.get("tool_choice")
    if choice in (None, "none"):
        return
    if body.get("tools") is None:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if choice in ("auto", "required"):
        return
    if not isinstance(choice, dict):
        raise bad_request(
            f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )
    usage = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
    function = choice.get("function")
    if not isinstance(function, dict):
        raise bad_request(
            f"Invalid value for `function`: `{function}` in `tool_choice`! {usage}", "tool_choice.function"
        )
    if "name" not in function:
        raise bad_request(f"Expected field `name` in `function` in `tool_choice`! {usage}", "tool_choice.function.name")
    if all(tool_name(tool) != function["name"] for tool in body["tools"] if isinstance(tool, dict)):
        raise bad_request(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )


def _check_logprobs(body: dict[str, Any]) -> None:
    top = body.get("top_logprobs")
    if top is None:
        return
    if not isinstance(top, (int, float)):
        raise bad_request("`top_logprobs` must be an integer.", "top_logprobs", value=top)
    if top < 0 and top != -1:
        raise bad_request("`top_logprobs` must be a positive value or -1.", "top_logprobs", value=top)
    if top and not body.get("logprobs"):
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")


def _coerce(kind: str, where: str, value: Any, errors: list[ErrorDetail]) -> Any:
    """Return `value` converted to its type, and append its errors to `errors`."""
    match kind:
        case "float" | "int" | "bool":
            return _scalar(kind, where, value, errors)
        case "string" if not isinstance(value, str):
            errors.append(error_detail("string_type", where, "Input should be a valid string", value))
        case "dict" if not isinstance(value, dict):
            errors.append(error_detail("dict_type", where, "Input should be a valid dictionary", value))
        case "list" if not isinstance(value, list):
            errors.append(error_detail("list_type", where, "Input should be a valid list", value))
        case "model" if not isinstance(value, dict):
            errors.append(_not_an_object(where, value))
        case "effort" if value not in EFFORTS:
            errors.append(_literal(where, value, EFFORTS))
        case "stop":
            errors += _stop_errors(where, value)
        case "tools":
            errors += _tool_errors(where, value)
        case "format":
            errors += _format_errors(where, value)
    return value


def _scalar(kind: str, where: str, value: Any, errors: list[ErrorDetail]) -> Any:
    noun = {"float": "number", "int": "integer", "bool": "boolean"}[kind]
    if isinstance(value, (list, dict)):
        errors.append(error_detail(f"{kind}_type", where, f"Input should be a valid {noun}", value))
        return value
    if kind == "bool":
        word = str(value).lower()
        if word not in _YES + _NO:
            errors.append(
                error_detail("bool_parsing", where, "Input should be a valid boolean, unable to interpret input", value)
            )
        return word in _YES
    try:
        number = float(value) if kind == "float" or isinstance(value, float) else int(value)
    except ValueError:
        errors.append(
            error_detail(
                f"{kind}_parsing",
                where,
                f"Input should be a valid {noun}, unable to parse string as a{'n' * (kind == 'int')} {noun}",
                value,
            )
        )
        return value
    if kind == "int" and number != int(number):
        errors.append(
            error_detail(
                "int_from_float", where, "Input should be a valid integer, got a number with a fractional part", value
            )
        )
    return number if kind == "float" or number != int(number) else int(number)


def _not_an_object(where: str, value: Any) -> ErrorDetail:
    return error_detail(
        "model_attributes_type", where, "Input should be a valid dictionary or object to extract fields from", value
    )


def _literal(where: str, value: Any, words: tuple[str, ...]) -> ErrorDetail:
    *others, last = (repr(word) for word in words)
    expected = f"{', '.join(others)} or {last}" if others else last
    return error_detail("literal_error", where, f"Input should be {expected}", value, expected=expected)


def _stop_errors(where: str, value: Any) -> Iterator[ErrorDetail]:
    if isinstance(value, str):
        return
    not_a_string = error_detail("string_type", where, "Input should be a valid string", value)
    if not isinstance(value, list):
        yield from (not_a_string, error_detail("list_type", where, "Input should be a valid list", value))
        return
    errors = [
        error_detail("string_type", f"{where}.{i}", "Input should be a valid string", item)
        for i, item in enumerate(value)
        if not isinstance(item, str)
    ]
    if len(value) > MAX_STOPS:
        message = f"List should have at most {MAX_STOPS} items after validation, not {len(value)}"
        errors.append(
            error_detail(
                "too_long", where, message, value, field_type="List", max_length=MAX_STOPS, actual_length=len(value)
            )
        )
    if errors:
        yield from (not_a_string, *errors)


def _tool_errors(where: str, value: Any) -> Iterator[ErrorDetail]:
    if not isinstance(value, list):
        yield error_detail("list_type", where, "Input should be a valid list", value)
        return
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            yield _not_an_object(f"{where}.{i}", tool)
            continue
        if tool.get("type", "function") != "function":
            yield _literal(f"{where}.{i}.type", tool["type"], ("function",))
        if "function" not in tool:
            yield error_detail("missing", f"{where}.{i}.function", "Field required", tool)
        elif not isinstance(tool["function"], dict):
            yield _not_an_object(f"{where}.{i}.function", tool["function"])
        elif "name" not in tool["function"]:
            yield error_detail("missing", f"{where}.{i}.function.name", "Field required", tool["function"])


def _format_errors(where: str, value: Any) -> Iterator[ErrorDetail]:
    """Yield the errors of a response format.

    It is a union of three models, and each reports what it misses.
    """
    if not isinstance(value, dict):
        yield from [_not_an_object(where, value)] * 3
        return
    schema = value.get("json_schema")
    own = _format_error(where, value, schema)
    if own is None:
        return
    yield own
    for names in (("format",), ("structures", "triggers")):
        if "type" not in value:
            yield error_detail("missing", f"{where}.type", "Field required", value)
        else:
            yield _literal(f"{where}.type", value["type"], ("structural_tag",))
        for name in names:
            yield error_detail("missing", f"{where}.{name}", "Field required", value)


def _format_error(where: str, value: dict[str, Any], schema: Any) -> ErrorDetail | None:
    if "type" not in value:
        return error_detail("missing", f"{where}.type", "Field required", value)
    if value["type"] not in _FORMATS:
        return _literal(f"{where}.type", value["type"], _FORMATS)
    if schema is None:
        return None
    if not isinstance(schema, dict):
        return _not_an_object(f"{where}.json_schema", schema)
    if "name" not in schema:
        return error_detail("missing", f"{where}.json_schema.name", "Field required", schema)
    if not isinstance(schema.get("schema", {}), dict):
        return error_detail(
            "dict_type", f"{where}.json_schema.schema", "Input should be a valid dictionary", schema["schema"]
        )
    return None


def _message_errors(messages: Any) -> Iterator[ErrorDetail]:
    """Yield the first error of each message; a real vLLM repeats it for each type of message."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        where = f"body.messages.{i}.ChatCompletionDeveloperMessageParam"
        if not isinstance(message, dict):
            yield error_detail("dict_type", where, "Input should be a valid dictionary", message)
        elif "role" not in message:
            yield error_detail("missing", f"{where}.role", "Field required", message)
        elif message["role"] == "user" and "content" in message and not isinstance(message["content"], (str, list)):
            yield error_detail("string_type", f"{where}.content", "Input should be a valid string", message["content"])
        for call in message.get("tool_calls") or () if isinstance(message, dict) else ():
            arguments = call.get("function", {}).get("arguments", "")
            if not isinstance(arguments, str):
                yield error_detail(
                    "string_type",
                    "body.0.ChatCompletionMessageFunctionToolCallParam.function",
                    "Input should be a valid string",
                    arguments,
                )
