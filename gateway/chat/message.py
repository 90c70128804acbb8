"""Messages of a conversation, with the parts of their content and the tool calls of earlier turns."""

import re
from itertools import accumulate
from typing import Annotated, Literal

import orjson
from msgspec import Meta, Struct, field, structs

from gateway.chat.derived import derived
from gateway.chat.surrogates import without_halves

MAX_CALLS = 128
_not_brackets = bytes(set(range(256)) - set(b"[]{}"))
_end_runs = re.compile(rb"[\]}]{65,}").sub
_CHANGES = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ImageUrl(Struct, frozen=True):
    url: str


class TextPart(Struct, frozen=True, tag="text"):
    text: str


class RefusalPart(Struct, frozen=True, tag="refusal"):
    refusal: str


class ImagePart(Struct, frozen=True, tag="image_url"):
    """Image. A client may send the URL itself in place of the object with the URL."""

    image_url: ImageUrl | str

    def __post_init__(self) -> None:
        if isinstance(self.image_url, str):
            structs.force_setattr(self, "image_url", ImageUrl(self.image_url))

    @property
    def url(self) -> str:
        assert isinstance(self.image_url, ImageUrl)
        return self.image_url.url


MAX_ARGUMENTS_DEPTH = 64
MAX_CONTAINERS = 10_000
"""Maximum number of objects and arrays in the arguments of a call. The parser takes 5 ms for them."""
MAX_BRACKETS, MAX_QUOTES = 200_000, 50_000
"""Maximum number of brackets, those within strings too, and of quotes where there are so many."""


class CalledFunction(Struct, frozen=True, dict=True):
    """Function of an earlier call.

    It is sent back to the model as it is, even if the model invented the name or the arguments were
    truncated. Arguments that are null or missing are the empty text.
    """

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    given: str | None = field(default=None, name="arguments")

    @property
    def arguments(self) -> str:
        return self.given or ""

    @property
    def whole_arguments(self) -> bytes:
        """Return the arguments as a JSON object, which templates and Ollama require.

        Arguments of any other form are wrapped in one.
        """
        text = self.arguments.strip()
        if not text or text == "{}":
            return b"{}"
        form = self.form
        if form == "other":
            return orjson.dumps({"arguments": self.arguments})
        whole = text.encode()
        return whole if form == "object" else without_halves(whole)

    @derived
    def form(self) -> Literal["object", "object with halves", "other"]:
        """Kind of the arguments: an object, one with half surrogate pairs, or anything else.

        It is found once: each rendering needs it, and it takes the longest.
        """
        whole = self.arguments.strip().encode()
        if _is_shallow_object(whole):
            return "object"
        mended = without_halves(whole)
        return "object with halves" if mended is not whole and _is_shallow_object(mended) else "other"


def _is_shallow_object(json: bytes) -> bool:
    brackets = json.count(b"{") + json.count(b"[")
    if brackets > MAX_CONTAINERS and _has_too_many_containers(json):
        return False
    try:
        is_object = isinstance(orjson.loads(json), dict)
    except orjson.JSONDecodeError:
        return False
    return is_object and (brackets <= MAX_ARGUMENTS_DEPTH or _depth(json) <= MAX_ARGUMENTS_DEPTH)


def _has_too_many_containers(json: bytes) -> bool:
    """Return whether `json` has too many objects and arrays, or too many strings to tell."""
    unescaped = json.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > MAX_QUOTES:
        return True
    outside = b"".join(unescaped.split(b'"')[::2])
    return outside.count(b"{") + outside.count(b"[") > MAX_CONTAINERS


def _depth(json: bytes) -> int:
    """Return the maximum nesting of `json`, or more than is allowed.

    Brackets within strings count too. There may be a million, so each step runs in C.
    """
    marks = _end_runs(b"]" * 64, json.translate(None, _not_brackets))
    if len(marks) > MAX_BRACKETS:
        return MAX_BRACKETS
    return max(accumulate(map(_CHANGES.__getitem__, marks)), default=0)


class ToolCall(Struct, frozen=True):
    """Tool call in an earlier message of the model."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(Struct, frozen=True, omit_defaults=True):
    """One message of the conversation. Its JSON has the fields that are set.

    `content` is None only for messages of the assistant and of tools. It counts as the empty text.
    """

    role: Role
    content: str | list[TextPart | ImagePart | RefusalPart] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """Return the text of the message.

        Parts are joined by a line end, as vLLM does for text models.
        """
        if isinstance(self.content, list):
            texts = (
                part.text if isinstance(part, TextPart) else part.refusal
                for part in self.content
                if not isinstance(part, ImagePart)
            )
            return "\n".join(texts)
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """Return the `data:` URLs of the message's images, in order."""
        if isinstance(self.content, list):
            return [part.url for part in self.content if isinstance(part, ImagePart)]
        return []

    @property
    def reasoning_text(self) -> str | None:
        return self.reasoning if self.reasoning is not None else self.reasoning_content
