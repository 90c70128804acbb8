"""The settings tree: merged limits, immutability, and hidden secrets."""

import pytest
from pydantic import ValidationError

from tests.config.harness import EXAMPLE, SECRET, load

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_limits_of_a_tier_override_those_of_the_backend() -> None:
    settings = load(EXAMPLE)
    assert settings.limits_for("pro", "vllm").concurrency == 20
    assert settings.limits_for("standard", "vllm").concurrency is None
    assert settings.limits_for(settings.tiers["pro"], settings.backends["vllm"]).max_concurrency == 128


def test_lower_max_concurrency_lowers_the_other_concurrencies() -> None:
    settings = load(
        "tiers: {a: {models: {ollama: x, vllm: y}, limits: {vllm: {max_concurrency: 8, idle_timeout: 5m}}}}"
    )
    limits = settings.limits_for("a", "vllm")
    assert (limits.max_concurrency, limits.model_concurrency, limits.vision_concurrency, limits.idle_timeout) == (
        8,
        8,
        8,
        300.0,
    )
    assert settings.backends["vllm"].limits.max_concurrency == 128


def test_settings_are_immutable() -> None:
    settings = load(EXAMPLE)
    for part, name in (
        (settings, "port"),
        (settings.backends["vllm"], "kind"),
        (settings.tiers["pro"].limits["vllm"], "concurrency"),
    ):
        with pytest.raises(ValidationError):
            setattr(part, name, 1)


def test_repr_of_settings_hides_keys() -> None:
    assert SECRET not in repr(load(environ={"GATEWAY_API_KEYS": SECRET, "VLLM_API_KEY": SECRET}))
