"""What comes in at vLLM's doors: its validation in its words, and the job that a request asks for. Pure."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model
from gateway.simulate.words import Limits, Prompt, count_tokens

CHARACTERS_PER_TOKEN = 26  # vLLM refuses by length alone above this, before it counts tokens
TURN_TOKENS = 4
IMAGE_TOKENS = 4
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
_NUMBERS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_p")
_WHOLE = ("max_tokens", "max_completion_tokens", "seed", "n", "top_logprobs", "min_tokens", "top_k")


class ApiError(Exception):
    """An answer that is an error in vLLM's shape; `kind` is its `type`."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True)
class Job:
    """One request for a completion."""

    model: Model
    prompt: Prompt
    prompt_tokens: int
    limits: Limits
    stream: bool
    choices: int
    top_logprobs: int | None
    include_usage: bool
    named_tool: bool


def invalid(kind: str, where: str, message: str, shown: str, context: str = "") -> ApiError:
    """FastAPI's validation error as vLLM writes it out."""
    text = f"1 validation error:\n  {{'type': '{kind}', 'loc': '{where}', 'msg': '{message}', 'input': {shown}{context}}}"
    return ApiError(400, text, "Bad Request", where)


def decode(body: bytes, content_type: str) -> dict[str, Any]:
    """The JSON object in `body`. Raises ApiError as FastAPI does."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", "Bad Request")
    try:
        found = json.loads(body)
    except json.JSONDecodeError as exc:
        context = f", 'ctx': {{'error': '{exc.msg}'}}"
        raise invalid("json_invalid", f"body.{exc.pos}", "JSON decode error", "'<dict of 0 items>'", context) from exc
    if not isinstance(found, dict):
        raise invalid("dict_type", "body", "Input should be a valid dictionary", f"'{type(found).__name__}'")
    return found


def chat_job(body: dict[str, Any], model: Model, reasoning_parser: bool, tool_parser: bool) -> Job:
    """The job of a body for `/v1/chat/completions`. Raises ApiError with vLLM's words."""
    _check_types(body)
    _check_values(body)
    tools, forced = _tools(body, tool_parser)
    turns, images = _messages(body, model)
    tokens = _check_context(turns, images, model, count_tokens(json.dumps(tools)) if tools else 0)
    template = body.get("chat_template_kwargs") or {}
    prompt = Prompt(turns, images, tools, _schema(body), forced, reasoning_parser and template.get("enable_thinking") is not False)
    return Job(
        model=model,
        prompt=prompt,
        prompt_tokens=tokens,
        limits=_limits(body, model, tokens),
        stream=body.get("stream") is True,
        choices=int(body.get("n") or 1),
        top_logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        named_tool=isinstance(body.get("tool_choice"), dict),
    )


def completion_job(body: dict[str, Any], model: Model) -> Job:
    """The job of a body for `/v1/completions`, one prompt of text."""
    _check_types(body, needed="prompt")
    turns = (("user", str(body["prompt"])),)
    tokens = _check_context(turns, 0, model, 0)
    limits = _limits({"max_tokens": 16, **body}, model, tokens)
    return Job(model, Prompt(turns), tokens, limits, body.get("stream") is True, 1, None, False, False)


def _check_types(body: dict[str, Any], needed: str = "messages") -> None:
    if needed not in body:
        raise invalid("missing", f"body.{needed}", "Field required", f"'<dict of {len(body)} items>'")
    for key in _NUMBERS:
        value = body.get(key)
        if isinstance(value, str):
            raise invalid("float_parsing", f"body.{key}", "Input should be a valid number, unable to parse string as a number", repr(value))
    for key in _WHOLE:
        value = body.get(key)
        if isinstance(value, str):
            message = "Input should be a valid integer, unable to parse string as an integer"
            raise invalid("int_parsing", f"body.{key}", message, repr(value))
    effort = body.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise invalid("literal_error", "body.reasoning_effort", "Input should be " + " or ".join(EFFORTS), repr(effort))


def _check_values(body: dict[str, Any]) -> None:
    if body.get("stream_options") and body.get("stream") is not True:
        raise ApiError(400, "Stream options can only be defined when `stream=True`. (parameter=stream_options)", param="stream_options")
    if body.get("tools") == []:
        message = "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely. (parameter=tools)"
        raise ApiError(400, message, param="tools")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise ApiError(400, "when using `top_logprobs`, `logprobs` must be set to true. (parameter=top_logprobs)", param="top_logprobs")
    if not body["messages"]:
        raise ApiError(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")
    temperature = body.get("temperature")
    if temperature is not None and not 0 <= temperature <= 2:
        shown = float(temperature)
        message = f"temperature must be in [0, 2], got {shown}. (parameter=temperature, value={shown})"
        raise ApiError(400, message, param="temperature")
    if (body.get("n") or 1) > 1 and temperature == 0:
        raise ApiError(400, f"n must be 1 when using greedy sampling, got {body['n']}.")


def _tools(body: dict[str, Any], tool_parser: bool) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """The tools that the model sees, and the name of the one that it must call."""
    tools = tuple(body.get("tools") or ())
    choice = body.get("tool_choice", "auto" if tools else "none")
    if choice == "none" or not tools:
        if choice not in ("none", "auto"):
            raise ApiError(400, "When using `tool_choice`, `tools` must be set. (parameter=tool_choice)", param="tool_choice")
        return (), None
    if choice == "auto":
        if not tool_parser:
            raise ApiError(400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        return tools, None
    names = [str(tool["function"]["name"]) for tool in tools]
    name = str(choice["function"]["name"]) if isinstance(choice, dict) else names[0]
    if name not in names:
        raise ApiError(400, "The tool specified in `tool_choice` does not match any of the specified `tools`", param="tool_choice")
    return tools, name


def _messages(body: dict[str, Any], model: Model) -> tuple[tuple[tuple[str, str], ...], int]:
    turns, images = [], 0
    for message in body["messages"]:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else []
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "text":
                texts.append(str(part.get("text", "")))
            else:
                _check_image(part, model)
                images += 1
        turns.append((str(message.get("role", "")), "\n".join(texts)))
    return tuple(turns), images


def _check_image(part: dict[str, Any], model: Model) -> None:
    source = part.get("image_url")
    url = str(source.get("url", "") if isinstance(source, dict) else source)
    if not model.vision:
        raise ApiError(400, f"{model.name} is not a multimodal model")
    if url.startswith(("http://", "https://")):  # the stand-in fetches nothing: as if nobody were there
        host, _, port = url.partition("://")[2].partition("/")[0].partition(":")
        shown = port or ("443" if url.startswith("https") else "80")
        message = f"Cannot connect to host {host}:{shown} ssl:default [Connect call failed ('{host}', {shown})]"
        raise ApiError(500, message, "InternalServerError")
    try:
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data.startswith(_MAGIC):
        raise ApiError(400, "Failed to load image: cannot identify image file <_io.BytesIO object>")


def _check_context(turns: tuple[tuple[str, str], ...], images: int, model: Model, more: int) -> int:
    """The tokens of the prompt. Raises ApiError when they leave no room for an answer."""
    length = sum(len(text) for _, text in turns) + 50 * len(turns)
    most = CHARACTERS_PER_TOKEN * model.context_length
    start = f"This model's maximum context length is {model.context_length} tokens. However, your prompt contains "
    if length > most:
        message = f"{length} characters (more than {most} characters, which is the upper bound for {model.context_length} input tokens). "
        message += f"Please reduce the length of the input prompt. (parameter=input_text, value={length})"
        raise ApiError(400, start + message, param="input_text")
    tokens = sum(count_tokens(text) + TURN_TOKENS for _, text in turns) + images * IMAGE_TOKENS + more
    if tokens >= model.context_length:
        message = f"at least {tokens} input tokens, which exceeds this limit even without any output tokens. "
        message += f"Please reduce the length of the input prompt. (parameter=input_tokens, value={tokens})"
        raise ApiError(400, start + message, param="input_tokens")
    return tokens


def _limits(body: dict[str, Any], model: Model, prompt_tokens: int) -> Limits:
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    if asked is not None and asked > model.context_length:
        message = f"max_tokens={asked} cannot be greater than max_model_len={model.context_length}. "
        message += f"Please request fewer output tokens. (parameter=max_tokens, value={asked})"
        raise ApiError(400, message, param="max_tokens")
    room = model.context_length - prompt_tokens
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(str(item) for item in stop)
    return Limits(min(asked or room, room), stops, ignore_end=bool(body.get("ignore_eos")))


def _schema(body: dict[str, Any]) -> Any:
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if asked.get("type") != "json_schema":
        return None
    if not asked.get("json_schema"):
        message = "When response_format type is 'json_schema', the 'json_schema' field must be provided. (parameter=response_format)"
        raise ApiError(400, message, param="response_format")
    return asked["json_schema"].get("schema")
