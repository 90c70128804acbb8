"""Requests for text completions, and their answers."""

import json
from typing import Any

import pytest

from gateway.chat.answer import Answer, ChosenLogprob, Delta, TokenLogprob, Usage
from gateway.chat.completion import MAX_COMPLETIONS, Completion
from gateway.dialects.dialect import ChatCall
from gateway.dialects.json_body import completed
from gateway.dialects.openai_chat import OpenAiChat
from gateway.dialects.openai_completions import OpenAiCompletions, TextForm
from gateway.errors import GatewayError

LIMIT = 1024 * 1024


def call(**fields: Any) -> ChatCall:
    body = json.dumps({"model": "standard", "prompt": "x", **fields}).encode()
    return OpenAiCompletions().parse(body, LIMIT)[0]


def parsed(**fields: Any) -> Completion:
    chat = call(**fields).chat
    assert isinstance(chat, Completion)
    return chat


def refusal(**fields: Any) -> tuple[str | None, str | None]:
    with pytest.raises(GatewayError) as caught:
        parsed(**fields)
    return caught.value.code, caught.value.param


def test_prompts_become_user_messages() -> None:
    assert [message.text for message in parsed(prompt=["a", "b"]).messages] == ["a", "b"]
    assert (parsed().prompt, parsed().max_tokens, parsed().echo) == ("x", 16, False)
    assert parsed(max_tokens=3, logprobs=0).top_logprobs == 0
    assert parsed(logprobs=5).logprobs is True
    assert parsed().logprobs is None


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"best_of": None, "suffix": None, "echo": False, "logprobs": None, "n": None},
        {"suffix": ""},
        {"user": "me", "unknown": [1], "logit_bias": {"1": 5}},
        {"max_tokens": 8.0},
        {"use_beam_search": False, "ignore_eos": True, "min_tokens": 2},
    ],
)
def test_fields_without_effect_are_accepted(fields: dict[str, Any]) -> None:
    assert parsed(**fields).prompt == "x"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": [1, 2]}, "unsupported_parameter", "prompt"),
        ({"prompt": [[1], [2]]}, "unsupported_parameter", "prompt"),
        ({"prompt": list(range(60_000))}, "unsupported_parameter", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": ["a", ""]}, "invalid_value", "prompt[1]"),
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"prompt": 5}, "invalid_value", "prompt"),
        ({"prompt": ["x"] * (MAX_COMPLETIONS + 1)}, "invalid_value", "prompt"),
        ({"prompt": ["x"] * (MAX_COMPLETIONS // 2 + 1), "n": 2}, "invalid_value", "prompt"),
        ({"n": 9}, "invalid_value", "n"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"logprobs": True}, "invalid_value", "logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"echo": True, "logprobs": 1}, "unsupported_parameter", "echo"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"guided_choice": ["a"]}, "unsupported_parameter", "guided_choice"),
        ({"prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
    ],
)
def test_fields_that_cannot_be_followed_are_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal(**fields) == (code, param)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "m", "prompt": "x", "other": 1e}', "invalid_json"),
        (b'{"model": "m", "prompt": ' + b"[" * 5000, "invalid_json"),
        (b'{"model": "m"}', "invalid_value"),
        (b'{"model": "m", "prompt": "' + b"x" * LIMIT + b'"}', "request_too_large"),
    ],
)
def test_bodies_that_are_not_requests_are_refused(body: bytes, code: str) -> None:
    with pytest.raises(GatewayError) as caught:
        OpenAiCompletions().parse(body, LIMIT)
    assert caught.value.code == code


def test_chats_api_does_not_take_a_prompt() -> None:
    with pytest.raises(GatewayError) as caught:
        OpenAiChat().parse(b'{"model": "m", "prompt": "x"}', LIMIT)
    assert caught.value.param == "messages"


def test_long_body_is_parsed_in_steps_to_the_same_request() -> None:
    body = json.dumps({"model": "m", "prompt": ["word " * 20_000] * 3}).encode()
    whole = OpenAiCompletions().parse(body, LIMIT)
    steps = OpenAiCompletions().parse_steps(body, LIMIT)
    next(steps)
    next(steps)
    assert completed(steps) == whole


def logprob(token: str) -> ChosenLogprob:
    return ChosenLogprob(token, -1.0, None, [TokenLogprob("other", -2.0)])


def test_offsets_of_a_stream_continue_over_its_events() -> None:
    renderer = TextForm("m", True, True).stream("1", 2)
    pieces = [
        renderer.render(Delta("ab", logprobs=[logprob("ab")])),
        renderer.render(Delta("c", logprobs=[logprob("c")])),
    ]
    shown = [json.loads(piece.removeprefix(b"data: "))["choices"][0]["logprobs"] for piece in pieces]
    assert [one["text_offset"] for one in shown] == [[0], [2]]
    assert shown[1]["top_logprobs"] == [{"c": -1.0, "other": -2.0}]


def test_text_of_the_fast_path_is_rendered_like_any_other() -> None:
    renderer = TextForm("m", True, False).stream("1", 2)
    before, after = renderer.around_text
    assert before + b"hi" + after == renderer.render(Delta("hi")) == renderer.splice([b"hi"])
    assert renderer.splice([b"a", b"b"]) == renderer.render(Delta("a")) + renderer.render(Delta("b"))
    assert renderer.keepalive() == before + after
    assert renderer.opening() == b""


def test_thoughts_are_not_part_of_the_text() -> None:
    renderer = TextForm("m", True, False).stream("1", 2)
    assert renderer.render(Delta(reasoning="note")) == renderer.keepalive()
    body = TextForm("m", False, False).answer("1", 2, Answer("t", "", "length", Usage(3, 4), [], None), lambda: None)  # type: ignore[arg-type, return-value]
    assert json.loads(body) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 2,
        "model": "m",
        "choices": [{"index": 0, "text": "t", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
