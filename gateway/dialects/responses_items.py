"""Input items of OpenAI's Responses API, and the messages that they become. Pure: no I/O, no clock."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.chat.message import CalledFunction, ImagePart, ImageUrl, Message, RefusalPart, TextPart, ToolCall
from gateway.dialects.json_body import STEP, Steps, explain
from gateway.errors import InvalidJson, InvalidRequest, UnsupportedParameter


class _InputText(Struct, frozen=True, tag="input_text"):
    text: str


class _OutputText(Struct, frozen=True, tag="output_text"):
    text: str


class _Refusal(Struct, frozen=True, tag="refusal"):
    refusal: str


class _InputImage(Struct, frozen=True, tag="input_image"):
    image_url: Raw = Raw(b"null")
    file_id: str | None = None


class _InputFile(Struct, frozen=True, tag="input_file"):
    pass


_Part = _InputText | _OutputText | _Refusal | _InputImage | _InputFile


class _Message(Struct, frozen=True, tag="message"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Raw] | None = None


class _FunctionCall(Struct, frozen=True, tag="function_call"):
    call_id: str
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    arguments: str | None = None


class _FunctionOutput(Struct, frozen=True, tag="function_call_output"):
    call_id: str
    output: str | list[Raw] | None = None


class _ReasoningText(Struct, frozen=True):
    text: str = ""


class _Reasoning(Struct, frozen=True, tag="reasoning"):
    summary: list[_ReasoningText] | None = None
    content: list[_ReasoningText] | None = None


class _Reference(Struct, frozen=True, tag="item_reference"):
    """Item of an earlier answer, by its id."""

    id: str


Item = _Message | _FunctionCall | _FunctionOutput | _Reasoning | _Reference


class _Typed(Struct, frozen=True):
    type: str = "message"


_items: dict[str, msgspec.json.Decoder[Any]] = {
    "message": msgspec.json.Decoder(_Message),
    "function_call": msgspec.json.Decoder(_FunctionCall),
    "function_call_output": msgspec.json.Decoder(_FunctionOutput),
    "reasoning": msgspec.json.Decoder(_Reasoning),
    "item_reference": msgspec.json.Decoder(_Reference),
}
_parts: msgspec.json.Decoder[_Part] = msgspec.json.Decoder(_Part)
_urls = msgspec.json.Decoder(str)
_types = msgspec.json.Decoder(_Typed)
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
REASONING_PREFIX = "rs"
"""Beginning of the ids of items with thoughts."""


def read_item(raw: Raw, path: str) -> Steps[Item]:
    """Decode an item, which is at `path` in the body. One without a type is a message.

    Raises:
        InvalidJson, InvalidRequest, UnsupportedParameter: its text, a field of it, or its type.
    """
    yield from _turn(raw)
    kind = _decoded(_types, raw, path).type
    if kind not in _items:
        raise _unsupported_type(path)
    yield from _turn(raw)
    item: Item = _decoded(_items[kind], raw, path)
    return item


def _turn(raw: Raw) -> Steps[None]:
    """Give other requests a turn before a pass over a long value."""
    if memoryview(raw).nbytes > STEP:
        yield


def _decoded(decoder: msgspec.json.Decoder[Any], raw: Raw, path: str) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        fault = explain(str(error))
        where = path if fault.param is None else f"{path}.{fault.param}"
        if where.endswith(".type"):
            raise _unsupported_type(where.removesuffix(".type")) from None
        raise InvalidRequest(f"Invalid value for '{where}'.", param=where) from None
    except _ERRORS:
        raise InvalidJson("The body is not valid JSON.") from None


def _unsupported_type(path: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"The type of '{path}' is not supported.", param=f"{path}.type")


class Conversation:
    """Collects the canonical messages. Consecutive items of the model become one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.image_bytes = 0
        self.image_paths: list[str] = []
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[ToolCall] = []

    def add(self, item: Item, path: str) -> Steps[None]:
        """Add an item, which is at `path` in the body.

        Raises:
            InvalidRequest, UnsupportedParameter: the item, or a part of its content.
        """
        if isinstance(item, _FunctionCall):
            self._calls.append(ToolCall(item.call_id, CalledFunction(item.name, item.arguments or "")))
        elif isinstance(item, _Reasoning):
            if self._calls or self._texts:
                self.end_turn()
            self._thoughts += [part.text for part in (item.content or item.summary or ()) if part.text]
        elif isinstance(item, _Reference):
            if not item.id.startswith(REASONING_PREFIX):  # thoughts are not needed, and the AI SDK sends them so
                raise UnsupportedParameter(
                    f"'{path}' is a reference to an item, but this gateway keeps no state between requests. Send the "
                    "item itself. Clients do so with 'store' set to false.",
                    param=path,
                )
        elif isinstance(item, _FunctionOutput):
            yield from self._add_output(item, path)
        else:
            yield from self._add_message(item, path)

    def _add_output(self, item: _FunctionOutput, path: str) -> Steps[None]:
        """Add the output of a function. Its images follow as a message of the user."""
        self.end_turn()
        content = yield from self._content(item.output or "", f"{path}.output")
        text = content if isinstance(content, str) else _text(content)
        self.messages.append(Message("tool", text, tool_call_id=item.call_id))
        if not isinstance(content, str):
            images: list[Any] = [part for part in content if isinstance(part, ImagePart)]
            if images:
                self.messages.append(Message("user", images))

    def _add_message(self, item: _Message, path: str) -> Steps[None]:
        if item.role != "assistant" or self._calls:
            self.end_turn()
        if item.content is None and item.role != "assistant":
            raise InvalidRequest(f"Missing required parameter: '{path}.content'.", param=f"{path}.content")
        content = yield from self._content(item.content or "", f"{path}.content")
        if item.role == "assistant":
            self._texts.append(content if isinstance(content, str) else _text(content))
        else:
            self.messages.append(Message(item.role, content))

    def end_turn(self) -> None:
        """End the message of the model that was being collected."""
        if self._texts or self._thoughts or self._calls:
            reasoning = "\n".join(self._thoughts) or None
            self.messages.append(Message("assistant", "\n".join(self._texts), self._calls or None, reasoning=reasoning))
            self._texts, self._thoughts, self._calls = [], [], []

    def _content(self, content: str | list[Raw], path: str) -> Steps[str | list[TextPart | ImagePart | RefusalPart]]:
        if isinstance(content, str):
            return content
        parts: list[TextPart | ImagePart | RefusalPart] = []
        for number, raw in enumerate(content):
            yield from _turn(raw)
            part: _Part = _decoded(_parts, raw, f"{path}[{number}]")
            if isinstance(part, _InputText | _OutputText):
                parts.append(TextPart(part.text))
            elif isinstance(part, _Refusal):
                parts.append(RefusalPart(part.refusal))
            else:
                yield from _turn(raw)
                parts.append(self._image(part, f"{path}[{number}]"))
        return parts

    def _image(self, part: _InputImage | _InputFile, path: str) -> ImagePart:
        if isinstance(part, _InputFile) or part.file_id is not None:
            raise UnsupportedParameter(f"'{path}': files are not supported. Send text or images.", param=path)
        self.image_bytes += memoryview(part.image_url).nbytes
        self.image_paths.append(f"{path}.image_url")
        try:
            return ImagePart(ImageUrl(_urls.decode(part.image_url)))
        except _ERRORS:
            raise InvalidRequest(f"'{path}.image_url' must be a string.", param=f"{path}.image_url") from None


def _text(parts: list[TextPart | ImagePart | RefusalPart]) -> str:
    texts = (
        part.text if isinstance(part, TextPart) else part.refusal for part in parts if not isinstance(part, ImagePart)
    )
    return "\n".join(texts)
