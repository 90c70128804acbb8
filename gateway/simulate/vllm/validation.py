"""vLLM's refusals of a chat body, in its words: what its validators find first, then each field's type, at last the ranges. Pure."""

import math
from collections.abc import Iterator
from typing import Any

from gateway.simulate.text import tool_name

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MOST_STOPS = 4
MOST_CHOICES = 16384
MOST_LOGPROBS = 20
VOCABULARY = 151_936  # of Qwen3
_SEEDS = (-(2**63), 2**63 - 1)
_YES, _NO = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")
_FORMATS = ("text", "json_object", "json_schema")
# In the order of vLLM's model, which is the order of the errors. What has no entry is taken as it comes.
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
    "chat_template_kwargs": "dict",
}
_SCHEMA_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_NO_CONSTRAINT = {
    "json": None,
    "regex": None,
    "choice": None,
    "grammar": None,
    "json_object": None,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
    "_backend": None,
    "_backend_was_auto": False,
}

Flaw = dict[str, Any]


class VllmApiError(Exception):
    """An answer that is an error in vLLM's shape; `kind` is its `type`."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def refused(message: str, param: str | None = None, **value: Any) -> VllmApiError:
    """A 400 of vLLM's own checks; with `param`, and `value=…` where it names that too, as its message ends."""
    if param is not None:
        message += f" (parameter={param}" + (f", value={value['value']})" if value else ")")
    return VllmApiError(400, message, param=param)


def flaw(kind: str, where: str, message: str, value: Any, **context: Any) -> Flaw:
    """One finding of pydantic."""
    shown = f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, (list, dict)) else str(value)
    return {"type": kind, "loc": where, "msg": message, "input": shown, **({"ctx": context} if context else {})}


def invalid(*flaws: Flaw) -> VllmApiError:
    """FastAPI's validation error as vLLM writes it out."""
    head = f"{len(flaws)} validation error{'s' if len(flaws) > 1 else ''}:"
    return VllmApiError(400, head + "".join(f"\n  {one}" for one in flaws), "Bad Request", flaws[0]["loc"])


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """The body with each value in its field's type ("6" for a number, "yes" for a truth). Raises ApiError in vLLM's words."""
    _check_tool_choice(body)
    _check_logprobs(body)
    if body.get("stream_options") and not body.get("stream"):
        raise refused("Stream options can only be defined when `stream=True`.", "stream_options")
    asked = body.get("response_format")
    if isinstance(asked, dict) and asked.get("type") == "json_schema" and asked.get("json_schema") is None:
        raise refused(
            "When response_format type is 'json_schema', the 'json_schema' field must be provided.", "response_format"
        )
    if "messages" not in body:
        raise invalid(flaw("missing", "body.messages", "Field required", body))
    if body["messages"] is None:
        raise refused("'NoneType' object is not iterable")
    taken = dict(body)
    flaws: list[Flaw] = []
    for key, kind in _FIELDS.items():
        if taken.get(key) is not None:
            taken[key] = _taken(kind, f"body.{key}", taken[key], flaws)
    seed = taken.get("seed")
    if not flaws and seed is not None and seed > _SEEDS[1]:
        flaws.append(
            flaw(
                "less_than_equal", "body.seed", f"Input should be less than or equal to {_SEEDS[1]}", seed, le=_SEEDS[1]
            )
        )
    flaws += _message_flaws(taken["messages"])
    if flaws:
        raise invalid(*flaws)
    return taken


def _check_tool_choice(body: dict[str, Any]) -> None:
    if body.get("tools") == []:
        raise refused(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.", "tools"
        )
    choice = body.get("tool_choice")
    if choice in (None, "none"):
        return
    if body.get("tools") is None:
        raise refused("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if choice in ("auto", "required"):
        return
    if not isinstance(choice, dict):
        raise refused(
            f'Invalid value for `tool_choice`: {choice}! Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )
    usage = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'
    function = choice.get("function")
    if not isinstance(function, dict):
        raise refused(f"Invalid value for `function`: `{function}` in `tool_choice`! {usage}", "tool_choice.function")
    if "name" not in function:
        raise refused(f"Expected field `name` in `function` in `tool_choice`! {usage}", "tool_choice.function.name")
    if all(tool_name(tool) != function["name"] for tool in body["tools"] if isinstance(tool, dict)):
        raise refused("The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice")


def _check_logprobs(body: dict[str, Any]) -> None:
    top = body.get("top_logprobs")
    if top is None:
        return
    if not isinstance(top, (int, float)):
        raise refused("`top_logprobs` must be an integer.", "top_logprobs", value=top)
    if top < 0 and top != -1:
        raise refused("`top_logprobs` must be a positive value or -1.", "top_logprobs", value=top)
    if top and not body.get("logprobs"):
        raise refused("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")


def _taken(kind: str, where: str, value: Any, flaws: list[Flaw]) -> Any:
    """`value` in its type; what is wrong with it goes to `flaws`."""
    match kind:
        case "float" | "int" | "bool":
            return _scalar(kind, where, value, flaws)
        case "string" if not isinstance(value, str):
            flaws.append(flaw("string_type", where, "Input should be a valid string", value))
        case "dict" if not isinstance(value, dict):
            flaws.append(flaw("dict_type", where, "Input should be a valid dictionary", value))
        case "list" if not isinstance(value, list):
            flaws.append(flaw("list_type", where, "Input should be a valid list", value))
        case "model" if not isinstance(value, dict):
            flaws.append(_no_model(where, value))
        case "effort" if value not in EFFORTS:
            flaws.append(_literal(where, value, EFFORTS))
        case "stop":
            flaws += _stop_flaws(where, value)
        case "tools":
            flaws += _tools_flaws(where, value)
        case "format":
            flaws += _format_flaws(where, value)
    return value


def _scalar(kind: str, where: str, value: Any, flaws: list[Flaw]) -> Any:
    noun = {"float": "number", "int": "integer", "bool": "boolean"}[kind]
    if isinstance(value, (list, dict)):
        flaws.append(flaw(f"{kind}_type", where, f"Input should be a valid {noun}", value))
        return value
    if kind == "bool":
        word = str(value).lower()
        if word not in _YES + _NO:
            flaws.append(
                flaw("bool_parsing", where, "Input should be a valid boolean, unable to interpret input", value)
            )
        return word in _YES
    try:
        number = float(value) if kind == "float" or isinstance(value, float) else int(value)
    except ValueError:
        flaws.append(
            flaw(
                f"{kind}_parsing",
                where,
                f"Input should be a valid {noun}, unable to parse string as a{'n' * (kind == 'int')} {noun}",
                value,
            )
        )
        return value
    if kind == "int" and number != int(number):
        flaws.append(
            flaw("int_from_float", where, "Input should be a valid integer, got a number with a fractional part", value)
        )
    return number if kind == "float" or number != int(number) else int(number)


def _no_model(where: str, value: Any) -> Flaw:
    return flaw(
        "model_attributes_type", where, "Input should be a valid dictionary or object to extract fields from", value
    )


def _literal(where: str, value: Any, words: tuple[str, ...]) -> Flaw:
    *others, last = (repr(word) for word in words)
    expected = f"{', '.join(others)} or {last}" if others else last
    return flaw("literal_error", where, f"Input should be {expected}", value, expected=expected)


def _stop_flaws(where: str, value: Any) -> Iterator[Flaw]:
    if isinstance(value, str):
        return
    no_string = flaw("string_type", where, "Input should be a valid string", value)
    if not isinstance(value, list):
        yield from (no_string, flaw("list_type", where, "Input should be a valid list", value))
        return
    wrong = [
        flaw("string_type", f"{where}.{i}", "Input should be a valid string", item)
        for i, item in enumerate(value)
        if not isinstance(item, str)
    ]
    if len(value) > MOST_STOPS:
        message = f"List should have at most {MOST_STOPS} items after validation, not {len(value)}"
        wrong.append(
            flaw("too_long", where, message, value, field_type="List", max_length=MOST_STOPS, actual_length=len(value))
        )
    if wrong:
        yield from (no_string, *wrong)


def _tools_flaws(where: str, value: Any) -> Iterator[Flaw]:
    if not isinstance(value, list):
        yield flaw("list_type", where, "Input should be a valid list", value)
        return
    for i, tool in enumerate(value):
        if not isinstance(tool, dict):
            yield _no_model(f"{where}.{i}", tool)
            continue
        if tool.get("type", "function") != "function":
            yield _literal(f"{where}.{i}.type", tool["type"], ("function",))
        if "function" not in tool:
            yield flaw("missing", f"{where}.{i}.function", "Field required", tool)
        elif not isinstance(tool["function"], dict):
            yield _no_model(f"{where}.{i}.function", tool["function"])
        elif "name" not in tool["function"]:
            yield flaw("missing", f"{where}.{i}.function.name", "Field required", tool["function"])


def _format_flaws(where: str, value: Any) -> Iterator[Flaw]:
    """A format is one of three models, and each says what it misses."""
    if not isinstance(value, dict):
        yield from [_no_model(where, value)] * 3
        return
    schema = value.get("json_schema")
    own = _format_flaw(where, value, schema)
    if own is None:
        return
    yield own
    for names in (("format",), ("structures", "triggers")):
        if "type" not in value:
            yield flaw("missing", f"{where}.type", "Field required", value)
        else:
            yield _literal(f"{where}.type", value["type"], ("structural_tag",))
        for name in names:
            yield flaw("missing", f"{where}.{name}", "Field required", value)


def _format_flaw(where: str, value: dict[str, Any], schema: Any) -> Flaw | None:
    if "type" not in value:
        return flaw("missing", f"{where}.type", "Field required", value)
    if value["type"] not in _FORMATS:
        return _literal(f"{where}.type", value["type"], _FORMATS)
    if schema is None:
        return None
    if not isinstance(schema, dict):
        return _no_model(f"{where}.json_schema", schema)
    if "name" not in schema:
        return flaw("missing", f"{where}.json_schema.name", "Field required", schema)
    if not isinstance(schema.get("schema", {}), dict):
        return flaw("dict_type", f"{where}.json_schema.schema", "Input should be a valid dictionary", schema["schema"])
    return None


def _message_flaws(messages: Any) -> Iterator[Flaw]:
    """The first finding for each message; the real one repeats it for each kind of message that there is."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        where = f"body.messages.{i}.ChatCompletionDeveloperMessageParam"
        if not isinstance(message, dict):
            yield flaw("dict_type", where, "Input should be a valid dictionary", message)
        elif "role" not in message:
            yield flaw("missing", f"{where}.role", "Field required", message)
        elif message["role"] == "user" and "content" in message and not isinstance(message["content"], (str, list)):
            yield flaw("string_type", f"{where}.content", "Input should be a valid string", message["content"])
        for call in message.get("tool_calls") or () if isinstance(message, dict) else ():
            arguments = call.get("function", {}).get("arguments", "")
            if not isinstance(arguments, str):
                yield flaw(
                    "string_type",
                    "body.0.ChatCompletionMessageFunctionToolCallParam.function",
                    "Input should be a valid string",
                    arguments,
                )


def check_ranges(body: dict[str, Any], most_tokens: int) -> None:
    """The sampling parameters of a checked body. Raises ApiError."""
    key = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = body.get(key)
    if asked is not None and asked > most_tokens:
        message = (
            f"{key}={asked} cannot be greater than max_model_len={most_tokens}. Please request fewer output tokens."
        )
        raise refused(message, key, value=asked)
    choices = 1 if body.get("n") is None else body["n"]
    if choices < 1:
        raise refused(f"n must be at least 1, got {choices}.")
    if choices > MOST_CHOICES:
        more = "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        raise refused(f"n must be at most {MOST_CHOICES}, got {choices}. {more}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= (body.get(name) or 0) <= 2:
            raise refused(f"{name} must be in [-2, 2], got {body[name]}.")
    _check_sampling(body)
    if asked is not None and asked < 1:
        raise refused(f"max_tokens must be at least 1, got {asked}.", "max_tokens", value=asked)
    if asked is not None and (body.get("min_tokens") or 0) > asked:
        raise refused(f"min_tokens must be less than or equal to max_tokens={asked}, got {body['min_tokens']}.")
    stop = body.get("stop")
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise refused("stop cannot contain an empty string.")
    if choices > 1 and body.get("temperature") == 0:
        raise refused(f"n must be 1 when using greedy sampling, got {choices}.")
    top = body.get("top_logprobs") or 0
    if top > MOST_LOGPROBS:
        raise refused(
            f"Requested sample logprobs of {top}, which is greater than max allowed: {MOST_LOGPROBS}",
            "logprobs",
            value=top,
        )


def _check_sampling(body: dict[str, Any]) -> None:
    penalty = body.get("repetition_penalty")
    if penalty is not None and penalty <= 0:
        raise refused(f"repetition_penalty must be greater than zero, got {penalty}.")
    temperature = body.get("temperature")
    if temperature is not None and not 0 <= temperature <= 2:
        should = (
            "a finite number" if not math.isfinite(temperature) else "non-negative" if temperature < 0 else "in [0, 2]"
        )
        raise refused(f"temperature must be {should}, got {temperature}.", "temperature", value=temperature)
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise refused(f"top_p must be in (0, 1], got {top_p}.", "top_p", value=top_p)
    top_k = body.get("top_k")
    if top_k is not None and top_k < -1:
        raise refused(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    min_p = body.get("min_p")
    if min_p is not None and not 0 <= min_p <= 1:
        raise refused(f"min_p must be in [0, 1], got {min_p}.")
    _check_bias(body.get("logit_bias") or {})


def _check_bias(bias: dict[str, Any]) -> None:
    wrong = [key for key in bias if not key.lstrip("-").isdigit()]
    if wrong:
        raise refused(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {wrong}",
            "logit_bias",
            value=wrong,
        )
    far = [int(key) for key in bias if not 0 <= int(key) < VOCABULARY]
    if far:
        message = f"token_id(s) {far} in logit_bias contain out-of-vocab token ids. Vocabulary size: {VOCABULARY}"
        raise refused(message, "logit_bias", value=far)


def check_schema(asked: dict[str, Any]) -> None:
    """A `response_format` whose schema no grammar can be made of. Raises ApiError."""
    if asked.get("type") != "json_schema":
        return
    schema = asked["json_schema"].get("schema")
    if schema is None:
        raise refused(
            f"You must use one kind of structured outputs constraint but none are specified: {_NO_CONSTRAINT}"
        )
    kind = schema.get("type")
    if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
        raise refused(f'Failed to transform json schema into a grammar: Unsupported type "{kind}"')
