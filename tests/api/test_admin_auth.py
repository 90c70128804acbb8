"""Admin authorisation, with and without keys."""

import pytest

from gateway.api.admin_auth import LOCAL, AdminAccess
from gateway.errors import Forbidden, InvalidApiKey

OPEN = AdminAccess([])
CLOSED = AdminAccess(["admin-key", "scraper-key"])
TOKEN = AdminAccess([], "the-token", trusts_loopback=False)
NOBODY = AdminAccess([], trusts_loopback=False)


def headers(*pairs: tuple[bytes, bytes], host: bytes = b"127.0.0.1:8080") -> list[tuple[bytes, bytes]]:
    return [(b"host", host), *pairs]


# Without a key


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1:8080", b"localhost", b"LocalHost:8080", b"[::1]:8080", b"127.0.0.1", b"gateway.localhost:8080"],
)
def test_local_program_has_access(peer: str, host: bytes) -> None:
    OPEN.check(peer, headers(host=host))


@pytest.mark.parametrize("peer", [None, "10.0.0.1", "::2", "::ffff:10.0.0.1", "192.168.1.5", "", "testclient"])
def test_remote_caller_is_refused(peer: str | None) -> None:
    with pytest.raises(Forbidden):
        OPEN.check(peer, headers())


@pytest.mark.parametrize(
    "pair",
    [
        (b"x-forwarded-for", b"127.0.0.1"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-anything", b""),
        (b"forwarded", b"for=127.0.0.1"),
        (b"via", b"1.1 proxy"),
        (b"x-real-ip", b"127.0.0.1"),
        (b"x-client-ip", b"127.0.0.1"),
        (b"x-cluster-client-ip", b"127.0.0.1"),
        (b"true-client-ip", b"127.0.0.1"),
        (b"cf-connecting-ip", b"127.0.0.1"),
    ],
    ids=lambda pair: pair[0].decode(),
)
def test_request_forwarded_by_a_proxy_is_refused(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(Forbidden):
        OPEN.check("127.0.0.1", headers(pair))


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"evil.example",
        b"evil.example:8080",
        b"localhost.evil.example",
        b"10.0.0.1",
        b"127.0.0.1.evil.example",
        b"[",
        b"user@evil",
        b"evil@localhost",
        b"evil.example?@localhost",
        b"notlocalhost",
        b"127.0.0.1.",
        b"2130706433",
    ],
)
def test_foreign_host_header_is_refused(host: bytes) -> None:
    """After DNS rebinding, a web page sends its own host name."""
    with pytest.raises(Forbidden):
        OPEN.check("127.0.0.1", headers(host=host))


@pytest.mark.parametrize(
    "origin",
    [
        b"http://evil.example",
        b"null",
        b"https://127.0.0.1:8080",
        b"http://127.0.0.1:3000",
        b"http://localhost:8080",
        b"",
    ],
)
def test_page_of_another_origin_is_refused(origin: bytes) -> None:
    with pytest.raises(Forbidden):
        OPEN.check("127.0.0.1", headers((b"origin", origin)))


def test_page_of_the_gateway_itself_has_access() -> None:
    OPEN.check("127.0.0.1", headers((b"origin", b"http://127.0.0.1:8080")))


# With a token


def test_token_grants_access_from_anywhere_and_has_no_id_of_its_own() -> None:
    headers_with_token = headers((b"authorization", b"Bearer the-token"), (b"via", b"proxy"), host=b"gateway.example")
    assert TOKEN.check("10.0.0.1", headers_with_token) == LOCAL


@pytest.mark.parametrize("pairs", [(), ((b"authorization", b"Bearer the-tokem"),), ((b"authorization", b"Bearer "),)])
def test_local_program_needs_the_token(pairs: tuple[tuple[bytes, bytes], ...]) -> None:
    """A proxy on the same machine looks like a local program: it may send no header of its own."""
    with pytest.raises(InvalidApiKey):
        TOKEN.check("127.0.0.1", headers(*pairs))


@pytest.mark.parametrize("pairs", [(), ((b"authorization", b"Bearer "),), ((b"authorization", b"Bearer None"),)])
def test_without_key_and_token_nobody_has_access_if_loopback_is_not_trusted(
    pairs: tuple[tuple[bytes, bytes], ...],
) -> None:
    with pytest.raises(Forbidden, match="GATEWAY_ADMIN_KEY"):
        NOBODY.check("127.0.0.1", headers(*pairs))


# With keys


@pytest.mark.parametrize("key", [b"admin-key", b"scraper-key"])
def test_each_key_grants_access_from_anywhere(key: bytes) -> None:
    CLOSED.check("10.0.0.1", headers((b"authorization", b"Bearer " + key), (b"via", b"proxy"), host=b"gateway.example"))


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ((b"authorization", b"Bearer wrong"),),
        ((b"authorization", b"Bearer "),),
        ((b"authorization", b"Basic admin-key"),),
    ],
    ids=["no header", "wrong key", "empty key", "Basic"],
)
def test_local_program_needs_the_key_if_one_is_configured(pairs: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(InvalidApiKey):
        CLOSED.check("127.0.0.1", headers(*pairs))


def test_empty_token_is_refused() -> None:
    with pytest.raises(InvalidApiKey):
        AdminAccess(["a"]).check("127.0.0.1", headers((b"authorization", b"Bearer")))
