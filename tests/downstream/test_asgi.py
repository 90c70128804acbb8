"""Scope and calls of an ASGI application."""

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import pytest

from gateway.downstream.asgi import asgi_handler, connection_scope
from gateway.downstream.cycle import RequestResponseCycle
from tests.downstream.virtual_connection import Transport


def test_scope_of_a_connection_has_its_addresses_and_the_root_path() -> None:
    assert connection_scope(Transport(), "3.0", "/gateway") == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "server": ("127.0.0.1", 2),
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "root_path": "/gateway",
    }


class TlsTransport(Transport):
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return object() if name == "sslcontext" else super().get_extra_info(name, default)


@pytest.mark.parametrize(("transport", "scheme"), [(Transport, "http"), (TlsTransport, "https")])
def test_scheme_is_that_of_the_transport(transport: type[Transport], scheme: str) -> None:
    assert connection_scope(transport(), "3.0", "")["scheme"] == scheme


async def test_application_is_called_with_the_methods_of_the_cycle_and_finds_it_in_the_scope() -> None:
    called: list[tuple[Any, ...]] = []

    def app(*arguments: Any) -> Awaitable[None]:
        called.append(arguments)
        return asyncio.sleep(0)

    class Cycle:
        async def receive(self) -> None: ...
        async def send(self) -> None: ...

    cycle = cast("RequestResponseCycle", Cycle())
    await asgi_handler(app, {"path": "/a"})(cycle)
    assert called == [({"path": "/a", "extensions": {"gateway.client": cycle}}, cycle.receive, cycle.send)]
