"""How an Ollama is told to load, and what it says that it has loaded; words recorded from 0.24 and 0.33."""

import json

import pytest

from gateway.engines.ollama_loading import MIN_KEEP_ALIVE, OllamaLoading, canonical, loaded

PS = (
    b'{"models":[{"name":"llama:latest","model":"llama:latest","size":3021312,"digest":"9a9a","expires_at":"2026-11-21T17:45:07.453677062Z",'
    b'"size_vram":0,"context_length":4096},{"name":"Library/Qwen3:8b","expires_at":"2319-03-02T17:45:07.5+01:00"}]}'
)


def test_what_is_loaded_is_told_by_canonical_name_and_time() -> None:
    assert loaded(PS) == {"llama": pytest.approx(1795283107.453677), "qwen3:8b": pytest.approx(11018565907.5)}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"models":1}', b'{"models":[{}]}'])
def test_what_is_no_such_list_tells_nothing(body: bytes) -> None:
    assert loaded(body) is None


@pytest.mark.parametrize("when", ["", "soon", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00Z"])
def test_time_that_cannot_be_read_is_long_past(when: str) -> None:
    (time,) = (loaded(json.dumps({"models": [{"name": "a", "expires_at": when}]}).encode()) or {}).values()
    assert time <= 0


def test_nothing_is_loaded() -> None:
    assert loaded(b'{"models":[]}') == loaded(b'{"models":null}') == {}


def test_load_asks_for_nothing_and_sends_what_requests_send() -> None:
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
def test_keep_alive_of_nothing_is_never_sent_with_a_load(keep_alive: str | int, sent: str | int) -> None:
    assert json.loads(OllamaLoading(keep_alive).body("a", False))["keep_alive"] == sent


def test_canonical_name_is_that_of_all_that_ollama_takes() -> None:
    assert {
        canonical(name)
        for name in ("Llama", "llama:latest", "library/llama", "registry.ollama.ai/library/llama:latest")
    } == {"llama"}
