"""Tests of loading models on Ollama; answers recorded from 0.24 and 0.33."""

import json

import pytest

from gateway.engines.ollama_loading import MIN_KEEP_ALIVE, OllamaLoading, canonical, loaded

PS = (
    b'{"models":[{"name":"llama:latest","model":"llama:latest","size":3021312,"digest":"9a9a",'
    b'"expires_at":"2026-11-21T17:45:07.453677062Z",'
    b'"size_vram":0,"context_length":4096},{"name":"Library/Qwen3:8b","expires_at":"2319-03-02T17:45:07.5+01:00"}]}'
)


def test_loaded_models_have_canonical_names_and_expiry_times() -> None:
    assert loaded(PS) == {"llama": pytest.approx(1795283107.453677), "qwen3:8b": pytest.approx(11018565907.5)}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"models":1}', b'{"models":[{}]}'])
def test_invalid_list_is_none(body: bytes) -> None:
    assert loaded(body) is None


@pytest.mark.parametrize("when", ["", "soon", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00Z"])
def test_invalid_expiry_time_is_in_the_past(when: str) -> None:
    (time,) = (loaded(json.dumps({"models": [{"name": "a", "expires_at": when}]}).encode()) or {}).values()
    assert time <= 0


def test_empty_list_means_no_loaded_model() -> None:
    assert loaded(b'{"models":[]}') == loaded(b'{"models":null}') == {}


def test_load_request_has_no_content_and_the_operators_settings() -> None:
    assert json.loads(OllamaLoading().body("a", False)) == {"model": "a", "messages": [], "stream": False}
    assert json.loads(OllamaLoading("10m", 8192).body("a", True)) == {
        "model": "a",
        "input": [],
        "options": {"num_ctx": 8192},
        "keep_alive": "10m",
    }


@pytest.mark.parametrize(
    ("keep_alive", "sent"),
    [(0, MIN_KEEP_ALIVE), ("0", MIN_KEEP_ALIVE), ("0s", MIN_KEEP_ALIVE), (-1, -1), ("10s", "10s")],
)
def test_load_request_never_sends_a_zero_keep_alive(keep_alive: str | int, sent: str | int) -> None:
    assert json.loads(OllamaLoading(keep_alive).body("a", False))["keep_alive"] == sent


def test_all_spellings_that_ollama_accepts_have_one_canonical_name() -> None:
    assert {
        canonical(name)
        for name in ("Llama", "llama:latest", "library/llama", "registry.ollama.ai/library/llama:latest")
    } == {"llama"}
