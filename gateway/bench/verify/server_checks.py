"""Checks of the server itself: it answers, lists its models, and one of them chats."""

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.target import OWNERS, Reply, Target

MOST_TRIED = 8
"""Listed models that are tried for one that chats."""


async def lists_models(target: Target) -> Reason:
    reply = await target.get("/v1/models")
    if reply.status in (401, 403):
        raise CheckFailed("key_refused", status=reply.status, message=reply.message)
    data = reply.body.get("data") if isinstance(reply.body, dict) else None
    if reply.status != 200 or not isinstance(data, list):
        raise CheckFailed("no_model_list", status=reply.status, message=reply.message)
    target.listed = [item for item in data if isinstance(item, dict) and isinstance(item.get("id"), str)]
    owners = [OWNERS[owner] for item in target.listed if (owner := item.get("owned_by")) in OWNERS]
    target.kind = owners[0] if owners else "openai"
    if not target.listed:
        raise CheckFailed("no_models")
    return Reason("models_listed", {"count": len(target.listed), "kind": target.kind})


async def answers(target: Target) -> Reason:
    """Choose the model, and load it."""
    names = [target.wanted_model] if target.wanted_model else [str(item["id"]) for item in target.listed]
    reply: Reply | None = None
    for name in names[:MOST_TRIED]:
        target.model = name
        reply = await target.ask(target.chat("Hello.", max_tokens=4))
        if reply.status == 200:
            break
    if reply is None:
        raise CheckFailed("no_models")
    if reply.status != 200:
        raise CheckFailed("no_chat", model=target.model, status=reply.status, message=reply.message)
    faults = plain_faults(reply)
    if faults:
        raise CheckFailed("wrong_shape", fields=", ".join(faults))
    return Reason("answered", {"model": target.model, "seconds": f"{reply.seconds:.2f}"})


def plain_faults(reply: Reply) -> list[str]:
    """Return the fields of a plain completion that are missing or have the wrong type."""
    body = reply.body if isinstance(reply.body, dict) else {}
    message = reply.choice.get("message")
    rules = {
        "id": isinstance(body.get("id"), str) and body["id"] != "",
        "object": body.get("object") == "chat.completion",
        "created": isinstance(body.get("created"), int),
        "model": isinstance(body.get("model"), str) and body["model"] != "",
        "choices": bool(reply.choice),
        "choices[0].index": reply.choice.get("index") == 0,
        "choices[0].message.role": isinstance(message, dict) and message.get("role") == "assistant",
        "choices[0].finish_reason": isinstance(reply.choice.get("finish_reason"), str),
    }
    return [name for name, holds in rules.items() if not holds]


async def shows_its_model(target: Target) -> None:
    reply = await target.get(f"/v1/models/{target.model}")
    if reply.status == 404 and target.kind != "gateway":
        raise CheckSkipped("no_single_model")
    if reply.status != 200 or not isinstance(reply.body, dict) or reply.body.get("id") != target.model:
        raise CheckFailed("wrong_model_entry", status=reply.status, message=reply.message)


REACH = (Check("server", "lists_models", lists_models), Check("server", "answers", answers))
"""Checks without which no other one can be run."""

CHECKS = (Check("server", "shows_its_model", shows_its_model),)
