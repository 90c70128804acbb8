"""Conversations that the chat templates of some families refuse."""

from typing import Any

import pytest

from gateway.simulate.options import Options, Template
from gateway.simulate.vllm.errors import VllmApiError
from gateway.simulate.vllm.templates import check_template


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "x"} for role in roles]


def called(id: str) -> list[dict[str, Any]]:
    return [
        *said("user"),
        {"role": "assistant", "content": "", "tool_calls": [{"id": id}]},
        {"role": "tool", "tool_call_id": id, "content": "x"},
        *said("assistant", "user"),
    ]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("any", said("user", "system", "user")),
        ("qwen3.5", said("system", "user", "user", "assistant")),
        ("mistral", said("system", "user", "assistant", "user")),
        ("mistral", called("abcDEF123")),
        ("gemma-2", said("user", "assistant", "user")),
    ],
)
def test_conversation_is_accepted(template: Template, messages: list[dict[str, Any]]) -> None:
    check_template(messages, template)


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("qwen3.5", said("system", "system", "user"), "System message must be at the beginning."),
        ("qwen3.5", said("user", "assistant", "system", "user"), "System message must be at the beginning."),
        ("qwen3.5", said("system", "assistant"), "No user query found in messages."),
        ("mistral", said("user", "user"), "roles must alternate"),
        ("mistral", said("assistant", "user"), "roles must alternate"),
        ("mistral", called("call_1"), "Tool call IDs should be alphanumeric strings with length 9!"),
        ("gemma-2", said("system", "user"), "System role not supported"),
        ("gemma-2", said("user", "user"), "roles must alternate"),
    ],
)
def test_conversation_is_refused(template: Template, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(VllmApiError, match=words) as caught:
        check_template(messages, template)
    assert caught.value.status == 400


def test_template_is_an_option() -> None:
    assert Options("vllm").with_settings(["template=mistral"]).template == "mistral"
    with pytest.raises(ValueError, match=r"any, qwen3\.5, mistral, gemma-2"):
        Options("vllm").with_settings(["template=llama"])
