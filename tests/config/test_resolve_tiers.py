"""Resolution of tiers: models, fallbacks, overrides and parameters."""

import pytest

from tests.config.harness import TIER, assert_refused

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (
            "tiers: {pro: {models: {vllm: b}}}\nllm_backend: ollama",
            "tiers.pro.models",
            "tier 'pro' has no model for 'ollama'",
        ),
        (
            "tiers: {pro: {models: {ollama: b}, backend: vllm}}",
            "tiers.pro.models",
            "tier 'pro' is pinned to 'vllm' but has no model for it",
        ),
        (
            "tiers: {pro: {models: {ollama: b}, fallback: vllm}}",
            "tiers.pro.fallback",
            "tier 'pro' has no model for 'vllm'",
        ),
        (TIER % ", backend: vllm, fallback: vllm", "tiers.pro.fallback", "pinned to 'vllm'; expected another backend"),
        (
            TIER % ", limits: {vllm: {model_concurrency: auto}}",
            "tiers.pro.limits.vllm.model_concurrency",
            "got 'auto' for kind vllm; expected a whole number",
        ),
        (TIER % ", params: {force: {model: x}}", "tiers.pro.params.force.model", "a tier cannot change 'model'"),
        (
            TIER % ", params: {force: {seed: 1}, drop: [seed]}",
            "tiers.pro.params.drop[0]",
            "'seed' is also under force",
        ),
    ],
)
def test_contradictory_tier_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)
