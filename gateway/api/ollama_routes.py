"""Ollama's own API: the calls that list and describe models, and those that would change them."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from gateway.api.model_catalog import CREATED, Allows, ModelCatalog, PublicEntry
from gateway.chat.surrogates import without_halves
from gateway.dialects.json_body import explain
from gateway.errors import Forbidden, InvalidJson, InvalidRequest, RequestTooLarge

VERSION = "0.33.0"
"""Version of Ollama whose API is served. Clients compare it with the version that they need."""

ARCHITECTURE = "gateway"
"""`general.architecture` of every model. Clients read the context length under this name."""

SECONDS_KEPT = 365 * 86400
"""Seconds until a model of an engine that keeps its models expires, in `/api/ps`."""

SECONDS_LOADED = 300
"""Seconds until an idle model expires at Ollama unless `keep_alive` says otherwise."""

CHANGING = ("pull", "push", "create", "copy", "delete", "blobs/{digest:path}")
"""Paths below `/api` that change models."""

MAX_SHOW_BODY = 64 * 1024
"""Bytes of the body of `/api/show`."""

CAPABILITIES = ("completion", "vision", "audio", "tools", "insert", "thinking", "embedding")
"""Capabilities in the order in which Ollama lists them."""


KNOWN_ENTRIES = 4096
"""Number of models whose JSON is kept, so that it is not rendered for each request of a client that polls."""


class _Named(msgspec.Struct):
    """The body of `/api/show`. Older clients call the model `name`."""

    model: str | None = None
    name: str | None = None


_names = msgspec.json.Decoder(_Named)


def add_ollama(app: FastAPI, catalog: ModelCatalog, client: Callable[[Request], Allows]) -> None:
    """Add the routes. `client` checks the client's key, and returns what it may use."""

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root() -> Response:
        return PlainTextResponse("Ollama is running")

    @app.head("/api/version", include_in_schema=False)
    @app.get("/api/version", summary="Show the version of Ollama's API", response_model=dict[str, str])
    async def version() -> Response:
        return _json(msgspec.json.encode({"version": VERSION}))

    listing: dict[str, Any] = {"response_model": dict[str, Any]}

    @app.head("/api/tags", include_in_schema=False)
    @app.get("/api/tags", summary="List the models as Ollama does", **listing)
    async def tags(allows: Annotated[Allows, Depends(client)]) -> Response:
        return _models(map(_tag, catalog.public_entries(allows)))

    @app.get("/api/ps", summary="List the loaded models as Ollama does", **listing)
    async def ps(allows: Annotated[Allows, Depends(client)]) -> Response:
        now = datetime.now(UTC)
        forever, soon = (_time(now + timedelta(seconds=seconds)) for seconds in (SECONDS_KEPT, SECONDS_LOADED))
        loaded = (entry for entry in catalog.public_entries(allows) if entry.is_loaded)
        return _models(_loaded(entry) % (forever if entry.stays_loaded else soon).encode() for entry in loaded)

    @app.post("/api/show", summary="Describe a model as Ollama does", **listing)
    async def show(request: Request, allows: Annotated[Allows, Depends(client)]) -> Response:
        return _json(msgspec.json.encode(_shown(catalog.public_entry(await _name(request), allows))))

    async def refuse() -> Response:
        raise Forbidden("This gateway serves models and does not change them: its operator does that at the engines.")

    for path in CHANGING:
        app.api_route(f"/api/{path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"], include_in_schema=False)(refuse)


async def _name(request: Request) -> str:
    """Return the model that the body names; older clients call the field `name`.

    Raises:
        InvalidJson, InvalidRequest: the body is not a JSON object with a name.
        RequestTooLarge: the body is longer than `MAX_SHOW_BODY`.
    """
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_SHOW_BODY:
            raise RequestTooLarge(f"The request body may have at most {MAX_SHOW_BODY} bytes.")
    if not content:
        raise InvalidJson("missing request body")
    try:
        named = _names.decode(without_halves(content))
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson("The body is not valid JSON.") from None
    name = named.model or named.name
    if not name:
        raise InvalidRequest("model is required", param="model")
    return name


def _full_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _details(entry: PublicEntry) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "",
        "family": ARCHITECTURE,
        "families": [ARCHITECTURE],
        "parameter_size": "",
        "quantization_level": "",
    }


def _time(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


_created = _time(datetime.fromtimestamp(CREATED, UTC))


def _models(models: Iterable[bytes]) -> Response:
    """Return the list of the models' JSON. FastAPI would take a hundred times as long to write 1,000 models."""
    return _json(b'{"models":[%b]}' % b",".join(models))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json; charset=utf-8")


def _model(entry: PublicEntry) -> dict[str, Any]:
    name = _full_name(entry.name)
    return {"name": name, "model": name}


def _capabilities(entry: PublicEntry) -> list[str]:
    known = [name for name in CAPABILITIES if name in entry.capabilities]
    return known + [name for name in entry.capabilities if name not in CAPABILITIES]


def _digest(entry: PublicEntry) -> str:
    """Return a digest that is the same at each start: it stands for the name, whatever serves it."""
    return sha256(entry.name.encode()).hexdigest()


@lru_cache(KNOWN_ENTRIES)
def _tag(entry: PublicEntry) -> bytes:
    """Return the JSON of a model in `/api/tags`."""
    model = {
        **_model(entry),
        "modified_at": _created,
        "size": 0,
        "digest": _digest(entry),
        "details": _details(entry) | ({"context_length": entry.context_length} if entry.context_length else {}),
        "capabilities": _capabilities(entry),
    }
    return msgspec.json.encode(model)


@lru_cache(KNOWN_ENTRIES)
def _loaded(entry: PublicEntry) -> bytes:
    """Return the JSON of a model in `/api/ps`, with `%b` in place of the time at which it expires."""
    before = {**_model(entry), "size": 0, "digest": _digest(entry), "details": _details(entry)}
    after = {"size_vram": 0, "context_length": entry.context_length or 0}
    return b'%b,"expires_at":"%%b",%b' % (
        msgspec.json.encode(before)[:-1].replace(b"%", b"%%"),
        msgspec.json.encode(after)[1:],
    )


def _shown(entry: PublicEntry) -> dict[str, Any]:
    info: dict[str, Any] = {"general.architecture": ARCHITECTURE}
    if entry.context_length is not None:
        info[f"{ARCHITECTURE}.context_length"] = entry.context_length
    return {
        "modelfile": f"FROM {_full_name(entry.name)}\n",
        "template": "{{ .Prompt }}",
        "details": _details(entry),
        "model_info": info,
        "capabilities": _capabilities(entry),
        "modified_at": _created,
    }
