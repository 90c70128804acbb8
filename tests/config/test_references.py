"""Names in the settings: references without regard to case, unknown names, and names that clash."""

import pytest

from tests.config.harness import TIER, assert_refused, load

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_references_do_not_depend_on_case() -> None:
    settings = load(
        "llm_backend: VLLM\n"
        "default_tier: a\n"
        "tiers: {A: {models: {Ollama: x, vLLM: y}, limits: {VLLM: {concurrency: 1}}}}"
    )
    assert settings.llm_backend == "vllm"
    assert settings.default_tier == "A"
    assert settings.tiers["A"].models == {"ollama": "x", "vllm": "y"}
    assert settings.limits_for("A", "vllm").concurrency == 1


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (
            "rollback_to: vlm",
            "rollback_to",
            "'vlm' is not a backend; expected one of: ollama, vllm; did you mean 'vllm'?",
        ),
        ("default_tier: ultra", "default_tier", "'ultra' is not a tier; expected one of: standard"),
        (TIER % ", backend: box", "tiers.pro.backend", "'box' is not a backend; expected one of: ollama, vllm"),
        (TIER % ", limits: {box: {}}", "tiers.pro.limits.box", "'box' is not a backend"),
        (TIER % ", aliases: [PRO]", "tiers.pro.aliases[0]", "'PRO' is already used by tiers.pro"),
        (TIER % ", aliases: [auto]", "tiers.pro.aliases[0]", "'auto' is reserved"),
        (
            "tiers: {pro: {models: {ollama: a}}, Pro: {models: {ollama: b}}}",
            "tiers.Pro",
            "'Pro' is already used by tiers.pro",
        ),
        ("tiers: {auto: {models: {ollama: a}}}", "tiers.auto", "'auto' is reserved"),
        (
            "tiers: {a: {models: {ollama: x}, aliases: ['*']}, b: {models: {ollama: y}, aliases: ['*']}}",
            "tiers.b.aliases[0]",
            "already used by tiers.a",
        ),
        ("embeddings: {e: {backend: box, model: m}}", "embeddings.e.backend", "'box' is not a backend"),
        (
            "embeddings: {standard: {backend: ollama, model: m}}",
            "embeddings.standard",
            "'standard' is already used by tiers.standard",
        ),
        ("rerankers: {e: {backend: box, model: m}}", "rerankers.e.backend", "'box' is not a backend"),
        (
            "rerankers: {e: {backend: ollama, model: m}}",
            "rerankers.e.backend",
            "'ollama' is of kind ollama; expected a backend of kind vllm",
        ),
        (
            "embeddings: {e: {backend: vllm, model: m}}\nrerankers: {E: {backend: vllm, model: m}}",
            "rerankers.E",
            "'E' is already used by embeddings.e",
        ),
        ("backends: {ollama: {}, Ollama: {}}", "backends.Ollama", "'Ollama' and 'ollama' differ only in case"),
    ],
)
def test_unknown_or_clashing_name_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)
