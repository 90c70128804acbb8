"""The dialect as a table: what a client may send, and what it gets, whichever engine serves. `python -m tests.e2e.dialect` prints it for the docs."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
from PIL import Image

USER = {"role": "user", "content": "Say hello."}


def picture(form: str = "PNG", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> str:
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
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Seoul"}'}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def pictured(url: str) -> list[dict[str, Any]]:
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
    """One request. `status`, `code` and `param` are what every engine's client gets; `calls` whether the answer has tool calls, None: as the
    model likes. Without `same_shape` the engines tell more or less of it. Where `finish` is None the model's own words decide how it ends."""

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
    """Plain and streamed."""
    return [Case(name, fields, **rest), Case(f"{name}, streamed", {**fields, "stream": True}, **rest)]


_INVALID, _UNSUPPORTED, _IMAGE = "invalid_value", "unsupported_parameter", "invalid_image"
_FORCED: dict[str, Any] = {"max_tokens": 120, "temperature": 1, "seed": 3}

CASES: list[Case] = [
    *_both("plain", {}),
    Case("stream with usage", {"stream": True, "stream_options": {"include_usage": True}}),
    Case("stream_options without stream", {"stream_options": {"include_usage": True}}, note="ignored"),
    Case("max_completion_tokens", {"max_completion_tokens": 5, "max_tokens": 50}, finish="length", note="wins over `max_tokens`"),
    Case("max_tokens beyond the context", {"max_tokens": 9_000_000, "stop": ["a", "e", "o", " "]}, note="the rest of the context"),
    *_both("logprobs with alternatives", {"logprobs": True, "top_logprobs": 2}),
    Case("logprobs alone", {"logprobs": True}, note="`top_logprobs` is an empty list"),
    Case("sampling", {"temperature": 2, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -1, "seed": 1}),
    Case("sampling of the engines", {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}, note="not OpenAI's; both engines have them"),
    Case("top_p 0", {"top_p": 0}, note="vLLM itself refuses it: sent as 0.000001"),
    Case("negative seed", {"seed": -5}),
    Case("stop, a string", {"stop": "zzzz"}),
    Case("stop, four strings", {"stop": ["zzzz", "yyyy", "xxxx", "wwww"]}),
    Case("logit_bias", {"logit_bias": {"5": 1}}, note="checked and ignored: Ollama has nothing like it"),
    Case("n 1", {"n": 1}),
    Case("fields of OpenAI without a meaning here", {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}, note="ignored"),
    Case("fields of Ollama", {"keep_alive": -1, "options": {"num_ctx": 9}, "format": "json"}, note="ignored"),
    Case("unknown fields", {"prompt_logprobs": 1, "_debug_render_only": True, "priority": 1}, note="never reach a backend"),
    Case("role developer", {"messages": [{"role": "developer", "content": "Be short."}, USER]}, note="becomes `system`"),
    Case("text parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
    Case("names of persons", {"messages": [{**USER, "name": "Kim"}]}, note="dropped"),
    Case("the assistant last", {"messages": [USER, {"role": "assistant", "content": "Hi"}]}, note="vLLM begins a new turn, Ollama goes on with it"),
    Case("thoughts of an earlier turn", {"messages": [USER, {"role": "assistant", "content": "Hi", "reasoning": "hm"}, USER]}),
    # Tools
    *_both("a forced function", {"tools": [WEATHER, TIME], "tool_choice": NAMED, **_FORCED}, calls=True),
    *_both("some function forced", {"tools": [WEATHER, TIME], "tool_choice": "required", **_FORCED}, calls=True),
    *_both("the only function forced", {"tools": [WEATHER], "tool_choice": "required", **_FORCED}, calls=True),
    *_both("a forced call cut off", {"tools": [WEATHER], "tool_choice": NAMED, "max_tokens": 2}, finish="length", calls=True,
        same_shape=False, note="as much of it as the engine tells"),
    *_both("free tools", {"tools": [WEATHER]}, calls=None, same_shape=False),
    Case("one call at a time", {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False, **_FORCED}, calls=True),
    Case("tools not to be used", {"tools": [WEATHER], "tool_choice": "none"}),
    Case("no tools", {"tools": []}, note="as if it were not there"),
    Case("a tool's answer", {"messages": called("sunny"), "tools": [WEATHER]}, calls=None, same_shape=False),
    Case("a tool's answer in parts", {"messages": called([{"type": "text", "text": "sunny"}])}),
    *[
        Case(f"an earlier call {how}", {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}]}, USER]})
        for how, name, arguments in (("that was cut off", "f", '{"city":'), ("without arguments", "f", ""), ("of an odd name", "get weather!", "{}"))
    ],
    Case("a user's turn with tool calls", {"messages": [{**USER, "tool_calls": [{"id": "a", "type": "function", "function": {
        "name": "f", "arguments": "{bad"}}]}]}, note="the calls are ignored"),
    Case("marks of an image in words", {"messages": [{"role": "user", "content": "What is [img-0]?"}]}, note="Ollama would take it for an image"),
    *_both("a forced function without parameters", {"tools": [{"type": "function", "function": {"name": "refresh"}}],
        "tool_choice": "required", **_FORCED}, calls=True),
    Case("a tool without parameters", {"tools": [{"type": "function", "function": {"name": "now"}}]}, calls=None, same_shape=False),
    # Structured output
    *_both("a schema", {"response_format": formatted(SCHEMA), "max_tokens": 60, "temperature": 1, "seed": 3}),
    Case("JSON", {"response_format": {"type": "json_object"}}),
    Case("text", {"response_format": {"type": "text"}}),
    # Thinking
    *[Case(f"reasoning_effort {effort}", {"reasoning_effort": effort}) for effort in ("none", "minimal", "low", "medium", "high", "xhigh")],
    Case("reasoning.effort", {"reasoning": {"effort": "low"}}, note="the form of the Responses API"),
    Case("think false", {"think": False}, note="Ollama's word"),
    Case("think true", {"think": True}, note="dropped where the model cannot"),
    Case("enable_thinking false", {"chat_template_kwargs": {"enable_thinking": False}}, note="vLLM's word"),
    # Images
    *_both("an image", {"messages": pictured(picture())}),
    *[Case(f"an image, {form}", {"messages": pictured(picture(form))}) for form in ("JPEG", "WEBP", "GIF")],
    *[Case(f"a png of mode {mode}", {"messages": pictured(picture("PNG", mode=mode))}) for mode in ("L", "P", "RGBA", "I;16")],
    Case("an image of one pixel", {"messages": pictured(picture(size=(1, 1)))}, note="enlarged: Ollama 0.24's runner dies of it"),
    Case("an image of 2000 × 4", {"messages": pictured(picture(size=(2000, 4)))}, note="padded: vLLM refuses it"),
    Case("an image's detail", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture(), "detail": "low"}}]}]}),
    # Refused
    Case("unknown model", {"model": "gpt-none"}, 404, "model_not_found", "model"),
    refused("no model", {"model": None}, _INVALID, "model"),
    refused("temperature 9", {"temperature": 9}, _INVALID, "temperature"),
    refused("temperature -1", {"temperature": -1}, _INVALID, "temperature"),
    refused("temperature, a string", {"temperature": "hot"}, _INVALID, "temperature"),
    refused("top_p 2", {"top_p": 2}, _INVALID, "top_p"),
    refused("presence_penalty 3", {"presence_penalty": 3}, _INVALID, "presence_penalty"),
    refused("frequency_penalty -3", {"frequency_penalty": -3}, _INVALID, "frequency_penalty"),
    refused("max_tokens 0", {"max_tokens": 0}, _INVALID, "max_tokens"),
    refused("max_tokens -1", {"max_tokens": -1}, _INVALID, "max_tokens"),
    refused("max_tokens, a string", {"max_tokens": "8"}, _INVALID, "max_tokens"),
    refused("max_tokens 10¹²", {"max_tokens": 10**12}, _INVALID, "max_tokens"),
    refused("n 0", {"n": 0}, _INVALID, "n"),
    refused("n 2", {"n": 2}, _UNSUPPORTED, "n", "Ollama has one answer only"),
    refused("n 1000000", {"n": 1_000_000}, _INVALID, "n"),
    refused("top_logprobs 21", {"logprobs": True, "top_logprobs": 21}, _INVALID, "top_logprobs"),
    refused("top_logprobs without logprobs", {"top_logprobs": 2}, _INVALID, "top_logprobs"),
    refused("stop, five strings", {"stop": ["a", "b", "c", "d", "e"]}, _INVALID, "stop"),
    refused("stop, empty", {"stop": ""}, _INVALID, "stop"),
    refused("stop, a number", {"stop": 5}, _INVALID, "stop"),
    refused("seed, a string", {"seed": "x"}, _INVALID, "seed"),
    refused("stream, a string", {"stream": "yes"}, _INVALID, "stream"),
    refused("logit_bias out of range", {"logit_bias": {"5": 200}}, _INVALID, "logit_bias[...]"),
    refused("no messages", {"messages": []}, _INVALID, "messages"),
    refused("messages, a string", {"messages": "hello"}, _INVALID, "messages"),
    refused("a turn without content", {"messages": [{"role": "user"}]}, _INVALID, "messages[0].content"),
    refused("an unknown role", {"messages": [{"role": "robot", "content": "x"}]}, _INVALID, "messages[0].role"),
    refused("role function", {"messages": [{"role": "function", "name": "f", "content": "x"}]}, _INVALID, "messages[0].role", "older than tools"),
    refused("content, a number", {"messages": [{"role": "user", "content": 5}]}, _INVALID, "messages[0].content"),
    refused("audio part", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, _UNSUPPORTED, "messages[0].content[0].type"),
    refused("audio answer", {"modalities": ["text", "audio"]}, _UNSUPPORTED, "modalities"),
    refused("functions", {"functions": [{"name": "f"}]}, _UNSUPPORTED, "functions", "the form before tools"),
    refused("a tool choice without tools", {"tool_choice": "required"}, _INVALID, "tool_choice"),
    refused("an unknown function chosen", {"tools": [TIME], "tool_choice": NAMED}, _INVALID, "tool_choice"),
    refused("an unknown tool choice", {"tools": [TIME], "tool_choice": "any"}, _INVALID, "tool_choice"),
    refused("an unknown kind of tool", {"tools": [{"type": "custom"}]}, _UNSUPPORTED, "tools[0].type"),
    refused("a tool's name with blanks", {"tools": [function("a b", "c", "d")]}, _INVALID, "tools[0].function.name"),
    refused("129 tools", {"tools": [function(f"f{number}", "c", "d") for number in range(129)]}, _INVALID, "tools"),
    refused("a tool's answer without the call's id", {"messages": [USER, {"role": "tool", "content": "x"}]}, _INVALID, "messages[1].tool_call_id"),
    refused("an unknown response format", {"response_format": {"type": "xml"}}, _UNSUPPORTED, "response_format.type"),
    refused("a format without its schema", {"response_format": {"type": "json_schema"}}, _INVALID, "response_format.json_schema"),
    refused("a schema that is none", {"response_format": formatted({"type": "strng"})}, _INVALID, "response_format.json_schema.schema"),
    refused("a schema elsewhere", {"response_format": formatted({"$ref": "http://127.0.0.1/x"})}, _INVALID, "response_format.json_schema.schema"),
    refused("an unknown effort", {"reasoning_effort": "silly"}, _INVALID, "reasoning_effort"),
    refused("an image by address", {"messages": pictured("http://127.0.0.1/a.png")}, "invalid_image_url", "messages[0].content[1].image_url.url"),
    refused("an image from a file", {"messages": pictured("file:///a.png")}, "invalid_image_url", "messages[0].content[1].image_url.url"),
    refused("an image in a system turn", {"messages": [{**pictured(picture())[0], "role": "system"}, USER]}, _UNSUPPORTED,
        "messages[0].content[1].type"),
    refused("bytes that are no image", {"messages": pictured("data:image/png;base64,aGVsbG8=")}, _IMAGE, "messages[0].content[1].image_url.url"),
    refused("an image that is not base64", {"messages": pictured("data:image/png;base64,!!!!")}, _IMAGE, "messages[0].content[1].image_url.url"),
    refused("half an image", {"messages": pictured(picture()[:120])}, _IMAGE, "messages[0].content[1].image_url.url"),
    refused("a prompt too long", {"messages": [{"role": "user", "content": "hello " * 60_000}]}, "context_length_exceeded", "messages"),
    refused("a prompt too long, streamed", {"messages": [{"role": "user", "content": "hello " * 60_000}], "stream": True},
        "context_length_exceeded", "messages"),
    refused("a hopeless prompt", {"messages": [{"role": "user", "content": " " * 900_000}]}, "context_length_exceeded", "messages",
        "refused without asking the backend"),
]  # fmt: skip


@dataclass
class View:
    """What a client sees of an answer, without what is the model's own: its words, its numbers."""

    status: int
    error: dict[str, Any] | None = None
    keys: Any = None
    """Names and types of a plain answer's fields."""
    events: list[Any] = field(default_factory=list)
    """Names and types of a stream's chunks in their order, equal neighbours as one."""
    finish: str | None = None
    has_calls: bool = False
    counts_agree: bool = True
    """prompt and completion make the total."""


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
    return View(200, keys=_types(body), finish=choice["finish_reason"], has_calls=bool(choice["message"].get("tool_calls")),
                counts_agree=_agrees(body["usage"]))  # fmt: skip


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
    """The cases as Markdown."""
    lines = ["| request | answer | |", "|---|---|---|"]
    for case in CASES:
        answer = str(case.status) if case.status == 200 else f"{case.status} `{case.code}`, `{case.param}`"
        lines.append(f"| {case.name} | {answer} | {case.note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
