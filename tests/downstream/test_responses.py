"""Heads of ASGI responses, and the errors of the server itself."""

import json
import re

import pytest

from gateway.downstream.responses import asgi_head, error_answer


def test_head_has_the_status_line_and_the_headers_in_lower_case() -> None:
    head = asgi_head(404, [(b"Content-Type", b"text/plain"), (b"x-a", b"B")])
    assert head == (b"HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\nx-a: B\r\n", None, False)


def test_status_without_a_phrase_has_an_empty_one() -> None:
    assert asgi_head(299, []).lines == b"HTTP/1.1 299 \r\n"


def test_headers_that_the_server_sets_itself_are_left_out() -> None:
    head = asgi_head(200, [(b"Transfer-Encoding", b"chunked"), (b"connection", b"keep-alive"), (b"a", b"b")])
    assert head == (b"HTTP/1.1 200 OK\r\na: b\r\n", None, False)


@pytest.mark.parametrize("value", [b"close", b"Close", b"te, close"])
def test_application_may_close_the_connection(value: bytes) -> None:
    head = asgi_head(200, [(b"Connection", value), (b"connection", b"keep-alive")])
    assert head == (b"HTTP/1.1 200 OK\r\n", None, True)


def test_first_content_length_is_told_and_sent() -> None:
    head = asgi_head(200, [(b"Content-Length", b"5")])
    assert head == (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n", b"5", False)
    assert asgi_head(200, [(b"content-length", b"5"), (b"content-length", b"6")]).content_length == b"5"


@pytest.mark.parametrize("bad", [b"\r\n", b"\n", b"\r", b"\0"])
@pytest.mark.parametrize("place", ["name", "value"])
def test_header_that_would_be_read_as_more_than_one_is_refused(bad: bytes, place: str) -> None:
    text = b"a" + bad + b"set-cookie"
    with pytest.raises(RuntimeError, match="line break or NUL"):
        asgi_head(200, [(text, b"b") if place == "name" else (b"b", text)])


def test_error_is_a_complete_answer_in_openai_s_format() -> None:
    head, _, body = error_answer(408, "request_timeout", "Too slow.").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"\r\nconnection: close" in head
    assert b"\r\ncontent-length: %d\r\n" % len(body) in head
    assert re.search(rb"\r\nx-request-id: req-[0-9a-f]{24}\r\n", head)
    error = {"message": "Too slow.", "type": "invalid_request_error", "param": None, "code": "request_timeout"}
    assert json.loads(body) == {"error": error}


def test_error_may_have_further_headers() -> None:
    answer = error_answer(429, None, "Later.", "rate_limit_error", b"retry-after: 1\r\n")
    assert answer.startswith(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\n")
