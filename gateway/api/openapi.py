"""The API's own description: the hot paths added to OpenAPI's document, and that document as a page without outside assets. Pure."""

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from gateway.chat.embedding import Embedding
from gateway.chat.request import REFUSED, UNUSED, Chat

CHAT_PATH = "/v1/chat/completions"
EMBEDDING_PATH = "/v1/embeddings"

ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

ERRORS = {
    400: "The request cannot be served as it is.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is no plain JSON.",
    502: "The backend failed.",
    503: "No room, or no healthy backend: see Retry-After.",
    504: "The backend did not answer in time.",
    508: "The request came from this gateway itself.",
}

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1f;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.1rem;margin:2rem 0 .25rem;border-top:1px solid #ddd;padding-top:1rem}
code{font-family:ui-monospace,monospace;background:#f2f2f5;padding:.1em .3em;border-radius:3px}
b{display:inline-block;min-width:3.5em;color:#0a5}table{border-collapse:collapse;width:100%;font-size:.9rem;margin:.5rem 0}
td,th{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #eee;vertical-align:top}
@media(prefers-color-scheme:dark){body{background:#161618;color:#e6e6ea}code{background:#2a2a2e}h2,td,th{border-color:#333}b{color:#4c9}}
"""


def add_data_paths(document: dict[str, Any]) -> None:
    """Put the raw ASGI paths into OpenAPI's `document`."""
    (chat, embedding), components = msgspec.json.schema_components(
        [Chat, Embedding], ref_template="#/components/schemas/{name}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(components)
    schemas["Error"] = ERROR_SCHEMA
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    answer = {"application/json": {"schema": {"type": "object"}}}
    either = {**answer, "text/event-stream": {"schema": {"type": "string"}}}
    paths = document.setdefault("paths", {})
    said = "A chat.completion, or a stream of chat.completion.chunk events."
    paths[CHAT_PATH] = _post("OpenAI's chat completions, streaming and not", chat, said, either)
    paths[EMBEDDING_PATH] = _post("OpenAI's embeddings", embedding, "A list of embeddings.", answer)


def _post(summary: str, request: dict[str, Any], said: str, answer: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {"200": {"description": said, "content": answer}}
    responses |= {str(status): {"description": text, "content": error} for status, text in ERRORS.items()}
    body = {"required": True, "content": {"application/json": {"schema": request}}}
    return {"post": {"summary": summary, "security": [{"key": []}], "requestBody": body, "responses": responses}}


def add_bodies(document: dict[str, Any], kinds: Sequence[type[msgspec.Struct]]) -> None:
    """Put the shapes of the bodies that paths refer to into OpenAPI's `document`."""
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)


def api_page(document: dict[str, Any]) -> str:
    """The document as HTML."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(document['info']['title'])}</title>"]
    parts.append(f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>")
    parts.append(f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>")
    parts.append(
        "<p>For programs: <a href=/openapi.json>/openapi.json</a>. Send the key as <code>Authorization: Bearer KEY</code>.</p>"
    )
    for path in sorted(document["paths"], key=lambda path: (path != CHAT_PATH, path != EMBEDDING_PATH, path)):
        for method, operation in document["paths"][path].items():
            parts.append(_operation(path, method, operation, document))
    return "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    parts = [
        f"<h2><b>{escape(method.upper())}</b> <code>{escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}</p>"
    ]
    reference = (
        operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref")
    )
    if reference:
        parts.append(_fields(document["components"]["schemas"][reference.rpartition("/")[2]]))
    rows = "".join(
        f"<tr><td>{escape(status)}<td>{escape(response['description'])}"
        for status, response in operation["responses"].items()
    )
    return "".join((*parts, f"<table><tr><th>Status<th>Meaning{rows}</table>"))


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}<td>{_remark(name, required)}"
        for name, field in schema["properties"].items()
    ]
    return f"<table><tr><th>Field<th>Type<th>{''.join(rows)}</table>"


def _remark(name: str, required: set[str]) -> str:
    if name in required:
        return "required"
    return "refused" if name in REFUSED else "checked, not used" if name in UNUSED else ""


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    words = str(field.get("type", "any"))
    if words == "array":
        words = f"array of {_type(field.get('items', {}))}"
    bounds = [
        f"{sign} {field[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if key in field
    ]
    return words + (f" ({', '.join(bounds)})" if bounds else "")
