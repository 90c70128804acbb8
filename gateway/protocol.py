"""The part of OpenAI's chat completions request that we take: bytes to `Chat`. Pure: no I/O, no clock.

Fields are taken by allow-list and rendered anew for each backend, so nothing that a client made up reaches one. What we do not know is
ignored, as OpenAI's own clients expect; what would change the shape of the answer and is not served is refused by name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.errors import InvalidImageUrl, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

MAX_NESTING_MARKS = 50_000
"""`[` and `{` in a body above `max_text_body`: what has more is not an image but a way to keep the parser busy."""

Penalty = Annotated[float, Meta(ge=-2, le=2)]
PositiveInt = Annotated[int, Meta(ge=1, le=10_000_000)]


class ImageUrl(Struct, frozen=True):
    url: str


class TextPart(Struct, frozen=True, tag="text"):
    text: str


class ImagePart(Struct, frozen=True, tag="image_url"):
    image_url: ImageUrl


class Message(Struct, frozen=True):
    """One turn. `content` is None only for an assistant's turn that was nothing but tool calls."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | ImagePart] | None = None
    tool_calls: Any = None

    @property
    def text(self) -> str:
        """All text of the turn; parts are joined by a line end, as vLLM joins them for text models."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """The `data:` URLs of the turn, in order."""
        if isinstance(self.content, list):
            return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]
        return []


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class Chat(Struct, frozen=True, kw_only=True):
    """One parsed request; what waits in a queue, rendered for a backend only when it is admitted there."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Meta(min_length=1, max_length=2048)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[str, Meta(min_length=1)] | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=4)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    response_format: Any = None
    logprobs: bool | None = None
    audio: Any = None

    @property
    def token_limit(self) -> int | None:
        """The newer name wins, as OpenAI and vLLM have it."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_images(self) -> bool:
        return any(isinstance(part, ImagePart) for message in self.messages if isinstance(message.content, list) for part in message.content)


_decoder = msgspec.json.Decoder(Chat)


def parse(body: bytes) -> Chat:
    """The request in `body`, which `check_size` has let pass.

    Raises:
        InvalidJson: no JSON, or no JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its path.
        UnsupportedParameter: it asks for what the gateway does not serve yet.
        InvalidImageUrl: an image is no `data:` URL.
    """
    try:
        chat = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    _check_served(chat)
    _check_messages(chat)
    return chat


def check_size(body: bytes, max_text_body: int) -> None:
    """Let only images be large.

    Raises:
        RequestTooLarge: above `max_text_body` bytes without an image, or with more in it than images have.
    """
    if len(body) <= max_text_body:
        return
    if b"data:image/" not in body:
        raise RequestTooLarge(f"A request without images may have at most {max_text_body} bytes.")
    if body.count(b"[") + body.count(b"{") > MAX_NESTING_MARKS:
        raise RequestTooLarge("The request has too many parts.")


def _explain(text: str) -> InvalidRequest:
    """msgspec's words are `REASON - at `$.path``; only reasons that cannot hold the client's text are passed on. The client's text may hold
    a place of its own: the last one is msgspec's."""
    reason, found, place = text.rpartition(" - at `$")
    if not found:
        reason, place = text, ""
    param = place.rstrip("`").lstrip(".") or None
    if reason.startswith("Object missing required field `"):
        name = reason.split("`")[1]
        param = f"{param}.{name}" if param else name
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if param is None:
        return InvalidJson("The body must be a JSON object.")
    if param.endswith("].type") and not reason.startswith("Expected"):
        return UnsupportedParameter(f"'{param}' must be 'text' or 'image_url'.", param=param)
    if not reason.startswith("Expected"):
        reason = "It is out of range or not one of the values allowed"
    return InvalidRequest(f"Invalid value for '{param}'. {reason.replace('`', '')}.", param=param)


NOT_SERVED = frozenset({"tools", "functions", "tool_choice", "response_format", "logprobs", "audio"})
"""Fields that are read only to be refused."""


def _check_served(chat: Chat) -> None:
    refused: str | None = None
    if chat.n is not None and chat.n > 1:
        refused = "n"
    elif chat.tools and chat.tool_choice != "none":
        refused = "tools"
    elif chat.functions:
        refused = "functions"
    elif chat.response_format is not None and chat.response_format != {"type": "text"}:
        refused = "response_format"
    elif chat.logprobs:
        refused = "logprobs"
    elif chat.audio is not None:
        refused = "audio"
    if refused is not None:
        raise UnsupportedParameter(f"'{refused}' is not served by this gateway yet, on any backend. Leave it out.", param=refused)


def _check_messages(chat: Chat) -> None:
    for index, message in enumerate(chat.messages):
        if message.tool_calls or message.role == "tool":
            raise UnsupportedParameter("Tool calls are not served by this gateway yet, on any backend.", param=f"messages[{index}]")
        if message.content is None:
            raise InvalidRequest(f"Missing required parameter: 'messages[{index}].content'.", param=f"messages[{index}].content")
        if isinstance(message.content, list):
            for number, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    check_image_url(part.image_url.url, f"messages[{index}].content[{number}].image_url.url")


def check_image_url(url: str, param: str) -> None:
    """A `data:` URL (RFC 2397) with a base64 image in it; nothing is ever fetched for a client."""
    head, comma, payload = url[:128].partition(",")
    head = head.lower()
    if not (comma and payload and head.startswith("data:") and head.endswith(";base64")):
        raise InvalidImageUrl("Images are taken as 'data:image/...;base64,...' URLs only: put the image itself into the request.", param=param)
