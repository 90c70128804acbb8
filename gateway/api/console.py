"""The console at `/ops/`: a page without outside assets, and the events that it shows.

The page is public, since it contains nothing but code. It asks for the admin key, and sends it with
its calls.
"""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response

from gateway.api.events import EventResponse, Events
from gateway.api.operations import Operations
from gateway.errors import NotFound

STATIC = Path(__file__).parents[1] / "static"
FOLDERS = ("console", "uplot")
"""Folders of `STATIC` whose files the console uses."""
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing but the gateway's own files runs, and no text becomes HTML or code."""
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Assets:
    """Files of the console, read at their first use."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], tuple[bytes, str, str]] = {}

    def respond(self, request: Request, folder: str, name: str) -> Response:
        """Return the file, or 304 if the browser has it.

        Raises:
            NotFound: The console has no such file.
        """
        content, kind, tag = self._file(folder, name)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**_HEADERS, "etag": tag})
        return Response(content, headers={**_HEADERS, "content-type": kind, "etag": tag})

    def _file(self, folder: str, name: str) -> tuple[bytes, str, str]:
        found = self._read.get((folder, name))
        if found is None:
            # `name` is looked up in a listing and never becomes a path, so it cannot lead elsewhere.
            files = {file.name: file for file in (STATIC / folder).iterdir()} if folder in FOLDERS else {}
            file = files.get(name)
            if file is None or file.suffix not in _TYPES:
                raise NotFound("There is no such file.")
            content = file.read_bytes()
            found = content, _TYPES[file.suffix], f'"{sha256(content).hexdigest()[:32]}"'
            self._read[folder, name] = found
        return found


def add_console(
    app: FastAPI, operations: Operations, events: Events, operator: Callable[[Request], Awaitable[str]]
) -> None:
    """Add the page, its files and `/ops/events`; `operator` authorises a request."""
    assets = Assets()

    @app.get("/ops", include_in_schema=False)
    async def page(request: Request) -> Response:
        # The path comes without its trailing slash; the page's relative addresses need one.
        if not request.scope["raw_path"].endswith(b"/"):
            return Response(status_code=308, headers={"location": "ops/"})
        return assets.respond(request, "console", "index.html")

    for folder in FOLDERS:

        @app.get(f"/ops/{folder}/{{name}}", include_in_schema=False)
        async def asset(request: Request, name: str, folder: str = folder) -> Response:
            return assets.respond(request, folder, name)

    @app.get(
        "/ops/events",
        dependencies=[Depends(operator)],
        summary="Follow the status as server-sent events",
        response_class=Response,
    )
    async def follow(tier: str | None = None) -> Response:
        events.check()
        operations.series(tier, 0)  # refuses a tier that does not exist
        return EventResponse(events, tier)
