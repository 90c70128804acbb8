"""Choice of a tier for requests for the model `auto`. Pure: no I/O, no clock."""

from typing import get_args

from gateway.chat.request import Chat
from gateway.config import AutoRule, Settings, Task
from gateway.errors import InvalidRequest

TASK = "x-gateway-task"
"""Request header in which a client states how difficult its request is."""

NO_RULE = "no rule holds"


class AutoRules:
    """Rules of the setting `auto`, in their order."""

    def __init__(self, settings: Settings) -> None:
        self._rules = [(rule, f"rule {number}: {rule}") for number, rule in enumerate(settings.auto, 1)]
        self._default_tier = settings.default_tier

    def choose(self, chat: Chat, task: bytes | None) -> tuple[str, str]:
        """Return the name of the tier and the reason, which contains only words of the settings.

        `task` is the value of the request header.

        Raises:
            InvalidRequest: `task` is not one of the known values.
        """
        task_name = None if task is None else task_of(task)
        for rule, reason in self._rules:
            if _holds(rule, chat, task_name):
                return rule.tier, reason
        return self._default_tier, NO_RULE


def _holds(rule: AutoRule, chat: Chat, task: str | None) -> bool:
    if rule.task is not None and rule.task != task:
        return False
    if rule.images is not None and rule.images != chat.has_images:
        return False
    if rule.tools is not None and rule.tools != bool(chat.offered):
        return False
    return rule.longer_than is None or text_length(chat) > rule.longer_than


def text_length(chat: Chat) -> int:
    """Return the number of characters in the text of all messages, without images and tools."""
    return sum(len(message.text) for message in chat.messages)


def task_of(value: bytes) -> str:
    """Return the task that the header value names.

    Raises:
        InvalidRequest: The value is unknown.
    """
    word = value.strip().lower().decode("latin-1")
    if word not in get_args(Task):
        raise InvalidRequest(f"The header {TASK} must be 'simple', 'medium' or 'complex'.", param=TASK)
    return word
