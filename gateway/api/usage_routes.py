"""Route of the operator for usage: who used how much."""

import re
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import date
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from gateway.api.json_rows import rows_response
from gateway.errors import GatewayError, InvalidRequest, NotFound
from gateway.usage.recorder import UsageRecorder
from gateway.usage.totals import DIMENSIONS

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def add_usage(app: FastAPI, usage: UsageRecorder | None, operator: Callable[[Request], Awaitable[str]]) -> None:
    """Add `/ops/usage`; `operator` authorises a request. Without `usage` the path is 404."""

    @app.get(
        "/ops/usage",
        dependencies=[Depends(operator)],
        summary="Show requests, tokens, images and seconds by key, person, tier, backend or day",
        response_model=dict[str, Any],
    )
    async def view(by: str = "key", since: str | None = None, until: str | None = None) -> Response:
        if usage is None:
            raise NotFound("This gateway keeps no usage. Set GATEWAY_USAGE_FILE.")
        fields, first, last = _fields(by), _day("since", since), _day("until", until)
        try:
            rows, is_complete = await usage.rows_of_all(fields, first, last)
        except sqlite3.Error:
            raise GatewayError("The file of usage cannot be read; the gateway's log may have the reason.") from None
        return await rows_response({"since": first, "until": last, "complete": is_complete}, "rows", rows)


def _fields(by: str) -> list[str]:
    """Return the fields in `by`, in the order in which rows have them.

    Raises:
        InvalidRequest: One of them is unknown.
    """
    words = {word.strip() for word in by.split(",") if word.strip()}
    if not words <= set(DIMENSIONS):
        raise InvalidRequest(f"'by' must be a list of {', '.join(DIMENSIONS)}, separated by commas.", param="by")
    return [name for name in DIMENSIONS if name in words]


def _day(name: str, text: str | None) -> str | None:
    if text is None:
        return None
    try:
        if not _DAY.fullmatch(text):
            raise ValueError
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a date such as 2026-11-29.", param=name) from None
