"""Programs on text completions of openai-python."""

from typing import Any

import openai
import pytest

from tests.e2e.programs.openai_python import client_of
from tests.e2e.programs.target import Program, Target

PROMPT = "The largest animal is"
TWO = [PROMPT, "The smallest animal is"]
SHORT: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


def plain_and_streamed(target: Target) -> None:
    with client_of(target) as client:
        answer = client.completions.create(model=target.model, prompt=PROMPT, **SHORT)
        usage: Any = {"include_usage": True}
        events = list(
            client.completions.create(model=target.model, prompt=PROMPT, stream=True, stream_options=usage, **SHORT)
        )
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", target.model, "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert "".join(event.choices[0].text for event in events if event.choices) == answer.choices[0].text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage == answer.usage


def default_limit(target: Target) -> None:
    with client_of(target) as client:
        answer = client.completions.create(model=target.model, prompt=PROMPT, seed=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


def prompts_and_choices(target: Target) -> None:
    with client_of(target) as client:
        answer = client.completions.create(model=target.model, prompt=TWO, n=2, echo=True, **SHORT)
        events = list(client.completions.create(model=target.model, prompt=TWO, stream=True, **SHORT))
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, [TWO[0], TWO[0], TWO[1], TWO[1]], strict=True):
        assert choice.text.startswith(prompt)
    assert {event.choices[0].index for event in events} == {0, 1}


def logprobs(target: Target) -> None:
    with client_of(target) as client:
        answer = client.completions.create(model=target.model, prompt=PROMPT, logprobs=2, **SHORT)
    choice = answer.choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == choice.text
    assert len(found.token_logprobs) == len(found.top_logprobs) == 6
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))


def refused(target: Target) -> None:
    with client_of(target) as client, pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=target.model, prompt=PROMPT, suffix="the end.")
    assert caught.value.param == "suffix"


CLIENT = "completions of openai-python"
PROGRAMS = (
    Program(CLIENT, "plain and streamed with usage", plain_and_streamed),
    Program(CLIENT, "16 tokens by default", default_limit),
    Program(CLIENT, "list of prompts, n, echo, streamed", prompts_and_choices),
    Program(CLIENT, "logprobs", logprobs),
    Program(CLIENT, "suffix is BadRequestError", refused),
)
