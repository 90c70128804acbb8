"""Error answers: the shape of OpenAI's error object, and the documented status, type and code."""

import json

import pytest

from gateway import errors
from gateway.errors import (
    ClientLeft,
    ContextLengthExceeded,
    GatewayError,
    InvalidApiKey,
    MethodNotAllowed,
    UpstreamError,
    UpstreamTimeout,
)

REQUEST = "invalid_request_error"
# Status, type and code of each error as documented, and an instance of it.
LIMIT = "rate_limit_error"
TABLE = [
    (400, REQUEST, "invalid_json", errors.InvalidJson("m")),
    (400, REQUEST, "invalid_value", errors.InvalidRequest("m", param="n")),
    (400, REQUEST, "unsupported_parameter", errors.UnsupportedParameter("m")),
    (400, REQUEST, "invalid_image", errors.InvalidImage("m")),
    (400, REQUEST, "invalid_image_url", errors.InvalidImageUrl("m")),
    (400, REQUEST, "invalid_value", errors.SchemaTooComplex("n")),
    (400, REQUEST, "context_length_exceeded", ContextLengthExceeded(4096)),
    (401, "authentication_error", "invalid_api_key", InvalidApiKey()),
    (401, "authentication_error", "invalid_api_key", errors.ExpiredApiKey()),
    (403, "permission_error", "forbidden", errors.Forbidden("m")),
    (403, "permission_error", "tier_not_allowed", errors.TierNotAllowed("'standard'")),
    (404, REQUEST, "model_not_found", errors.ModelNotFound("m")),
    (404, REQUEST, "not_found", errors.NotFound("m")),
    (405, REQUEST, "method_not_allowed", MethodNotAllowed("POST")),
    (408, REQUEST, "request_timeout", errors.RequestTimeout("m")),
    (409, REQUEST, "conflict", errors.Conflict("m")),
    (413, REQUEST, "request_too_large", errors.RequestTooLarge("m")),
    (415, REQUEST, "unsupported_media_type", errors.UnsupportedMediaType("m")),
    (431, REQUEST, "headers_too_large", errors.HeadersTooLarge("m")),
    (500, "server_error", None, errors.Crash()),
    (429, LIMIT, "rate_limit_exceeded", errors.RateLimited("requests_per_minute", "m", retry_after=1)),
    (429, LIMIT, "rate_limit_exceeded", errors.BudgetSpent("tokens_per_day", "m", retry_after=1)),
    (429, LIMIT, "concurrency_exceeded", errors.ConcurrencyExceeded("concurrency", "m", retry_after=1)),
    (502, "server_error", "upstream_error", UpstreamError("closed")),
    (400, "invalid_request_error", "invalid_value", errors.RolesRefused()),
    (503, "server_error", "queue_full", errors.QueueFull("m", retry_after=3)),
    (503, "server_error", "queue_timeout", errors.QueueTimeout("m", retry_after=3)),
    (503, "server_error", "backend_unavailable", errors.BackendUnavailable("m", retry_after=3)),
    (503, "server_error", "shutting_down", errors.ShuttingDown()),
    (504, "server_error", "upstream_timeout", UpstreamTimeout("no end")),
    (508, "server_error", "loop_detected", errors.LoopDetected()),
]


@pytest.mark.parametrize(("status", "type", "code", "error"), TABLE, ids=[code or "crash" for _, _, code, _ in TABLE])
def test_error_has_the_documented_status_type_and_code(
    status: int, type: str, code: str | None, error: GatewayError
) -> None:
    body = json.loads(error.envelope())
    assert (error.status, body["error"]["type"], body["error"]["code"]) == (status, type, code)
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    assert body["error"]["param"] == error.param


def test_table_lists_every_error_that_is_sent() -> None:
    def leaves(kind: type[GatewayError]) -> set[type[GatewayError]]:
        below = set().union(*map(leaves, kind.__subclasses__())) if kind.__subclasses__() else set()
        return below if kind is errors.Overloaded else below | {kind}

    never_sent = {ClientLeft, errors.ModelUnloaded, errors.ServerHangs}  # the last looks like its base class
    assert leaves(GatewayError) - {GatewayError} - never_sent == {type(error) for *_, error in TABLE}


@pytest.mark.parametrize("error", [error for status, *_, error in TABLE if status == 503], ids=lambda error: error.code)
def test_503_has_a_retry_after_header(error: GatewayError) -> None:
    assert (b"retry-after", b"%d" % (error.retry_after or 0)) in error.answer_headers()
    assert error.retry_after


def test_upstream_timeout_tells_clients_not_to_retry() -> None:
    assert UpstreamTimeout("no end").answer_headers() == [(b"x-should-retry", b"false")]


def test_method_not_allowed_names_the_allowed_methods() -> None:
    assert (b"allow", b"GET, POST") in MethodNotAllowed("GET, POST").answer_headers()


def test_invalid_api_key_names_the_authentication_scheme() -> None:
    assert (b"www-authenticate", b"Bearer") in InvalidApiKey().answer_headers()


@pytest.mark.parametrize("limit", [None, 4096])
def test_message_about_the_context_length_contains_the_code(limit: int | None) -> None:
    """LangChain recognises the error by this word in the text."""
    message = ContextLengthExceeded(limit).message
    assert "context_length_exceeded" in message
    assert ("4096" in message) == (limit is not None)
