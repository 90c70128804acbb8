"""Checks that Korean text reaches the model and comes back whole, plain and in streams."""

import json
from typing import Any

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.stream_checks import streamed
from gateway.bench.verify.target import Messages, Reply, Stream, Target

SENTENCE = "다람쥐 헌 쳇바퀴에 타고파, 읊조리다 깻잎 값을 셈했다."
"""Sentence whose syllables have all kinds of final consonants, single and double."""

QUESTION = f"다음 문장을 그대로 다시 쓰세요: {SENTENCE}"
BROKEN = "\ufffd"
SEEDS = (3, 4, 5)
"""Seeds that are tried in turn: a model of random weights may write blanks until it is cut off."""


async def keeps_hangul_in_chunks(target: Target) -> Reason:
    """Look for syllables that were cut apart between chunks.

    A model may write invalid bytes of its own accord, and then its plain answer has them too.
    """
    body = target.chat(QUESTION, max_tokens=96, seed=1)
    stream = await target.stream(body)
    if not stream.is_stream:
        raise CheckFailed(
            "not_a_stream", status=stream.reply.status, type=stream.reply.headers.get("content-type", "-"),
            message=stream.reply.message,
        )  # fmt: skip
    try:
        stream.reply.content.decode()
    except UnicodeDecodeError:
        raise CheckFailed("invalid_utf8") from None
    broken = sum(event.text.count(BROKEN) for event in stream.chunks)
    if broken:
        plain = await target.ask(body)
        if BROKEN not in plain.whole_text:
            raise CheckFailed("broken_in_chunks", count=broken)
        raise CheckSkipped("model_writes_broken", count=broken)
    hangul = sum(1 for letter in "".join(event.text for event in stream.chunks) if "가" <= letter <= "힣")
    return Reason("hangul_seen", {"count": hangul, "chunks": len(stream.pieces)})


async def returns_hangul(target: Target) -> None:
    """Have the model write a Korean sentence under a schema, which even random weights must."""
    await _forced(target, is_stream=False)


async def returns_hangul_streamed(target: Target) -> None:
    await _forced(target, is_stream=True)


async def _forced(target: Target, *, is_stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"문장": {"type": "string", "enum": [SENTENCE]}},
        "required": ["문장"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "sentence", "schema": schema, "strict": True}}
    for seed in SEEDS:
        body = target.chat(QUESTION, max_tokens=400, temperature=1, seed=seed, response_format=wanted)
        answer: Reply | Stream = await (target.stream(body) if is_stream else target.ask(body))
        reply = answer.reply if isinstance(answer, Stream) else answer
        if reply.status != 200:
            raise CheckSkipped("no_schema", status=reply.status, message=reply.message)
        if isinstance(answer, Stream) and not answer.finishes:
            raise CheckSkipped("stream_broke_off", message=answer.error_message or "no finish_reason")
        text = answer.content if isinstance(answer, Stream) else answer.text
        value = _object(text)
        if value == {"문장": SENTENCE}:
            return
        if BROKEN in text:
            raise CheckFailed("hangul_broken")
        if value is not None:
            raise CheckFailed("hangul_differs")
        finish = answer.finishes[-1:] if isinstance(answer, Stream) else [answer.choice.get("finish_reason")]
        if finish != ["length"]:
            raise CheckFailed("hangul_differs")
    raise CheckSkipped("cut_off")


async def repeats_korean(target: Target) -> Reason:
    reply = await target.ask(target.chat(QUESTION, max_tokens=256))
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    if SENTENCE in reply.text:
        return Reason("repeated")
    if BROKEN in reply.text and sum(1 for word in SENTENCE.split() if word in reply.text) >= 2:
        raise CheckFailed("hangul_broken")
    raise CheckSkipped("not_repeated")


async def takes_korean_names(target: Target) -> None:
    """Send Hangul everywhere that a request has free text: it may not be refused."""
    messages: Messages = [
        {"role": "system", "content": "당신은 친절한 도우미입니다."},
        {"role": "user", "content": "안녕하세요? 오늘 날씨 어때요? 😀"},
        {"role": "assistant", "content": "맑아요."},
        {"role": "user", "content": [{"type": "text", "text": "고마워요."}]},
    ]
    reply = await target.ask(target.chat(messages, user="김철수"))
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    await streamed(target, stop=["끝."])


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


CHECKS = (
    Check("korean", "keeps_hangul_in_chunks", keeps_hangul_in_chunks),
    Check("korean", "returns_hangul", returns_hangul),
    Check("korean", "returns_hangul_streamed", returns_hangul_streamed),
    Check("korean", "repeats_korean", repeats_korean),
    Check("korean", "takes_korean_names", takes_korean_names),
)
