"""The canonical request for text completions."""

from gateway.chat.completion import Completion, prompt_messages
from gateway.chat.parameter_policy import ParameterPolicy
from gateway.rollout.canary import canary_bucket


def completion(*prompts: str) -> Completion:
    return Completion(model="m", messages=prompt_messages([*prompts]), echo=True)


def test_each_prompt_becomes_a_request_of_its_own() -> None:
    found = completion("a", "b").for_each_prompt()
    assert [(one.prompt, len(one.messages), one.echo) for one in found] == [("a", 1, True), ("b", 1, True)]


def test_parameters_of_a_tier_apply_and_keep_the_kind() -> None:
    applied = ParameterPolicy({"temperature": 0.5}, {"seed": 3}, [], 8).apply(completion("a"))
    assert isinstance(applied, Completion)
    assert (applied.temperature, applied.seed, applied.token_limit, applied.echo) == (0.5, 3, 8, True)


def test_canary_bucket_depends_on_the_prompt() -> None:
    buckets = {prompt: canary_bucket("key", b"", completion(prompt), 1_000_000) for prompt in ("a", "b", "c")}
    assert len(set(buckets.values())) == 3
    assert canary_bucket("key", b"", completion("a"), 1_000_000) == buckets["a"]
