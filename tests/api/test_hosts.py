"""Names and addresses of this machine."""

import pytest

from gateway.api.hosts import host_of, is_local_host, is_loopback


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("Gateway.Example:8080", "gateway.example"),
        ("gateway:", "gateway"),
        ("[::1]:8080", "::1"),
        ("[::FFFF:127.0.0.1]", "::ffff:127.0.0.1"),
        ("", ""),
        (":80", ""),
        ("::1", ""),
        ("[::1", ""),
        ("a:b", ""),
        ("user@a", ""),
        ("a/b", ""),
        ("a?b", ""),
        ("a, b", ""),
    ],
)
def test_host_is_read_from_the_authority(authority: str, host: str) -> None:
    assert host_of(authority) == host


@pytest.mark.parametrize(
    "authority",
    ["localhost", "LOCALHOST:1", "ui.localhost", "a.b.localhost:80", "127.0.0.1", "127.255.0.9:8", "[::1]", "[::1]:80"],
)
def test_local_names_are_local_with_any_port(authority: str) -> None:
    assert is_local_host(authority)


@pytest.mark.parametrize(
    "authority",
    [
        "",
        "localhost.example",
        "evillocalhost",
        "evil.example:80",
        "128.0.0.1",
        "0.0.0.0",
        "127.1",
        "[::2]",
        "x@localhost",
    ],
)
def test_other_names_are_not_local(authority: str) -> None:
    assert not is_local_host(authority)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.9.9.9", True), ("::ffff:10.0.0.1", False), ("localhost", False)],
)
def test_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
