"""Names and addresses of this machine, and the check of `Host` on an open gateway."""

import asyncio
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import pytest

from gateway import config
from gateway.api.hosts import HostCheck, host_of, is_local_host, is_loopback
from gateway.api.paths import ALIVE_PATHS
from gateway.app import Gateway
from gateway.errors import Forbidden
from gateway.telemetry.log import ExchangeLog
from tests.api.both_engines import ADMIN, KEY, bearer, document, error_of, serving
from tests.fakes.running_gateway import PATIENCE, Raw, request_bytes


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


# The check on a gateway


FOREIGN = (403, "forbidden")
DATA = (
    "/v1/models",
    "/models",
    "/v1/models/gpt-4o",
    "/docs",
    "/openapi.json",
    "/nowhere",
    "/ops",
    "/v1/chat/completions",
)


@pytest.mark.uvloop
async def test_open_gateway_refuses_foreign_hosts_but_for_health_checks() -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1, so `Origin` and `Host` match."""
    async with serving() as (_, client):
        for host in ("evil.example", "evil.example:8080", "10.0.0.1", "localhost.evil.example", "gateway"):
            for path in DATA:
                answer = await client.get(path, headers={"host": host, "origin": f"http://{host}"})
                assert error_of(answer) == FOREIGN, path
                assert "allowed_hosts" in answer.text
            answer = await client.post("/v1/embeddings", headers={"host": host}, json={})
            assert error_of(answer) == FOREIGN
            for path in (*ALIVE_PATHS, "/readyz"):
                assert (await client.get(path, headers={"host": host})).status_code == 200
            for path in ("/ops/status", "/metrics"):
                answer = await client.get(path, headers={"host": host})
                assert error_of(answer) == FOREIGN
        for host in ("localhost", "ui.localhost:99", "127.9.9.9", "[::1]:8080"):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
            assert error_of(await client.get("/v1/chat/completions", headers={"host": host}))[0] == 405


@pytest.mark.uvloop
async def test_own_host_and_allowed_hosts_are_accepted_with_any_port() -> None:
    async with serving(allowed_hosts=["Host.Docker.Internal", "[fd00::1]"]) as (_, client):
        for host in ("host.docker.internal", "HOST.docker.internal:8080", "[fd00::1]:80"):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200
        for host in ("docker.internal", "x.host.docker.internal"):
            assert error_of(await client.get("/v1/models", headers={"host": host})) == FOREIGN
    own = HostCheck(["gpu-box"], is_on=True)
    own.check({b"host": b"GPU-box:8080"})
    for fields in ({}, {b"host": b""}, {b"host": b"gpu-box.evil.example"}):
        with pytest.raises(Forbidden):
            own.check(fields)


@pytest.mark.uvloop
@pytest.mark.parametrize(
    "settings",
    [{"api_keys": [KEY]}, {"host": "0.0.0.0"}, {"host": "10.0.0.1"}],
    ids=["client keys", "all addresses", "an address of the network"],
)
async def test_gateway_with_keys_or_on_the_network_does_not_check_hosts(settings: dict[str, Any]) -> None:
    async with serving(**settings) as (_, client):
        headers = {"host": "gateway.example", **bearer(KEY)}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert error_of(await client.get("/v1/chat/completions", headers=headers)) == (405, "method_not_allowed")


@pytest.mark.uvloop
async def test_address_that_a_name_stands_for_decides_whether_hosts_are_checked() -> None:
    settings = config.build(document(host="gpu-box"))
    for address, is_checked in (("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), (None, False)):
        gateway = Gateway(settings, ExchangeLog(True, BytesIO()), address=address)
        gateway._hosts.check({b"host": b"GPU-box:8080"})
        if is_checked:
            with pytest.raises(Forbidden):
                gateway._hosts.check({b"host": b"evil.example"})
        else:
            gateway._hosts.check({b"host": b"evil.example"})


@pytest.mark.uvloop
async def test_admin_key_grants_access_under_any_host() -> None:
    async with serving(admin_key=ADMIN) as (_, client):
        for path in ("/ops/status", "/metrics"):
            answer = await client.get(path, headers={"host": "gateway.example", **bearer(ADMIN)})
            assert answer.status_code == 200


@pytest.mark.uvloop
async def test_host_is_checked_once_for_the_requests_of_a_connection_with_the_same_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And again for a head with another Host, on the same connection."""
    checked: list[bytes] = []
    check = HostCheck.check

    def counted(self: HostCheck, fields: Mapping[bytes, bytes]) -> None:
        checked.append(fields[b"host"])
        check(self, fields)

    monkeypatch.setattr(HostCheck, "check", counted)
    async with serving() as (gateway, _), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        raw = Raw(reader, writer)
        statuses = []
        for host in ("localhost", "localhost", "localhost", "evil.example", "localhost"):
            request = request_bytes({"model": "gpt-4o"}).replace(b"Host: localhost", f"Host: {host}".encode())
            writer.write(request)
            statuses.append((await raw.reply()).status)
        raw.leave()
    assert statuses == [200, 200, 200, 403, 200]
    assert checked[0] == b"localhost"
    assert b"evil.example" in checked
    assert checked[: checked.index(b"evil.example")] == [b"localhost"]


@pytest.mark.uvloop
async def test_host_in_an_absolute_target_is_checked_instead_of_the_header() -> None:
    async with serving() as (gateway, _):
        for target, host, status in (
            ("http://evil.example/v1/models", "localhost", b"403"),
            ("http://localhost/v1/models", "evil.example", b"200"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            assert (await reader.read()).split(b" ")[1] == status
            writer.close()
