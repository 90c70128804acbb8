"""Generates a value that satisfies a JSON Schema, as grammar-guided decoding would. Pure."""

from re import _parser  # type: ignore[attr-defined]  # the parser of `re`, which has no public name
from typing import Any

Schema = dict[str, Any]


def instance(schema: Any, word: str, root: Schema | None = None, depth: int = 0) -> Any:
    """Return one value that satisfies `schema`.

    Free strings are `word`, truncated or padded to the length bounds. Supports the keywords of
    OpenAI's strict mode.
    """
    if not isinstance(schema, dict) or depth > 16:
        return {}
    root = schema if root is None else root
    if "$ref" in schema:
        return instance(_resolve(str(schema["$ref"]), root), word, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return instance(schema[key][0], word, root, depth + 1)
    if schema.get("allOf"):
        merged: Schema = {}
        for part in schema["allOf"]:
            merged |= _resolve(str(part["$ref"]), root) if "$ref" in part else part
        return instance(merged, word, root, depth + 1)
    kind = schema.get("type")
    kind = next(iter(kind), None) if isinstance(kind, list) else kind
    if kind == "array":
        items = schema.get("items", {"type": "string"})
        return [instance(items, word, root, depth + 1) for _ in range(max(1, _bound(schema, "minItems", 1)))]
    if kind in ("string", "integer", "number", "boolean", "null"):
        return _scalar(schema, kind, word)
    properties = schema.get("properties")
    return (
        {key: instance(part, word, root, depth + 1) for key, part in properties.items()}
        if isinstance(properties, dict)
        else {}
    )


def matching(pattern: str) -> str:
    """Return a short text that matches the regular expression `pattern`."""
    return _generated(_parser.parse(pattern))


def _generated(parts: Any) -> str:
    text = ""
    for kind, value in parts:
        match str(kind):
            case "LITERAL":
                text += chr(value)
            case "IN" | "NOT_LITERAL" | "ANY":
                text += _member(value)
            case "MAX_REPEAT" | "MIN_REPEAT":
                text += _generated(value[2]) * max(1, value[0]) if value[1] else ""
            case "SUBPATTERN":
                text += _generated(value[3])
            case "BRANCH":
                text += _generated(value[1][0])
    return text


def _member(value: Any) -> str:
    """Return a character of a class: its first one, or any for a negated one."""
    found: tuple[Any, Any] = value[0] if isinstance(value, list) else (None, None)
    kind, first = found
    match str(kind):
        case "LITERAL":
            return chr(first)
        case "RANGE":
            return chr(first[0])
        case "CATEGORY" if "DIGIT" in str(first):
            return "0"
        case "CATEGORY" if "SPACE" in str(first):
            return " "
    return "a"


def _scalar(schema: Schema, kind: str, word: str) -> Any:
    if kind == "string" and isinstance(schema.get("pattern"), str):
        return matching(schema["pattern"])
    if kind == "string":
        return word[: _bound(schema, "maxLength", len(word))].ljust(_bound(schema, "minLength", 0), "x")
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    low = _bound(schema, "minimum", _bound(schema, "exclusiveMinimum", -1) + 1)
    return min(max(low, 4), _bound(schema, "maximum", max(low, 4)))


def _bound(schema: Schema, key: str, default: int) -> Any:
    """Return the numeric keyword `key`, or `default` where it is missing or not a number."""
    value = schema.get(key, default)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _resolve(reference: str, root: Schema) -> Schema:
    found: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(step, {}) if step and isinstance(found, dict) else found
    return found if isinstance(found, dict) else {}
