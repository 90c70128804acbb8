"""The pretended model's words, and how limits cut them."""

from gateway.simulate.text import GenerationLimits, Prompt, answer, compose, digest, logprob


def test_digest_sees_words_and_no_blanks() -> None:
    assert digest("Say  hello.\n") == digest("Say hello.") != digest("Say hello!")


def test_length_is_asked_for_in_the_question() -> None:
    assert len(compose(Prompt((("user", "Give me 70 words"),)), 32)) == 70


def test_stop_string_across_tokens_ends_the_reply_before_it_and_counts_its_tokens() -> None:
    found = answer(["one", " tw", "o th", "ree"], GenerationLimits(10, stop=("three", "two")))
    assert (found.joined("content"), found.stop_string, found.finish, len(found.pieces)) == ("one ", "two", "stop", 3)


def test_reply_as_long_as_its_limit_ends_for_length() -> None:
    assert answer(["a", "b"], GenerationLimits(2)).finish == "length"
    assert answer(["a", "b"], GenerationLimits(3)).finish == "stop"


def test_thirty_equal_tokens_are_borne_and_one_more_is_not() -> None:
    assert not answer(["x"] * 30, GenerationLimits(100, gives_up_after=30)).broken
    assert len(answer([" x", "x\n"] * 40, GenerationLimits(100, gives_up_after=30)).pieces) == 31


def test_end_of_thought_parts_reasoning_from_content_and_is_neither() -> None:
    found = answer(["hm", "</think>", "yes"], GenerationLimits(9), thinks=True)
    assert [(piece.kind, piece.text) for piece in found.pieces] == [
        ("thinking", "hm"),
        ("nothing", ""),
        ("content", "yes"),
    ]


def test_call_is_read_in_either_syntax_and_only_when_whole() -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    assert answer([f"<tool_call>{call}", "</tool_call>"], GenerationLimits(9), tools=True).calls[0].arguments == {
        "a": 1
    }
    assert answer([call], GenerationLimits(9), tools=True, bare_json_calls=True).calls[0].name == "f"
    assert not answer([f"<tool_call>{call}", "</tool_call>"], GenerationLimits(1), tools=True).calls
    assert not answer([call], GenerationLimits(9), tools=False, bare_json_calls=True).calls


def test_alternatives_begin_with_the_token_itself() -> None:
    entry = logprob(" a", 2, keeps_empty=False)
    assert next(other["token"] for other in entry["top_logprobs"]) == " a"
    assert "top_logprobs" not in logprob("a", 0, keeps_empty=False)
    assert logprob("a", 0, keeps_empty=True)["top_logprobs"] == []
