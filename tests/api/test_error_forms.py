"""Errors outside the data endpoints have the form of the client API of their path."""

import json

import pytest

from gateway.api.error_forms import error_answer
from gateway.errors import MethodNotAllowed, NotFound


@pytest.mark.parametrize(
    ("path", "fields", "media_type"),
    [
        ("/v1/other", ["error"], b"application/json"),
        ("/v1/chat/completions", ["error"], b"application/json"),
        ("/v1/messages", ["type", "error"], b"application/json"),
        ("/v1/messages/batches", ["type", "error"], b"application/json"),
        ("/messages", ["type", "error"], b"application/json"),
        ("/api/tags", ["error"], b"application/json; charset=utf-8"),
    ],
)
def test_error_has_the_form_of_the_path(path: str, fields: list[str], media_type: bytes) -> None:
    headers, body = error_answer(path, NotFound("nothing here"))
    parsed = json.loads(body)
    assert (list(parsed), dict(headers)[b"content-type"]) == (fields, media_type)
    is_text = path.startswith("/api/")
    assert (parsed["error"] if is_text else parsed["error"]["message"]) == "nothing here"


def test_error_keeps_its_headers() -> None:
    headers, _ = error_answer("/api/tags", MethodNotAllowed("GET"))
    assert (b"allow", b"GET") in headers
