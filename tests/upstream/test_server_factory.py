"""Servers of a backend: their names, addresses, heads and TLS."""

from typing import Any

import pytest

from gateway import config
from gateway.upstream.backend import Backend
from gateway.upstream.server import Server
from gateway.upstream.server_factory import place


def backend(*servers: Any, **keys: Any) -> Backend:
    settings = config.build(
        {
            "llm_backend": "here",
            "backends": {"here": {"kind": "vllm", "servers": list(servers), **keys}},
            "tiers": {"standard": {"models": {"here": "llama"}}},
        }
    )
    return Backend(settings.backends["here"])


def at(text: str, address: str = "10.0.0.5", **keys: Any) -> Server:
    here = backend(text, **keys)
    return here.build_at(here.names[0], address)


def test_name_goes_into_the_host_header_and_the_address_into_the_connection() -> None:
    server = at("dns://vllm.svc:8000/models/a/v1")
    head = server.chat_head(b"", b"me")
    assert head.startswith(b"POST /models/a/v1/chat/completions HTTP/1.1\r\nHost: vllm.svc:8000\r\n")
    origin = server.pool.origin
    assert (origin.host, origin.address, origin.port, origin.tls) == ("vllm.svc", "10.0.0.5", 8000, None)


@pytest.mark.parametrize(
    ("text", "port", "is_secure"),
    [
        ("dns://vllm.svc", 8000, False),
        ("dns://vllm.svc:80", 80, False),
        ("dns+https://vllm.svc", 443, True),
        ("dns+https://vllm.svc:8443", 8443, True),
    ],
)
def test_port_and_tls_come_from_the_address_in_the_settings(text: str, port: int, is_secure: bool) -> None:
    origin = at(text).pool.origin
    assert (origin.port, origin.tls is not None) == (port, is_secure)


def test_tls_context_is_shared_by_all_servers() -> None:
    here = backend("dns+https://vllm.svc", "https://other:1")
    one, two = (here.build_at(here.names[0], address) for address in ("10.0.0.1", "10.0.0.2"))
    assert one.pool.origin.tls is two.pool.origin.tls is here.servers[0].pool.origin.tls


@pytest.mark.parametrize(
    ("address", "label"),
    [("10.0.0.5", "10.0.0.5:8000"), ("fd00::5", "[fd00::5]:8000"), ("fe80::1%3", "[fe80::1%3]:8000")],
)
def test_server_at_an_address_is_named_by_it(address: str, label: str) -> None:
    server = at("dns://vllm.svc", address)
    assert (server.label, server.name) == (label, f"here#{label}")
    assert place(server.pool.origin) == label


def test_path_tells_two_servers_at_one_address_apart() -> None:
    assert at("dns://vllm.svc/a").label == "10.0.0.5:8000/a"


@pytest.mark.parametrize("servers", [["a:1"], ["a:1", "b:1"]], ids=["one", "two"])
def test_server_of_the_settings_is_named_by_its_number_if_there_are_several(servers: list[str]) -> None:
    here = backend(*servers)
    assert [server.label for server in here.servers] == ["1", "2"][: len(servers)]
    assert [server.name for server in here.servers] == (["here"] if len(servers) == 1 else ["here#1", "here#2"])


def test_number_of_a_server_counts_the_names_before_it() -> None:
    assert [server.label for server in backend("dns://vllm.svc", "b:1").servers] == ["2"]


def test_servers_at_the_same_address_have_the_same_seed_in_every_replica() -> None:
    assert at("dns://vllm.svc").prefixes.seed == at("dns://vllm.svc").prefixes.seed
    assert at("dns://vllm.svc").prefixes.seed != at("dns://vllm.svc", "10.0.0.6").prefixes.seed


def test_new_server_gets_nothing_before_its_first_probe_and_knows_nothing() -> None:
    server = at("dns://vllm.svc", max_concurrency=3)
    assert server.is_joining
    assert not server.is_up()
    assert server.discovered is None
    assert server.slots.limit == 3
    assert server.pool.connect_timeout == 2
