"""Rendering of requests with long strings in steps, as parts that are sent one after the other. Pure.

Images of 20 MiB take 30 ms to render, during which the event loop does nothing else. So an engine
renders the request with a short placeholder for each long string, and the strings follow in slices.
The parts are never joined: that would be one more copy of the body.
"""

import secrets
from collections.abc import Callable, Generator, Sequence
from itertools import repeat
from typing import NamedTuple

import msgspec

from gateway.chat.embedding import Embedding
from gateway.chat.message import ImagePart, ImageUrl, Message
from gateway.chat.request import Chat

MIN_LENGTH = 16 * 1024
"""Minimum length of an image that is rendered apart, in characters."""
SLICE = 256 * 1024
"""Number of characters that are rendered in one step. Control characters, the slowest, take 2 ms."""

Parts = list[bytes]
"""Request body: its parts, in their order."""
Rendering = Generator[None, None, Parts]
"""Work in steps of a few milliseconds, between which other requests get a turn."""


class LongString(NamedTuple):
    """The part of a string that the placeholder stands for: all from `start`."""

    text: str
    start: int


def render_images(chat: Chat, render: Callable[[Chat], bytes]) -> Rendering:
    """Render `chat` with its images in steps, to the same bytes as `render` alone.

    `render` returns the body for a chat: it may drop the heads of `data:` URLs, but it keeps their
    order and all that follows the comma.
    """
    strings: list[LongString] = []
    placeholder = _placeholder()
    messages = [_shortened(message, placeholder, strings) for message in chat.messages]
    rendered = render(msgspec.structs.replace(chat, messages=messages) if strings else chat)
    yield
    return (yield from _filled(rendered, placeholder, strings))


def render_texts(embedding: Embedding, render: Callable[[Embedding], bytes]) -> Rendering:
    """Render `embedding` with its texts in steps, to the same bytes as `render` alone."""
    placeholder = _placeholder()
    texts = embedding.texts
    short = placeholder if isinstance(embedding.input, str) else [*repeat(placeholder, len(texts))]
    rendered = render(msgspec.structs.replace(embedding, input=short))
    yield
    return (yield from _filled(rendered, placeholder, [LongString(text, 0) for text in texts]))


def _placeholder() -> str:
    """Return a placeholder that no client can have written into its texts, because it is random."""
    return secrets.token_hex(16)


def _shortened(message: Message, placeholder: str, strings: list[LongString]) -> Message:
    """Return `message` with placeholders for its long images, which are added to `strings`."""
    if not isinstance(message.content, list):
        return message
    parts = list(message.content)
    for position, part in enumerate(parts):
        if isinstance(part, ImagePart) and len(part.url) >= MIN_LENGTH:
            url = part.url
            start = url.index(",") + 1
            parts[position] = ImagePart(ImageUrl(url[:start] + placeholder))
            strings.append(LongString(url, start))
    return msgspec.structs.replace(message, content=parts)


def _filled(rendered: bytes, placeholder: str, strings: Sequence[LongString]) -> Rendering:
    """Return the parts of `rendered` with `strings` in place of the placeholders."""
    around = rendered.split(placeholder.encode())
    parts, pieces, size = [], around[:1], 0
    for string, after in zip(strings, around[1:], strict=True):
        for start in range(string.start, len(string.text), SLICE):
            pieces.append(msgspec.json.encode(string.text[start : start + SLICE])[1:-1])
            size += len(pieces[-1])
            if size >= SLICE:  # thousands of short strings become one part
                parts.append(b"".join(pieces))
                pieces, size = [], 0
                yield
        pieces.append(after)
    parts.append(b"".join(pieces))
    return parts
