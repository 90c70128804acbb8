"""Cross-origin answers."""

import pytest

from gateway.api.cors import Cors

APP = b"https://app.example"
ASKS = {b"access-control-request-method": b"POST", b"access-control-request-headers": b"authorization,x-stainless-os"}


def test_without_origins_nothing_is_said() -> None:
    cors = Cors([])
    assert cors.headers({b"origin": APP}) == []
    assert cors.preflight_headers({b"origin": APP, **ASKS}) is None


@pytest.mark.parametrize("setting", ["https://app.example", "https://app.example/"])
def test_listed_origin_may_read(setting: str) -> None:
    headers = dict(Cors([setting]).headers({b"origin": APP}))
    assert headers[b"access-control-allow-origin"] == APP
    assert headers[b"vary"] == b"Origin"
    assert b"x-request-id" in headers[b"access-control-expose-headers"]
    assert b"retry-after" in headers[b"access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin",
    [b"https://evil.example", b"http://app.example", b"https://app.example:444", b"https://app.example.evil", b"null"],
)
def test_other_origin_may_not(origin: bytes) -> None:
    cors = Cors(["https://app.example"])
    assert cors.headers({b"origin": origin}) == []
    assert cors.preflight_headers({b"origin": origin, **ASKS}) is None


def test_star_lets_any_origin_read() -> None:
    assert dict(Cors(["*"]).headers({b"origin": b"null"}))[b"access-control-allow-origin"] == b"*"


def test_request_of_a_program_gets_no_header() -> None:
    assert Cors(["*"]).headers({}) == []


def test_preflight_allows_what_was_asked_for() -> None:
    headers = dict(Cors(["https://app.example"]).preflight_headers({b"origin": APP, **ASKS}) or ())
    assert headers[b"access-control-allow-headers"] == ASKS[b"access-control-request-headers"]
    assert b"POST" in headers[b"access-control-allow-methods"]
    assert headers[b"access-control-max-age"] == b"600"


def test_preflight_that_asks_for_no_headers_is_told_the_usual() -> None:
    headers = dict(Cors(["*"]).preflight_headers({b"origin": APP, b"access-control-request-method": b"POST"}) or ())
    assert headers[b"access-control-allow-headers"] == b"authorization, content-type"


def test_options_without_a_wish_is_no_preflight() -> None:
    assert Cors(["*"]).preflight_headers({b"origin": APP}) is None


def test_credentials_are_never_allowed() -> None:
    for cors in (Cors(["*"]), Cors(["https://app.example"])):
        for headers in (cors.headers({b"origin": APP}), cors.preflight_headers({b"origin": APP, **ASKS}) or []):
            assert b"access-control-allow-credentials" not in dict(headers)
