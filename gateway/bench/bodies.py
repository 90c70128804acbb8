"""Bodies of requests in OpenAI's and in Ollama's API. Pure."""

import base64
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.bench.target import Api, BenchImage, BenchRequest

_OLLAMA_OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repeat_penalty",
}
"""Sampling parameters that Ollama's API has, by their name in vLLM's."""

OLLAMA_LACKS = ("ignore_eos",)


def render(request: BenchRequest, model: str, api: Api, path: str) -> bytes:
    """Return the JSON body of `request` for the endpoint at `path`."""
    name = request.model or model
    if api == "ollama":
        return orjson.dumps(_ollama(request, name, is_chat=not path.endswith("/generate")))
    is_chat = path.endswith("/chat/completions")
    return orjson.dumps(_openai_chat(request, name) if is_chat else _openai_completion(request, name))


def _openai_chat(request: BenchRequest, model: str) -> dict[str, Any]:
    messages: list[Mapping[str, Any]] = list(request.messages)
    if request.images:
        parts = [{"type": "text", "text": messages[-1]["content"]}, *map(_image_part, request.images)]
        messages[-1] = {**messages[-1], "content": parts}
    return _openai_fields(request, {"model": model, "messages": messages})


def _openai_completion(request: BenchRequest, model: str) -> dict[str, Any]:
    return _openai_fields(request, {"model": model, "prompt": request.messages[-1]["content"]})


def _openai_fields(request: BenchRequest, body: dict[str, Any]) -> dict[str, Any]:
    body["stream"] = request.stream
    if request.stream:
        body["stream_options"] = {"include_usage": True}
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens  # Ollama's /v1 ignores max_completion_tokens
    return {**body, **request.parameters}


def _ollama(request: BenchRequest, model: str, *, is_chat: bool) -> dict[str, Any]:
    options: dict[str, Any] = {} if request.max_tokens is None else {"num_predict": request.max_tokens}
    top: dict[str, Any] = {}
    for key, value in request.parameters.items():
        if key in _OLLAMA_OPTIONS:
            options[_OLLAMA_OPTIONS[key]] = value
        elif key == "options" and isinstance(value, Mapping):
            options |= value
        elif key not in OLLAMA_LACKS:
            top[key] = value
    body: dict[str, Any] = {"model": model, "stream": request.stream}
    images = [_base64(image) for image in request.images]
    if is_chat:
        messages: list[Mapping[str, Any]] = list(request.messages)
        if images:
            messages[-1] = {**messages[-1], "images": images}
        body["messages"] = messages
    else:
        body["prompt"] = request.messages[-1]["content"]
        if images:
            body["images"] = images
    if options:
        body["options"] = options
    return {**body, **top}


def _image_part(image: BenchImage) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{image.media_type};base64,{_base64(image)}"}}


def _base64(image: BenchImage) -> str:
    return base64.b64encode(image.data).decode()
