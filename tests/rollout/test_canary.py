"""Every turn of a conversation has the same canary bucket."""

import json
from typing import Any

import pytest

from gateway.chat.request import Chat
from gateway.dialects.openai_chat_request import decode
from gateway.rollout.canary import WHOLE_IMAGE, canary_bucket

BUCKETS = 10_000


def chat(*messages: tuple[str, Any]) -> Chat:
    return decode(
        json.dumps(
            {"model": "m", "messages": [{"role": role, "content": content} for role, content in messages]}
        ).encode(),
        2**24,
    )


def with_image(payload: str) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": "Look"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}},
    ]


def bucket(asked: Chat, key_id: str = "key", session: bytes = b"") -> int:
    return canary_bucket(key_id, session, asked, BUCKETS)


FIRST = (("system", "Be brief."), ("user", "Hello"))


def test_every_turn_of_a_conversation_has_the_bucket_of_the_first() -> None:
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
    ids=["system-message", "user-message", "no-system-message", "other-role", "same-text-joined"],
)
def test_different_beginning_is_a_different_conversation(other: tuple[tuple[str, str], ...]) -> None:
    assert bucket(chat(*other)) != bucket(chat(*FIRST))


def test_images_of_the_first_user_message_identify_the_conversation() -> None:
    small, large = "A" * 100, "B" * WHOLE_IMAGE
    found = {
        bucket(chat(("user", with_image(payload))))
        for payload in (small, small[:-1] + "C", large, large + "BBBB", large[:-1] + "C", "C" + large[1:])
    }
    assert len(found) == 6
    assert bucket(chat(("user", with_image(large)))) == bucket(
        chat(("user", with_image(large)), ("assistant", "A cat"), ("user", "Sure?"))
    )


def test_session_takes_precedence_over_the_messages() -> None:
    assert bucket(chat(("user", "a")), session=b"s") == bucket(chat(("user", "b")), session=b"s")
    assert bucket(chat(("user", "a")), session=b"s") != bucket(chat(("user", "a")), session=b"t")


def test_keys_do_not_share_conversations() -> None:
    assert bucket(chat(*FIRST), "one") != bucket(chat(*FIRST), "two")
    assert bucket(chat(*FIRST), "one", b"1") != bucket(chat(*FIRST), "two", b"1")


def test_conversation_without_a_user_message_has_a_bucket() -> None:
    assert bucket(chat(("system", "a"))) == bucket(chat(("system", "a"), ("assistant", "b")))


def test_conversations_are_spread_evenly_over_the_buckets() -> None:
    """A tenth of 4,000 conversations is in a tenth of the buckets, within five deviations."""
    below = sum(bucket(chat(("user", str(number)))) < BUCKETS // 10 for number in range(4000))
    assert 400 - 95 < below < 400 + 95


def test_text_that_looks_like_the_next_message_is_another_conversation() -> None:
    one = (("system", "a"), ("user", "buserc"))
    assert bucket(chat(*one)) != bucket(chat(("system", "auserb"), ("user", "c")))
