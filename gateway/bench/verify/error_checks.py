"""Checks that wrong requests are refused with the status and the body of OpenAI's API."""

import math
from collections.abc import Mapping
from typing import Any

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.target import Messages, Reply, Target

NO_IMAGE = "data:image/png;base64,bm90IGFuIGltYWdl"
UNKNOWN_MODEL = "no-such-model-verify"
LONGEST_CONTEXT = 400_000
"""Tokens. A prompt that exceeds a longer context would itself be refused as too large."""


def require_error(target: Target, reply: Reply, *statuses: int, codes: tuple[str, ...] = ()) -> None:
    """Check that an answer is an error with one of these statuses, in OpenAI's shape.

    A gateway has to send one of `codes` as well. Engines send numbers as codes, or none.

    Raises:
        CheckFailed: It is not.
    """
    if reply.status == 200:
        raise CheckFailed("accepted")
    if reply.status not in statuses:
        wanted = " / ".join(map(str, statuses))
        raise CheckFailed("wrong_status", status=reply.status, wanted=wanted, message=reply.message)
    faults = error_faults(reply, strictly=target.kind == "gateway")
    if faults:
        raise CheckFailed("wrong_error_shape", status=reply.status, fields=", ".join(faults))
    if target.kind == "gateway" and codes and reply.error.get("code") not in codes:
        raise CheckFailed("wrong_code", code=reply.error.get("code"), wanted=" / ".join(codes))


def error_faults(reply: Reply, *, strictly: bool) -> list[str]:
    """Return the fields of an error that are missing or have the wrong type."""
    error = reply.error
    code = error.get("code")
    rules = {
        "error": bool(error),
        "error.message": isinstance(error.get("message"), str) and error["message"] != "",
        "error.type": isinstance(error.get("type"), str) and error["type"] != "",
        "error.param": "param" not in error or error["param"] is None or isinstance(error["param"], str),
        "error.code": code is None or isinstance(code, str) or (isinstance(code, int) and not strictly),
        "content-type": reply.headers.get("content-type", "").startswith("application/json"),
    }
    return [name for name, holds in rules.items() if not holds]


async def bad_json(target: Target) -> None:
    whole = b'{"model": "m", "messages": [{"role": "user", "content": "Hello'
    require_error(target, await target.ask(whole), 400, codes=("invalid_json",))


async def unknown_model(target: Target) -> None:
    reply = await target.ask({**target.chat("Hello."), "model": UNKNOWN_MODEL})
    if reply.status == 200 and target.kind == "gateway":
        raise CheckSkipped("takes_any_model")
    require_error(target, reply, 404, codes=("model_not_found",))


async def missing_model(target: Target) -> None:
    body = target.chat("Hello.")
    del body["model"]
    reply = await target.ask(body)
    if reply.status == 200 and target.kind == "vllm":
        raise CheckSkipped("vllm_default_model")
    require_error(target, reply, 400, codes=("invalid_value",))


async def missing_messages(target: Target) -> None:
    require_error(target, await target.ask({"model": target.model, "max_tokens": 4}), 400, codes=("invalid_value",))


async def wrong_type(target: Target) -> None:
    require_error(target, await target.ask(target.chat("Hello.", temperature="hot")), 400, codes=("invalid_value",))


async def wrong_request_streamed(target: Target) -> None:
    """A refused stream is an error with a status, not a stream."""
    stream = await target.stream(target.chat("Hello.", temperature="hot"))
    require_error(target, stream.reply, 400, codes=("invalid_value",))


async def unknown_path(target: Target) -> None:
    reply = await target.ask(target.chat("Hello."), "/v1/no-such-path")
    if target.kind != "gateway" and reply.status == 404:
        return  # engines answer in the words of their web framework
    require_error(target, reply, 404, codes=("not_found",))


async def wrong_key(target: Target) -> None:
    reply = await target.ask(target.chat("Hello.", max_tokens=2), authorization="Bearer sk-this-key-is-wrong")
    if reply.status == 200:
        if (await target.ask(target.chat("Hello.", max_tokens=2), authorization="")).status == 200:
            raise CheckSkipped("open_server")
        raise CheckFailed("any_key_taken")
    if target.kind == "vllm" and reply.status == 401:
        return  # its body is a bare text
    require_error(target, reply, 401, codes=("invalid_api_key",))


async def too_long(target: Target) -> Reason:
    limit = await context_length(target)
    if limit is None:
        raise CheckSkipped("context_unknown")
    if limit > LONGEST_CONTEXT:
        raise CheckSkipped("context_too_long", tokens=limit)
    # A number and a blank are a token or more; a server of the stand-in's kind counts four bytes as one.
    words = math.ceil(limit * 1.1) + 200
    text = "7 " * words if words > 100_000 else "7777 " * words
    reply = await target.ask(target.chat(text, max_tokens=4))
    if reply.status == 200:
        seen = reply.usage.get("prompt_tokens", "-")
        if isinstance(seen, int) and seen >= words:  # a gateway lists the shortest context of a tier's backends
            raise CheckSkipped("context_longer", tokens=limit, seen=seen)
        raise CheckFailed("prompt_cut", words=words, limit=limit, seen=seen)
    require_error(target, reply, 400, codes=("context_length_exceeded",))
    return Reason("context", {"tokens": limit})


async def context_length(target: Target) -> int | None:
    """Return the context of the model in tokens, as far as the server tells it."""
    for name in ("max_model_len", "context_length"):
        if isinstance(known := target.entry.get(name), int) and known > 0:
            return known
    if target.kind != "ollama":
        return None
    reply = await target.get("/api/ps")
    models = reply.body.get("models") if isinstance(reply.body, dict) else None
    names = {target.model, f"{target.model}:latest"}
    for item in models if isinstance(models, list) else ():
        if isinstance(item, dict) and item.get("name") in names and isinstance(item.get("context_length"), int):
            return int(item["context_length"])
    return None


async def bad_image(target: Target) -> None:
    content: Messages = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": NO_IMAGE}}]
    codes = ("invalid_image", "unsupported_parameter")
    require_error(target, await target.ask(target.chat(_user(content))), 400, codes=codes)


def _user(content: Messages) -> Messages:
    return [{"role": "user", "content": content}]


async def says_what_is_wrong(target: Target) -> None:
    """The error names the parameter, so that a program can show it beside its field."""
    reply = await target.ask(target.chat("Hello.", top_p="all"))
    require_error(target, reply, 400, codes=("invalid_value",))
    error: Mapping[str, Any] = reply.error
    if "top_p" not in str(error.get("param")) and "top_p" not in str(error.get("message")):
        raise CheckFailed("parameter_not_named", parameter="top_p", message=reply.message)


CHECKS = tuple(
    Check("errors", run.__name__, run)
    for run in (
        bad_json,
        unknown_model,
        missing_model,
        missing_messages,
        wrong_type,
        wrong_request_streamed,
        says_what_is_wrong,
        unknown_path,
        wrong_key,
        too_long,
        bad_image,
    )
)
