"""Repair of the JSON Schemas of tools that older or careless generators write. Pure.

What engines' templates take as text, a grammar and Ollama's own structs do not: keywords of drafts 3
and 4, keywords that are null, and type names of other languages.
"""

from typing import Any

from gateway.chat.json_schema import Schema, nodes

_NULLABLE = frozenset({"default", "const", "example"})
"""Keywords whose value may be null."""
_TYPES = {
    "object": "object", "array": "array", "string": "string", "number": "number", "integer": "integer",
    "boolean": "boolean", "null": "null", "dict": "object", "list": "array", "str": "string", "float": "number",
    "double": "number", "int": "integer", "bool": "boolean",
}  # fmt: skip
_TEXTS = ("description", "title")
_BOUNDS = (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum"))
_lacks_faults = frozenset(("type", "required", "properties", *_TEXTS, *(name for name, _ in _BOUNDS))).isdisjoint


def repair(schema: Schema) -> None:
    """Repair `schema` in place, without changing the meaning of a valid one.

    - Keywords that are null are removed.
    - `exclusiveMinimum: true` next to a `minimum` (draft 4) becomes the bound itself.
    - `required: true` of a property (draft 3) moves to the list of the object.
    - The type `any` (draft 3) is removed, and names such as `int` or `STRING` become JSON types.
    - A single name becomes the list `required`, and an empty list of properties an empty object.
    """
    for node, _ in nodes(schema):
        _repair(node)
    if isinstance(schema.get("type"), list) and "object" in schema["type"]:
        schema["type"] = "object"  # arguments are never anything else
    if isinstance(schema.get("required"), bool):
        del schema["required"]


def _repair(node: Schema) -> None:
    if None in node.values():
        for name in [name for name, value in node.items() if value is None and name not in _NULLABLE]:
            del node[name]
    if _lacks_faults(node):
        return
    if "type" in node:
        _repair_type(node)
    for name, bound in _BOUNDS:
        if isinstance(node.get(name), bool):
            is_exclusive = node.pop(name)
            if is_exclusive and isinstance(node.get(bound), int | float):
                node[name] = node.pop(bound)
    for name in _TEXTS:
        if name in node and not isinstance(node[name], str):
            del node[name]
    if node.get("properties") == []:
        node["properties"] = {}
    _repair_required(node)


def _repair_type(node: Schema) -> None:
    named = node["type"]
    if isinstance(named, str):
        if named.lower() == "any":
            del node["type"]
        else:
            node["type"] = _TYPES.get(named.lower(), named)
    elif isinstance(named, list) and all(isinstance(one, str) for one in named):
        names: list[str] = named
        types = list(dict.fromkeys(_TYPES.get(one.lower(), one) for one in names))
        if not types or any(one.lower() == "any" for one in types):
            del node["type"]
        else:
            node["type"] = types


def _repair_required(node: Schema) -> None:
    properties: Any = node.get("properties")
    required: Any = node.get("required")
    if isinstance(required, str):
        required = node["required"] = [required]
    if isinstance(required, list) and any(not isinstance(name, str) for name in required):
        required = node["required"] = [name for name in required if isinstance(name, str)]
    if not isinstance(properties, dict):
        return
    found = [] if not isinstance(required, list) else required
    for name, schema in properties.items():
        if isinstance(schema, dict) and isinstance(schema.get("required"), bool) and schema.pop("required"):
            found.append(name)
    if found:
        node["required"] = list(dict.fromkeys(found))
