"""Tests of the addresses from which images may be fetched."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.image_address import ImageAddress, is_allowed, is_public, parse, parse_prefix, redirected

CDN = [
    "https://cdn.example.com/",
    "https://img.example.com:8443/public/",
    "https://bücher.example/a",
    "https://10.1.2.3/",
]
ALLOWED = [prefix for text in CDN if (prefix := parse_prefix(text))]


def allows(text: str) -> bool:
    address = parse(text)
    return address is not None and is_allowed(address, ALLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "https://cdn.example.com/a.png",
        "HTTPS://CDN.Example.COM:443/a.png",
        "https://cdn.example.com./a.png",
        "https://cdn.example.com",
        "https://cdn.example.com/a%20b.png?X-Amz-Credential=a%2Fb#part",
        "https://cdn.example.com/고양이.png",
        "https://cdn.example.com/resize/https://other.example/a.png",
        "https://img.example.com:8443/public/a/b.png",
        "https://xn--bcher-kva.example/a/b.png",
        "https://BÜCHER.example/a",
        "https://10.1.2.3/a.png",
        "https://cdn.example.com/..a/b..c/.../d.png",
    ],
)
def test_address_below_a_prefix_is_allowed(text: str) -> None:
    assert allows(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://cdn.example.com/a.png",
        "ftp://cdn.example.com/a.png",
        "//cdn.example.com/a.png",
        "cdn.example.com/a.png",
        "https://cdn.example.com@evil.example/a.png",
        "https://evil.example@cdn.example.com/a.png",
        "https://user:secret@cdn.example.com/a.png",
        "https://cdn.example.com:pw@evil.example/",
        "https://cdn.example.com.evil.example/a.png",
        "https://evil-cdn.example.com/a.png",
        "https://evil.example/https://cdn.example.com/a.png",
        "https://evil.example#@cdn.example.com/",
        "https://evil.example\\@cdn.example.com/",
        "https://cdn.example.com\\.evil.example/",
        "https://cdn.example.com:8443/a.png",
        "https://cdn.example.com:0/",
        "https://cdn.example.com:99999/",
        "https://cdn.example.com:x/",
        "https://img.example.com:8443/public",
        "https://img.example.com:8443/publicity/a.png",
        "https://img.example.com:8443/public/../secret.png",
        "https://img.example.com:8443/public/%2e%2E/secret.png",
        "https://img.example.com:8443/public/.%2e/secret.png",
        "https://img.example.com:8443/public/..%2fsecret.png",
        "https://img.example.com:8443/public/..%5csecret.png",
        "https://img.example.com:8443/public/%252e%252e/secret.png",
        "https://img.example.com:8443/public/..",
        "https://img.example.com/public/a.png",
        "https://bücher.example/ab",
        "https://bucher.example/a",
        "https://cdn.example.com/a b.png",
        " https://cdn.example.com/",
        "https://cdn.example.com/\na",
        "https://cdn.exa\tmple.com/",
        "https://cdn.example.com/\x00",
        "https://cdn%2eexample.com/",
        "https://cdn。example。com.evil.example/",
        "https://[::1]/",
        "https://[::1%25eth0]/",
        "https://[not an address]/",
        "https://10.1.515/",
        "https://0x0a010203/",
        "https://167838211/",
        "https://10.1.2.03/",
        "https:///a.png",
        "https://",
        "",
        "https://cdn.example.com/" + "a" * 5000,
    ],
)
def test_other_or_ambiguous_address_is_not_allowed(text: str) -> None:
    assert not allows(text)


@pytest.mark.parametrize(
    "text", ["https://a.example/?x", "http://a.example/", "https://u@a.example/", "https://a.example/#x", "a"]
)
def test_prefix_is_a_plain_https_address(text: str) -> None:
    assert parse_prefix(text) is None


def test_request_is_made_of_the_parts() -> None:
    assert parse("https://B%C3%BC.example/") is None
    address = parse("https://bücher.example:8443/고 양".replace(" ", "%20") + "?q=ü&r=%2F#f")
    assert address == ImageAddress("xn--bcher-kva.example", 8443, "/%EA%B3%A0%20%EC%96%91", "q=%C3%BC&r=%2F")
    assert (address.authority, address.target) == (
        "xn--bcher-kva.example:8443",
        "/%EA%B3%A0%20%EC%96%91?q=%C3%BC&r=%2F",
    )
    literal = parse("https://[2001:DB8::1]/a")
    assert literal is not None
    assert (literal.host, literal.authority) == ("2001:db8::1", "[2001:db8::1]")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/b.png", "https://cdn.example.com/b.png"),
        ("b.png?x=1", "https://cdn.example.com/a/b.png?x=1"),
        ("//evil.example/b", "https://evil.example/b"),
        ("https://evil.example/b", "https://evil.example/b"),
        ("http://cdn.example.com/b", None),
        ("https://u@cdn.example.com/b", None),
        ("/%2e%2e/b", None),
        ("/b\r\nX: y", None),
        ("https://[", None),
    ],
)
def test_redirect_is_resolved_and_read_as_strictly(location: str, expected: str | None) -> None:
    start = parse("https://cdn.example.com/a/x.png")
    assert start is not None
    assert redirected(start, location) == (parse(expected) if expected else None)


@given(st.text())
def test_any_text_can_be_parsed(text: str) -> None:
    for address in (parse(text), parse("https://" + text), parse("https://a.example/" + text)):
        if address is not None:
            f"GET {address.target} HTTP/1.1\r\nHost: {address.authority}".encode("ascii")
            assert not set(address.target + address.host) & set(" \r\n\\@") or "@" in address.target


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1", "100.127.255.255", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
        "198.18.0.1", "203.0.113.5", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
        "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808", "2002:7f00:1::", "2002:808:808::", "2001:0:808:808::1", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_address_of_another_network_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "172.32.0.1"])
def test_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
