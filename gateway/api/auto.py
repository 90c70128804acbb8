"""Which tier the model name `auto` means for a request, and why. Pure: no I/O, no clock."""

from typing import get_args

from gateway.chat.request import Chat
from gateway.config import AutoRule, Settings, Task
from gateway.errors import InvalidRequest

TASK = "x-gateway-task"
"""Request header with a client's word for how hard its request is."""

NO_RULE = "no rule holds"


class AutoRules:
    """The rules of the settings, in their order."""

    def __init__(self, settings: Settings) -> None:
        self._rules = [(rule, f"rule {number}: {rule}") for number, rule in enumerate(settings.auto, 1)]
        self._default_tier = settings.default_tier

    def choose(self, chat: Chat, task: bytes | None) -> tuple[str, str]:
        """The tier's name, and the reason in words of the settings alone; `task` is what the client said.

        Raises:
            InvalidRequest: `task` is no word for it.
        """
        said = None if task is None else task_of(task)
        for rule, reason in self._rules:
            if _holds(rule, chat, said):
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
    """Characters of all messages' text; images and tools do not count."""
    return sum(len(message.text) for message in chat.messages)


def task_of(value: bytes) -> str:
    """Raises `InvalidRequest` for another word."""
    word = value.strip().lower().decode("latin-1")
    if word not in get_args(Task):
        raise InvalidRequest(f"The header {TASK} has to be 'simple', 'medium' or 'complex'.", param=TASK)
    return word
