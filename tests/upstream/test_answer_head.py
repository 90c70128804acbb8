"""The head of a plain answer that is kept for the next ones: what it takes, and what it leaves to the parser."""

import pytest

from gateway.upstream.answer_head import AnswerHead, answer_head

OK = b"HTTP/1.1 200 OK\r\ndate: Sun\r\nContent-Length: 2\r\ncontent-type: application/json\r\n\r\n"
HEADERS = [(b"date", b"Sun"), (b"content-length", b"2"), (b"content-type", b"application/json")]


def kept(raw: bytes = OK + b"{}", headers: list[tuple[bytes, bytes]] = HEADERS) -> AnswerHead | None:
    return answer_head(raw, headers, dict(headers))


def test_answer_with_the_same_head_and_its_whole_body_is_taken() -> None:
    head = kept()
    assert head is not None
    assert head.body(OK + b"{}") == b"{}"
    assert head.body(OK.replace(b": 2", b": 12") + b'{"a":"bcde"}') == b'{"a":"bcde"}'
    assert head.fields[b"content-type"] == b"application/json"


@pytest.mark.parametrize(
    "data",
    [
        OK,
        OK + b"{",
        OK + b"{} ",
        OK.replace(b": 2", b": 0"),
        OK.replace(b": 2", b": ") + b"{}",
        OK.replace(b": 2", b": +2") + b"{}",
        OK.replace(b": 2", b": 0x2") + b"{}",
        OK.replace(b": 2", b":  2") + b"{}",
        OK.replace(b": 2", b": " + b"0" * 5000 + b"2") + b"{}",
        OK.replace(b"Sun", b"Mon") + b"{}",
        OK.replace(b"200", b"500") + b"{}",
        OK[:-2] + b"connection: close\r\n\r\n{}",
        OK[:40],
        b"",
    ],
)
def test_any_other_answer_is_left_to_the_parser(data: bytes) -> None:
    head = kept()
    assert head is not None
    assert head.body(data) is None


@pytest.mark.parametrize(
    "raw",
    [
        OK.replace(b" 200 ", b" 201 ") + b"{}",
        OK.replace(b"1.1", b"1.0") + b"{}",
        b"HTTP/1.1 102 Processing\r\n\r\n" + OK + b"{}",
        OK.replace(b"Content-Length: 2\r\n", b"transfer-encoding: chunked\r\n") + b"2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_only_heads_of_plain_answers_are_kept(raw: bytes) -> None:
    assert kept(raw) is None


def test_head_with_a_repeated_name_is_not_kept() -> None:
    assert kept(OK + b"{}", [*HEADERS, (b"date", b"Sun")]) is None
