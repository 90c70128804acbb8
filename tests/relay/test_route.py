"""The route of a fallback: to the backend that the tier names, or to its next one."""

from typing import Any

import pytest

from gateway import config
from gateway.relay.route import Route, fallback_route

MODELS = {"ollama": "small", "vllm": "Small", "cloud": "tiny"}


def tier(**changes: Any) -> config.Tier:
    document = {
        "llm_backend": "vllm",
        "backends": {
            "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"},
            "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:2"},
            "cloud": {"kind": "openai", "base_url": "http://127.0.0.1:3"},
        },
        "tiers": {"standard": {"models": MODELS, **changes}},
    }
    return config.build(document).tiers["standard"]


def route(backend: str) -> Route:
    return Route("standard", backend, MODELS[backend])


@pytest.mark.parametrize("backend", MODELS)
def test_tier_has_no_fallback_by_default(backend: str) -> None:
    assert fallback_route(tier(), backend) is None


@pytest.mark.parametrize(("backend", "other"), [("ollama", "vllm"), ("vllm", "cloud"), ("cloud", "ollama")])
def test_fallback_true_leads_to_the_next_backend_in_the_settings_order(backend: str, other: str) -> None:
    assert fallback_route(tier(fallback=True), backend) == route(other)


@pytest.mark.parametrize("backend", ["ollama", "cloud"])
def test_named_fallback_serves_every_other_backend(backend: str) -> None:
    assert fallback_route(tier(fallback="vllm"), backend) == route("vllm")


def test_backend_is_not_its_own_fallback() -> None:
    assert fallback_route(tier(fallback="vllm"), "vllm") is None
    assert fallback_route(tier(models={"vllm": "Small"}, fallback=True), "vllm") is None


@pytest.mark.parametrize(
    ("fallback", "backend", "other"),
    [
        (True, "ollama", "cloud"),
        (True, "vllm", "cloud"),
        (True, "cloud", "ollama"),
        ("vllm", "ollama", None),
        ("vllm", "cloud", "vllm"),
        ("cloud", "ollama", "cloud"),
    ],
)
def test_no_fallback_leads_from_one_engine_on_the_gpu_to_another(
    fallback: bool | str, backend: str, other: str | None
) -> None:
    found = fallback_route(tier(fallback=fallback), backend, frozenset({"ollama", "vllm"}))
    assert found == (None if other is None else route(other))
