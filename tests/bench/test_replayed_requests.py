"""Made-up requests have the sizes of the recorded ones, and their common beginnings."""

from typing import Any

import pytest

from gateway.bench.prompts import TokenRatio
from gateway.bench.replayed_requests import ReplayedRequests
from gateway.bench.target import BenchRequest
from gateway.telemetry.recording import RecordedExchange
from tests.bench.traffic import recorded, recording

RATIO = TokenRatio(2.0, 10.0)


def replayed(*exchanges: RecordedExchange, ratio: TokenRatio | None = RATIO, **options: Any) -> ReplayedRequests:
    return ReplayedRequests(recording(*exchanges), ratio, **options)


def words(request: BenchRequest) -> int:
    return sum(len(message["content"].split()) for message in request.messages)


def test_a_request_has_the_tokens_of_the_recorded_one_in_the_targets_own_count() -> None:
    """90 tokens beside the template's 10, at 2 tokens a word."""
    (made,) = replayed(recorded())
    assert words(made) == 45
    assert (made.max_tokens, made.stream, made.name) == (20, True, "standard")
    assert dict(made.parameters) == {"ignore_eos": True}


def test_without_a_count_of_the_target_a_word_is_a_token() -> None:
    assert words(replayed(recorded(), ratio=None)[0]) == 100


def test_what_was_refused_gets_the_usual_lengths() -> None:
    refused = recorded(prompt_tokens=None, completion_tokens=None, outcome="rejected", characters=800)
    made = replayed(recorded(), recorded(completion_tokens=40), refused)[2]
    assert words(made) == 100  # 800 characters are 200 tokens
    assert made.max_tokens == 30


def test_turns_of_a_conversation_begin_alike() -> None:
    lengths = (100, 140, 200)
    first, second, third = replayed(*[recorded(prompt_tokens=tokens, conversation="c") for tokens in lengths])
    assert [words(made) for made in (first, second, third)] == [45, 65, 95]
    assert second.messages[:1] == first.messages
    assert third.messages[:3] == second.messages
    assert [message["role"] for message in third.messages] == ["user", "assistant", "user", "assistant", "user"]


def test_a_conversation_that_became_shorter_keeps_its_beginning() -> None:
    made = replayed(*[recorded(prompt_tokens=tokens, conversation="c") for tokens in (100, 200, 140)])
    assert made[2].messages[0] == made[0].messages[0]
    assert words(made[2]) == 65
    assert made[2].messages[-1]["role"] == "user"


def test_other_conversations_have_other_texts() -> None:
    made = replayed(recorded(conversation="a"), recorded(conversation="b"), recorded(), recorded())
    assert len({item.messages[0]["content"] for item in made}) == 4


def test_a_common_system_message_is_common_again() -> None:
    prefix: dict[str, Any] = {"prefix": "p", "prefix_characters": 160}  # 40 tokens: 20 words
    one, other = replayed(recorded(conversation="a", **prefix), recorded(conversation="b", **prefix))
    assert one.messages[0] == other.messages[0]
    assert one.messages[0]["role"] == "system"
    assert len(one.messages[0]["content"].split()) == 20
    assert one.messages[1] != other.messages[1]
    assert words(one) == 45


def test_images_have_the_recorded_pixels_and_text_has_the_characters() -> None:
    made = replayed(recorded(), recorded(images=((10_000, 5), (None, 5)), prompt_tokens=9000))[1]
    assert len(made.images) == 2
    assert words(made) == 50  # 400 characters are 100 tokens
    assert int.from_bytes(made.images[0].data[16:20]) == 100
    assert int.from_bytes(made.images[1].data[16:20]) == 512


def test_plain_requests_stay_plain_and_tiers_are_sent_on_demand() -> None:
    made = replayed(recorded(stream=False, tier="pro"), sends_tiers=True, timeout=3.0, parameters={"temperature": 0})[0]
    assert (made.stream, made.model, made.timeout) == (False, "pro", 3.0)
    assert dict(made.parameters) == {"ignore_eos": True, "temperature": 0}
    assert replayed(recorded())[0].model == ""


def test_requests_are_the_same_each_time_and_differ_by_the_seed() -> None:
    one = replayed(recorded(conversation="a"))
    assert one[0] == one[-1] == next(iter(one)) == one[:1][0]
    assert one[0] != replayed(recorded(conversation="a"), seed=1)[0]
    with pytest.raises(IndexError):
        one[1]
