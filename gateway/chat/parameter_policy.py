"""A tier's changes to request parameters: defaults, forced and dropped ones.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.chat import checks
from gateway.chat.message import Message
from gateway.chat.request import FORMAT_FIELDS, REFUSED, THINKING_FIELDS, Chat, TemplateOptions, TierTemplateOptions
from gateway.errors import GatewayError

_TYPES = {field.name: field.type for field in msgspec.structs.fields(Chat)}

_TOKENS = ("max_completion_tokens", "max_tokens")
_TEMPLATE = "chat_template_kwargs"

_DEPENDENT = frozenset({"tool_choice", "top_logprobs", "continue_final_message", "add_generation_prompt"})
"""Fields that are only valid in combination with others."""

_SYNONYMS = {name: names for names in (_TOKENS, THINKING_FIELDS, FORMAT_FIELDS) for name in names}
"""Fields with the same meaning. Setting one of them replaces the others."""


def problem(name: str, value: object) -> str | None:
    """Return what is wrong with this value for the parameter `name`, or None.

    For the report on invalid settings.
    """
    expected = _TYPES.get(name)
    if expected is None or name in REFUSED:
        return f"{name!r} is not a parameter that the gateway accepts"
    try:
        converted = msgspec.convert(value, expected)
        if name not in _DEPENDENT:
            checks.check(Chat(model="any", messages=[Message("user", "any")], **{name: converted}))
    except msgspec.ValidationError as error:
        return f"got {value!r}: {str(error).replace('`', '')}"
    except GatewayError as error:
        return f"got {value!r}: {error.message}"
    return None


class ParameterPolicy:
    """Parameter changes of one tier. `problem` must have accepted the values.

    Words of the chat template that do not control thinking go to every request, from `default` and
    `force` alike: clients cannot send them.
    """

    __slots__ = ("_cap", "_default", "_drop", "_force", "_words")

    def __init__(
        self,
        default: Mapping[str, object],
        force: Mapping[str, object],
        drop: Sequence[str],
        max_tokens: int | None = None,
    ) -> None:
        self._default = _converted(default)
        self._force = _converted(force)
        self._words = _template_words(default) | _template_words(force)
        self._drop = [name for name in drop if name in _TYPES]
        self._cap = max_tokens

    def __bool__(self) -> bool:
        return bool(self._default or self._force or self._drop or self._cap or self._words)

    def apply(self, chat: Chat) -> Chat:
        """Drop parameters, then apply defaults for unset ones, then forced values, then the cap."""
        changes: dict[str, Any] = dict.fromkeys(self._drop)
        changes |= {name: value for name, value in self._default.items() if self._is_unset(chat, name)}
        for name, value in self._force.items():
            changes.update(dict.fromkeys(_SYNONYMS.get(name, ())))
            changes[name] = value
        if changes:
            chat = msgspec.structs.replace(chat, **changes)
        if self._words:
            asked = chat.chat_template_kwargs or TemplateOptions()
            options = TierTemplateOptions(asked.enable_thinking, asked.thinking, self._words)
            chat = msgspec.structs.replace(chat, chat_template_kwargs=options)
        if self._cap is not None and (chat.token_limit is None or chat.token_limit > self._cap):
            chat = msgspec.structs.replace(chat, max_completion_tokens=self._cap, max_tokens=None)
        return chat

    def _is_unset(self, chat: Chat, name: str) -> bool:
        return all(getattr(chat, other) is None or other in self._drop for other in _SYNONYMS.get(name, (name,)))


def _converted(values: Mapping[str, object]) -> dict[str, Any]:
    converted = {name: msgspec.convert(value, _TYPES[name]) for name, value in values.items()}
    if converted.get(_TEMPLATE) == TemplateOptions():  # says nothing about thinking
        del converted[_TEMPLATE]
    return converted


def _template_words(values: Mapping[str, object]) -> dict[str, Any]:
    options = values.get(_TEMPLATE)
    if not isinstance(options, Mapping):
        return {}
    return {name: value for name, value in options.items() if name not in TemplateOptions.__struct_fields__}
