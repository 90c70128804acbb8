"""Conversations that some chat templates refuse are served alike by both engines.

Covers: gateway/chat/conversation.py, gateway/relay/chat.py
"""

from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.simulate import Model, Options
from gateway.simulate.options import Template
from tests.fakes.running_gateway import PATIENCE, running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

CALL = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
OTHER = {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]


CALLED = [
    *said("user"),
    {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER]},
    {"role": "tool", "tool_call_id": "call_1", "content": "one"},
    {"role": "tool", "tool_call_id": "call_2", "content": "two"},
]
SERVED = {
    "two system messages": said("system", "system", "user"),
    "developer and system": said("developer", "system", "user"),
    "late system message": said("user", "assistant", "system", "user"),
    "last message from the system": said("system", "user", "system"),
    "two user messages": said("user", "user"),
    "two user messages after the system's": said("system", "user", "user", "assistant", "user"),
    "two assistant messages": said("user", "assistant", "assistant", "user"),
    "all of it": said("system", "user", "user", "system", "assistant", "assistant", "developer", "user"),
}
TEMPLATES: tuple[Template, ...] = ("any", "qwen3.5", "mistral", "gemma-2")


async def ask(options: Options, messages: list[dict[str, Any]]) -> tuple[httpx2.Response, list[dict[str, Any]]]:
    """Return the gateway's answer, and the bodies that the engine got."""
    async with stand_in(options) as engine:
        settings = config.build(
            {
                "llm_backend": "one",
                "backends": {"one": {"kind": options.kind, "base_url": engine.base_url}},
                "tiers": {"standard": {"models": {"one": options.served[0].name}}},
                "state_file": "",
            }
        )
        async with running(settings) as gateway, httpx2.AsyncClient(timeout=PATIENCE, trust_env=False) as client:
            url = f"{gateway.base_url}/v1/chat/completions"
            answer = await client.post(url, json={"model": "standard", "messages": messages, "max_tokens": 5})
            seen = (await client.get(f"{engine.base_url}/simulate/requests")).json()
    bodies = [one["body"] for one in seen if one["path"] in ("/api/chat", "/v1/chat/completions")]
    return answer, [body for body in bodies if body["messages"]]  # without messages it loads the model


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", SERVED)
async def test_conversation_is_served_whatever_the_template_refuses(name: str, template: Template) -> None:
    answer, bodies = await ask(Options("vllm", template=template), SERVED[name])
    assert answer.status_code == 200, answer.text
    *_, sent = bodies
    texts = "\n\n".join(message["content"] for message in sent["messages"])
    assert sorted(texts.split("\n\n")) == [message["content"] for message in SERVED[name]]
    assert [message["role"] for message in sent["messages"][1:]].count("system") == 0


@pytest.mark.parametrize("generation", ["0.33", "0.24"])
@pytest.mark.parametrize("name", SERVED)
async def test_system_messages_are_the_same_on_both_engines(name: str, generation: Any) -> None:
    _, (ollama,) = await ask(Options("ollama", (Model("llama"),), generation=generation), SERVED[name])
    _, (vllm,) = await ask(Options("vllm"), SERVED[name])
    shown = [[(one["role"], one["content"]) for one in body["messages"]] for body in (ollama, vllm)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("template", ["any", "qwen3.5", "mistral"])
async def test_calls_with_any_ids_may_be_sent_back(template: Template) -> None:
    answer, bodies = await ask(Options("vllm", template=template), CALLED)
    assert answer.status_code == 200, answer.text
    (sent,) = bodies
    called, *results = sent["messages"][1:]
    ids = [call["id"] for call in called["tool_calls"]]
    assert ids == [result["tool_call_id"] for result in results]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("template", ["mistral", "gemma-2"])
@pytest.mark.parametrize("messages", [said("assistant", "user"), [*CALLED, *said("user", "user")]])
async def test_refusal_that_cannot_be_avoided_says_why(template: Template, messages: list[dict[str, Any]]) -> None:
    answer, bodies = await ask(Options("vllm", template=template), messages)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "messages")
    assert "chat template" in error["message"]
    assert "take turns" in error["message"]
    assert len(bodies) <= 3
