"""CORS headers of responses and preflight requests."""

import pytest

from gateway.api.cors import Cors

APP = b"https://app.example"
PREFLIGHT = {
    b"access-control-request-method": b"POST",
    b"access-control-request-headers": b"authorization,x-stainless-os",
}


def test_without_origins_no_header_is_sent() -> None:
    cors = Cors([])
    assert cors.headers({b"origin": APP}) == []
    assert cors.preflight_headers({b"origin": APP, **PREFLIGHT}) is None


@pytest.mark.parametrize("setting", ["https://app.example", "https://app.example/"])
def test_allowed_origin_may_read(setting: str) -> None:
    headers = dict(Cors([setting]).headers({b"origin": APP}))
    assert headers[b"access-control-allow-origin"] == APP
    assert headers[b"vary"] == b"Origin"
    assert b"x-request-id" in headers[b"access-control-expose-headers"]
    assert b"retry-after" in headers[b"access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin",
    [b"https://evil.example", b"http://app.example", b"https://app.example:444", b"https://app.example.evil", b"null"],
)
def test_other_origin_may_not_read(origin: bytes) -> None:
    cors = Cors(["https://app.example"])
    assert cors.headers({b"origin": origin}) == []
    assert cors.preflight_headers({b"origin": origin, **PREFLIGHT}) is None


def test_wildcard_allows_any_origin() -> None:
    assert dict(Cors(["*"]).headers({b"origin": b"null"}))[b"access-control-allow-origin"] == b"*"


def test_request_without_an_origin_gets_no_header() -> None:
    assert Cors(["*"]).headers({}) == []


def test_preflight_allows_the_requested_headers() -> None:
    headers = dict(Cors(["https://app.example"]).preflight_headers({b"origin": APP, **PREFLIGHT}) or ())
    assert headers[b"access-control-allow-headers"] == PREFLIGHT[b"access-control-request-headers"]
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert headers[b"access-control-max-age"] == b"600"


def test_preflight_without_requested_headers_gets_the_default_ones() -> None:
    headers = dict(Cors(["*"]).preflight_headers({b"origin": APP, b"access-control-request-method": b"POST"}) or ())
    assert headers[b"access-control-allow-headers"] == b"authorization, content-type"


def test_options_without_a_requested_method_is_not_a_preflight() -> None:
    assert Cors(["*"]).preflight_headers({b"origin": APP}) is None


def test_credentials_are_never_allowed() -> None:
    for cors in (Cors(["*"]), Cors(["https://app.example"])):
        for headers in (cors.headers({b"origin": APP}), cors.preflight_headers({b"origin": APP, **PREFLIGHT}) or []):
            assert b"access-control-allow-credentials" not in dict(headers)


@pytest.mark.parametrize(
    ("setting", "allowed", "refused"),
    [
        (
            "http://localhost:*",
            [b"http://localhost:3000", b"http://localhost:65535"],
            [b"http://localhost", b"https://localhost:3000", b"http://localhost:3000.evil", b"http://evil.localhost:3"],
        ),
        (
            "https://*.example.com",
            [b"https://a.example.com", b"https://a.b.example.com"],
            [
                b"https://example.com",
                b"https://a.example.com.evil",
                b"https://evil/.example.com",
                b"http://a.example.com",
            ],
        ),
        ("app://*", [b"app://obsidian.md", b"app://localhost:3"], [b"apps://x", b"null", b"app://a/b"]),
        ("http://[::1]:*", [b"http://[::1]:99"], [b"http://[::1]", b"http://[::12]:9"]),
    ],
)
def test_star_in_an_origin_stands_for_a_part_of_it(setting: str, allowed: list[bytes], refused: list[bytes]) -> None:
    cors = Cors([setting, "https://plain.example"])
    for origin in (*allowed, b"https://plain.example"):
        assert dict(cors.headers({b"origin": origin}))[b"access-control-allow-origin"] == origin
        assert cors.preflight_headers({b"origin": origin, **PREFLIGHT}) is not None
    for origin in refused:
        assert cors.headers({b"origin": origin}) == []
