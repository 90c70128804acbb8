"""OpenAPI document: the data endpoints in it, and its HTML page without external assets. Pure."""

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from gateway.api.paths import (
    CHAT_PATH,
    COMPLETION_PATHS,
    COUNT_TOKENS_PATHS,
    EMBEDDING_PATH,
    MESSAGE_PATHS,
    OLLAMA_CHAT_PATH,
    OLLAMA_EMBED_PATH,
    OLLAMA_EMBEDDINGS_PATH,
    OLLAMA_GENERATE_PATH,
    RERANK_PATHS,
    RESPONSE_PATHS,
)
from gateway.chat.embedding import Embedding
from gateway.chat.request import REFUSED, UNUSED, Chat
from gateway.dialects.openai_completions import CompletionBody
from gateway.dialects.rerank import RerankBody

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

SECURITY: list[dict[str, list[str]]] = [{"key": []}, {"x-api-key": []}, {"api-key": []}]
"""The ways to send a key; one is enough."""

ERRORS = {
    400: "The request is invalid or not supported.",
    401: "The API key is missing or incorrect.",
    403: "The API key may not use the model.",
    404: "The model does not exist.",
    413: "The request body is too large.",
    415: "The request body is not sent as uncompressed JSON.",
    429: "A limit of the API key is reached; see Retry-After and the x-ratelimit headers.",
    502: "The backend failed.",
    503: "The gateway is overloaded or shutting down, or no backend is healthy; see Retry-After.",
    504: "The backend did not respond in time.",
    508: "The request was sent by this gateway itself (loop).",
}

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1f;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.1rem;margin:2rem 0 .25rem;border-top:1px solid #ddd;padding-top:1rem}
code{font-family:ui-monospace,monospace;background:#f2f2f5;padding:.1em .3em;border-radius:3px}
b{display:inline-block;min-width:3.5em;color:#0a5}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:.5rem 0}
td,th{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #eee;vertical-align:top}
@media(prefers-color-scheme:dark){body{background:#161618;color:#e6e6ea}code{background:#2a2a2e}
h2,td,th{border-color:#333}b{color:#4c9}}
"""


def add_data_paths(document: dict[str, Any]) -> None:
    """Add the data endpoints, which are raw ASGI, to the OpenAPI `document`."""
    (chat, completion, embedding, rerank), components = msgspec.json.schema_components(
        [Chat, CompletionBody, Embedding, RerankBody], ref_template="#/components/schemas/{name}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(components)
    schemas["Error"] = ERROR_SCHEMA
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
    }
    json_content = {"application/json": {"schema": {"type": "object"}}}
    json_or_stream = {**json_content, "text/event-stream": {"schema": {"type": "string"}}}
    paths = document.setdefault("paths", {})
    description = "A chat.completion, or a stream of chat.completion.chunk events."
    paths[CHAT_PATH] = _post("Create a chat completion, streamed or not", chat, description, json_or_stream)
    description = "A text_completion, or a stream of them as events."
    paths[COMPLETION_PATHS[0]] = _post(
        "Complete texts without a chat template", completion, description, json_or_stream
    )
    paths[EMBEDDING_PATH] = _post("Create embeddings", embedding, "A list of embeddings.", json_content)
    description = "The documents by relevance."
    paths[RERANK_PATHS[0]] = _post("Rank documents (Cohere's and Jina's API)", rerank, description, json_content)
    anything = {"type": "object"}
    lines = {**json_content, "application/x-ndjson": {"schema": {"type": "string"}}}
    for path, summary, content in (
        (RESPONSE_PATHS[0], "Create a response (OpenAI's Responses API)", json_or_stream),
        (MESSAGE_PATHS[0], "Create a message (Anthropic's Messages API)", json_or_stream),
        (COUNT_TOKENS_PATHS[0], "Count the tokens of a message (Anthropic's Messages API)", json_content),
        (OLLAMA_CHAT_PATH, "Chat (Ollama's own API)", lines),
        (OLLAMA_GENERATE_PATH, "Generate from a prompt (Ollama's own API)", lines),
        (OLLAMA_EMBED_PATH, "Create embeddings (Ollama's own API)", json_content),
        (OLLAMA_EMBEDDINGS_PATH, "Create one embedding (Ollama's own API)", json_content),
    ):
        paths[path] = _post(summary, anything, "The answer in the form of that API.", content)


def _post(summary: str, request: dict[str, Any], description: str, content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {"200": {"description": description, "content": content}}
    responses |= {str(status): {"description": text, "content": error} for status, text in ERRORS.items()}
    body = {"required": True, "content": {"application/json": {"schema": request}}}
    return {"post": {"summary": summary, "security": SECURITY, "requestBody": body, "responses": responses}}


def add_bodies(document: dict[str, Any], kinds: Sequence[type[msgspec.Struct]]) -> None:
    """Add the schemas of the request bodies `kinds` to the OpenAPI `document`."""
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)


def api_page(document: dict[str, Any]) -> str:
    """Return the document as an HTML page."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(document['info']['title'])}</title>"]
    parts.append(f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>")
    parts.append(f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>")
    parts.append(
        "<p>Machine-readable: <a href=/openapi.json>/openapi.json</a>. "
        "Send the API key as <code>Authorization: Bearer KEY</code>, <code>x-api-key: KEY</code> "
        "or <code>api-key: KEY</code>.</p>"
    )
    for path in sorted(document["paths"], key=lambda path: (path != CHAT_PATH, path != EMBEDDING_PATH, path)):
        for method, operation in document["paths"][path].items():
            parts.append(_operation(path, method, operation, document))
    return "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    summary = escape(operation.get("summary", ""))
    parts = [f"<h2><b>{escape(method.upper())}</b> <code>{escape(path)}</code></h2><p>{summary}</p>"]
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
    return "refused" if name in REFUSED else "checked, but not used" if name in UNUSED else ""


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    name = str(field.get("type", "any"))
    if name == "array":
        name = f"array of {_type(field.get('items', {}))}"
    bounds = [
        f"{sign} {field[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if key in field
    ]
    return name + (f" ({', '.join(bounds)})" if bounds else "")
