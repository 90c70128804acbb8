"""Tests of each engine's embeddings: requests, answers and errors."""

import json
from typing import Any

import pytest

from gateway.chat.embedding import Embedding
from gateway.dialects.json_body import completed
from gateway.engines.embeddings import LONG_ANSWER, STEP, Embedded, Embedder, OllamaEmbedder, OpenAiEmbedder
from gateway.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    UnsupportedParameter,
    UpstreamError,
)
from tests.golden import Recording, load
from tests.simulate.replaying import recorded

EMBEDDERS: dict[str, Embedder] = {"ollama": OllamaEmbedder(), "vllm": OpenAiEmbedder()}
PATHS = ("/api/embed", "/v1/embeddings")
RECORDINGS = [
    recording
    for server in ("ollama-0.33-embed", "ollama-0.24-embed", "vllm-embed")
    for recording in recorded(server).values()
]
CHATS_ONLY = [
    recording for server in ("vllm-0.32.0", "ollama-0.33", "ollama-0.24") for recording in load(server).values()
]


def embedder(recording: Recording) -> Embedder:
    return EMBEDDERS[recording.server.partition("-")[0]]


def on_engines_path(recordings: list[Recording]) -> list[Recording]:
    """Return the recordings of the path that the gateway uses for that engine."""
    return [recording for recording in recordings if recording.path == embedder(recording).path]


def recording_id(recording: Recording) -> str:
    return f"{recording.server}/{recording.case}"


def rendered(embedder: Embedder, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        embedder.render(Embedding(**{"model": "gateway-name", "input": "a"} | fields), "server-name")
    )
    return body


# Requests


def test_ollama_request_sends_texts_as_a_list_and_disables_truncation() -> None:
    assert rendered(OllamaEmbedder()) == {"model": "server-name", "input": ["a"], "truncate": False}
    assert rendered(OllamaEmbedder(), input=["a", "b"], dimensions=8, encoding_format="base64")["dimensions"] == 8


def test_ollama_request_carries_the_operators_settings() -> None:
    body = rendered(OllamaEmbedder("30m", 8192, truncate=True))
    assert body == {"model": "server-name", "input": ["a"], "keep_alive": "30m", "options": {"num_ctx": 8192}}


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vllm_request_uses_the_clients_encoding_format(form: str) -> None:
    assert rendered(OpenAiEmbedder(), encoding_format=form, dimensions=8) == {
        "model": "server-name",
        "input": ["a"],
        "encoding_format": form,
        "dimensions": 8,
    }
    assert rendered(OpenAiEmbedder())["encoding_format"] == "float"


# Answers


@pytest.mark.parametrize(
    "recording", [recording for recording in on_engines_path(RECORDINGS) if recording.status == 200], ids=recording_id
)
def test_recorded_answer_is_parsed(recording: Recording) -> None:
    answer = completed(embedder(recording).parse(json.dumps(recording.body).encode()))
    assert answer is not None
    body = recording.body
    vectors = body.get("embeddings") if "embeddings" in body else [item["embedding"] for item in body["data"]]
    assert [json.loads(vector) for vector in answer.vectors] == vectors
    assert answer.prompt_tokens == (
        body.get("prompt_eval_count", 0) if "embeddings" in body else body["usage"]["prompt_tokens"]
    )


def test_vectors_are_sorted_by_index_if_present() -> None:
    data = [{"embedding": [2], "index": 1}, {"embedding": [1], "index": 0}]
    for found, expected in ((data, [b"[1]", b"[2]"]), ([{"embedding": [2]}, {"embedding": [1]}], [b"[2]", b"[1]"])):
        answer = completed(OpenAiEmbedder().parse(json.dumps({"data": found}).replace(" ", "").encode()))
        assert answer is not None
        assert answer.vectors == expected


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"data":3}', b'{"embeddings":null}', b'{"data":[{}]}', b"\xff", b"[" * 100_000]
)
@pytest.mark.parametrize("kind", EMBEDDERS)
def test_other_document_is_not_an_answer(kind: str, body: bytes) -> None:
    assert completed(EMBEDDERS[kind].parse(body)) is None


# Errors

MEANINGS: dict[str, tuple[type[GatewayError], str | None]] = {
    "dimensions": (UnsupportedParameter, "dimensions"),
    "dimensions_too_many": (UnsupportedParameter, "dimensions"),
    "too_long": (ContextLengthExceeded, "input"),
    "unknown": (ModelNotFound, "model"),
}


@pytest.mark.parametrize(
    "recording", [recording for recording in on_engines_path(RECORDINGS) if recording.status != 200], ids=recording_id
)
def test_recorded_error_maps_to_a_gateway_error(recording: Recording) -> None:
    """Ollama answers 400 for an internal failure and for requests that the gateway never sends."""
    error = embedder(recording).client_error(recording.status, json.dumps(recording.body).encode())
    case = recording.case.removeprefix("api_embed_").removeprefix("embeddings_")
    default = UpstreamError if recording.server.startswith("ollama") else InvalidRequest
    kind, param = MEANINGS.get(case, (default, None))
    assert (type(error), getattr(error, "param", None)) == (kind, param)
    assert "tiny-embed" not in error.message


@pytest.mark.parametrize(
    "recording",
    [recording for recording in on_engines_path(CHATS_ONLY) if recording.method == "POST"],
    ids=recording_id,
)
def test_model_without_embeddings_is_the_same_400_on_every_engine(recording: Recording) -> None:
    body = recording.body if isinstance(recording.body, str) else json.dumps(recording.body)
    error = embedder(recording).client_error(recording.status, body.encode())
    assert (type(error), error.status, error.param) == (UnsupportedParameter, 400, "model")


def test_a_text_without_a_token_is_the_clients_fault() -> None:
    error = OllamaEmbedder().client_error(500, b'{"error":"Failed to create new sequence: no input provided"}')
    assert (type(error), error.status, error.param) == (InvalidRequest, 400, "input")


@pytest.mark.parametrize(
    "text",
    [
        'do embedding request: Post \\"http://127.0.0.1:38671/embedding\\": EOF',
        'Post \\"http://127.0.0.1:42511/tokenize\\": EOF',
        "embedding contains NaN or Inf values",
    ],
)
def test_ollamas_400_for_an_internal_failure_becomes_502(text: str) -> None:
    """Seen on both generations when the runner is killed."""
    error = OllamaEmbedder().client_error(400, b'{"error":"%b"}' % text.encode())
    assert isinstance(error, UpstreamError)
    assert "127" not in error.message


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("input (900 tokens) is too large to process. increase the physical batch size (current batch size: 512)", 512),
        ("input exceeds maximum context length and cannot be truncated further", None),
        ("input after truncation exceeds maximum context length", None),
        (
            (
                "This model's maximum context length is 2048 tokens. "
                "However, your prompt contains at least 2049 input tokens"
            ),
            2048,
        ),
    ],
)
@pytest.mark.parametrize("kind", EMBEDDERS)
@pytest.mark.parametrize("status", [400, 500])
def test_too_long_text_is_the_same_error_on_every_engine(kind: str, status: int, text: str, limit: int | None) -> None:
    error = EMBEDDERS[kind].client_error(status, json.dumps({"error": {"message": text}}).encode())
    assert isinstance(error, ContextLengthExceeded)
    assert (error.limit, error.param) == (limit, "input")
    assert "context_length_exceeded" in error.message


@pytest.mark.parametrize(
    "text",
    ["only supports dimensions in range [1, 64], got 400.", "only supports Matryoshka dimensions [32, 16], got 4."],
)
def test_unsupported_dimensions_are_an_invalid_request(text: str) -> None:
    error = OpenAiEmbedder().client_error(400, json.dumps({"error": {"message": f"Model 'm' {text}"}}).encode())
    assert (type(error), error.param) == (InvalidRequest, "dimensions")


def test_busy_ollama_is_503() -> None:
    assert isinstance(
        OllamaEmbedder().client_error(503, b'{"error":"server busy, please try again."}'), BackendUnavailable
    )


# Long answers


def long_answer(kind: str, vectors: list[str]) -> bytes:
    if kind == "ollama":
        return b'{"model":"a]b[1,2]","embeddings":[%b],"prompt_eval_count":3}' % ", ".join(vectors).encode()
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{text}}}' for index, text in enumerate(vectors)
    )
    return b'{"id":"[0]","data":[%b],"usage":{"prompt_tokens":3,"details":[]}}' % data.encode()


def steps_of(kind: str, body: bytes) -> tuple[Embedded | None, int]:
    steps, count = EMBEDDERS[kind].parse(body), 1
    while True:
        try:
            next(steps)
            count += 1
        except StopIteration as end:
            return end.value, count


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize("width", [1, 7, 1024])
def test_long_answer_is_parsed_in_steps_to_the_same_vectors(kind: str, width: int) -> None:
    vectors = [str([number + 0.5] * width) for number in range(2048 if width > 7 else 40_000 // width)]
    vectors = [*vectors[:2048], "[" + "0.25, " * 60_000 + "1]"]
    body = long_answer(kind, vectors)
    assert len(body) > LONG_ANSWER
    found, steps = steps_of(kind, body)
    assert found is not None
    assert found.vectors == [vector.encode() for vector in vectors]
    assert found.prompt_tokens == 3
    assert steps > len(body) // (2 * STEP)


@pytest.mark.parametrize("space", ["", " \n"])
def test_long_answer_in_base64_is_parsed_in_steps(space: str) -> None:
    vectors = [f'"{letter * 9_000}\\/=="' for letter in "ABCD" * 100]
    body = long_answer("vllm", vectors).replace(b'"embedding":', f'"embedding"{space}:{space}'.encode())
    found, steps = steps_of("vllm", body)
    assert found is not None
    assert found.vectors == [vector.encode() for vector in vectors]
    assert steps >= 3


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize(
    "unit", ["[]", "{}", '[["x"]]', '""', "1", "[", "[" + "0," * 2_000_000 + "0]", '"' + "A" * 2000 + '!"']
)
def test_long_answer_of_other_values_is_refused_before_it_is_parsed(kind: str, unit: str) -> None:
    body = long_answer(kind, [unit] * max(1, 4_000_000 // len(unit)))
    assert len(body) > LONG_ANSWER
    found, steps = steps_of(kind, body)
    assert found is None
    assert steps <= 1 + len(body) // STEP


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
def test_number_that_is_not_that_of_a_vector_is_no_vector(kind: str) -> None:
    found, _ = steps_of(kind, long_answer(kind, ["7", str([0.5] * 100_000), "-1", "99999999999"]))
    assert found is not None
    assert [found.vectors[index] for index in (0, 2, 3)] == [b"7", b"-1", b"99999999999"]
