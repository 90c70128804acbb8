"""JSON Schemas of clients: checks and `$ref` resolution. Pure; no referenced document is fetched."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple
from urllib.parse import unquote

import jsonschema_rs
import orjson

from gateway.errors import InvalidRequest, SchemaTooComplex

MAX_SCHEMA = 32 * 1024
"""Maximum size of a JSON Schema in bytes.

An engine compiles a grammar of it before the first token.
"""
MAX_DEPTH = 32
"""Maximum nesting of schemas."""
LEVELS_AROUND = 8
"""Levels of arrays and objects that stay free around a schema.

orjson writes 254 levels, and a response repeats the schemas of its request: `/v1/responses` has three around them.
"""
MAX_NODES = 4000
"""Maximum number of schemas in a schema, including itself."""
MAX_NAME = 256
"""Maximum length of a property name in characters.

A longer one of unusual characters overflows the stack of llama.cpp's converter.
"""
MAX_PLACE = 200
"""Maximum length of the path of a fault in a message, in characters."""
MAX_VALIDATED = 4 * MAX_SCHEMA
"""Maximum size of the schemas that no keyword defines as schemas but a reference leads to, in bytes.

Each is validated on its own, although they may contain each other.
"""

_BOUNDS = (
    ("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"), ("minimum", "maximum"),
    ("exclusiveMinimum", "maximum"), ("minimum", "exclusiveMaximum"), ("exclusiveMinimum", "exclusiveMaximum"),
)  # fmt: skip
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
    "propertyNames", "not", "if", "then", "else", "contentSchema",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")
_IS_SINGLE, _IS_LIST, _IS_MAP = 1, 2, 4
_FORMS = {
    name: _IS_SINGLE * (name in _SINGLE) + _IS_LIST * (name in _LISTS) + _IS_MAP * (name in _MAPS)
    for name in (*_SINGLE, *_LISTS, *_MAPS)
}
"""Kinds of values of the keywords with schemas: one schema, a list or a map of them."""
_SAME_VALUE_KEYWORDS = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
"""Keywords whose schemas apply to the same value as the schema with the keyword."""
_lacks_same_value = frozenset((*_SAME_VALUE_KEYWORDS, "$ref")).isdisjoint
_NEVER_EMPTY = ("enum", "anyOf", "oneOf", "allOf")
_lacks_faults = frozenset((*_NEVER_EMPTY, "properties", *chain.from_iterable(_BOUNDS))).isdisjoint

_newer_validator = jsonschema_rs.Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})
_is_schema, _schema_errors = _newer_validator.is_valid, _newer_validator.iter_errors
_is_older_schema = jsonschema_rs.Draft7Validator({"$ref": "http://json-schema.org/draft-07/schema#"}).is_valid
"""Validators of schemas. The library contains both meta-schemas."""

Schema = dict[str, Any]
TYPES = ("object", "array", "string", "number", "boolean", "null")
"""All JSON types; integers are numbers."""


class WorkBudget:
    """Counted work that the schemas of one request may take.

    A unit is about a microsecond: one schema, property or value that is looked at.
    """

    __slots__ = ("_left", "_param")

    def __init__(self, units: int, param: str) -> None:
        """`param` is the path of the schemas in the request."""
        self._left = units
        self._param = param

    def spend(self, units: int) -> None:
        """Count `units` of work, before it is done.

        Raises:
            SchemaTooComplex: nothing is left.
        """
        self._left -= units
        if self._left < 0:
            raise SchemaTooComplex(self._param)


class SchemaDocument:
    """Root schema that references are resolved against."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._anchors: dict[str, Schema] | None = None
        self._resolved: dict[str, Any] = {}

    def resolve(self, reference: str) -> Any:
        """Return the schema that `reference`, a JSON pointer or an anchor, leads to.

        Return None if it leads nowhere.
        """
        if reference not in self._resolved:
            self._resolved[reference] = self._find(reference)
        return self._resolved[reference]

    def _find(self, reference: str) -> Any:
        pointer = unquote(reference.removeprefix("#"))
        if not pointer:
            return self.root
        if not pointer.startswith("/"):
            if self._anchors is None:
                self._anchors = {
                    name: node
                    for node, _ in nodes(self.root)
                    for key in ("$anchor", "$dynamicAnchor")
                    if isinstance(name := node.get(key), str)
                }
            return self._anchors.get(pointer)
        found: Any = self.root
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict):
                found = found.get(step)
            elif isinstance(found, list) and re.fullmatch("0|[1-9][0-9]{0,5}", step) and int(step) < len(found):
                found = found[int(step)]
            else:
                return None
        return found if isinstance(found, dict | bool) else None


def check(schema: Schema, param: str, owner: str = "") -> int:
    """Check a client's schema that a grammar is made of, and return its size in bytes.

    Rejects schemas that are not valid in draft 7 or 2020-12, that no value can satisfy, or that
    would harm an engine. `param` is the path of the schema in the request, `owner` says whose it is.
    The message names the place of the fault, and repeats nothing else of the schema.

    Raises:
        InvalidRequest: the schema is rejected.
        SchemaTooComplex: checking it would take too long.
    """
    size, found = _check_size(schema, param, owner)
    fault = _find_fault(schema, found, param)
    if fault is not None:
        raise _rejected(param, owner, fault.words, _place(schema, fault.node, fault.path))
    return size


def check_size(schema: Schema, param: str, owner: str = "") -> int:
    """Check a schema that is only shown to the model, and return its size in bytes.

    Raises:
        InvalidRequest: it is too large or too deep.
    """
    return _check_size(schema, param, owner)[0]


def _check_size(schema: Schema, param: str, owner: str) -> tuple[int, list[Schema]]:
    """Return the size in bytes, and all schemas in `schema`."""
    around: Any = schema
    for _ in range(LEVELS_AROUND):
        around = [around]
    try:
        size = len(orjson.dumps(around)) - 2 * LEVELS_AROUND
    except orjson.JSONEncodeError:
        raise _rejected(param, owner, "is nested too deeply, or has numbers that are too large") from None
    if size > MAX_SCHEMA:
        raise _rejected(param, owner, f"has more than {MAX_SCHEMA} bytes")
    found: list[Schema] = []
    for node, depth in nodes(schema):
        found.append(node)
        if depth > MAX_DEPTH:
            raise _rejected(param, owner, f"is nested more than {MAX_DEPTH} levels deep")
        if len(found) > MAX_NODES:
            raise _rejected(param, owner, f"has more than {MAX_NODES} subschemas")
    return size, found


def _rejected(param: str, owner: str, words: str, place: str = "") -> InvalidRequest:
    return InvalidRequest(f"'{param}'{owner} {words}{place}.", param=param)


class _Fault(NamedTuple):
    """Fault of a schema, in the node where it is, or at a path below the root."""

    words: str
    node: Schema | None = None
    path: Sequence[str | int] = ()


def _place(schema: Schema, node: Schema | None, path: Sequence[str | int]) -> str:
    """Return where a fault is, as `at 'properties.city'`; empty for the root."""
    if node is not None:
        path = next((found for found, other in _paths(schema) if other is node), ())
    text = ".".join(map(str, path))
    shown = "".join(char if char.isprintable() else "?" for char in text[:MAX_PLACE])
    return f", at '{shown}{'…' if len(text) > MAX_PLACE else ''}'" if text else ""


def _paths(schema: object) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Yield everything in `schema` with its path."""
    rest: list[tuple[tuple[str | int, ...], object]] = [((), schema)]
    while rest:
        path, value = rest.pop()
        yield path, value
        if isinstance(value, dict):
            rest.extend(((*path, name), inner) for name, inner in value.items())
        elif isinstance(value, list):
            rest.extend(((*path, index), inner) for index, inner in enumerate(value))


def _find_fault(schema: Schema, found: list[Schema], param: str) -> _Fault | None:
    if not (_is_schema(schema) or _is_older_schema(schema)):
        return _Fault("is not a valid JSON Schema", path=_first_invalid(schema))
    if any(not reference.startswith("#") for reference in _references(schema)):
        return _Fault("refers to another document with '$ref'")
    within = next((_Fault(words, node) for node in found if (words := _find_fault_within(node))), None)
    return within or _find_reference_fault(schema, found, WorkBudget(MAX_VALIDATED, param))


def _first_invalid(schema: Schema) -> Sequence[str | int]:
    """Return the path of the first thing that the newer meta-schema rejects."""
    return next((error.instance_path for error in _schema_errors(schema)), ())


def _find_fault_within(node: Schema) -> str | None:
    """Return a fault that the meta-schemas do not detect."""
    if _lacks_faults(node):
        return None
    if any(isinstance(node.get(name), list) and not node[name] for name in _NEVER_EMPTY):
        return "has an empty 'enum', 'anyOf', 'oneOf' or 'allOf'"
    for low, high in _BOUNDS:
        if low not in node:
            continue
        least, most = _number(node.get(low)), _number(node.get(high))
        if least is not None and most is not None and (least > most or (least == most and "exclusive" in low + high)):
            return f"has a '{low}' that contradicts its '{high}'"
    properties = node.get("properties")
    if isinstance(properties, dict) and any(len(name) > MAX_NAME for name in properties):
        return f"has a property name of more than {MAX_NAME} characters"
    return None


def _find_reference_fault(schema: Schema, found: list[Schema], validated: WorkBudget) -> _Fault | None:
    """Return a fault of the references, or of the schemas they lead to. `validated` is in bytes."""
    document, known = SchemaDocument(schema), {id(node) for node in found}
    rest = list(found)
    while rest:  # a reference may lead to a place that no keyword defines as a schema
        referring = rest.pop()
        reference = referring.get("$ref")
        if not isinstance(reference, str):
            continue
        target = document.resolve(reference)
        if target is None:
            return _Fault("has a '$ref' that cannot be resolved", referring)
        if isinstance(target, dict) and id(target) not in known:
            validated.spend(len(orjson.dumps(target)))
            if not (_is_schema(target) or _is_older_schema(target)):
                return _Fault("has a '$ref' to something that is not a JSON Schema", referring)
            for node, _ in nodes(target):
                if id(node) not in known:
                    known.add(id(node))
                    found.append(node)
                    rest.append(node)
    return _Fault("has an endless '$ref' loop") if _has_loop(document, found) else None


def _has_loop(document: SchemaDocument, found: list[Schema]) -> bool:
    """Return whether the check of a value against a schema depends on itself."""
    after = {id(node): [id(child) for child in _same_value_schemas(document, node)] for node in found}
    waiting = dict.fromkeys(after, 0)
    for children in after.values():
        for child in children:
            waiting[child] = waiting.get(child, 0) + 1
    ready = [node for node, count in waiting.items() if not count]
    done = 0
    while ready:
        done += 1
        for child in after.get(ready.pop(), ()):
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return done < len(waiting)


def _same_value_schemas(document: SchemaDocument, node: Schema) -> Iterator[Schema]:
    if _lacks_same_value(node):
        return
    reference = node.get("$ref")
    target = document.resolve(reference) if isinstance(reference, str) else None
    if isinstance(target, dict):
        yield target
    for name in _SAME_VALUE_KEYWORDS:
        found = node.get(name)
        children = (
            found
            if isinstance(found, list)
            else found.values()
            if isinstance(found, dict) and name.startswith("depend")
            else [found]
        )
        yield from (child for child in children if isinstance(child, dict))


def nodes(schema: object) -> Iterator[tuple[Schema, int]]:
    """Yield each schema within `schema` with its depth.

    Values that only look like schemas, for example in `enum`, are skipped.
    """
    rest = [(schema, 1)]
    while rest:
        node, depth = rest.pop()
        if not isinstance(node, dict):
            continue
        yield node, depth
        depth += 1
        for name, value in node.items():
            form = _FORMS.get(name)
            if form is None:
                continue
            if isinstance(value, dict):
                if form & _IS_MAP:
                    rest.extend([(child, depth) for child in value.values()])
                elif form & _IS_SINGLE:
                    rest.append((value, depth))
            elif isinstance(value, list) and form & _IS_LIST:
                rest.extend([(child, depth) for child in value])


def _number(value: object) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _references(schema: object) -> list[str]:
    found: list[str] = []
    rest = [schema]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            found.extend(
                item[name] for name in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(item.get(name), str)
            )
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
    return found
