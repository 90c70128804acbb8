"""Text of the simulated model, and how limits end it."""

from gateway.simulate.text import GenerationLimits, Prompt, answer, compose, digest, logprob


def test_digest_ignores_whitespace() -> None:
    assert digest("Say  hello.\n") == digest("Say hello.") != digest("Say hello!")


def test_question_sets_the_length() -> None:
    assert len(compose(Prompt((("user", "Give me 70 words"),)), 32)) == 70


def test_stop_string_across_tokens_is_removed_but_its_tokens_count() -> None:
    found = answer(["one", " tw", "o th", "ree"], GenerationLimits(10, stop=("three", "two")))
    assert (found.joined("content"), found.stop_string, found.finish, len(found.pieces)) == ("one ", "two", "stop", 3)


def test_reply_that_reaches_its_limit_ends_with_length() -> None:
    assert answer(["a", "b"], GenerationLimits(2)).finish == "length"
    assert answer(["a", "b"], GenerationLimits(3)).finish == "stop"


def test_reply_is_aborted_after_more_than_thirty_equal_tokens() -> None:
    assert not answer(["x"] * 30, GenerationLimits(100, repeat_limit=30)).broken
    assert len(answer([" x", "x\n"] * 40, GenerationLimits(100, repeat_limit=30)).pieces) == 31


def test_end_of_thought_token_separates_reasoning_from_content() -> None:
    found = answer(["hm", "</think>", "yes"], GenerationLimits(9), thinks=True)
    assert [(piece.kind, piece.text) for piece in found.pieces] == [
        ("thinking", "hm"),
        ("nothing", ""),
        ("content", "yes"),
    ]


def test_complete_tool_call_is_parsed_in_either_syntax() -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    assert answer([f"<tool_call>{call}", "</tool_call>"], GenerationLimits(9), tools=True).calls[0].arguments == {
        "a": 1
    }
    assert answer([call], GenerationLimits(9), tools=True, bare_json_calls=True).calls[0].name == "f"
    assert not answer([f"<tool_call>{call}", "</tool_call>"], GenerationLimits(1), tools=True).calls
    assert not answer([call], GenerationLimits(9), tools=False, bare_json_calls=True).calls


def test_top_logprobs_begin_with_the_token_itself() -> None:
    entry = logprob(" a", 2, keeps_empty=False)
    assert next(other["token"] for other in entry["top_logprobs"]) == " a"
    assert "top_logprobs" not in logprob("a", 0, keeps_empty=False)
    assert logprob("a", 0, keeps_empty=True)["top_logprobs"] == []
