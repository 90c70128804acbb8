"""Model names of clients, and the routes that they select."""

from typing import Any

import pytest

from gateway import config
from gateway.api.model_names import ModelNames
from gateway.errors import ModelNotFound
from gateway.relay.route import Route
from gateway.rollout.state import Rollout

DOCUMENT: dict[str, Any] = {
    "llm_backend": "vllm",
    "backends": {
        "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:11434"},
        "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:8001"},
    },
    "tiers": {
        "Standard": {
            "models": {"ollama": "qwen:2b", "vllm": "Qwen/Small"},
            "aliases": ["gpt-4o-mini", {"name": "background", "listed": False}],
        },
        "pinned": {"models": {"ollama": "qwen:8b", "vllm": "Qwen/Small"}, "backend": "ollama", "aliases": ["gpt-4o"]},
    },
    "default_tier": "pinned",
}


def model_names(**changes: Any) -> ModelNames:
    return ModelNames(config.build(DOCUMENT | changes))


def route_of(name: str, **changes: Any) -> Route:
    """Return the route of a request for `name` before any roll-out change."""
    return Rollout(config.build(DOCUMENT | changes)).tiers[tier_of(model_names(**changes), name)].route


def tier_of(model_names: ModelNames, name: str) -> str:
    tier = model_names.tier(name)
    assert tier is not None
    return tier.name


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("standard", Route("Standard", "vllm", "Qwen/Small")),
        ("STANDARD", Route("Standard", "vllm", "Qwen/Small")),
        ("gpt-4o-mini", Route("Standard", "vllm", "Qwen/Small")),
        ("GPT-4o-Mini", Route("Standard", "vllm", "Qwen/Small")),
        ("background", Route("Standard", "vllm", "Qwen/Small")),
        ("pinned", Route("pinned", "ollama", "qwen:8b")),
        ("qwen:2b", Route("Standard", "vllm", "Qwen/Small")),
        ("qwen:8b", Route("pinned", "ollama", "qwen:8b")),
        ("qwen/small", Route("Standard", "vllm", "Qwen/Small")),
    ],
)
def test_name_selects_its_route(name: str, route: Route) -> None:
    assert route_of(name) == route


@pytest.mark.parametrize("name", ["auto", "Auto", "AUTO"])
def test_auto_leaves_the_tier_to_the_request(name: str) -> None:
    assert model_names().tier(name) is None
    starred = {"a": {"models": {"vllm": "m"}, "aliases": [{"name": "*", "priority": "batch"}]}}
    found = model_names(tiers=starred, default_tier="a")
    assert found.tier(name) is None
    assert not found.is_batch(name)


def test_llm_backend_moves_all_tiers_that_are_not_pinned() -> None:
    assert route_of("standard", llm_backend="ollama") == Route("Standard", "ollama", "qwen:2b")
    assert route_of("pinned", llm_backend="ollama").backend == "ollama"


def test_backends_own_name_of_a_model_works_whichever_backend_serves() -> None:
    """A program that names vLLM's model still works after a rollback."""
    assert route_of("Qwen/Small", llm_backend="ollama") == Route("Standard", "ollama", "qwen:2b")


def test_public_name_takes_precedence_over_a_backends_name() -> None:
    tiers = {"a": {"models": {"vllm": "b"}}, "b": {"models": {"vllm": "c"}}}
    assert tier_of(model_names(tiers=tiers, default_tier="a"), "b") == "b"


@pytest.mark.parametrize("name", ["nope", "*", "gpt-4", "standard ", "", "qwen"])
def test_error_for_an_unknown_name_lists_the_public_names(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        model_names().tier(name)
    assert caught.value.param == "model"
    assert "'Standard', 'gpt-4o-mini', 'pinned', 'gpt-4o'" in caught.value.message
    assert "background" not in caught.value.message
    assert "Qwen" not in caught.value.message


def test_unknown_name_is_not_echoed() -> None:
    with pytest.raises(ModelNotFound) as caught:
        model_names().tier("a-secret-that-was-sent")
    assert "a-secret" not in caught.value.message


def test_wildcard_alias_accepts_any_other_name_and_is_not_listed() -> None:
    tiers = {"a": {"models": {"vllm": "m"}}, "b": {"models": {"vllm": "n"}, "aliases": ["*"]}}
    found = model_names(tiers=tiers, default_tier="a")
    assert tier_of(found, "whatever") == "b"
    assert tier_of(found, "a") == "a"
    assert [public.name for public in found.public_models()] == ["a", "b"]


def test_tiers_and_listed_aliases_are_public_in_the_files_order() -> None:
    assert [public.name for public in model_names().public_models()] == ["Standard", "gpt-4o-mini", "pinned", "gpt-4o"]


def test_wildcard_alias_with_batch_priority_counts_for_every_name_that_is_not_known() -> None:
    tiers = {
        "a": {"models": {"vllm": "m"}, "aliases": ["chat", {"name": "Night", "priority": "batch"}]},
        "b": {"models": {"vllm": "n"}, "aliases": [{"name": "*", "priority": "batch"}]},
    }
    found = model_names(tiers=tiers, default_tier="a")
    assert found.has_batch
    batch = [name for name in ("whatever", "Night", "NIGHT", "a", "A", "chat", "m", "auto") if found.is_batch(name)]
    assert batch == ["whatever", "Night", "NIGHT"]


def test_wildcard_alias_without_a_priority_is_interactive() -> None:
    tiers = {"a": {"models": {"vllm": "m"}, "aliases": ["*", {"name": "night", "priority": "batch"}]}}
    found = model_names(tiers=tiers, default_tier="a")
    assert (found.is_batch("whatever"), found.is_batch("night")) == (False, True)
    assert not model_names().has_batch
