"""Parsing of requests to the vLLM stand-in: JSON, messages, tools, prompt lengths. Pure."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model, Options
from gateway.simulate.text import GenerationLimits, Prompt, count_tokens
from gateway.simulate.vllm.errors import VllmApiError, bad_request, error_detail, validation_failed
from gateway.simulate.vllm.sampling import check_ranges, check_schema, constrained
from gateway.simulate.vllm.templates import check_template
from gateway.simulate.vllm.validation import validate

CHARACTERS_PER_TOKEN = 26  # above this, vLLM rejects a prompt by its length, without counting tokens
TURN_TOKENS = 4
IMAGE_TOKENS = 4
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


@dataclass(frozen=True, slots=True)
class Job:
    """One completion request: `choices` replies to each of `prompts`."""

    model: Model
    prompts: tuple[Prompt, ...]
    prompt_tokens: int
    limits: GenerationLimits
    stream: bool
    choices: int
    top_logprobs: int | None
    include_usage: bool
    counts_each: bool
    named_tool: bool
    has_parser: bool

    @property
    def prompt(self) -> Prompt:
        return self.prompts[0]

    @property
    def replies(self) -> tuple[Prompt, ...]:
        """The prompt of each reply, in the order of their indexes."""
        return tuple(prompt for prompt in self.prompts for _ in range(self.choices))


def decode(body: bytes, content_type: str) -> dict[str, Any]:
    """Decode the JSON object in `body`.

    Raises:
        VllmApiError: as FastAPI reports it: wrong media type, or not a JSON object.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise VllmApiError(
            400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", "Bad Request"
        )
    try:
        found = json.loads(body) if body else None
    except json.JSONDecodeError as exc:
        raise validation_failed(
            error_detail("json_invalid", f"body.{exc.pos}", "JSON decode error", {}, error=exc.msg)
        ) from exc
    if found is None:
        raise validation_failed(error_detail("missing", "body", "Field required", None))
    if not isinstance(found, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise validation_failed(error_detail("model_attributes_type", "body", message, found))
    return found


def check_model(body: dict[str, Any], options: Options) -> None:
    """Check the model name; a body without one means the first model.

    Raises:
        VllmApiError: the model is not served.
    """
    name, names = body.get("model"), [model.name for model in options.served]
    if name and name not in names:
        raise VllmApiError(
            404, f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}.", "NotFoundError", "model"
        )


def chat_job(body: dict[str, Any], model: Model, options: Options) -> Job:
    """Parse a body of `/v1/chat/completions`.

    Raises:
        VllmApiError: the request is not valid; the message is vLLM's.
    """
    body = validate(body)
    check_model(body, options)
    if not body["messages"]:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    check_template(body["messages"], options.template)
    tools, forced, strict = _tools(body, options.tool_parser)
    _check_continuation(body)
    turns, images = _messages(body, model)
    tokens = _check_context(turns, images, model, count_tokens(json.dumps(tools)) if tools else 0)
    check_ranges(body, model.context_length)
    stream_options = body.get("stream_options") or {}
    thinks, leaks = _reasoning(body, model, options)
    prompt = Prompt(
        turns,
        images,
        tools,
        _schema(body),
        forced,
        thinks,
        leaks,
        forced_strictly=strict or not options.loose_calls,
        literal=constrained(body.get("structured_outputs")),
    )
    return Job(
        model=model,
        prompts=(prompt,),
        prompt_tokens=tokens,
        limits=_limits(body, model, tokens),
        stream=bool(body.get("stream")),
        choices=int(body.get("n") or 1),
        top_logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        include_usage=bool(stream_options.get("include_usage")),
        counts_each=bool(stream_options.get("include_usage") and stream_options.get("continuous_usage_stats")),
        named_tool=isinstance(body.get("tool_choice"), dict),
        has_parser=options.tool_parser or options.reasoning_parser,
    )


def _check_continuation(body: dict[str, Any]) -> None:
    """Check what the chat template needs to continue the last message.

    Raises:
        VllmApiError: the message is that of transformers.
    """
    if body.get("continue_final_message") and body.get("add_generation_prompt") is not False:
        raise bad_request("continue_final_message and add_generation_prompt are not compatible.")


def _reasoning(body: dict[str, Any], model: Model, options: Options) -> tuple[bool, bool]:
    """Return whether the model reasons, and whether it reasons without a parser that separates it.

    The template's own word takes precedence over `reasoning_effort`.
    """
    words = body.get("chat_template_kwargs") or {}
    enabled = words.get(model.thinking_word)
    effort = body.get("reasoning_effort")
    wanted = enabled is not False if enabled is not None else effort != "none"
    can_leak = (model.thinking or model.leaks) and not options.reasoning_parser
    return options.reasoning_parser and wanted, can_leak and wanted


def completion_job(body: dict[str, Any], model: Model, options: Options) -> Job:
    """Parse a body of `/v1/completions`, whose prompt is a text, several texts, or token ids.

    Raises:
        VllmApiError: the request is not valid; the message is vLLM's.
    """
    logprobs = body.get("logprobs")
    body = {key: value for key, value in body.items() if key != "logprobs"}
    prompt = body.pop("prompt", None)
    body = validate({"max_tokens": 16, "messages": [], **body})
    check_model(body, options)
    if body.get("suffix"):
        raise VllmApiError(400, "suffix is only supported for models with FIM completion rendering", param="suffix")
    if not prompt and not isinstance(prompt, int):
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    prompts = _prompts(prompt)
    tokens = sum(_check_context(each.turns, 0, model, 0) for each in prompts)
    check_ranges(body, model.context_length)
    limits = _limits(body, model, tokens)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return Job(
        model,
        prompts,
        tokens,
        limits,
        bool(body.get("stream")),
        int(body.get("n") or 1),
        logprobs,
        usage,
        False,
        False,
        False,
    )


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    if not isinstance(prompt, (str, list)):
        not_a_list = error_detail("list_type", "body.prompt", "Input should be a valid list", prompt)
        not_a_string = error_detail("string_type", "body.prompt", "Input should be a valid string", prompt)
        raise validation_failed(not_a_list, not_a_list, not_a_string, not_a_list)
    texts = [prompt] if isinstance(prompt, str) or all(isinstance(item, int) for item in prompt) else prompt
    return tuple(Prompt((("user", text if isinstance(text, str) else " ".join(map(str, text))),)) for text in texts)


def _tools(body: dict[str, Any], tool_parser: bool) -> tuple[tuple[dict[str, Any], ...], str | None, bool]:
    """Return the tools for the model, the name of a forced tool, and whether its arguments must
    follow its schema.

    Raises:
        VllmApiError: the tool choice needs a tool parser.
    """
    tools = tuple(body.get("tools") or ())
    choice = body.get("tool_choice", "auto") if tools else None
    if choice in (None, "none"):
        return (), None, False
    if choice == "auto":
        if not tool_parser:
            raise bad_request('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        return tools, None, False
    name = str(choice["function"]["name"]) if isinstance(choice, dict) else str(tools[0]["function"]["name"])
    if not tool_parser:
        setting = f'tool_choice=function "{name}"' if isinstance(choice, dict) else 'tool_choice="required"'
        raise bad_request(f"{setting} requires --tool-call-parser to be set")
    strict = next(tool["function"].get("strict") for tool in tools if tool["function"]["name"] == name)
    return tools, name, bool(strict)


def _messages(body: dict[str, Any], model: Model) -> tuple[tuple[tuple[str, str], ...], int]:
    turns, images = [], 0
    for message in body["messages"]:
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else []
        for part in content if isinstance(content, list) else ():
            if (text := _part_text(part)) is not None:
                texts.append(text)
            else:
                _check_image(part, model)
                images += 1
        turns.append((str(message.get("role", "")), "\n".join(texts)))
    return tuple(turns), images


def _part_text(part: Any) -> str | None:
    """Return the text of a content part; None for an image.

    Raises:
        VllmApiError: it is neither. The message of a real vLLM lists all types of parts.
    """
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image_url" and "image_url" in part:
            return None
        if part.get("type") == "input_audio":
            raise bad_request("At most 0 audio(s) may be provided in one prompt.", "audio")
    message = (
        "Field required [type=missing"
        if isinstance(part, dict)
        else "Input should be a valid dictionary [type=dict_type"
    )
    raise bad_request(f"1 validation error for ValidatorIterator\n0.ChatCompletionContentPartTextParam\n  {message}]")


def _check_image(part: dict[str, Any], model: Model) -> None:
    source = part["image_url"]
    if not isinstance(source, dict):
        message = "Input should be a valid dictionary [type=dict_type]"
        raise bad_request(f"1 validation error for ChatCompletionContentPartImageParam\nimage_url\n  {message}")
    if not model.vision:
        raise bad_request(f"{model.name} is not a multimodal model")
    url = str(source.get("url", ""))
    if not url:
        raise bad_request("multi_modal_data['image'][0] is empty but multi_modal_uuids['image'][0] is missing.")
    scheme, _, rest = url.partition(":")
    match scheme.lower():
        case "http" | "https":  # the stand-in fetches nothing and answers as if it could not connect
            host, _, port = rest.removeprefix("//").partition("/")[0].partition(":")
            shown = port or ("443" if scheme == "https" else "80")
            message = f"Cannot connect to host {host}:{shown} ssl:default [Connect call failed ('{host}', {shown})]"
            raise VllmApiError(500, message, "InternalServerError")
        case "file":
            raise VllmApiError(
                500, "Cannot load local files without `--allowed-local-media-path`.", "InternalServerError"
            )
        case "data":
            _check_image_data(rest)
        case _:
            raise bad_request("The URL must be either a HTTP, data or file URL.")


def _check_image_data(rest: str) -> None:
    head, _, text = rest.partition(",")
    if not head.endswith(";base64"):
        raise VllmApiError(501, "Only base64 data URLs are supported for now.", "NotImplementedError")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise bad_request("Non-base64 digit found") from exc
    if not data.startswith(_MAGIC):
        raise bad_request("Failed to load image: cannot identify image file <_io.BytesIO object>")


def _check_context(turns: tuple[tuple[str, str], ...], images: int, model: Model, more: int) -> int:
    """Return the number of prompt tokens.

    Raises:
        VllmApiError: the prompt leaves no room for an answer.
    """
    length = sum(len(text) for _, text in turns) + 50 * len(turns)
    most = CHARACTERS_PER_TOKEN * model.context_length
    start = f"This model's maximum context length is {model.context_length} tokens. However, your prompt contains "
    if length > most:
        message = (
            f"{length} characters (more than {most} characters, which is the upper bound for "
            f"{model.context_length} input tokens). "
        )
        raise bad_request(start + message + "Please reduce the length of the input prompt.", "input_text", value=length)
    tokens = sum(count_tokens(text) + TURN_TOKENS for _, text in turns) + images * IMAGE_TOKENS + more
    if tokens >= model.context_length:
        message = f"at least {tokens} input tokens, which exceeds this limit even without any output tokens. "
        raise bad_request(
            start + message + "Please reduce the length of the input prompt.", "input_tokens", value=tokens
        )
    return tokens


def _limits(body: dict[str, Any], model: Model, prompt_tokens: int) -> GenerationLimits:
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    room = model.context_length - prompt_tokens
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerationLimits(
        min(most or room, room), stops, ignore_end=bool(body.get("ignore_eos")), least=int(body.get("min_tokens") or 0)
    )


def _schema(body: dict[str, Any]) -> Any:
    response_format = body.get("response_format") or {}
    if response_format.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if response_format.get("type") != "json_schema":
        return None
    check_schema(response_format)
    return response_format["json_schema"]["schema"]
