"""Table of requests and responses that are the same on every engine.

`python -m tests.e2e.dialect` prints it for docs/dialect.md.
"""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
from PIL import Image

USER = {"role": "user", "content": "Say hello."}


def image_url(form: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, size, 120 if mode in ("L", "P", "I;16") else (200, 30, 30, 128)[: len(mode)]).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def function(name: str, field_name: str, *values: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {field_name: {"type": "string", "enum": list(values)}},
        "required": [field_name],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"{name} of a place", "parameters": schema}}


WEATHER, TIME = function("get_weather", "city", "Seoul", "Busan"), function("get_time", "zone", "KST", "UTC")


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Seoul"}'}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def odd(property: Any, **siblings: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": property}, **siblings}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def image_message(url: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}],
        }
    ]


def called(content: Any) -> list[dict[str, Any]]:
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": content},
    ]


@dataclass(frozen=True)
class Case:
    """One request and the response that every engine's client gets.

    Attributes:
        calls: whether the answer has tool calls; None if the model decides.
        finish: the finish reason; None if the model's text decides.
        same_shape: whether fields and chunks are the same on every engine.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    code: str | None = None
    param: str | None = None
    finish: str | None = None
    calls: bool | None = False
    same_shape: bool = True
    note: str = ""

    @property
    def stream(self) -> bool:
        return self.fields.get("stream") is True

    def body(self, model: str) -> dict[str, Any]:
        return {"model": model, "messages": [USER], "max_tokens": 8, "temperature": 0, **self.fields}


def refused(name: str, fields: dict[str, Any], code: str, param: str | None, note: str = "") -> Case:
    return Case(name, fields, 400, code, param, note=note)


def _both(name: str, fields: dict[str, Any], **rest: Any) -> list[Case]:
    """Return the case as a plain request and as a stream."""
    return [Case(name, fields, **rest), Case(f"{name}, streamed", {**fields, "stream": True}, **rest)]


_INVALID, _UNSUPPORTED, _IMAGE = "invalid_value", "unsupported_parameter", "invalid_image"
_FORCED: dict[str, Any] = {"max_tokens": 120, "temperature": 1, "seed": 3}

CASES: list[Case] = [
    *_both("plain", {}),
    Case("stream with usage", {"stream": True, "stream_options": {"include_usage": True}}),
    Case("stream_options without stream", {"stream_options": {"include_usage": True}}, note="ignored"),
    Case(
        "max_completion_tokens",
        {"max_completion_tokens": 5, "max_tokens": 50},
        finish="length",
        note="takes precedence over `max_tokens`",
    ),
    Case(
        "max_tokens beyond the context",
        {"max_tokens": 9_000_000, "stop": ["a", "e", "o", " "]},
        note="the rest of the context",
    ),
    *_both("logprobs with alternatives", {"logprobs": True, "top_logprobs": 2}),
    Case("logprobs without top_logprobs", {"logprobs": True}, note="`top_logprobs` is an empty list"),
    Case(
        "sampling parameters",
        {"temperature": 2, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -1, "seed": 1},
    ),
    Case(
        "sampling parameters of the engines",
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
        note="not in OpenAI's API; both engines have them",
    ),
    Case("top_p 0", {"top_p": 0}, note="sent as 0.000001: vLLM refuses 0"),
    Case("negative seed", {"seed": -5}),
    Case("stop as a string", {"stop": "zzzz"}),
    Case("stop with four strings", {"stop": ["zzzz", "yyyy", "xxxx", "wwww"]}),
    Case("logit_bias", {"logit_bias": {"5": 1}}, note="validated, then ignored: Ollama has no equivalent"),
    Case("n 1", {"n": 1}),
    Case("n 2", {"n": 2, "temperature": 1}, note="each choice is a request to the engine"),
    Case("n 2, streamed", {"n": 2, "temperature": 1, "stream": True}, same_shape=False, note="interleaved"),
    Case(
        "OpenAI fields without effect here",
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        note="ignored",
    ),
    Case("Ollama fields", {"keep_alive": -1, "options": {"num_ctx": 9}, "format": "json"}, note="ignored"),
    Case(
        "unknown fields",
        {"prompt_logprobs": 1, "_debug_render_only": True, "priority": 1},
        note="never sent to a backend",
    ),
    Case(
        "role developer", {"messages": [{"role": "developer", "content": "Be short."}, USER]}, note="sent as `system`"
    ),
    *[
        Case(f"roles {', '.join(roles)}", {"messages": [{**USER, "role": role} for role in roles]}, note=note)
        for roles, note in (
            (("system", "system", "user"), "joined"),
            (("user", "assistant", "system", "user"), "the system's in front"),
            (("developer", "user", "user"), "user and user are joined if the template wants turns"),
            (("user", "assistant", "assistant", "user"), "likewise"),
        )
    ],
    Case(
        "content in text parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    ),
    Case("message with a name", {"messages": [{**USER, "name": "Kim"}]}, note="dropped"),
    Case(
        "last message from the assistant",
        {"messages": [USER, {"role": "assistant", "content": "Hi"}]},
        note="vLLM begins a new turn, Ollama continues the message",
    ),
    Case(
        "continue_final_message",
        {
            "messages": [USER, {"role": "assistant", "content": "Hi"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        note="the answer is the continuation alone",
    ),
    Case("min_tokens and ignore_eos", {"min_tokens": 2, "ignore_eos": True}, note="vLLM follows, Ollama ignores"),
    Case(
        "mm_processor_kwargs",
        {"messages": image_message(image_url()), "mm_processor_kwargs": {}},  # a vLLM may refuse any option
        note="vLLM follows, Ollama ignores",
    ),
    Case(
        "reasoning in an earlier message",
        {"messages": [USER, {"role": "assistant", "content": "Hi", "reasoning": "hm"}, USER]},
    ),
    *[
        Case(
            f"assistant message with content null and {what}",
            {"messages": [USER, {"role": "assistant", "content": None, **fields}, USER]},
            note="the empty text",
        )
        for what, fields in (("reasoning", {"reasoning": "hm"}), ("no tool calls", {"tool_calls": []}))
    ],
    Case("max_tokens 8.0", {"max_tokens": 8.0}),
    # Tools
    *_both("tool_choice with a function name", {"tools": [WEATHER, TIME], "tool_choice": NAMED, **_FORCED}, calls=True),
    *_both(
        "tool_choice required, two tools", {"tools": [WEATHER, TIME], "tool_choice": "required", **_FORCED}, calls=True
    ),
    *_both("tool_choice required, one tool", {"tools": [WEATHER], "tool_choice": "required", **_FORCED}, calls=True),
    *_both(
        "forced tool call cut off by max_tokens",
        {"tools": [WEATHER], "tool_choice": NAMED, "max_tokens": 2},
        finish="length",
        calls=True,
        same_shape=False,
        note="as much of the call as the engine returns",
    ),
    *_both(
        "tool_choice of type allowed_tools",
        {"tools": [WEATHER, TIME], "tool_choice": allowed("required", "get_weather"), **_FORCED},
        calls=True,
        note="the model is offered only these tools",
    ),
    Case(
        "tool_choice of type allowed_tools, without any",
        {"tools": [WEATHER, TIME], "tool_choice": allowed("auto")},
        note="as `none`",
    ),
    *_both(
        "tool with a Korean name",
        {
            "tools": [function("날씨_조회", "city", "Seoul")],
            "tool_choice": {"type": "function", "function": {"name": "날씨_조회"}},
            **_FORCED,
        },
        calls=True,
        note="the engine gets it in ASCII letters",
    ),
    *_both("tools without tool_choice", {"tools": [WEATHER]}, calls=None, same_shape=False),
    Case(
        "parallel_tool_calls false",
        {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False, **_FORCED},
        calls=True,
    ),
    Case("tool_choice none", {"tools": [WEATHER], "tool_choice": "none"}),
    Case("empty tools list", {"tools": []}, note="treated as absent"),
    Case("tool result", {"messages": called("sunny"), "tools": [WEATHER]}, calls=None, same_shape=False),
    Case("tool result with content null", {"messages": called(None)}, note="the empty text"),
    Case("tool result in text parts", {"messages": called([{"type": "text", "text": "sunny"}])}),
    *[
        Case(
            f"earlier tool call {how}",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}
                        ],
                    },
                    USER,
                ]
            },
        )
        for how, name, arguments in (
            ("with truncated arguments", "f", '{"city":'),
            ("without arguments", "f", ""),
            ("with arguments null", "f", None),
            ("with an invalid name", "get weather!", "{}"),
        )
    ],
    Case(
        "user message with tool calls",
        {
            "messages": [
                {
                    **USER,
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{bad"}}],
                }
            ]
        },
        note="the calls are ignored",
    ),
    Case(
        "image placeholder in text",
        {"messages": [{"role": "user", "content": "What is [img-0]?"}]},
        note="escaped: Ollama would take it for an image",
    ),
    *_both(
        "forced function without parameters",
        {"tools": [{"type": "function", "function": {"name": "refresh"}}], "tool_choice": "required", **_FORCED},
        calls=True,
    ),
    Case(
        "tool without parameters",
        {"tools": [{"type": "function", "function": {"name": "now"}}]},
        calls=None,
        same_shape=False,
    ),
    *[
        Case(
            f"one of two tools with {what}",
            {"tools": [WEATHER, {"type": "function", "function": {"name": "odd", "parameters": schema}}]},
            calls=None,
            same_shape=False,
            note=note,
        )
        for what, schema, note in (
            ("a draft-4 schema", odd({"type": "integer", "minimum": 0, "exclusiveMinimum": True}), "mended"),
            ("keywords that are null", odd({"enum": None, "description": None}, required=None), "removed"),
            ("required: true in a property", odd({"type": "string", "required": True}), "mended"),
            ("type any", odd({"type": "any"}), "removed"),
            ("a $ref to nowhere", odd({"$ref": "#/$defs/nowhere"}), "passed on: no grammar is made of it"),
            ("a property that is no schema", odd("string"), "likewise"),
        )
    ],
    *_both(
        "forced function with a draft-4 schema",
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "odd",
                        "parameters": odd(
                            {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 9, "required": True}
                        ),
                    },
                }
            ],
            "tool_choice": "required",
            "parallel_tool_calls": False,  # a model of random weights may call twice
            **_FORCED,
        },
        calls=True,
    ),
    # Structured output
    *_both(
        "response_format json_schema",
        {"response_format": formatted(SCHEMA), "max_tokens": 60, "temperature": 1, "seed": 3},
    ),
    Case("response_format json_object", {"response_format": {"type": "json_object"}}),
    Case("response_format text", {"response_format": {"type": "text"}}),
    *_both(
        "structured_outputs.json", {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60}, note="as json_schema"
    ),
    *_both("structured_outputs.choice", {"structured_outputs": {"choice": ["yes", "no"]}}, note="the bare word"),
    *_both("structured_outputs.regex", {"structured_outputs": {"regex": "(ab|cd){2}"}}, note="the bare text"),
    Case("guided_choice", {"guided_choice": ["예", "아니요", "no"]}, note="vLLM's older name"),
    Case("guided_regex", {"guided_regex": r"[0-9]{2}"}),
    Case("guided_json as text", {"guided_json": json.dumps(SCHEMA), "max_tokens": 60}),
    Case(
        "options of structured_outputs",
        {"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}},
        note="ignored but for the constraint",
    ),
    # Thinking
    *[
        Case(f"reasoning_effort {effort}", {"reasoning_effort": effort})
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh")
    ],
    Case("reasoning.effort", {"reasoning": {"effort": "low"}}, note="the Responses API's form"),
    Case("think false", {"think": False}, note="Ollama's parameter"),
    Case("think true", {"think": True}, note="dropped if the model cannot think"),
    Case("enable_thinking false", {"chat_template_kwargs": {"enable_thinking": False}}, note="vLLM's parameter"),
    Case("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": False}}, note="DeepSeek's name for it"),
    Case("enable_thinking", {"enable_thinking": False}, note="Qwen's parameter"),
    *[
        Case(f"thinking {kind}", {"thinking": {"type": kind, "budget_tokens": 1024}}, note="Anthropic's parameter")
        for kind in ("disabled", "enabled", "adaptive")
    ],
    Case("reasoning.enabled", {"reasoning": {"enabled": False}}, note="OpenRouter's parameter"),
    Case(
        "other words for the template", {"chat_template_kwargs": {"custom": 1}}, note="ignored: only a tier sets them"
    ),
    # Images
    *_both("image", {"messages": image_message(image_url())}),
    *[Case(f"{form} image", {"messages": image_message(image_url(form))}) for form in ("JPEG", "WEBP", "GIF")],
    *[
        Case(f"PNG image in Pillow mode {mode}", {"messages": image_message(image_url("PNG", mode=mode))})
        for mode in ("L", "P", "RGBA", "I;16")
    ],
    Case(
        "image of 1 × 1 pixel",
        {"messages": image_message(image_url(size=(1, 1)))},
        note="enlarged: it crashes Ollama 0.24's runner",
    ),
    Case(
        "image of 2000 × 4 pixels",
        {"messages": image_message(image_url(size=(2000, 4)))},
        note="stretched: vLLM refuses it",
    ),
    Case(
        "image_url as a string",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image_url()}]}]},
    ),
    Case(
        "image with detail",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image_url(), "detail": "low"}}]}
            ]
        },
    ),
    # Refused
    Case("unknown model", {"model": "gpt-none"}, 404, "model_not_found", "model"),
    refused("missing model", {"model": None}, _INVALID, "model"),
    refused("temperature 9", {"temperature": 9}, _INVALID, "temperature"),
    refused("temperature -1", {"temperature": -1}, _INVALID, "temperature"),
    refused("temperature as a string", {"temperature": "hot"}, _INVALID, "temperature"),
    refused("top_p 2", {"top_p": 2}, _INVALID, "top_p"),
    refused("presence_penalty 3", {"presence_penalty": 3}, _INVALID, "presence_penalty"),
    refused("frequency_penalty -3", {"frequency_penalty": -3}, _INVALID, "frequency_penalty"),
    refused("max_tokens 0", {"max_tokens": 0}, _INVALID, "max_tokens"),
    refused("max_tokens -1", {"max_tokens": -1}, _INVALID, "max_tokens"),
    refused("max_tokens as a string", {"max_tokens": "8"}, _INVALID, "max_tokens"),
    refused("max_tokens 10¹²", {"max_tokens": 10**12}, _INVALID, "max_tokens"),
    refused("n 0", {"n": 0}, _INVALID, "n"),
    refused("n 9", {"n": 9}, _INVALID, "n"),
    refused("n 1000000", {"n": 1_000_000}, _INVALID, "n"),
    refused("top_logprobs 21", {"logprobs": True, "top_logprobs": 21}, _INVALID, "top_logprobs"),
    refused("top_logprobs without logprobs", {"top_logprobs": 2}, _INVALID, "top_logprobs"),
    refused("stop with five strings", {"stop": ["a", "b", "c", "d", "e"]}, _INVALID, "stop"),
    refused("empty stop", {"stop": ""}, _INVALID, "stop"),
    refused("stop as a number", {"stop": 5}, _INVALID, "stop"),
    refused("seed as a string", {"seed": "x"}, _INVALID, "seed"),
    refused("stream as a string", {"stream": "yes"}, _INVALID, "stream"),
    refused("logit_bias out of range", {"logit_bias": {"5": 200}}, _INVALID, "logit_bias[...]"),
    refused("empty messages", {"messages": []}, _INVALID, "messages"),
    refused("messages as a string", {"messages": "hello"}, _INVALID, "messages"),
    refused("message without content", {"messages": [{"role": "user"}]}, _INVALID, "messages[0].content"),
    refused("unknown role", {"messages": [{"role": "robot", "content": "x"}]}, _INVALID, "messages[0].role"),
    refused(
        "role function",
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        _INVALID,
        "messages[0].role",
        "predates tools",
    ),
    refused("content as a number", {"messages": [{"role": "user", "content": 5}]}, _INVALID, "messages[0].content"),
    refused(
        "audio input",
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        _UNSUPPORTED,
        "messages[0].content[0].type",
    ),
    refused("audio output", {"modalities": ["text", "audio"]}, _UNSUPPORTED, "modalities"),
    refused("functions", {"functions": [{"name": "f"}]}, _UNSUPPORTED, "functions", "predates tools"),
    refused("tool_choice without tools", {"tool_choice": "required"}, _INVALID, "tool_choice"),
    refused("tool_choice with an unknown function", {"tools": [TIME], "tool_choice": NAMED}, _INVALID, "tool_choice"),
    refused("unknown tool_choice", {"tools": [TIME], "tool_choice": "any"}, _INVALID, "tool_choice"),
    refused("unknown tool type", {"tools": [{"type": "custom"}]}, _UNSUPPORTED, "tools[0].type"),
    refused(
        "unknown type of tool_choice", {"tools": [TIME], "tool_choice": {"type": "x"}}, _UNSUPPORTED, "tool_choice.type"
    ),
    refused(
        "allowed_tools with an unknown function",
        {"tools": [TIME], "tool_choice": allowed("auto", "get_weather")},
        _INVALID,
        "tool_choice",
    ),
    refused("tool name with a space", {"tools": [function("a b", "c", "d")]}, _INVALID, "tools[0].function.name"),
    refused(
        "forced function with a $ref to nowhere",
        {
            "tools": [
                WEATHER,
                {"type": "function", "function": {"name": "odd", "parameters": odd({"$ref": "#/$defs/nowhere"})}},
            ],
            "tool_choice": "required",
        },
        _INVALID,
        "tools[1].function.parameters",
        "the message names the function and the place",
    ),
    refused("129 tools", {"tools": [function(f"f{number}", "c", "d") for number in range(129)]}, _INVALID, "tools"),
    refused(
        "tool result without tool_call_id",
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        _INVALID,
        "messages[1].tool_call_id",
    ),
    refused("unknown response_format", {"response_format": {"type": "xml"}}, _UNSUPPORTED, "response_format.type"),
    refused(
        "json_schema without a schema",
        {"response_format": {"type": "json_schema"}},
        _INVALID,
        "response_format.json_schema",
    ),
    refused(
        "invalid JSON Schema",
        {"response_format": formatted({"type": "strng"})},
        _INVALID,
        "response_format.json_schema.schema",
    ),
    refused(
        "JSON Schema with a remote $ref",
        {"response_format": formatted({"$ref": "http://127.0.0.1/x"})},
        _INVALID,
        "response_format.json_schema.schema",
    ),
    refused("unknown reasoning_effort", {"reasoning_effort": "silly"}, _INVALID, "reasoning_effort"),
    refused("structured_outputs without a constraint", {"structured_outputs": {}}, _INVALID, "structured_outputs"),
    refused(
        "two constraints",
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}},
        _INVALID,
        "structured_outputs.choice",
    ),
    refused(
        "structural_tag",
        {"structured_outputs": {"structural_tag": "{}"}},
        _UNSUPPORTED,
        "structured_outputs.structural_tag",
    ),
    refused(
        "constraint with a forced tool call",
        {"guided_choice": ["a"], "tools": [TIME], "tool_choice": "required"},
        _INVALID,
        "guided_choice",
    ),
    refused("guided_regex that is too large", {"guided_regex": "((a{99}){99}){99}"}, _INVALID, "guided_regex"),
    refused("unknown thinking.type", {"thinking": {"type": "maybe"}}, _UNSUPPORTED, "thinking.type"),
    refused("min_tokens above max_tokens", {"min_tokens": 9}, _INVALID, "min_tokens"),
    refused(
        "continue_final_message after a user message",
        {"continue_final_message": True},
        _INVALID,
        "continue_final_message",
    ),
    refused(
        "add_generation_prompt false alone",
        {"add_generation_prompt": False},
        _UNSUPPORTED,
        "add_generation_prompt",
        "Ollama cannot leave it out",
    ),
    refused(
        "image by http URL",
        {"messages": image_message("http://127.0.0.1/a.png")},
        "invalid_image_url",
        "messages[0].content[1].image_url.url",
    ),
    refused(
        "image by file URL",
        {"messages": image_message("file:///a.png")},
        "invalid_image_url",
        "messages[0].content[1].image_url.url",
    ),
    refused(
        "image in a system message",
        {"messages": [{**image_message(image_url())[0], "role": "system"}, USER]},
        _UNSUPPORTED,
        "messages[0].content[1].type",
    ),
    refused(
        "image data that is not an image",
        {"messages": image_message("data:image/png;base64,aGVsbG8=")},
        _IMAGE,
        "messages[0].content[1].image_url.url",
    ),
    refused(
        "image data that is not base64",
        {"messages": image_message("data:image/png;base64,!!!!")},
        _IMAGE,
        "messages[0].content[1].image_url.url",
    ),
    refused(
        "truncated image",
        {"messages": image_message(image_url()[:120])},
        _IMAGE,
        "messages[0].content[1].image_url.url",
    ),
    refused(
        "prompt too long",
        {"messages": [{"role": "user", "content": "hello " * 60_000}]},
        "context_length_exceeded",
        "messages",
    ),
    refused(
        "prompt too long, streamed",
        {"messages": [{"role": "user", "content": "hello " * 60_000}], "stream": True},
        "context_length_exceeded",
        "messages",
    ),
    refused(
        "prompt far too long",
        {"messages": [{"role": "user", "content": " " * 900_000}]},
        "context_length_exceeded",
        "messages",
        "refused before a backend is asked",
    ),
]


@dataclass
class View:
    """A response as the client sees it, without the model's text and numbers."""

    status: int
    error: dict[str, Any] | None = None
    keys: Any = None
    """Names and types of the fields of a plain answer."""
    events: list[Any] = field(default_factory=list)
    """Names and types of the fields of a stream's chunks in order; equal neighbours count once."""
    finish: str | None = None
    has_calls: bool = False
    counts_agree: bool = True
    """The tokens of prompt and completion add up to the total."""


def view(answer: httpx2.Response) -> View:
    if answer.status_code != 200:
        error = answer.json()["error"]
        return View(
            answer.status_code, {name: error[name] for name in ("type", "code", "param")} | {"keys": sorted(error)}
        )
    if answer.headers["content-type"].startswith("text/event-stream"):
        return _stream_view(answer.text)
    body = answer.json()
    choice = body["choices"][0]
    return View(
        200,
        keys=_types(body),
        finish=choice["finish_reason"],
        has_calls=bool(choice["message"].get("tool_calls")),
        counts_agree=_agrees(body["usage"]),
    )


def _stream_view(text: str) -> View:
    seen = View(200)
    for chunk in _chunks(text):
        if chunk == "[DONE]":
            seen.events.append(chunk)
            continue
        for choice in chunk.get("choices", []):
            seen.finish = choice["finish_reason"] or seen.finish
            seen.has_calls = seen.has_calls or "tool_calls" in choice["delta"]
        seen.counts_agree = seen.counts_agree and _agrees(chunk.get("usage"))
        types = _types(chunk)
        if not seen.events or seen.events[-1] != types:
            seen.events.append(types)
    return seen


def _chunks(text: str) -> Iterator[Any]:
    for event in text.split("\n\n"):
        if event:
            data = event.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def _agrees(usage: dict[str, int] | None) -> bool:
    return usage is None or usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"] > 0


def _types(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _types(inner, key) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [_types(value[0], name)] if value else []
    return value if name in ("object", "type", "role", "index") else type(value).__name__


def table() -> str:
    """Return the cases as a Markdown table."""
    lines = ["| request | answer | |", "|---|---|---|"]
    for case in CASES:
        answer = str(case.status) if case.status == 200 else f"{case.status} `{case.code}`, `{case.param}`"
        lines.append(f"| {case.name} | {answer} | {case.note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
