"""Warnings about settings that work but are probably unintended."""

import pytest

from tests.config.harness import load, warned

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_open_gateway_is_reported() -> None:
    assert load().warnings == (
        "GATEWAY_API_KEYS: not set, so the gateway is open: it accepts requests with any key or none",
    )


def test_model_name_of_two_tiers_is_reported() -> None:
    settings = load("tiers: {a: {models: {ollama: m, vllm: n}}, b: {models: {ollama: m, vllm: o}}}")
    assert warned(settings) == [
        "tiers.b.models: 'm' is also a model of tier 'a'; a request for that name is served by 'a'"
    ]


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("backends: {ollama: {}, box: {kind: vllm}}", {}, None),
        (
            "backends: {ollama: {}, box: {kind: vllm}}\ntiers: {a: {models: {ollama: x}}}",
            {},
            "backends.box: no tier uses it",
        ),
        (
            "tiers: {a: {models: {ollama: x}, limits: {vllm: {}}}}",
            {},
            "tiers.a.limits.vllm: ignored: the tier has no model on this backend",
        ),
        (
            "tiers: {a: {models: {ollama: x}, fallback: true}}",
            {},
            "tiers.a.fallback: true, but only one backend has a model",
        ),
        ("llm_backend: vllm\ntiers: {a: {models: {vllm: x}}}", {}, "backends.ollama: no tier uses it"),
        (
            "rollback_to: ollama\nbackends: {ollama: {}, vllm: {discover: true}}\ntiers: {a: {models: {ollama: x}}}",
            {},
            None,
        ),
        (
            "llm_backend: vllm\ntiers: {a: {models: {vllm: x}}}",
            {},
            "tiers.a.models: no model for 'ollama', so a rollback does not move",
        ),
        (
            "backends: {ollama: {max_concurrency: 2, model_concurrency: 3}}",
            {},
            "backends.ollama.model_concurrency: 3 is above max_concurrency",
        ),
        (None, {"GATEWAY_API_KEYS": "short"}, "GATEWAY_API_KEYS: a key has fewer than 16 characters"),
        (
            None,
            {"GATEWAY_COMMIT_AFTER": "3"},
            "GATEWAY_COMMIT_AFTER: ignored: unknown setting; did you mean 'GATEWAY__COMMIT_AFTER'?",
        ),
        (
            None,
            {"GATEWAY_APIKEYS": "x"},
            "GATEWAY_APIKEYS: ignored: unknown setting; did you mean 'GATEWAY_API_KEYS'?",
        ),
        ("max_waiting_bytes: 20MiB", {}, None),
        (
            None,
            {"GATEWAY__MAX_WAITING_BYTES": "20MB"},
            "max_waiting_bytes: 20000000 is below max_body; a larger body is always refused",
        ),
        (None, {"OLLAMA_BASE_URL": "localhost:8080"}, "backends.ollama: its address is the gateway's own"),
        (None, {"OLLAMA_BASE_URL": "dns://localhost:8080"}, "backends.ollama: its address is the gateway's own"),
    ],
)
def test_probably_unintended_setting_is_reported(text: str | None, environ: dict[str, str], words: str | None) -> None:
    found = warned(load(text, environ))
    assert any(words in line for line in found) if words else found == []


def test_what_is_not_served_while_another_engine_has_the_gpu_is_reported() -> None:
    text = (
        "exclusive: true\nbackends: {ollama: {}, vllm: {}}\n"
        "tiers: {a: {models: {ollama: x, vllm: y}, fallback: true}, b: {models: {ollama: z}, backend: ollama}}\n"
        "embeddings: {e: {backend: ollama, model: e}}"
    )
    assert warned(load(text)) == [
        "tiers.a.fallback: no effect: the other engines have no GPU meanwhile (exclusive)",
        "tiers.b.backend: its requests are refused while another engine has the GPU (exclusive)",
        "embeddings.e: its requests are refused while another engine has the GPU (exclusive)",
    ]


def test_commands_without_exclusive_are_reported() -> None:
    text = "backends: {ollama: {}, vllm: {stop: a, start: b}}\ntiers: {a: {models: {ollama: x, vllm: y}}}"
    assert "exclusive: false, so the commands stop and start of the backends are never run" in warned(load(text))
