"""Bad requests, through the gateway's HTTP server, on both backends.

Whatever a client sends, it gets one documented response and never a 5xx, and a bad request never
reaches a backend. The case numbers are those of the project's list of bad requests: 47 to 74.
"""

import base64
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.dialects.openai_chat_request import parse
from gateway.errors import GatewayError
from tests.downstream.server_thread import eventually
from tests.fakes.chats import MIB, WEATHER, called, schema_format, tool
from tests.fakes.fault_backend import MODEL
from tests.fakes.fleet import HASTY, Answer, Fleet
from tests.fakes.images import png_data_url
from tests.fakes.processor_time import assert_at_most

CANARY = "the-canary-of-a-prompt"
KEY = "the-key-of-a-client"
VALID: dict[str, Any] = {"model": "standard", "messages": [{"role": "user", "content": CANARY}]}
JSON = ("Content-Type: application/json",)
BODY_LIMIT = 64 * 1024
GATEWAYS = {
    "open": {},
    "locked": {"GATEWAY_API_KEYS": KEY},
    "roomy": {"GATEWAY__MAX_TEXT_BODY": "20MiB"},
    "narrow": {"GATEWAY__MAX_BODY": str(BODY_LIMIT), "GATEWAY__MAX_TEXT_BODY": str(BODY_LIMIT)},
    "hasty": {},
}
BY_CODE = {"invalid_api_key": "authentication_error"}


@pytest.fixture(scope="module", params=["ollama", "vllm"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with Fleet(request.param, GATEWAYS, {"hasty": HASTY}) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def untouchable() -> Iterator[socket.socket]:
    """Listen at an address that the gateway must never connect to; check at the end that it did
    not.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener
        with pytest.raises(BlockingIOError):
            listener.accept()


# Requests


def message(method: str, path: str, *headers: str | bytes, body: bytes = b"", host: str = "Host: localhost") -> bytes:
    """Return a request with exactly these headers."""
    lines = [f"{method} {path} HTTP/1.1", host, *headers]
    return (
        b"\r\n".join([line.encode("latin-1") if isinstance(line, str) else line for line in lines if line])
        + b"\r\n\r\n"
        + body
    )


def post(body: bytes | dict[str, Any] | None = None, *headers: str | bytes, media: tuple[str, ...] = JSON) -> bytes:
    """Return a chat request with this body."""
    data = (
        json.dumps(VALID).encode() if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    )
    return message("POST", "/v1/chat/completions", *media, f"Content-Length: {len(data)}", *headers, body=data)


def chat(**fields: Any) -> bytes:
    return post(VALID | fields)


def with_field(name: str, value: bytes) -> bytes:
    """Return a valid request with one more field, whose raw value may be invalid JSON."""
    return post(json.dumps(VALID).encode()[:-1] + b',"%b":%b}' % (name.encode(), value))


def with_content(content: bytes) -> bytes:
    return post(b'{"model":"standard","messages":[{"role":"user","content":%b}]}' % content)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def image(url: str) -> bytes:
    return chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


MANY = b'{"model":"standard","input":"a","messages":[{"role":"user","content":"a"}],"x":[' + b"1," * 300_000 + b"1]}"
COMPLEX: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^a{1,999}$"}},  # vLLM needs the portable form of this
    "enum": [f"n{number:03}" for number in range(700)],
    "anyOf": [{"minProperties": 1}] * 1200,
}
GOOD = post()
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
DATA = json.dumps(VALID).encode()


@dataclass(frozen=True)
class Case:
    """One request and its response.

    `calls` is the number of requests that may reach a backend. `says` is a further check of the
    response.
    """

    number: int
    name: str
    data: bytes | Callable[[], bytes]
    status: int
    code: str | None = None
    param: str | None = None
    gateway: str = "open"
    calls: int = 0
    is_closed: bool = False
    says: Callable[[Answer], bool] = lambda answer: True

    def __str__(self) -> str:
        return f"{self.number} {self.name}"


def refused(
    number: int,
    name: str,
    data: bytes | Callable[[], bytes],
    param: str | None = None,
    code: str = "invalid_value",
    **more: Any,
) -> Case:
    return Case(number, name, data, 400, code, param, **more)


def invalid_json(number: int, name: str, data: bytes) -> Case:
    return refused(number, name, data, code="invalid_json")


def served(number: int, name: str, data: bytes, **more: Any) -> Case:
    return Case(number, name, data, 200, calls=1, **more)


def raw(number: int, name: str, head: str | bytes, status: int = 400, code: str = "invalid_value") -> Case:
    return Case(number, name, head.encode("latin-1") if isinstance(head, str) else head, status, code, is_closed=True)


SURROGATE = b'"\\ud800"'
OWN_ID = r"req-[0-9a-f]{24}"
UPLOAD = f"Content-Length: {BODY_LIMIT + 1}"

CASES = [
    # 47 to 53: invalid JSON
    invalid_json(47, "empty", post(b"")),
    invalid_json(47, "brace", post(b"{")),
    invalid_json(47, "trailing junk", post(DATA + b"x")),
    invalid_json(47, "second document", post(DATA + DATA)),
    *(
        invalid_json(47, f"top-level {text}", post(text.encode()))
        for text in ("[]", "[{}]", '"x"', "1", "null", "true")
    ),
    invalid_json(48, "1,100 deep", with_field("x", b"[" * 1100 + b"]" * 1100)),
    invalid_json(48, "100,000 deep", with_field("x", b"[" * 100_000 + b"]" * 100_000)),
    invalid_json(48, "100,000 open", post(b'{"a":' * 100_000)),
    refused(48, "schema 150 deep", chat(tools=[tool(parameters=nested(150))]), "tools[0].function.parameters"),
    refused(
        48, "schema 400 deep", chat(response_format=schema_format(nested(400))), "response_format.json_schema.schema"
    ),
    *(
        invalid_json(49, f"{text} as {name}", with_field(name, text.encode()))
        for text in ("NaN", "Infinity", "-Infinity", "1e999")
        for name in ("temperature", "x")
    ),
    *(
        invalid_json(50, f"5,000 digits as {name}", with_field(name, b"9" * 5000))
        for name in ("seed", "temperature", "x")
    ),
    *(
        refused(50, f"2^64 as {name}", with_field(name, b"18446744073709551616"), name)
        for name in ("seed", "max_tokens", "temperature", "top_k", "n")
    ),
    refused(
        50,
        "2^64 in a schema",
        chat(tools=[tool(parameters={"type": "object", "maximum": 2**64})]),
        "tools[0].function.parameters",
    ),
    served(51, "lone surrogate in the prompt", with_content(SURROGATE)),
    served(51, "lone surrogate in an ignored field", with_field("x", SURROGATE)),
    served(51, "lone surrogate as a key", post(DATA[:-1] + b",%b:1}" % SURROGATE)),
    Case(51, "lone surrogate as the model", chat(model="\ud83d"), 404, "model_not_found", "model"),
    served(51, "surrogate in bytes", with_content(b'"\xed\xa0\x80"')),
    invalid_json(52, "invalid UTF-8", with_content(b'"\xff"')),
    invalid_json(52, "invalid UTF-8 in an ignored field", with_field("x", b'"\xff"')),
    invalid_json(52, "overlong UTF-8", with_content(b'"\xc0\x80"')),
    invalid_json(52, "BOM", post(b"\xef\xbb\xbf" + DATA)),
    invalid_json(52, "UTF-16", post(json.dumps(VALID).encode("utf-16"))),
    invalid_json(52, "UTF-32", post(json.dumps(VALID).encode("utf-32"))),
    served(53, "last of two models", post(b'{"model":"nope",' + DATA[1:])),
    Case(53, "last of two models unknown", post(DATA[:-1] + b',"model":"nope"}'), 404, "model_not_found", "model"),
    # 54 and 55: the model
    *(
        Case(
            54,
            f"{name} in the model",
            chat(model=model),
            404,
            "model_not_found",
            "model",
            says=lambda answer: "x-evil" not in answer.headers,
        )
        for name, model in (
            ("NUL", "standard\0"),
            ("CRLF", "standard\r\nX-Evil: 1"),
            ("LF", f"{MODEL}\n"),
            ("quote", 'standard"} 1\n'),
        )
    ),
    refused(55, "no model", post({"messages": VALID["messages"]}), "model"),
    refused(55, "null for a model", chat(model=None), "model"),
    refused(55, "number for a model", chat(model=5), "model"),
    Case(55, "model of 8 KiB", chat(model="x" * 8192), 404, "model_not_found", "model"),
    Case(55, "unknown model", chat(model="nope"), 404, "model_not_found", "model"),
    # 56 to 59: media type and size
    Case(56, "text/plain", post(media=("Content-Type: text/plain",)), 415, "unsupported_media_type"),
    Case(56, "no type", post(media=()), 415, "unsupported_media_type"),
    Case(56, "form", post(media=("Content-Type: application/x-www-form-urlencoded",)), 415, "unsupported_media_type"),
    *(
        Case(57, name, post(None, f"Content-Encoding: {name}"), 415, "unsupported_media_type")
        for name in ("gzip", "br", "deflate", "zstd")
    ),
    Case(
        58,
        "too large by its length",
        message("POST", "/v1/chat/completions", *JSON, UPLOAD, body=b"x" * (BODY_LIMIT + 1)),
        413,
        "request_too_large",
        gateway="narrow",
    ),
    Case(
        58,
        "too large by its length, nothing sent",
        message("POST", "/v1/chat/completions", *JSON, UPLOAD),
        413,
        "request_too_large",
        gateway="narrow",
        is_closed=True,
    ),
    Case(
        58,
        "too large in chunks",
        message(
            "POST", "/v1/chat/completions", *JSON, "Transfer-Encoding: chunked", body=chunked(b"x" * BODY_LIMIT, b"x")
        ),
        413,
        "request_too_large",
        gateway="narrow",
    ),
    served(58, "just as large", post(DATA[:-1] + b" " * (BODY_LIMIT - len(DATA)) + b"}"), gateway="narrow"),
    Case(
        58,
        "too large, unknown path",
        message("POST", "/v1/nothing", *JSON, "Transfer-Encoding: chunked", body=chunked(*[b"x" * BODY_LIMIT] * 40)),
        404,
        "not_found",
        gateway="narrow",
        is_closed=True,
    ),
    Case(
        59,
        "less than its length",
        message("POST", "/v1/chat/completions", *JSON, f"Content-Length: {len(DATA) + 1}", body=DATA),
        408,
        "request_timeout",
        gateway="hasty",
        is_closed=True,
    ),
    # 60 to 64: HTTP
    raw(
        60,
        "101 headers",
        HEAD + "".join(f"A{number}: b\r\n" for number in range(100)) + "\r\n",
        431,
        "headers_too_large",
    ),
    raw(60, "header of 64 KiB", HEAD + f"A: {'b' * 65536}\r\n\r\n", 431, "headers_too_large"),
    *(
        raw(61, name, HEAD + lines + "\r\n" + body)
        for name, lines, body in (
            ("length and chunked", "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            ("chunked and length", "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"),
            ("two lengths", "Content-Length: 3\r\nContent-Length: 4\r\n", "abcd"),
            ("signed length", "Content-Length: +3\r\n", "abc"),
            ("length of 5,000 digits", f"Content-Length: {'9' * 5000}\r\n", "abc"),
            ("length of 5,000 zeros", f"Content-Length: {'0' * 5000}3\r\n", "abc"),
            ("odd encoding", "Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"),
            ("folded header", "A: b\r\n c\r\n", ""),
            ("bare LF", "A: b\nC: d\r\n", ""),
            ("space before the colon", "Content-Length : 3\r\n", "abc"),
            ("chunk longer than it says", "Transfer-Encoding: chunked\r\n", "3\r\nabcd\r\n0\r\n\r\n"),
            ("chunk size beyond 64 bits", "Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\nabc"),
        )
    ),
    raw(62, "no Host", "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
    raw(62, "two Hosts", HEAD + "Host: other\r\nContent-Length: 0\r\n\r\n"),
    raw(62, "Host with a path", "GET /v1/models HTTP/1.1\r\nHost: gateway/x\r\n\r\n"),
    raw(62, "absolute target with a user", "GET http://u@other/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    raw(63, "HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    raw(63, "TLS", bytes.fromhex("16030100f1010000ed0303")),
    Case(
        63,
        "WebSocket",
        message(
            "GET",
            "/v1/realtime",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: a",
            "Sec-WebSocket-Version: 13",
        ),
        404,
        "not_found",
    ),
    served(63, "h2c", post(None, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAA")),
    *(
        Case(
            64,
            f"{method} on chat",
            message(method, "/v1/chat/completions"),
            405,
            "method_not_allowed",
            says=lambda a: a.headers["allow"] == "POST",
        )
        for method in ("GET", "PUT", "DELETE", "PATCH")
    ),
    Case(
        64,
        "POST on models",
        message("POST", "/v1/models", "Content-Length: 0"),
        405,
        "method_not_allowed",
        says=lambda a: "GET" in a.headers["allow"],
    ),
    *(
        Case(64, f"unknown path {path}", message("GET", path), 404, "not_found")
        for path in (
            "/nope",
            "/v1/nope",
            f"/{CANARY}",
            "/v1/chat/completions/x",
            "/%2e%2e/etc/passwd",
        )
    ),
    # 65: the error names the wrong field, but nothing of the prompt
    *(
        refused(65, param, chat(**fields), param)
        for param, fields in (
            ("messages[0].content", {"messages": [{"role": "user", "content": {CANARY: CANARY}}]}),
            ("messages[0].role", {"messages": [{"role": CANARY, "content": CANARY}]}),
            (
                "messages[0].content[0].text",
                {"messages": [{"role": "user", "content": [{"type": "text", "text": [CANARY]}]}]},
            ),
            ("messages", {"messages": CANARY}),
            ("stop", {"stop": {CANARY: 1}}),
            ("temperature", {"temperature": CANARY}),
            ("tools[0].function.name", {"tools": [tool(f"{CANARY} {CANARY}")]}),
            ("tool_choice", {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": CANARY}}}),
        )
    ),
    # 66 and 67: API keys are checked before the body is read
    *(
        Case(
            66,
            name,
            message("POST", "/v1/chat/completions", *JSON, *lines, "Content-Length: 100000"),
            401,
            "invalid_api_key",
            gateway="locked",
        )
        for name, lines in (
            ("no key", ()),
            ("wrong key", ("Authorization: Bearer wrong",)),
            ("empty key", ("Authorization: Bearer ",)),
            ("no scheme", (f"Authorization: {KEY}",)),
            ("Basic", (f"Authorization: Basic {base64.b64encode(f'a:{KEY}'.encode()).decode()}",)),
            ("two keys", (f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}")),
            ("two keys, one wrong", (f"Authorization: Bearer {KEY}", "Authorization: Bearer wrong")),
            ("non-ASCII key", ("Authorization: Bearer \xe9\xff",)),
            ("key of 60 KB", (f"Authorization: Bearer {'x' * 60_000}",)),
        )
    ),
    raw(66, "key of 100 KB", HEAD + f"Authorization: Bearer {'x' * 100_000}\r\n\r\n", 431, "headers_too_large"),
    *(
        Case(
            67,
            name,
            message("POST", f"/v1/chat/completions{query}", *JSON, *lines, "Content-Length: 2", body=b"{}"),
            401,
            "invalid_api_key",
            gateway="locked",
        )
        for name, query, lines in (
            ("key in the query", f"?api_key={KEY}", ()),
            ("key in a cookie", "", (f"Cookie: api_key={KEY}; Authorization=Bearer {KEY}",)),
            ("key in another header", "", (f"X-Key: {KEY}",)),
        )
    ),
    Case(66, "right key", post(None, f"Authorization: Bearer {KEY}"), 200, gateway="locked", calls=1),
    Case(66, "right key of Anthropic's clients", post(None, f"X-Api-Key: {KEY}"), 200, gateway="locked", calls=1),
    Case(66, "right key of Azure's clients", post(None, f"Api-Key: {KEY}"), 200, gateway="locked", calls=1),
    # 68: images by URL, and invalid images (see also below)
    *(
        refused(68, url[:30] or "empty", image(url), "messages[0].content[0].image_url.url", "invalid_image_url")
        for url in (
            "http://169.254.169.254/latest/meta-data/",
            "https://example.com/x.png",
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "//127.0.0.1/x.png",
            "/etc/passwd",
            "iVBORw0KGgo=",
            "",
            "data:",
            "data:image/png,abc",
            "gopher://127.0.0.1:1/_x",
        )
    ),
    refused(
        68,
        "not an image",
        image("data:image/png;base64," + base64.b64encode(b"no image at all").decode()),
        IMAGE := "messages[0].content[0].image_url.url",
        "invalid_image",
    ),
    refused(68, "not base64", image("data:image/png;base64,%%%%"), IMAGE, "invalid_image"),
    refused(68, "empty image", image("data:image/png;base64,"), IMAGE, "invalid_image"),
    refused(68, "cut off", image(png_data_url(is_noise=True)[:2000]), IMAGE, "invalid_image"),
    served(68, "good image", image(png_data_url())),
    # 70: numbers, lists and schemas beyond their limits
    refused(70, "n of a million", chat(n=1_000_000), "n"),
    refused(70, "n of 9", chat(n=9), "n"),
    *(
        refused(70, f"{name} {value}", chat(**{name: value}), name)
        for name in ("max_tokens", "max_completion_tokens")
        for value in (-1, 0, 10**12, "5", 1.5, True)
    ),
    refused(
        70,
        "logit_bias of 100,000",
        lambda: chat(logit_bias={str(token): 1 for token in range(100_000)}),
        "logit_bias",
        gateway="roomy",
    ),
    refused(
        70,
        "10,000 tools",
        lambda: chat(tools=[tool(f"f{number}") for number in range(10_000)]),
        "tools",
        gateway="roomy",
    ),
    refused(70, "100,000 messages", lambda: chat(messages=VALID["messages"] * 100_000), "messages", gateway="roomy"),
    Case(
        70,
        "100,000 messages, default body limit",
        lambda: chat(messages=VALID["messages"] * 100_000),
        413,
        "request_too_large",
    ),
    refused(70, "129 tools", chat(tools=[tool(f"f{number}") for number in range(129)]), "tools"),
    refused(70, "5 stops", chat(stop=["a"] * 5), "stop"),
    refused(70, "top_logprobs of 21", chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    refused(
        70,
        "schema of 65 KiB",
        chat(response_format=schema_format({"description": "x" * 66_000})),
        "response_format.json_schema.schema",
    ),
    *(
        refused(70, f"{name} that is too complex", lambda fields=fields: chat(**fields), param)
        for name, fields, param in (
            ("schema", {"response_format": schema_format(COMPLEX)}, "response_format.json_schema.schema"),
            ("tool", {"tools": [tool(parameters=COMPLEX)], "tool_choice": "required"}, "tools"),
        )
    ),
    *(
        Case(
            70,
            f"300,000 members of {path}",
            message("POST", path, *JSON, f"Content-Length: {len(MANY)}", body=MANY),
            413,
            "request_too_large",
        )
        for path in ("/v1/embeddings", "/v1/chat/completions")
    ),
    Case(
        70,
        "300,000 members of /ops/rollout",
        message("PUT", "/ops/rollout", *JSON, f"Content-Length: {len(MANY)}", host="Host: 127.0.0.1", body=MANY),
        413,
        "request_too_large",
    ),
    # 71: streams
    refused(71, "stream yes", chat(stream="yes"), "stream"),
    refused(71, "stream 1", chat(stream=1), "stream"),
    served(
        71,
        "stream_options without a stream",
        chat(stream_options={"include_usage": True}),
        says=lambda answer: b'"choices"' in answer.body,
    ),
    served(71, "stream_options with stream false", chat(stream=False, stream_options={"include_usage": True})),
    # 73 and 74: headers
    Case(
        73,
        "Expect with a bad key",
        message(
            "POST",
            "/v1/chat/completions",
            *JSON,
            "Authorization: Bearer wrong",
            "Expect: 100-continue",
            f"Content-Length: {len(DATA)}",
        ),
        401,
        "invalid_api_key",
        gateway="locked",
    ),
    *(
        served(
            74,
            f"id {name}",
            post(None, value),
            says=lambda answer: bool(re.fullmatch(OWN_ID, answer.headers["x-request-id"])),
        )
        for name, value in (
            ("of 10 KB", "X-Request-Id: " + "a" * 10_000),
            ("of non-ASCII characters", b"X-Request-Id: \xc3\xa9\xff"),
            ("with a space", "X-Request-Id: a b"),
            ("with an escaped line end", "X-Request-Id: a%0d%0ax-evil: 1"),
        )
    ),
    raw(74, "id with a bare CR", HEAD + "X-Request-Id: a\rX-Evil: 1\r\nContent-Length: 0\r\n\r\n"),
    raw(74, "id with a NUL", HEAD + "X-Request-Id: a\0\r\nContent-Length: 0\r\n\r\n"),
    served(
        74,
        "valid id",
        post(None, "X-Request-Id: a-1"),
        says=lambda answer: answer.headers["x-request-id"] == "a-1",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_request_gets_its_documented_response_and_reaches_no_backend(fleet: Fleet, case: Case) -> None:
    before = fleet.calls
    with fleet.connect(case.gateway) as connection:
        connection.send(case.data if isinstance(case.data, bytes) else case.data())
        answer = connection.answer()
        assert not case.is_closed or connection.is_closed()
    assert answer.status == case.status, answer
    assert fleet.calls - before == case.calls
    assert case.says(answer), answer
    assert answer.headers["x-request-id"]
    if case.code is not None:
        error = answer.error
        assert (error["code"], error["param"], error["type"]) == (
            case.code,
            case.param,
            BY_CODE.get(case.code, "invalid_request_error"),
        )
        assert CANARY not in answer.body.decode()
        assert KEY not in answer.body.decode()


def test_served_request_reaches_only_the_active_backend(fleet: Fleet) -> None:
    before = {kind: len(backend.requests) for kind, backend in fleet.backends.items()}
    assert fleet.ask(post(b'{"model":"nope",' + DATA[1:])).status == 200
    assert {kind: len(backend.requests) - before[kind] for kind, backend in fleet.backends.items()} == {
        "ollama": 0,
        "vllm": 0,
        fleet.kind: 1,
    }
    sent = fleet.backends[fleet.kind].requests[-1].partition(b"\r\n\r\n")[2]
    assert sent.count(b'"model"') == 1  # case 53: the body is rewritten, so the first of two models is gone
    assert json.loads(sent)["model"] == MODEL


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_image_url_is_never_fetched(fleet: Fleet, untouchable: socket.socket, scheme: str) -> None:
    """Case 68; `untouchable` checks at its end that the gateway did not connect."""
    before = fleet.calls
    answer = fleet.ask(image(f"{scheme}://127.0.0.1:{untouchable.getsockname()[1]}/x.png"))
    assert (answer.status, answer.error["code"], fleet.calls) == (400, "invalid_image_url", before)


REDIRECTING_FIELDS = (
    "api_base",
    "base_url",
    "api_key",
    "extra_body",
    "extra_headers",
    "extra_query",
    "custom_llm_provider",
    "metadata",
    "proxy",
    "webhook_url",
)


@pytest.mark.parametrize("name", REDIRECTING_FIELDS)
def test_field_that_would_redirect_a_proxy_is_dropped(fleet: Fleet, untouchable: socket.socket, name: str) -> None:
    """Case 69."""
    url = f"http://127.0.0.1:{untouchable.getsockname()[1]}"
    answer = fleet.ask(
        chat(
            **{
                name: {"url": url, "api_base": url, "base_url": url}
                if name in ("extra_body", "extra_headers", "metadata")
                else url
            }
        )
    )
    assert answer.status == 200
    assert url.encode() not in fleet.backends[fleet.kind].requests[-1]


@pytest.mark.parametrize(
    "name",
    [
        "X-Portkey-Custom-Host",
        "X-Forwarded-Host",
        "X-Api-Base",
        "OpenAI-Base-Url",
        "Helicone-Target-Url",
        "X-Original-Url",
        "Forwarded",
        "Cookie",
    ],
)
def test_header_that_would_redirect_a_proxy_is_dropped(fleet: Fleet, untouchable: socket.socket, name: str) -> None:
    """Case 69."""
    url = f"http://127.0.0.1:{untouchable.getsockname()[1]}"
    assert fleet.ask(post(None, f"{name}: {url}")).status == 200
    assert url.encode() not in fleet.backends[fleet.kind].requests[-1]


# Time


@pytest.mark.parametrize("depth", [1_100, 100_000])
def test_deep_body_costs_about_as_much_as_a_flat_one(depth: int) -> None:
    """Case 48."""
    body = b'{"model":"standard","messages":' + b"[" * depth + b"]" * depth + b"}"
    flat = json.dumps(VALID | {"metadata": {f"key{number}": "value" * 20 for number in range(1500)}}).encode()

    def refuse() -> None:
        with pytest.raises(GatewayError):
            parse(body, MIB)

    assert_at_most(10, refuse, yardstick=lambda: json.loads(flat))


@pytest.mark.parametrize("key", ["", "wrong", "x" * 60_000])
def test_bad_key_costs_little_more_than_to_read_it(fleet: Fleet, key: str) -> None:
    """Case 66."""
    refused = message("POST", "/v1/chat/completions", *JSON, f"Authorization: Bearer {key}", "Content-Length: 0")
    healthy = message("GET", "/healthz", f"X-Unused: {key}")
    with fleet.connect("locked") as connection:

        def ask(sent: bytes, status: int) -> None:
            for _ in range(10):
                connection.send(sent)
                assert connection.answer().status == status

        assert_at_most(3, lambda: ask(refused, 401), yardstick=lambda: ask(healthy, 200), clock=time.process_time)


# Traces left behind

UNKNOWN_NAMES = 1000


def samples(fleet: Fleet) -> set[str]:
    """Return the names and labels of all metric series."""
    answer = fleet.ask(message("GET", "/metrics", host="Host: 127.0.0.1"))
    assert answer.status == 200
    return {
        line.rpartition(b" ")[0].decode() for line in answer.body.splitlines() if line and not line.startswith(b"#")
    }


def resident(fleet: Fleet) -> int:
    """Return the resident memory of this process in bytes, without the gateways' in-memory logs."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 - sum(len(gateway.log.getvalue()) for gateway in fleet.gateways.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_unknown_names_and_paths_leave_no_metric_series_and_no_memory_behind(fleet: Fleet) -> None:
    """Case 72."""

    def ask(numbers: range) -> None:
        with fleet.connect() as connection:
            for number in numbers:
                connection.send(chat(model=f"{CANARY}-{number}"))
                assert connection.answer().status == 404
                connection.send(message("GET", f"/v1/{CANARY}-{number}"))
                assert connection.answer().status == 404

    ask(range(100))
    series, memory = samples(fleet), resident(fleet)
    ask(range(100, 100 + UNKNOWN_NAMES))
    assert len(samples(fleet) - series) <= 2
    assert resident(fleet) - memory <= 2 * MIB
    assert not [name for name in samples(fleet) if CANARY in name]


def test_logs_have_no_prompt_no_key_and_no_5xx(fleet: Fleet) -> None:
    """They also have none of the made-up names. This covers all exchanges of this file so far."""
    for name, gateway in fleet.gateways.items():
        fleet.ask(chat(model=f"{CANARY}-of-the-log"), name)
        eventually(gateway.log.getvalue)
        text = gateway.log.getvalue().decode()
        assert CANARY not in text
        assert KEY not in text
        assert all(json.loads(line)["status"] < 500 for line in text.splitlines())


# Random variations of a valid request

RICH: dict[str, Any] = {
    "model": "standard",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": png_data_url(), "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [called()]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
        {"role": "user", "content": "So?"},
    ],
    "tools": [tool(description="d", strict=True)],
    "tool_choice": "auto",
    "response_format": schema_format(WEATHER),
    "stream": False,
    "stream_options": {"include_usage": True},
    "max_tokens": 64,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "seed": 1,
    "n": 1,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"1": 1},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths (keys and indexes) of all values inside `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [found for key, item in inner for found in paths(item, (*path, key))]


NUMBERS = [0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), 10**30]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(["", "\0", "user", "tool", "none", "required", "é🙂", "x" * 300, "$ref"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "function", "$ref", "properties", ""]), inner)
    ),
    max_leaves=6,
)
changes = st.lists(
    st.tuples(st.sampled_from(paths(RICH)), st.sampled_from(["set", "drop", "wrap", "twice", "deep"]), anything),
    min_size=1,
    max_size=3,
)


def deep(value: Any, levels: int = 200) -> Any:
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


def mutated(changes: list[tuple[tuple[Any, ...], str, Any]]) -> dict[str, Any]:
    """Return a copy of `RICH` with the changes applied."""
    document: dict[str, Any] = json.loads(json.dumps(RICH))
    for path, manner, value in changes:
        holder: Any = document
        try:
            for key in path[:-1]:
                holder = holder[key]
            old = holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has removed it
        if manner == "drop":
            del holder[path[-1]]
        elif isinstance(holder, str):
            continue
        else:
            holder[path[-1]] = {"set": value, "wrap": [old], "twice": [old, old], "deep": deep(value)}[manner]
    return document


def check_served_or_refused(fleet: Fleet, data: bytes) -> None:
    """Check that the request is either served by one backend, or refused before any is asked."""
    before = fleet.calls
    answer = fleet.ask(data)
    assert answer.status == 200 or 400 <= answer.status < 500, answer
    if answer.status == 200:
        assert fleet.calls == before + 1
    else:
        assert answer.error["type"] == "invalid_request_error"
        assert fleet.calls == before


few_examples = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def test_unchanged_request_is_served(fleet: Fleet) -> None:
    assert fleet.ask(post(RICH)).status == 200


@few_examples
@given(changes)
def test_any_change_of_a_valid_request_is_served_or_refused(
    fleet: Fleet, changes: list[tuple[tuple[Any, ...], str, Any]]
) -> None:
    check_served_or_refused(fleet, post(mutated(changes)))


@few_examples
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["cut", "put", "flip"]), st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_any_change_of_the_bytes_of_a_valid_request_is_served_or_refused(
    fleet: Fleet, edits: list[tuple[float, str, bytes]]
) -> None:
    body = json.dumps(RICH).encode()
    for share, manner, data in edits:
        at = int(share * len(body))
        body = body[:at] + {"cut": b"", "put": data + body[at : at + 1], "flip": data}[manner] + body[at + 1 :]
    check_served_or_refused(fleet, post(body))
