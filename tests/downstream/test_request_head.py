"""Request heads on real sockets: ambiguous ones are refused, and equal ones are cached."""

import socket

import pytest

from tests.downstream.server_thread import CHUNKED, GET, HEAD, ServerThread, assert_refused, read_all, read_response

REFUSED = {
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "length list": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "negative length": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "hexadecimal length": HEAD + b"Content-Length: 0x3\r\n\r\nabc",
    "empty length": HEAD + b"Content-Length:\r\n\r\n",
    "length over 64 bits": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    "length of 5,000 zeros": HEAD + b"Content-Length: " + b"0" * 5000 + b"3\r\n\r\nabc",
    "length of 5,000 digits": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc",
    "length of 16 digits": HEAD + b"Content-Length: 0000000000000003\r\n\r\nabc",
    "length with an underscore": HEAD + b"Content-Length: 0_3\r\n\r\nabc",
    "length in other digits": HEAD + b"Content-Length: \xd9\xa3\r\n\r\nabc",
    "length with a space": HEAD + b"Content-Length: 3 3\r\n\r\nabc",
    "length, then chunked": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "unknown encoding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "gzip and chunked": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked and gzip": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "vertical tab before chunked": HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"A: b\r\n c\r\n\r\n",
    "folded encoding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF everywhere": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare LF after a header": b"GET / HTTP/1.1\r\nHost: a\nB: c\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "bare CR in a header": HEAD + b"A: b\rc\r\n\r\n",
    "NUL in a header": HEAD + b"A: b\0c\r\n\r\n",
    "control character in a header": HEAD + b"A: b\x01c\r\n\r\n",
    "space before the colon": HEAD + b"Content-Length : 3\r\n\r\nabc",
    "space before the first name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "header without a name": HEAD + b": b\r\n\r\n",
    "header without a colon": HEAD + b"abc\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "the same Host twice": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "Host with a space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "Host with a user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "Host with a high byte": b"GET / HTTP/1.1\r\nHost: a\xe4\r\n\r\n",
    "two Hosts in HTTP/1.0": b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "absolute target of another scheme": b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target without a host": b"GET http:///a HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with a user": b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target without Host": b"GET http://a/ HTTP/1.1\r\n\r\n",
    "absolute target beside two Hosts": b"GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "authority as target": b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT with a path": b"CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n",
    "star without OPTIONS": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "query with 101 parameters": b"GET /a?" + b"a&" * 101 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in the target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "control character in the target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces in the request line": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab in the request line": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "RTSP": b"GET / RTSP/1.0\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100f1010000ed0303"),
    "unknown method": b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "chunk size over 64 bits": CHUNKED + b"fffffffffffffffff\r\nabc",
    "chunk size not a number": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "no chunk size": CHUNKED + b"\r\nabc\r\n0\r\n\r\n",
    "space after the chunk size": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "bare LF after the chunk size": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "bare LF after the chunk": CHUNKED + b"3\r\nabc\n0\r\n\r\n",
    "bare LF in the extension": CHUNKED + b"3;a=b\nabc\r\n0\r\n\r\n",
    "bare LF in the trailers": CHUNKED + b"3\r\nabc\r\n0\r\nA: b\n\r\n",
    "length in the trailers": CHUNKED + b"3\r\nabc\r\n0\r\nContent-Length: 5\r\n\r\n",
    "upgrade with two lengths": HEAD
    + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
}


TOO_LARGE = {
    "101 headers": HEAD + b"".join(b"a%d: b\r\n" % number for number in range(100)) + b"\r\n",
    "header of 64 KiB": HEAD + b"A: " + b"b" * 65536 + b"\r\n\r\n",
    "target of 64 KiB": b"GET /" + b"b" * 65536 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "64 KiB without the end of the head": HEAD + b"A: " + b"b" * 65536,
}


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED.keys())
def test_ambiguous_request_is_refused_before_it_reaches_the_application(
    default_server: ServerThread, request_bytes: bytes
) -> None:
    seen = len(default_server.app.scopes)
    assert_refused(default_server.ask(request_bytes), 400, "invalid_value")
    assert len(default_server.app.scopes) == seen


@pytest.mark.parametrize("request_bytes", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_head_over_its_limits_is_refused_with_431(default_server: ServerThread, request_bytes: bytes) -> None:
    seen = len(default_server.app.scopes)
    assert_refused(default_server.ask(request_bytes), 431, "headers_too_large")
    assert len(default_server.app.scopes) == seen


def test_ambiguous_request_after_a_served_one_is_refused(default_server: ServerThread) -> None:
    with default_server.connect(GET) as client:
        assert read_response(client)[0] == 200
        client.sendall(REFUSED["two Hosts"])
        assert_refused(read_all(client), 400, "invalid_value")


SERVED = {
    "plain": GET,
    "HTTP/1.0 without Host": b"GET /hello HTTP/1.0\r\n\r\n",
    "IPv6 Host": b"GET /hello HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    "blank line before the request line": b"\r\n" + GET,
    "query": b"GET /hello?a=b%20c HTTP/1.1\r\nHost: a\r\n\r\n",
    "high byte in a header": b"GET /hello HTTP/1.1\r\nHost: a\r\nX: \xe4\r\n\r\n",
    "100 headers": b"GET /hello HTTP/1.1\r\nHost: a\r\n"
    + b"".join(b"a%d: b\r\n" % number for number in range(99))
    + b"\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "WebSocket": b"GET /hello HTTP/1.1\r\nHost: a\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: a\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", SERVED.values(), ids=SERVED.keys())
def test_valid_request_is_served_in_one_piece_and_byte_by_byte(
    default_server: ServerThread, request_bytes: bytes
) -> None:
    for pieces in ([request_bytes], [bytes([byte]) for byte in request_bytes[:300]] + [request_bytes[300:]]):
        with default_server.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                client.sendall(piece)
            assert read_response(client)[::2] == (200, b"hello")


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 11\r\n\r\nhello world",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX: y\r\n\r\n",
    ],
    ids=["content length", "chunked"],
)
@pytest.mark.parametrize(
    "upgrade",
    [
        b"",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"UPGRADE:h2c\r\nConnection: upgrade\r\n",
    ],
    ids=["no upgrade", "upgrade to h2c", "upgrade in other case"],
)
def test_body_arrives_complete_when_its_request_is_split_at_any_byte(
    default_server: ServerThread, framing: bytes, upgrade: bytes
) -> None:
    request = HEAD + upgrade + framing
    with default_server.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for cut in range(1, len(request)):
            client.sendall(request[:cut])
            client.sendall(request[cut:])
            status, headers, body = read_response(client)
            assert (status, body) == (200, b"hello world")
            assert "connection" not in headers
        names = {name for name, _ in default_server.app.scopes[-1]["headers"]}
        assert b"upgrade" not in names
        assert b"x" not in names, "a trailer became a header"


def test_scope_describes_the_request(default_server: ServerThread) -> None:
    default_server.ask(
        b"POST /echo/a%20b?c=d%20e HTTP/1.1\r\nHost: gateway\r\nX-Key: Value\r\nX-Key: Two\r\n"
        b"Connection: close\r\nContent-Length: 0\r\n\r\n"
    )
    scope = default_server.app.scopes[-1]
    assert scope["method"] == "POST"
    assert scope["path"] == "/echo/a b"
    assert scope["raw_path"] == b"/echo/a%20b"
    assert scope["query_string"] == b"c=d%20e"
    assert scope["http_version"] == "1.1"
    assert scope["client"][0] == "127.0.0.1"
    assert scope["server"] == default_server.address
    assert scope["headers"][1:3] == [(b"x-key", b"Value"), (b"x-key", b"Two")]
    assert scope["extensions"]["gateway.client"].fields[b"x-key"] == b"Two"


# Repeated heads


def test_requests_with_a_repeated_head_have_their_own_length_body_and_scope(default_server: ServerThread) -> None:
    seen = len(default_server.app.scopes)
    bodies = [b"first", b"2", b"", b"a" * 70_000, b"again"]
    with default_server.connect() as client:
        for body in bodies:
            client.sendall(HEAD + b"X-Key: One\r\nContent-Length: %d\r\nX-Last: two\r\n\r\n%b" % (len(body), body))
            status, headers, echo = read_response(client)
            assert (status, echo) == (200, body)
            assert "connection" not in headers
    for scope, body in zip(default_server.app.scopes[seen:], bodies, strict=True):
        length = b"%d" % len(body)
        assert scope["headers"] == [
            (b"host", b"gateway"),
            (b"x-key", b"One"),
            (b"content-length", length),
            (b"x-last", b"two"),
        ]
        assert scope["extensions"]["gateway.client"].fields == dict(scope["headers"])
        assert (scope["method"], scope["path"], scope["http_version"]) == ("POST", "/echo", "1.1")
    assert len({id(client) for client in default_server.app.clients[-len(bodies) :]}) == len(bodies)


def test_notes_are_shared_only_by_requests_with_the_same_head(default_server: ServerThread) -> None:
    with default_server.connect() as client:
        for key in (b"One", b"One", b"Two"):
            client.sendall(HEAD + b"X-Key: %b\r\nContent-Length: 0\r\n\r\n" % key)
            read_response(client)
            default_server.app.clients[-1].notes.setdefault("key", key)
    assert [client.notes for client in default_server.app.clients[-3:]] == [
        {"key": b"One"},
        {"key": b"One"},
        {"key": b"Two"},
    ]


def test_handler_in_the_notes_answers_the_whole_requests_that_repeat_the_head(default_server: ServerThread) -> None:
    head, other = HEAD + b"X-Handled: 1\r\n", HEAD + b"X-Handled: 2\r\n"
    long = b"a" * 70_000  # does not arrive in one read
    sent = [(head, b"first"), (head, b"2"), (head, long), (head, b"again"), (other, b"third"), (other, b"4th")]
    handled = []
    with default_server.connect() as client:
        for lines, body in sent:
            client.sendall(lines + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            status, headers, echo = read_response(client)
            assert (status, echo) == (200, body)
            handled.append(headers.get("handled") == "yes")
    assert handled == [False, True, False, True, False, True]
    expected = {b"host": b"gateway", b"x-handled": b"2"}
    assert default_server.app.clients[-1].fields == expected
    assert default_server.app.clients[-2].fields == {**expected, b"content-length": b"5"}


@pytest.mark.parametrize(
    "request_bytes",
    [pytest.param(bad, id=name) for name, bad in REFUSED.items() if bad.startswith(HEAD)],
)
def test_ambiguous_request_after_a_cached_head_is_refused(default_server: ServerThread, request_bytes: bytes) -> None:
    with default_server.connect() as client:
        for _ in range(2):
            client.sendall(HEAD + b"Content-Length: 3\r\n\r\nabc")
            assert read_response(client)[::2] == (200, b"abc")
        seen = len(default_server.app.scopes)
        client.sendall(request_bytes)
        assert_refused(read_all(client), 400, "invalid_value")
    assert len(default_server.app.scopes) == seen


@pytest.mark.parametrize("host", [b"", b"gate way", b"gateway/", b"evil\x7f"])
def test_host_of_every_request_on_a_connection_is_checked(default_server: ServerThread, host: bytes) -> None:
    with default_server.connect() as client:
        for valid in (b"gateway", b"gateway", b"other:8080", b"[::1]"):
            client.sendall(b"GET /hello HTTP/1.1\r\nHost: %b\r\n\r\n" % valid)
            assert read_response(client)[::2] == (200, b"hello")
        client.sendall(b"GET /hello HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert_refused(read_all(client), 400, "invalid_value")


@pytest.mark.parametrize("note", [b"", b"X-Noted: yes\r\n"], ids=["without notes", "with notes"])
def test_expectation_of_every_request_on_a_connection_is_answered(default_server: ServerThread, note: bytes) -> None:
    """Also if the application has notes on its head, after which bodies are buffered."""
    with default_server.connect() as client:
        for body in (b"first", b"second", b"third"):
            client.sendall(HEAD + note + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
            continued = b"HTTP/1.1 100 Continue\r\n\r\n"
            assert client.recv(len(continued), socket.MSG_WAITALL) == continued
            client.sendall(body)
            assert read_response(client)[::2] == (200, body)


@pytest.mark.parametrize(
    ("target", "version", "path", "query"),
    [
        (b"http://real.example:8080/a%20b?c=d", b"1.1", "/a b", b"c=d"),
        (b"HTTPS://real.example:8080", b"1.1", "/", b""),
        (b"http://real.example:8080?c", b"1.0", "/", b"c"),
    ],
)
def test_target_in_absolute_form_overrules_host(
    default_server: ServerThread, target: bytes, version: bytes, path: str, query: bytes
) -> None:
    """RFC 9112 section 3.2.2: else a check of Host would look at another name than a proxy did."""
    host = b"Host: forged\r\n" if version == b"1.1" else b""
    line = b"POST %b HTTP/%b\r\n%bConnection: close\r\nContent-Length: 0\r\n\r\n"
    default_server.ask(line % (target, version, host))
    scope = default_server.app.scopes[-1]
    assert (scope["path"], scope["query_string"]) == (path, query)
    assert [value for name, value in scope["headers"] if name == b"host"] == [b"real.example:8080"]
    assert scope["extensions"]["gateway.client"].fields[b"host"] == b"real.example:8080"
