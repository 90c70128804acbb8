"""Forms of a conversation that chat templates accept. Pure: no I/O, no clock.

A chat template turns the messages into the model's prompt, and many accept less than OpenAI does.
Templates of Qwen3.5 raise an error for a system message that is not the first one; those of Mistral
and Gemma demand that user and assistant take turns; Mistral's demand tool call ids of nine letters
and digits.
"""

import re
import string
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice

from msgspec import structs

from gateway.chat.message import ImagePart, Message, RefusalPart, TextPart

ID_CHARACTERS, ID_LENGTH = string.digits + string.ascii_letters, 9
"""Tool call ids in the form that all chat templates accept."""

_SYSTEM = frozenset({"system", "developer"})
_BETWEEN = "\n\n"
"""Text between joined messages, as Ollama joins them for its own templates (template/template.go)."""
_ID_CHARACTER_OF = bytes(ord(ID_CHARACTERS[byte % len(ID_CHARACTERS)]) for byte in range(256))
_is_plain_id = re.compile(f"[{ID_CHARACTERS}]{{{ID_LENGTH}}}").fullmatch


def with_system_first(messages: list[Message]) -> list[Message]:
    """Return the messages with all system messages joined in front.

    It is the one form that every template accepts. The engines' templates differ in what they do
    with a later one, so that a conversation would not survive a switch between them.
    """
    for message in islice(messages, 1, None):
        if message.role in _SYSTEM:
            break
    else:
        return messages
    system = _BETWEEN.join(message.text for message in messages if message.role in _SYSTEM and message.text)
    return [Message("system", system), *(message for message in messages if message.role not in _SYSTEM)]


def with_turns(messages: list[Message]) -> list[Message] | None:
    """Return the messages with neighbours of the user, and of the assistant, joined.

    Return None if there are none.
    """
    joined: list[Message] = []
    for message in with_system_first(messages):
        if joined and message.role == joined[-1].role and message.role in ("user", "assistant"):
            joined[-1] = _joined(joined[-1], message)
        else:
            joined.append(message)
    return joined if len(joined) < len(messages) else None


def without_system(messages: list[Message]) -> list[Message] | None:
    """Return the messages with the text of system messages in front of the user's first message.

    Return None if there is none of either.
    """
    system, *rest = with_system_first(messages)
    found = next((index for index, message in enumerate(rest) if message.role == "user"), None)
    if system.role not in _SYSTEM or found is None:
        return None
    rest[found] = _joined(structs.replace(system, role="user"), rest[found])
    return rest


def _joined(first: Message, second: Message) -> Message:
    return structs.replace(
        first,
        content=_joined_content(first.content or "", second.content or ""),
        tool_calls=[*(first.tool_calls or ()), *(second.tool_calls or ())] or None,
        reasoning=_BETWEEN.join(filter(None, (first.reasoning_text, second.reasoning_text))) or None,
        reasoning_content=None,
    )


_Parts = Sequence[TextPart | ImagePart | RefusalPart]


def _joined_content(first: str | _Parts, second: str | _Parts) -> str | list[TextPart | ImagePart | RefusalPart]:
    if isinstance(first, str) and isinstance(second, str):
        return _BETWEEN.join(filter(None, (first, second)))
    return [*_parts(first), *_parts(second)]


def _parts(content: str | _Parts) -> _Parts:
    return ([TextPart(content)] if content else []) if isinstance(content, str) else content


def template_id(id: str) -> str:
    """Return `id`, or an id in its place that all templates accept. It is the same for each `id`."""
    if _is_plain_id(id):
        return id
    return sha256(id.encode()).digest()[:ID_LENGTH].translate(_ID_CHARACTER_OF).decode()
