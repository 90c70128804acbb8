"""What a tier does to a request's parameters: defaults, forced values, dropped ones. Pure: no I/O, no clock."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.chat import checks
from gateway.chat.request import REFUSED, Chat, Message
from gateway.errors import GatewayError

_TYPES = {field.name: field.type for field in msgspec.structs.fields(Chat)}

_TOKENS = ("max_completion_tokens", "max_tokens")
_THINKING = ("reasoning_effort", "reasoning", "think", "chat_template_kwargs")

_NEED_OTHERS = frozenset({"tool_choice", "top_logprobs"})
"""Fields that are right or wrong only beside others."""

_OTHER_NAMES = {name: names for names in (_TOKENS, _THINKING) for name in names}
"""Fields that say the same: who sets one of them unsays the others."""


def problem(name: str, value: object) -> str | None:
    """What is wrong with giving the parameter `name` this value, for the settings' report; None: nothing is."""
    expected = _TYPES.get(name)
    if expected is None or name in REFUSED:
        return f"{name!r} is not a parameter that the gateway takes"
    try:
        taken = msgspec.convert(value, expected)
        if name not in _NEED_OTHERS:
            checks.check(Chat(model="any", messages=[Message("user", "any")], **{name: taken}))
    except msgspec.ValidationError as error:
        return f"got {value!r}: {str(error).replace('`', '')}"
    except GatewayError as error:
        return f"got {value!r}: {error.message}"
    return None


class ParameterPolicy:
    """The values are taken as checked by `problem`."""

    __slots__ = ("_cap", "_default", "_drop", "_force")

    def __init__(
        self,
        default: Mapping[str, object],
        force: Mapping[str, object],
        drop: Sequence[str],
        max_tokens: int | None = None,
    ) -> None:
        self._default = {name: msgspec.convert(value, _TYPES[name]) for name, value in default.items()}
        self._force = {name: msgspec.convert(value, _TYPES[name]) for name, value in force.items()}
        self._drop = [name for name in drop if name in _TYPES]
        self._cap = max_tokens

    def __bool__(self) -> bool:
        return bool(self._default or self._force or self._drop or self._cap)

    def apply(self, chat: Chat) -> Chat:
        """Drop, then defaults for what nothing was said of, then forced values, then the cap."""
        changes: dict[str, Any] = dict.fromkeys(self._drop)
        changes |= {name: value for name, value in self._default.items() if self._is_unsaid(chat, name)}
        for name, value in self._force.items():
            changes.update(dict.fromkeys(_OTHER_NAMES.get(name, ())))
            changes[name] = value
        if changes:
            chat = msgspec.structs.replace(chat, **changes)
        if self._cap is not None and (chat.token_limit is None or chat.token_limit > self._cap):
            chat = msgspec.structs.replace(chat, max_completion_tokens=self._cap, max_tokens=None)
        return chat

    def _is_unsaid(self, chat: Chat, name: str) -> bool:
        return all(getattr(chat, other) is None or other in self._drop for other in _OTHER_NAMES.get(name, (name,)))
