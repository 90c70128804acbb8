"""Conversations that the chat templates of some model families refuse, with their messages. Pure.

vLLM answers the text of a template's exception with 400. See the templates of Qwen3.5 (and later),
Mistral-7B-Instruct-v0.3 and gemma-2 on Hugging Face.
"""

import re
from typing import Any

from gateway.simulate.options import Template
from gateway.simulate.vllm.errors import bad_request

_is_mistral_id = re.compile("[a-zA-Z0-9]{9}").fullmatch


def check_template(messages: list[dict[str, Any]], template: Template) -> None:
    """Check a conversation as `template` does.

    Raises:
        VllmApiError: the template raises an exception.
    """
    match template:
        case "qwen3.5":
            _check_qwen(messages)
        case "mistral":
            _check_mistral(messages)
        case "gemma-2":
            if messages[0].get("role") == "system":
                raise bad_request("System role not supported")
            _check_alternation(messages)


def _check_qwen(messages: list[dict[str, Any]]) -> None:
    if any(message.get("role") == "system" for message in messages[1:]):
        raise bad_request("System message must be at the beginning.")
    if not any(message.get("role") == "user" for message in messages):
        raise bad_request("No user query found in messages.")


def _check_mistral(messages: list[dict[str, Any]]) -> None:
    rest = messages[1:] if messages[0].get("role") == "system" else messages
    turns = [message for message in rest if message.get("role") != "tool" and not message.get("tool_calls")]
    if any(message.get("role") != ("assistant" if index % 2 else "user") for index, message in enumerate(turns)):
        raise bad_request(
            "After the optional system message, conversation roles must alternate user/assistant/user/assistant/..."
        )
    for message in rest:
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        if message.get("role") == "tool":
            ids.append(message.get("tool_call_id"))
        if any(not isinstance(given, str) or not _is_mistral_id(given) for given in ids):
            raise bad_request("Tool call IDs should be alphanumeric strings with length 9!")


def _check_alternation(messages: list[dict[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if message.get("role") != ("assistant" if index % 2 else "user"):
            raise bad_request("Conversation roles must alternate user/assistant/user/assistant/...")
