"""A conversation has one bucket from its first turn to its last."""

import json
from typing import Any

import pytest

from gateway.chat.request import Chat
from gateway.dialects.openai_chat import decode
from gateway.rollout.canary import WHOLE_IMAGE, canary_bucket

BUCKETS = 10_000


def chat(*messages: tuple[str, Any]) -> Chat:
    return decode(
        json.dumps(
            {"model": "m", "messages": [{"role": role, "content": content} for role, content in messages]}
        ).encode(),
        2**24,
    )


def picture(payload: str) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}},
    ]


def bucket(asked: Chat, key_id: str = "key", session: bytes = b"") -> int:
    return canary_bucket(key_id, session, asked, BUCKETS)


FIRST = (("system", "Be brief."), ("user", "Hello"))


def test_every_turn_of_a_conversation_has_the_bucket_of_its_first() -> None:
    first = bucket(chat(*FIRST))
    assert bucket(chat(*FIRST, ("assistant", "Hi"), ("user", "And then?"))) == first
    assert bucket(chat(*FIRST, ("assistant", "Hi"), ("system", "Summary: …"), ("user", "More"))) == first


@pytest.mark.parametrize(
    "other",
    [
        (("system", "Be long."), ("user", "Hello")),
        (("system", "Be brief."), ("user", "Hello!")),
        (("user", "Hello"),),
        (("user", "Be brief."), ("user", "Hello")),
        (("system", "Be brief.Hello"), ("user", "")),
    ],
)
def test_another_beginning_is_another_conversation(other: tuple[tuple[str, str], ...]) -> None:
    assert bucket(chat(*other)) != bucket(chat(*FIRST))


def test_images_of_the_first_question_count() -> None:
    small, large = "A" * 100, "B" * WHOLE_IMAGE
    found = {
        bucket(chat(("user", picture(payload))))
        for payload in (small, small[:-1] + "C", large, large + "BBBB", large[:-1] + "C", "C" + large[1:])
    }
    assert len(found) == 6
    assert bucket(chat(("user", picture(large)))) == bucket(
        chat(("user", picture(large)), ("assistant", "A cat"), ("user", "Sure?"))
    )


def test_session_counts_more_than_words() -> None:
    assert bucket(chat(("user", "a")), session=b"s") == bucket(chat(("user", "b")), session=b"s")
    assert bucket(chat(("user", "a")), session=b"s") != bucket(chat(("user", "a")), session=b"t")


def test_keys_do_not_share_conversations() -> None:
    assert bucket(chat(*FIRST), "one") != bucket(chat(*FIRST), "two")
    assert bucket(chat(*FIRST), "one", b"1") != bucket(chat(*FIRST), "two", b"1")


def test_conversation_without_a_question_has_one_too() -> None:
    assert bucket(chat(("system", "a"))) == bucket(chat(("system", "a"), ("assistant", "b")))


def test_buckets_are_even() -> None:
    """Of 4,000 conversations a tenth lies below a tenth of the buckets, give or take five standard deviations."""
    below = sum(bucket(chat(("user", str(number)))) < BUCKETS // 10 for number in range(4000))
    assert 400 - 95 < below < 400 + 95
