"""Who may use `/ops` and `/metrics`."""

import pytest

from gateway.api.admin_auth import AdminAccess
from gateway.errors import Forbidden, InvalidApiKey

OPEN = AdminAccess([])
CLOSED = AdminAccess(["admin-key", "scraper-key"])


def headers(*pairs: tuple[bytes, bytes], host: bytes = b"127.0.0.1:8080") -> list[tuple[bytes, bytes]]:
    return [(b"host", host), *pairs]


# Without a key


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", [b"127.0.0.1:8080", b"localhost", b"LocalHost:8080", b"[::1]:8080", b"127.0.0.1"])
def test_program_on_this_machine_is_let_in(peer: str, host: bytes) -> None:
    OPEN.check(peer, headers(host=host))


@pytest.mark.parametrize("peer", [None, "10.0.0.1", "::2", "::ffff:10.0.0.1", "192.168.1.5", "", "testclient"])
def test_caller_from_elsewhere_is_not(peer: str | None) -> None:
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
    ],
)
def test_what_a_proxy_passes_on_is_not(pair: tuple[bytes, bytes]) -> None:
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
    ],
)
def test_host_that_is_not_this_machine_is_not(host: bytes) -> None:
    """A page whose name DNS was bent to this machine sends that name."""
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
def test_page_of_another_origin_is_not(origin: bytes) -> None:
    with pytest.raises(Forbidden):
        OPEN.check("127.0.0.1", headers((b"origin", origin)))


def test_own_page_is_let_in() -> None:
    OPEN.check("127.0.0.1", headers((b"origin", b"http://127.0.0.1:8080")))


# With keys


@pytest.mark.parametrize("key", [b"admin-key", b"scraper-key"])
def test_any_of_the_keys_opens_from_anywhere(key: bytes) -> None:
    CLOSED.check("10.0.0.1", headers((b"authorization", b"Bearer " + key), (b"via", b"proxy"), host=b"gateway.example"))


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ((b"authorization", b"Bearer wrong"),),
        ((b"authorization", b"Bearer "),),
        ((b"authorization", b"Basic admin-key"),),
    ],
)
def test_set_key_is_asked_of_this_machine_too(pairs: tuple[tuple[bytes, bytes], ...]) -> None:
    with pytest.raises(InvalidApiKey):
        CLOSED.check("127.0.0.1", headers(*pairs))


def test_empty_token_is_not_the_digest_of_nothing() -> None:
    with pytest.raises(InvalidApiKey):
        AdminAccess(["a"]).check("127.0.0.1", headers((b"authorization", b"Bearer")))
