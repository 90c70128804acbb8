"""What comes in at vLLM's doors: JSON, messages, tools and lengths, and the job that a request asks for. Pure."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model, Options
from gateway.simulate.text import GenerationLimits, Prompt, count_tokens
from gateway.simulate.vllm.validation import VllmApiError, check_ranges, check_schema, checked, flaw, invalid, refused

CHARACTERS_PER_TOKEN = 26  # vLLM refuses by length alone above this, before it counts tokens
TURN_TOKENS = 4
IMAGE_TOKENS = 4
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


@dataclass(frozen=True, slots=True)
class Job:
    """One request for a completion: a reply to each of `prompts`, or `choices` of them."""

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
    """The JSON object in `body`. Raises ApiError as FastAPI does."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise VllmApiError(
            400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", "Bad Request"
        )
    try:
        found = json.loads(body) if body else None
    except json.JSONDecodeError as exc:
        raise invalid(flaw("json_invalid", f"body.{exc.pos}", "JSON decode error", {}, error=exc.msg)) from exc
    if found is None:
        raise invalid(flaw("missing", "body", "Field required", None))
    if not isinstance(found, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise invalid(flaw("model_attributes_type", "body", message, found))
    return found


def known_model(body: dict[str, Any], options: Options) -> None:
    """Raises ApiError when `body` names a model that is not served; one without a name is for the first."""
    name, names = body.get("model"), [model.name for model in options.served]
    if name and name not in names:
        raise VllmApiError(
            404, f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}.", "NotFoundError", "model"
        )


def chat_job(body: dict[str, Any], model: Model, options: Options) -> Job:
    """The job of a body for `/v1/chat/completions`. Raises ApiError with vLLM's words."""
    body = checked(body)
    known_model(body, options)
    if not body["messages"]:
        raise refused("Cannot apply chat template to an empty conversation. Provide at least one message.")
    tools, forced, strict = _tools(body, options.tool_parser)
    turns, images = _messages(body, model)
    tokens = _check_context(turns, images, model, count_tokens(json.dumps(tools)) if tools else 0)
    check_ranges(body, model.context_length)
    stream_options = body.get("stream_options") or {}
    thinks, leaks = _thoughts(body, model, options)
    prompt = Prompt(
        turns, images, tools, _schema(body), forced, thinks, leaks, forced_strictly=strict or not options.loose_calls
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


def _thoughts(body: dict[str, Any], model: Model, options: Options) -> tuple[bool, bool]:
    """Whether the model thinks, and whether it does without a parser that tells it apart. What its template is told decides, else the effort."""
    told = (body.get("chat_template_kwargs") or {}).get("enable_thinking")
    effort = body.get("reasoning_effort")
    wanted = told is not False if told is not None else effort != "none"
    return options.reasoning_parser and wanted, (
        model.thinking or model.leaks
    ) and not options.reasoning_parser and wanted


def completion_job(body: dict[str, Any], model: Model, options: Options) -> Job:
    """The job of a body for `/v1/completions`: a text, several, or token ids."""
    logprobs = body.get("logprobs")
    body = {key: value for key, value in body.items() if key != "logprobs"}
    asked = body.pop("prompt", None)
    body = checked({"max_tokens": 16, "messages": [], **body})
    known_model(body, options)
    if body.get("suffix"):
        raise VllmApiError(400, "suffix is only supported for models with FIM completion rendering", param="suffix")
    if not asked and not isinstance(asked, int):
        raise refused("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    prompts = _prompts(asked)
    tokens = sum(_check_context(prompt.turns, 0, model, 0) for prompt in prompts)
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


def _prompts(asked: Any) -> tuple[Prompt, ...]:
    if not isinstance(asked, (str, list)):
        no_list = flaw("list_type", "body.prompt", "Input should be a valid list", asked)
        no_string = flaw("string_type", "body.prompt", "Input should be a valid string", asked)
        raise invalid(no_list, no_list, no_string, no_list)
    texts = [asked] if isinstance(asked, str) or all(isinstance(item, int) for item in asked) else asked
    return tuple(Prompt((("user", text if isinstance(text, str) else " ".join(map(str, text))),)) for text in texts)


def _tools(body: dict[str, Any], tool_parser: bool) -> tuple[tuple[dict[str, Any], ...], str | None, bool]:
    """The tools that the model sees, the name of the one that it must call, and whether its arguments must be as its schema says."""
    tools = tuple(body.get("tools") or ())
    choice = body.get("tool_choice", "auto") if tools else None
    if choice in (None, "none"):
        return (), None, False
    if choice == "auto":
        if not tool_parser:
            raise refused('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        return tools, None, False
    name = str(choice["function"]["name"]) if isinstance(choice, dict) else str(tools[0]["function"]["name"])
    if not tool_parser:
        asked = f'tool_choice=function "{name}"' if isinstance(choice, dict) else 'tool_choice="required"'
        raise refused(f"{asked} requires --tool-call-parser to be set")
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
    """The text of a content part, None when it is a picture. Raises ApiError for what is neither; the real one then lists all kinds of parts."""
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if part.get("type") == "image_url" and "image_url" in part:
            return None
        if part.get("type") == "input_audio":
            raise refused("At most 0 audio(s) may be provided in one prompt.", "audio")
    message = (
        "Field required [type=missing"
        if isinstance(part, dict)
        else "Input should be a valid dictionary [type=dict_type"
    )
    raise refused(f"1 validation error for ValidatorIterator\n0.ChatCompletionContentPartTextParam\n  {message}]")


def _check_image(part: dict[str, Any], model: Model) -> None:
    source = part["image_url"]
    if not isinstance(source, dict):
        message = "Input should be a valid dictionary [type=dict_type]"
        raise refused(f"1 validation error for ChatCompletionContentPartImageParam\nimage_url\n  {message}")
    if not model.vision:
        raise refused(f"{model.name} is not a multimodal model")
    url = str(source.get("url", ""))
    if not url:
        raise refused("multi_modal_data['image'][0] is empty but multi_modal_uuids['image'][0] is missing.")
    scheme, _, rest = url.partition(":")
    match scheme.lower():
        case "http" | "https":  # the stand-in fetches nothing: as if nobody were there
            host, _, port = rest.removeprefix("//").partition("/")[0].partition(":")
            shown = port or ("443" if scheme == "https" else "80")
            message = f"Cannot connect to host {host}:{shown} ssl:default [Connect call failed ('{host}', {shown})]"
            raise VllmApiError(500, message, "InternalServerError")
        case "file":
            raise VllmApiError(
                500, "Cannot load local files without `--allowed-local-media-path`.", "InternalServerError"
            )
        case "data":
            _check_picture(rest)
        case _:
            raise refused("The URL must be either a HTTP, data or file URL.")


def _check_picture(rest: str) -> None:
    head, _, text = rest.partition(",")
    if not head.endswith(";base64"):
        raise VllmApiError(501, "Only base64 data URLs are supported for now.", "NotImplementedError")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise refused("Non-base64 digit found") from exc
    if not data.startswith(_MAGIC):
        raise refused("Failed to load image: cannot identify image file <_io.BytesIO object>")


def _check_context(turns: tuple[tuple[str, str], ...], images: int, model: Model, more: int) -> int:
    """The tokens of the prompt. Raises ApiError when they leave no room for an answer."""
    length = sum(len(text) for _, text in turns) + 50 * len(turns)
    most = CHARACTERS_PER_TOKEN * model.context_length
    start = f"This model's maximum context length is {model.context_length} tokens. However, your prompt contains "
    if length > most:
        message = f"{length} characters (more than {most} characters, which is the upper bound for {model.context_length} input tokens). "
        raise refused(start + message + "Please reduce the length of the input prompt.", "input_text", value=length)
    tokens = sum(count_tokens(text) + TURN_TOKENS for _, text in turns) + images * IMAGE_TOKENS + more
    if tokens >= model.context_length:
        message = f"at least {tokens} input tokens, which exceeds this limit even without any output tokens. "
        raise refused(start + message + "Please reduce the length of the input prompt.", "input_tokens", value=tokens)
    return tokens


def _limits(body: dict[str, Any], model: Model, prompt_tokens: int) -> GenerationLimits:
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    room = model.context_length - prompt_tokens
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return GenerationLimits(min(asked or room, room), stops, ignore_end=bool(body.get("ignore_eos")))


def _schema(body: dict[str, Any]) -> Any:
    asked = body.get("response_format") or {}
    if asked.get("type") == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if asked.get("type") != "json_schema":
        return None
    check_schema(asked)
    return asked["json_schema"]["schema"]
