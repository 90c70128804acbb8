"""Tests of the errors that clients get for a backend's errors, including all recorded ones."""

import json
import re

import pytest

from gateway import errors
from gateway.engines.error_mapping import client_error, message_of
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidRequest,
    RolesRefused,
    UnsupportedParameter,
    UpstreamError,
)
from tests.engines.recorded import ERRORS, error_body, recording_id
from tests.golden import Recording

CONTEXT, IMAGE, REQUEST = ContextLengthExceeded, errors.InvalidImage, errors.InvalidRequest
NO_MODEL, UNSUPPORTED = errors.ModelNotFound, errors.UnsupportedParameter
# A case not listed here is 400 for a request that the engine rejects for another reason.
MEANINGS: dict[str, type[GatewayError]] = {
    "api_chat_image_bad": IMAGE,
    "api_chat_image_not_base64": IMAGE,
    "api_chat_think": UNSUPPORTED,
    "api_chat_tools_unsupported": UNSUPPORTED,
    "api_chat_truncate_false_too_long": CONTEXT,
    "api_chat_truncate_false_too_long_stream": CONTEXT,
    "api_chat_unknown": NO_MODEL,
    "api_show_unknown": NO_MODEL,
    "chat_image_bad": IMAGE,
    "chat_max_tokens_too_large": CONTEXT,
    "chat_model_unknown": NO_MODEL,
    "chat_reasoning_effort": UNSUPPORTED,
    "chat_stream_error_image_bad": IMAGE,
    "chat_too_long": CONTEXT,
    "chat_too_long_stream": CONTEXT,
    "origin_foreign": UpstreamError,
}
OF_ONE_SERVER: dict[str, type[GatewayError]] = {
    "vllm-0.32.0/chat_image_url_http": UpstreamError,
    "vllm-0.32.0/embeddings": NO_MODEL,
    "ollama-0.33/api_embed": UpstreamError,
    "ollama-0.33/embeddings": UpstreamError,
    "ollama-0.24/api_embed": UpstreamError,
    "ollama-0.24/embeddings": UpstreamError,
}


@pytest.mark.parametrize("recording", ERRORS, ids=recording_id)
def test_recorded_error_maps_to_a_gateway_error(recording: Recording) -> None:
    expected = OF_ONE_SERVER.get(recording_id(recording)) or MEANINGS.get(recording.case, REQUEST)
    assert type(client_error(recording.status, error_body(recording))) is expected


@pytest.mark.parametrize("recording", ERRORS, ids=recording_id)
def test_message_contains_none_of_the_backends_words(recording: Recording) -> None:
    """This covers its text, model names, paths, addresses and words of its language."""
    body = error_body(recording)
    sent = client_error(recording.status, body).envelope().decode().lower()
    message = message_of(body).lower()
    assert not message or message not in sent
    for word in (
        "qwen",
        "llama",
        "nope",
        "registry",
        "127.0.0.1",
        "json:",
        "unmarshal",
        "bytesio",
        "body.",
        "localhost",
        "aliases",
    ):
        assert word not in sent
    own_words = set(re.findall(r"[a-z]+", sent)) | {""}
    assert not [path for path in re.findall(r"/[\w./-]+", message) if path.strip("/") in own_words]


@pytest.mark.parametrize(("server", "limit"), [("vllm-0.32.0", 2048), ("ollama-0.33", 4096), ("ollama-0.24", None)])
def test_message_contains_the_context_length_if_the_backend_reports_it(server: str, limit: int | None) -> None:
    found = {
        client_error(recording.status, error_body(recording)).message
        for recording in ERRORS
        if recording.server == server and MEANINGS.get(recording.case) is CONTEXT
    }
    assert found == {ContextLengthExceeded(limit).message}


@pytest.mark.parametrize(
    ("case", "param"), [("api_chat_think", "reasoning_effort"), ("api_chat_tools_unsupported", "tools")]
)
def test_unsupported_feature_is_named_by_param(case: str, param: str) -> None:
    for recording in (recording for recording in ERRORS if recording.case == case):
        assert client_error(recording.status, error_body(recording)).param == param


# Seen in source code, or on other versions


@pytest.mark.parametrize(
    "text",
    [
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 9000. "
            "This model's maximum context length is 4096 tokens and your request has 7"
        ),
        (
            "This model's maximum context length is 4096 tokens. "
            "However, you requested 9000 output tokens and your prompt contains at least 7"
        ),
        "The prompt (total length 9000) is longer than the maximum model length of 4096.",
    ],
)
def test_context_errors_of_other_versions_are_recognised(text: str) -> None:
    body = json.dumps({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}).encode()
    assert isinstance(client_error(400, body), ContextLengthExceeded)


def test_image_for_a_model_without_vision_is_unsupported() -> None:
    inner = (
        '{"error":{"code":400,"message":"Multimodal data provided, but model does not support multimodal requests.",'
        '"type":"x"}}'
    )
    for text in (
        inner,
        "m is not a multimodal model",
        "Failed to create new sequence: this model is missing data required for image input",
    ):
        assert isinstance(client_error(400, json.dumps({"error": text}).encode()), errors.UnsupportedParameter)


def test_vllms_image_limit_is_in_the_message() -> None:
    text = (
        "At most {} image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase this limit. "
        "(parameter=image)"
    )
    few, none = (client_error(400, json.dumps({"error": {"message": text.format(limit)}}).encode()) for limit in (4, 0))
    assert (type(few), few.param, few.message) == (
        errors.InvalidRequest,
        "messages",
        "This model accepts at most 4 images in one request.",
    )
    assert isinstance(none, errors.UnsupportedParameter)


@pytest.mark.parametrize(
    ("status", "text", "param"),
    [
        (500, "Failed to create new sequence: no input provided", "messages"),
        (500, "failed to load model vocabulary required for format", "response_format"),
        (500, "failed to parse grammar", "response_format"),
        (500, "invalid JSON schema in format", "response_format"),
        (400, "JSON schema conversion failed:\nUnsupported ref: #", "response_format"),
        (400, "Failed to initialize samplers: failed to parse grammar", "response_format"),
        (400, "The provided JSON schema contains features not supported by xgrammar.", "response_format"),
        (400, "Failed to transform json schema into a grammar: enum array must not be empty", "response_format"),
        (400, "Invalid structural tag specification.", "response_format"),
        (400, "Grammar error: Unimplemented keys", "response_format"),
        (400, "Error parsing regex: look-around", "response_format"),
        (
            400,
            "Regex uses unsupported feature for structured outputs: Backreferences are unsupported.",
            "response_format",
        ),
        (
            400,
            "The JSON schema is nested too deeply: objects and arrays may nest at most 100 levels",
            "response_format",
        ),
        (400, "'auto' tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set", "tools"),
        (400, "registry.ollama.ai/library/llama:latest does not support tools", "tools"),
        (400, '"qwen3-vl" does not support thinking', "reasoning_effort"),
    ],
)
def test_fault_of_the_request_is_400_for_any_engine_status(status: int, text: str, param: str) -> None:
    error = client_error(status, json.dumps({"error": text}).encode())
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize("status", [429, 503])
def test_busy_backend_is_503_with_retry_after(status: int) -> None:
    error = client_error(status, b'{"error":"server busy, please try again.  maximum pending requests exceeded"}')
    assert isinstance(error, errors.BackendUnavailable)
    assert error.retry_after == 5


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "auth"),
        (403, "auth"),
        (405, "status_4xx"),
        (500, "status_5xx"),
        (502, "status_5xx"),
        (504, "status_5xx"),
        (301, "status_3xx"),
    ],
)
def test_backend_failure_is_502_with_a_reason_for_the_metrics(status: int, reason: str) -> None:
    error = client_error(status, b'{"error":"Unauthorized"}')
    assert isinstance(error, UpstreamError)
    assert error.reason == reason


def test_loop_through_this_gateway_stays_a_loop_error() -> None:
    assert isinstance(client_error(508, errors.LoopDetected().envelope()), errors.LoopDetected)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"[1, 2]", b'"x"', b"null", b'{"error": {"error": {"error": []}}}', b"<html>", b"[" * 10_000],
)
@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_any_error_body_is_accepted(status: int, body: bytes) -> None:
    assert client_error(status, body).message


@pytest.mark.parametrize(
    "message",
    [
        "System message must be at the beginning.",
        "No user query found in messages.",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "After the optional system message, conversation roles must alternate user and assistant roles",
        "Only user and assistant roles are supported, with the exception of an initial optional system message!",
        "System role not supported",
        "Unexpected message role.",
        "Expected last role User or Tool (or Assistant with prefix set to True) for serving but got assistant",
        "Not the same number of function calls and responses",
    ],
)
@pytest.mark.parametrize("status", [400, 500], ids=["vLLM", "llama.cpp"])
def test_refusal_of_a_chat_template_says_why(message: str, status: int) -> None:
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "code": status}}).encode()
    assert isinstance(client_error(status, body), RolesRefused)


@pytest.mark.parametrize("field", ["min_tokens", "stop_token_ids", "mm_processor_kwargs", "continue_final_message"])
def test_field_whose_value_vllm_refuses_is_named(field: str) -> None:
    body = json.dumps({"error": {"message": f"{field} must be something else, got 5.", "code": 400}}).encode()
    error = client_error(400, body)
    assert isinstance(error, REQUEST)
    assert error.param == field
    assert "something" not in error.message


def test_only_the_beginning_of_a_long_message_is_searched() -> None:
    """Engines say what is wrong first. The search of 64 KiB took 40 ms."""
    fault = "does not support thinking"
    found = client_error(400, json.dumps({"error": fault + " " * 60_000}).encode())
    assert isinstance(found, UnsupportedParameter)
    unseen = client_error(400, json.dumps({"error": " " * 60_000 + fault}).encode())
    assert type(unseen) is InvalidRequest
