"""Checks of OpenAI's parameters: counts, lengths, stops, choices, log probabilities, images."""

import base64
import struct
import zlib
from typing import Any

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.stream_checks import streamed
from gateway.bench.verify.target import Messages, Reply, Target

TOKENS = 6


async def answered(target: Target, content: str | Messages = "Say hello.", **fields: Any) -> Reply:
    """Return the plain answer to a request that has to be accepted.

    Raises:
        CheckFailed: It was refused.
    """
    reply = await target.ask(target.chat(content, **fields))
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    return reply


async def usage(target: Target) -> Reason:
    counts = (await answered(target)).usage
    prompt, completion, total = (counts.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    if not (isinstance(prompt, int) and isinstance(completion, int) and isinstance(total, int)):
        raise CheckFailed("no_usage")
    if prompt <= 0 or completion <= 0 or total != prompt + completion:
        raise CheckFailed("wrong_usage", prompt=prompt, completion=completion, total=total)
    return Reason("counts", {"prompt": prompt, "completion": completion})


async def stream_options(target: Target) -> None:
    """The counts are the last chunk, without choices, and only where they are asked for."""
    stream = await streamed(target, stream_options={"include_usage": True})
    last = stream.chunks[-1].body if stream.chunks else {}
    counts = last.get("usage")
    if not isinstance(counts, dict) or not counts.get("prompt_tokens") or not counts.get("completion_tokens"):
        raise CheckFailed("no_stream_usage")
    if last.get("choices") != []:
        raise CheckFailed("usage_with_choices")
    if (await streamed(target)).usages:
        raise CheckFailed("usage_unasked")


async def max_tokens(target: Target) -> None:
    await _cut(target, max_tokens=TOKENS)


async def max_completion_tokens(target: Target) -> None:
    body = target.chat("Count from 1 to 500.", max_completion_tokens=TOKENS)
    del body["max_tokens"]
    _check_cut(await target.ask(body))


async def _cut(target: Target, **fields: Any) -> None:
    _check_cut(await target.ask(target.chat("Count from 1 to 500.", **fields)))


def _check_cut(reply: Reply) -> None:
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    made, finish = reply.usage.get("completion_tokens"), reply.choice.get("finish_reason")
    if isinstance(made, int) and made > TOKENS:
        raise CheckFailed("too_many_tokens", made=made, most=TOKENS)
    if made == TOKENS and finish != "length":
        raise CheckFailed("wrong_finish", finish=finish, wanted="length")
    if finish == "stop":
        raise CheckSkipped("ended_by_itself")
    if finish != "length":
        raise CheckFailed("wrong_finish", finish=finish, wanted="length")


async def stop(target: Target) -> None:
    """Ask twice, the second time with a piece of the first answer as a stop sequence."""
    question = "Describe a river, a mountain and a city in three sentences."
    fields: dict[str, Any] = {"max_tokens": 48, "seed": 1}
    first = (await answered(target, question, **fields)).text
    middle = len(first) // 2
    piece = first[middle : middle + 4].strip()
    if len(piece) < 2 or "\ufffd" in piece:
        raise CheckSkipped("no_text_to_stop")
    reply = await answered(target, question, stop=[piece], **fields)
    if piece in reply.text:
        raise CheckFailed("stop_ignored")
    wanted = first[: first.index(piece)]
    if not (reply.text.startswith(wanted.rstrip()[:8]) and len(reply.text) <= len(first)):
        raise CheckSkipped("not_repeatable")
    if reply.text.strip() == wanted.strip() and reply.choice.get("finish_reason") != "stop":
        raise CheckFailed("wrong_finish", finish=reply.choice.get("finish_reason"), wanted="stop")


async def several_choices(target: Target) -> None:
    reply = await answered(target, n=2, temperature=1)
    found = reply.body.get("choices") if isinstance(reply.body, dict) else None
    choices = [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []
    if len(choices) != 2:
        raise CheckFailed("choices_missing", count=len(choices))
    if sorted(choice.get("index", -1) for choice in choices) != [0, 1]:
        raise CheckFailed("choices_not_numbered")


async def logprobs(target: Target) -> None:
    reply = await answered(target, logprobs=True, top_logprobs=2, max_tokens=TOKENS)
    found = reply.choice.get("logprobs")
    entries = found.get("content") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise CheckFailed("no_logprobs")
    for entry in entries:
        value = entry.get("logprob")
        if not isinstance(entry.get("token"), str) or not isinstance(value, int | float) or not value <= 0:
            raise CheckFailed("wrong_logprobs")
        if len(entry.get("top_logprobs") or ()) != 2:
            raise CheckFailed("wrong_top_logprobs", count=len(entry.get("top_logprobs") or ()), wanted=2)


async def roles(target: Target) -> None:
    """The roles `system` and `developer`, a name, and content in parts."""
    for role in ("system", "developer"):
        messages: Messages = [
            {"role": role, "content": "Be brief."},
            {"role": "user", "name": "Kim", "content": [{"type": "text", "text": "Hello."}]},
        ]
        await answered(target, messages, max_tokens=2)


async def harmless_fields(target: Target) -> None:
    """Fields that programs always send, and an unknown one."""
    await answered(
        target, max_tokens=2, user="u", store=False, metadata={"a": "b"}, parallel_tool_calls=True, logit_bias={},
        presence_penalty=0, frequency_penalty=0, top_p=1, unknown_field_of_verify=True,
    )  # fmt: skip


async def image(target: Target) -> None:
    """An image that can be read."""
    url = f"data:image/png;base64,{base64.b64encode(png(64, 64)).decode()}"
    content = [{"type": "text", "text": "What colour is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    message = {"role": "user", "content": content}
    reply = await target.ask(target.chat([message], max_tokens=8))
    if 400 <= reply.status < 500 and reply.error:
        raise CheckSkipped("no_images", message=reply.message)
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    without = await answered(target, "What colour is it?", max_tokens=8)
    seen, plain = reply.usage.get("prompt_tokens"), without.usage.get("prompt_tokens")
    if isinstance(seen, int) and isinstance(plain, int) and seen <= plain + 2:
        raise CheckFailed("image_ignored", tokens=seen, without=plain)


def png(width: int, height: int) -> bytes:
    """Return a red PNG image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xc8\x1e\x1e" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


CHECKS = tuple(
    Check("dialect", run.__name__, run)
    for run in (
        usage,
        stream_options,
        max_tokens,
        max_completion_tokens,
        stop,
        several_choices,
        logprobs,
        roles,
        harmless_fields,
        image,
    )
)
