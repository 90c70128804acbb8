"""The limit of connections of one client address, as function calls and on real sockets."""

import json
import logging
from ipaddress import ip_network

import pytest

from gateway.downstream.connection_limit import NOTE_SECONDS, ConnectionLimit, TooManyConnections
from gateway.downstream.limits import ServerLimits
from tests.downstream.server_thread import GET, eventually, parse_head, read_all, read_response, serving


def enter(limit: ConnectionLimit, *addresses: str) -> list[int | str | None]:
    return [limit.enter(address) for address in addresses]


def test_each_address_has_its_own_connections() -> None:
    limit = ConnectionLimit(2)
    keys = enter(limit, "10.0.0.1", "10.0.0.2", "10.0.0.1")
    for address in ("10.0.0.1", "::ffff:10.0.0.1"):
        with pytest.raises(TooManyConnections):
            limit.enter(address)
    enter(limit, "10.0.0.2")
    assert keys[0] is not None
    limit.leave(keys[0])
    enter(limit, "10.0.0.1")


def test_address_without_connections_is_forgotten() -> None:
    limit = ConnectionLimit(2)
    for key in enter(limit, "10.0.0.1", "10.0.0.1", "2001:db8::1"):
        assert key is not None
        limit.leave(key)
    assert not limit._counts


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    limit = ConnectionLimit(2)
    enter(limit, "2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", "2001:db8:0:2::2")
    with pytest.raises(TooManyConnections):
        limit.enter("2001:db8:0:1::3")
    enter(limit, "::1", "0.0.0.1")  # not mixed up with an IPv4 address
    enter(limit, "::1", "0.0.0.1")


def test_proxies_have_no_limit() -> None:
    limit = ConnectionLimit(1, [ip_network("10.0.0.0/8"), ip_network("2001:db8::7/128")])
    proxies = ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::7")
    assert enter(limit, *proxies * 3) == [None] * 9
    enter(limit, "2001:db8::8", "11.0.0.1")
    with pytest.raises(TooManyConnections):
        limit.enter("2001:db8::8")


def test_socket_without_an_address_is_counted_by_its_name() -> None:
    limit = ConnectionLimit(1)
    assert enter(limit, "@abc") == ["@abc"]
    with pytest.raises(TooManyConnections):
        limit.enter("@abc")


def test_refusals_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    limit = ConnectionLimit(1, clock=lambda: now[0])
    enter(limit, "10.0.0.1")
    with caplog.at_level(logging.WARNING):
        for time in (0.0, 1.0, NOTE_SECONDS, NOTE_SECONDS + 1):
            now[0] = time
            with pytest.raises(TooManyConnections):
                limit.enter("10.0.0.1")
    assert [record.getMessage() for record in caplog.records] == [
        f"max_connections_per_address: {count} connections refused, the last one of 10.0.0.1, which has 1"
        for count in (1, 2)
    ]


@pytest.mark.parametrize("sends", [b"", GET])
def test_connection_above_the_limit_is_refused_at_once(loop: str, sends: bytes) -> None:
    with serving(loop, ServerLimits(), connection_limit=ConnectionLimit(2)) as server:
        with server.connect() as first, server.connect() as second:
            eventually(lambda: server.connections == 2)
            with server.connect() as third:
                status, headers = parse_head((answer := read_all(third)).partition(b"\r\n\r\n")[0])
                assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
                error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
                assert (error["code"], error["type"]) == ("concurrency_exceeded", "rate_limit_error")
            first.sendall(GET)
            assert read_response(first)[0] == 200
            second.sendall(sends)
        eventually(lambda: server.connections == 0)
        for _ in range(3):
            with server.connect(GET) as client:
                assert read_response(client)[0] == 200
            eventually(lambda: server.connections == 0)


def test_address_without_a_limit_may_connect_as_often_as_it_likes(loop: str) -> None:
    limit = ConnectionLimit(1, [ip_network("127.0.0.1")])
    with (
        serving(loop, ServerLimits(), connection_limit=limit) as server,
        server.connect() as first,
        server.connect() as second,
    ):
        for client in (first, second):
            client.sendall(GET)
            assert read_response(client)[0] == 200
