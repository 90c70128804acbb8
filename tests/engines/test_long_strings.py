"""Tests of rendering long strings in steps."""

import json
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from gateway.chat.embedding import Embedding
from gateway.chat.message import ImagePart
from gateway.chat.request import Chat
from gateway.dialects.openai_chat_request import decode
from gateway.engines.embeddings import OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import ModelFacts
from gateway.engines.long_strings import MIN_LENGTH, SLICE, Rendering, render_images, render_texts
from gateway.engines.ollama import Ollama
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm
from tests.fakes.chats import request

HEAD = "data:image/png;base64,"
LONG = HEAD + "AbC/" * (3 * SLICE // 4) + "xyz="
MOST_BYTES = 6 * SLICE + 4096
"""Bytes that are rendered in one step: no character of JSON takes more than six."""

T = TypeVar("T")


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def with_images(*messages: list[str]) -> Chat:
    """Return a chat whose user messages have these images and a text before each."""
    return chat(*([part for url in urls for part in ({"type": "text", "text": "?"}, image(url))] for urls in messages))


def chat(*contents: list[dict[str, Any]]) -> Chat:
    body = request(messages=[{"role": "user", "content": content} for content in contents])
    return decode(body, len(body))


def in_steps(steps: Rendering) -> tuple[list[bytes], int]:
    """Return the parts and the number of steps."""
    count = 0
    while True:
        count += 1
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count


def both(engine: OpenAi | Ollama, asked: Chat) -> tuple[bytes, list[bytes], int]:
    def render(short: Chat) -> bytes:
        return engine.render(short, "m", ModelFacts(), True)

    return render(asked), *in_steps(render_images(asked, render))


@pytest.mark.parametrize("engine", [Ollama(), OpenAi(), Vllm()])
@pytest.mark.parametrize(
    "messages",
    [
        [[LONG]],
        [[LONG, HEAD + "AAAA", LONG[:-4]], [HEAD + "BBBB" * MIN_LENGTH], [LONG]],
        [[HEAD + "AAAA"]],
        [[HEAD + "C" * SLICE], [HEAD + "D" * (SLICE + 1)]],
        [['data:,\x00\\"/' + "\uac00\U0001f600\x7f" * SLICE]],
    ],
)
def test_images_in_steps_are_the_bytes_of_one_call(engine: OpenAi | Ollama, messages: list[list[str]]) -> None:
    whole, parts, _ = both(engine, with_images(*messages))
    assert b"".join(parts) == whole


@pytest.mark.parametrize("engine", [Ollama(), Vllm()])
def test_no_step_renders_more_than_a_slice_and_the_rest_of_the_request(engine: OpenAi | Ollama) -> None:
    whole, parts, steps = both(engine, with_images([HEAD + "A" * (20 * SLICE)], [HEAD + "\x01" * (3 * SLICE)]))
    assert b"".join(parts) == whole
    assert max(map(len, parts)) <= MOST_BYTES
    assert steps >= len(parts) >= 20


def test_hundreds_of_small_images_are_few_parts() -> None:
    whole, parts, _ = both(Vllm(), with_images([HEAD + "A" * MIN_LENGTH] * 500))
    assert b"".join(parts) == whole
    assert len(parts) <= 1 + len(whole) // SLICE


def test_text_of_a_client_is_never_taken_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may repeat what it has seen of other requests: every placeholder is new."""
    seen: list[str] = []
    new = secrets.token_hex

    def recorded(size: int) -> str:
        seen.append(new(size))
        return seen[-1]

    monkeypatch.setattr(secrets, "token_hex", recorded)
    both(Vllm(), with_images([LONG]))
    asked = chat([{"type": "text", "text": seen[0]}, image(LONG)])
    whole, parts, _ = both(Vllm(), asked)
    assert b"".join(parts) == whole
    assert len(set(seen)) == 2
    assert min(map(len, seen)) == 32


def test_chat_itself_keeps_its_images() -> None:
    asked = with_images([LONG])
    both(Ollama(), asked)
    content = asked.messages[0].content
    assert isinstance(content, list)
    assert [part.url for part in content if isinstance(part, ImagePart)] == [LONG]


@pytest.mark.parametrize("embedder", [OllamaEmbedder("5m", 8, True), OpenAiEmbedder()])
@pytest.mark.parametrize(
    "texts",
    ["a", ["a"], "\n\uac00" * SLICE, ["\x01" * SLICE, "", 'b"\\'] * 3, [f"text {number}" for number in range(2048)]],
)
def test_texts_in_steps_are_the_bytes_of_one_call(
    embedder: OllamaEmbedder | OpenAiEmbedder, texts: str | list[str]
) -> None:
    asked = Embedding(model="m", input=texts, dimensions=8)
    render: Callable[[Embedding], bytes] = lambda short: embedder.render(short, "m")  # noqa: E731
    parts, steps = in_steps(render_texts(asked, render))
    assert b"".join(parts) == render(asked)
    assert json.loads(b"".join(parts))["input"] == asked.texts
    assert max(map(len, parts)) <= MOST_BYTES
    assert steps >= len(parts)
