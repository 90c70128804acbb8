"""ASGI: the scope of a connection, and the handler that calls an application.

The messages of the application are read and sent by the cycle.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from gateway.downstream.cycle import Handler, RequestResponseCycle

Scope = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


def connection_scope(transport: asyncio.Transport, asgi_version: str, root_path: str) -> Scope:
    """Return the keys of the scope that all requests of a connection have in common."""
    return {
        "type": "http",
        "asgi": {"version": asgi_version, "spec_version": "2.3"},
        "server": get_local_addr(transport),
        "client": get_remote_addr(transport),
        "scheme": "https" if is_ssl(transport) else "http",
        "root_path": root_path,
    }


def asgi_handler(app: App, scope: Scope) -> Handler:
    """Return the handler that calls an ASGI application. `scope` gets the cycle as an extension."""

    def handle(cycle: RequestResponseCycle) -> Awaitable[None]:
        scope["extensions"] = {"gateway.client": cycle}
        return app(scope, cycle.receive, cycle.send)

    return handle
