"""Canonical request to continue texts, without a chat template. Pure: no I/O, no clock."""

from msgspec import structs

from gateway.chat.message import Message
from gateway.chat.request import Chat

MAX_COMPLETIONS = 128
"""Maximum number of completions in a request: prompts times `n`. Each is a request to an engine."""


class Completion(Chat, frozen=True, kw_only=True):
    """A chat whose user messages are the prompts, one each.

    So everything that only needs the text of a request treats it as a chat. The relay gets one
    request for each prompt.
    """

    echo: bool = False
    """True if the answer begins with the prompt."""

    @property
    def prompt(self) -> str:
        """Return the first prompt, which is the only one of a request to an engine."""
        return self.messages[0].text

    def for_each_prompt(self) -> list["Completion"]:
        """Return a request for each prompt."""
        return [structs.replace(self, messages=[message]) for message in self.messages]


def prompt_messages(prompts: list[str]) -> list[Message]:
    """Return the messages of a `Completion`."""
    return [Message("user", prompt) for prompt in prompts]
