"""Routes of the operator for keys with names, and what an answer outside the data endpoints says of limits."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from gateway.api.json_rows import rows_response
from gateway.api.named_keys import NamedKeys
from gateway.errors import NotFound
from gateway.keys.account import Account

ACCOUNT = "gateway.account"
"""Entry of a request's ASGI extensions with the account of its key."""


def add_keys(app: FastAPI, named_keys: NamedKeys | None, operator: Callable[[Request], Awaitable[str]]) -> None:
    """Add `/ops/keys`; `operator` authorises a request. Without `named_keys`, both paths are 404."""

    def keys() -> NamedKeys:
        if named_keys is None:
            raise NotFound("This gateway has no file of keys. Set GATEWAY_KEYS_FILE.")
        return named_keys

    @app.get(
        "/ops/keys",
        dependencies=[Depends(operator)],
        summary="Show names, limits and use of the keys, never the keys",
        response_model=dict[str, Any],
    )
    async def view() -> Response:
        named = keys()
        return await rows_response(named.view(), "keys", (account.view() for account in list(named.accounts)))

    @app.post(
        "/ops/keys/reload",
        dependencies=[Depends(operator)],
        summary="Reread the file of keys; if it is wrong, the keys before stay in force",
    )
    async def reload() -> dict[str, Any]:
        return await keys().reload()


def limit_headers(extensions: dict[str, Any], person: str) -> list[tuple[bytes, bytes]]:
    """Return the headers about the limits of the request's key and of `person`; none if they have no limits."""
    account: Account | None = extensions.get(ACCOUNT)
    lines = b"" if account is None else account.lines(person)
    pairs = [line.split(b": ", 1) for line in lines.split(b"\r\n") if line]
    return [(name, value) for name, value in pairs]
