"""Only harmless words of an engine's error text are logged."""

import pytest

from gateway.engines.engine_reason import MAX_REASON, engine_reason
from gateway.engines.error_mapping import client_error


@pytest.mark.parametrize(
    "text",
    [
        "llama runner process has terminated: exit status 2",
        "llama runner process has terminated: signal: killed",
        "llama runner process has terminated: CUDA error: out of memory",
        "llama runner process no longer running: -1 error loading model",
        "llama runner process has terminated: GGML_ASSERT",
        "model requires more system memory (5.6 GiB) than is available (2.0 GiB)",
        (
            "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error, "
            "check … server logs for details"
        ),
        "timed out waiting for llama runner to start - progress 0.00",
        "memory layout cannot be allocated",
        "server busy, please try again. maximum pending requests exceeded",
        "an error was encountered while running the model: unexpected EOF",
        "EngineCore encountered an issue. See stack trace (above) for the root cause",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "EngineDeadError",
    ],
)
def test_reasons_of_ollama_and_vllm_are_kept(text: str) -> None:
    """As in Ollama's server/sched.go, llm/server.go and runner, and in vLLM's v1/engine/exceptions.py and PyTorch."""
    assert engine_reason(text.replace("…", "ollama")) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("unable to load model: /var/lib/models/blobs/sha256-12ab", "unable to load model"),
        ("the runner process died\r\n\x1b[31mwith signal\x00 9\u202e", "the runner process died"),
        ("model is loaded: 4111 1111 1111 1111", "model is loaded"),
        ("model is loaded: 41111111", "model is loaded"),
        ("failed to load model: secret-of-the-engine", "failed to load model"),
        ("failed to load model: model.of/the/engine@server=memory", "failed to load model"),
        ("failed to load model name of the engine", "failed to load model … of the engine"),
        ("engine process died at 10.0.0.5:8001", "engine process died at"),
        ("failed to load the model 'my system memory is out of' again", "failed to load the model"),
        ('failed to load the model "my system memory is out of', "failed to load the model"),
        ("llama runner process has terminated" + " GGML_ASSERT" * 500, None),
    ],
)
def test_only_known_words_outside_of_quotes_are_kept(text: str, kept: str | None) -> None:
    found = engine_reason(text)
    assert found is not None
    assert len(found) <= MAX_REASON
    assert found.isascii() or "…" in found
    assert found.isprintable()
    assert found == kept or kept is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Tell me about my dog",
        "my password is hunter2 and my card is 4111 1111 1111 1111",
        "Internal Server",
        "sk-0123456789abcdef",
        "모델",
        "memory",
        "한국어 model 한국어 memory 한국어",
        "there is no reason for it to be so",
    ],
)
def test_other_text_is_not_kept(text: str) -> None:
    assert engine_reason(text) is None


@pytest.mark.parametrize(
    "text", ["a " * 10**6, "memory " * 10**6, "1 " * 10**6, "(" * 10**6, "'" * 10**6, "model 1" * 10**6]
)
def test_long_text_costs_little(text: str) -> None:
    found = engine_reason(text)
    assert found is None or len(found) <= MAX_REASON


TEXT = b'{"error": "llama runner process has terminated: exit status 2"}'


@pytest.mark.parametrize(("status", "is_kept"), [(500, True), (502, True), (503, True), (400, False), (404, False)])
def test_reason_is_kept_for_failures_of_the_engine_alone(status: int, is_kept: bool) -> None:
    """Refusals of requests repeat them."""
    error = client_error(status, TEXT)
    assert error.engine_reason == ("llama runner process has terminated: exit status 2" if is_kept else None)
    assert b"runner" not in error.envelope()
