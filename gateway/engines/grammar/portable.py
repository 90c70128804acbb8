"""JSON Schemas in the form that every engine makes a grammar of: the same where it can be, looser where not, never tighter. Pure.

Most of what is here is due to llama.cpp's converter (common/json-schema-to-grammar.cpp), which Ollama runs in its own process (0.24) or in the
model's (0.33): it stops at keywords that it does not know, reads some against their meaning, and some schemas kill it or keep it busy for ever.
"""

import math
import re
from collections.abc import Iterable
from itertools import chain, count
from typing import Any

from gateway.chat.json_schema import TYPES, Schema, SchemaDocument, nodes
from gateway.engines.grammar import ambiguity
from gateway.engines.grammar import regex as patterns

MAX_COUNT = 1000
"""Of a bound on a length: llama.cpp makes a rule of each, and refuses from 2000 on."""
MAX_COUNTS = 20_000
"""Of all bounds of a schema."""
MAX_OPTIONAL = 128
"""Properties of one object that may be left out: the converter's work grows with the third power (600 take 1 s, 2000 take 36 s)."""
MAX_INTEGER = 10**15
"""Of a bound on a number. Near 2^63 the converter never ends; `2^53 - 1`, which zod puts everywhere, is no bound that any model meets."""
MAX_FORMS = 5000
"""Schemas in the result: choices within choices are multiplied out."""
MAX_COUNTED = 16
"""Properties of an object with `minProperties`, on vLLM."""
MAX_DEPTH = 48
MERGED_LEVELS = 8
"""Added to the depth by `allOf`: what refers to itself there is written out."""
MAX_NAMES = 800
"""Characters of the names of an object that may have others: of each the converter makes a rule, to keep it out of the others."""
MAX_PATH = 64
"""Characters of the names that lead to a schema: the converter names its rules by them. What is further down gets a name of its own."""
MAX_NAME = 256
FORMATS = frozenset({"date", "time", "date-time", "uuid"})
"""What llama.cpp knows; others it passes over, and vLLM refuses those that it does not know."""

_ALL_TYPES = frozenset(TYPES) | {"integer"}
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id", "id", "$anchor",
     "$dynamicAnchor", "$defs", "definitions", "$vocabulary"}
)  # fmt: skip
_COMPOUND = ("properties", "items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
_ARRAY_GROUP = ("items", "prefixItems", "additionalItems")
_plain_name = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch
_trie_safe = re.compile(r"[A-Za-z0-9_ .,:;/@#$%&*+=!?~'<>(){}|`]*").fullmatch
"""Names that the converter may put into classes of characters, one by one."""
_repetitions = re.compile(r"[{,](\d{1,19})(?=[,}])").findall
_odd = re.compile("[^a-zA-Z0-9-]+")
_RULES = frozenset(
    {"", "root", "space", "boolean", "decimal-part", "integral-part", "number", "integer", "value", "object", "array", "uuid", "char", "string",
     "null", "date", "time", "date-time", "date-string", "time-string", "date-time-string", "dot"}
)  # fmt: skip
"""The converter's own rules, which a property of the outermost object would take the place of."""


def portable(schema: Schema) -> Schema:
    """`schema`, which `schemas.check` has taken, for any engine. What is valid under `schema` is so under the result."""
    return _Forms().whole([schema])[0]


def harmless(schema: Schema) -> Schema:
    """`schema` itself where vLLM takes it without harm: it refuses what it cannot follow. Else its portable form."""
    return portable(schema) if any(_is_harmful(node) for node, _ in nodes(schema)) else schema


def _is_harmful(node: Schema) -> bool:
    """xgrammar 0.2.8 fails on long repetitions while it compiles, after vLLM has taken the request; with a least number of properties it
    counts the ways to choose them (15 of 30: for ever)."""
    described = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(described if isinstance(described, dict) else ())):
        if isinstance(pattern, str) and any(int(number) > patterns.MAX_COUNT for number in _repetitions(pattern)):
            return True
    properties = node.get("properties")
    is_large = isinstance(properties, dict) and len(properties) > MAX_COUNTED
    return is_large and ("minProperties" in node or "maxProperties" in node)


def portable_calls(functions: Iterable[tuple[str, Schema]]) -> Schema:
    """A call of one of the functions, of which each has a name and the schema of its arguments: `{"name": ..., "arguments": {...}}`."""
    forms = _Forms()
    named = list(functions)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for (name, _), arguments in zip(named, forms.parts([schema for _, schema in named]), strict=True)
    ]
    return {"anyOf": calls} | forms.definitions()


def anything() -> Schema:
    """Any value. `{}` is any object to llama.cpp."""
    return {"type": list(TYPES)}


class _Forms:
    """One result, of one or more documents. Definitions are made of what is referred to, under names that all engines can follow."""

    def __init__(self) -> None:
        self._document = SchemaDocument({})
        self._names: dict[int, tuple[str, Schema]] = {}
        """By the schema's identity, which it keeps by being there."""
        self._taken: set[str] = set()
        self._waiting: list[tuple[SchemaDocument, str, Schema]] = []
        self._definitions: dict[str, Schema] = {}
        self._forms = 0
        self._path = 0
        self._counts = 0

    def whole(self, roots: list[Schema]) -> list[Schema]:
        """Each with all that it needs."""
        parts = self.parts(roots)
        return [part | self.definitions() for part in parts]

    def parts(self, roots: list[Schema]) -> list[Schema]:
        """They need `definitions` beside them, where the document begins."""
        found = []
        for root in roots:
            self._document, self._path = SchemaDocument(root), 0
            form = self._form(root, 1)
            self._define()
            if id(root) in self._names or any(_odd.sub("-", name) in _RULES for name in form.get("properties", ())):
                self._document = SchemaDocument(root)
                form = self._referring(root, "root")
                self._define()
            found.append(form)
        ambiguity.limited(found, self._definitions)
        self._definitions = ambiguity.needed(found, self._definitions)
        return found

    def definitions(self) -> Schema:
        return {"$defs": self._definitions} if self._definitions else {}

    def _define(self) -> None:
        while self._waiting:
            self._document, name, schema = self._waiting.pop()
            self._path = 0
            self._definitions[name] = self._form(schema, 1)

    def _referring(self, target: Schema, hint: str) -> Schema:
        name, _ = self._names.get(id(target), ("", None))
        if not name:
            numbered = (f"def-{number}" for number in count(len(self._names)))
            name = next(
                name for name in chain([hint], numbered) if _plain_name(name) and _odd.sub("-", name) not in self._taken
            )
            self._names[id(target)] = (name, target)
            self._taken.add(_odd.sub("-", name))
            self._waiting.append((self._document, name, target))
        return {"$ref": f"#/$defs/{name}"}

    def _form(self, schema: object, depth: int) -> Schema:
        self._forms += 1
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._forms > MAX_FORMS:
            return anything()
        if "allOf" in schema:
            schema = self._merged(schema, depth)
            depth += MERGED_LEVELS
        told = {key: schema[key] for key in ("title", "description") if isinstance(schema.get(key), str)}
        if "default" in schema and not isinstance(schema["default"], dict | list):
            told["default"] = schema["default"]
        reference = schema.get("$ref")
        form = self._reference(reference) if isinstance(reference, str) else self._constraints(schema, depth)
        return form | told

    def _constraints(self, schema: Schema, depth: int) -> Schema:
        choices = schema.get("anyOf") if isinstance(schema.get("anyOf"), list) else schema.get("oneOf")
        if isinstance(choices, list):
            return self._choice(schema, choices, depth)
        types = _types(schema)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return _values(schema, values, types)
        return self._typed(schema, types, depth)

    # References, and schemas of the same value

    def _reference(self, reference: str) -> Schema:
        target = self._target(reference)
        if not isinstance(target, dict):
            return anything()
        return self._referring(target, reference.rpartition("/")[2] if "/" in reference else "root")

    def _target(self, reference: str) -> Any:
        """What is behind it and all references that follow."""
        for _ in range(MAX_DEPTH):
            target = self._document.resolve(reference)
            if not isinstance(target, dict) or not isinstance(target.get("$ref"), str):
                return target
            reference = target["$ref"]
        return None

    def _merged(self, schema: Schema, depth: int) -> Schema:
        """Without `allOf`: all that it says is of one value, and only one of the engines knows how to tell."""
        parts = schema.get("allOf")
        if not isinstance(parts, list):
            return schema
        if depth > MAX_DEPTH or self._forms > MAX_FORMS:
            return {}
        own = {key: value for key, value in schema.items() if key != "allOf"}
        if len(parts) == 1 and isinstance(parts[0], dict) and "$ref" in parts[0] and _ANNOTATIONS.issuperset(own):
            return parts[0] | own
        result = self._inlined(own, depth)
        for part in parts:
            self._forms += 1
            if isinstance(part, dict):
                result = _both(result, self._inlined(part, depth + 1))
        return result

    def _inlined(self, schema: Schema, depth: int) -> Schema:
        """What a reference leads to in its place."""
        if isinstance(schema.get("$ref"), str):
            target = self._target(schema["$ref"])
            schema = target if isinstance(target, dict) else {}
        return self._merged(schema, depth + 1)

    def _choice(self, schema: Schema, choices: list[Any], depth: int) -> Schema:
        """Any of `choices`: `oneOf` of looser schemas would be tighter. What stands beside them holds for each."""
        beside = {
            key: value for key, value in schema.items() if key not in _ANNOTATIONS and key not in ("anyOf", "oneOf")
        }
        forms: list[Schema] = []
        for choice in choices:
            if choice is False:
                continue
            if beside and isinstance(choice, dict) and not (beside.keys() == {"type"} and "$ref" in choice):
                choice = _both(
                    beside, self._inlined(choice, depth) if "$ref" in choice else self._merged(choice, depth)
                )
            form = self._form(choice, depth + 1)
            if form == anything():
                return form
            for part in form["anyOf"] if form.keys() == {"anyOf"} else [form]:
                if part not in forms:
                    forms.append(part)
        if not forms:
            return anything()
        return forms[0] if len(forms) == 1 else {"anyOf": forms}

    # One type

    def _typed(self, schema: Schema, types: list[str], depth: int) -> Schema:
        if len(types) > 1 or not types:
            return self._of_several(schema, types, depth)
        form: Schema = {"type": types[0]}
        if types[0] == "object":
            form |= self._object(schema, depth)
        elif types[0] == "array":
            form |= self._array(schema, depth)
        elif types[0] == "string":
            form |= self._string(schema)
        elif types[0] in ("integer", "number"):
            form |= _numbers(schema, types[0])
        return form

    def _of_several(self, schema: Schema, types: list[str], depth: int) -> Schema:
        """A schema without a type is one of an object, an array or a string where its keywords are; so all engines read it."""
        if types:
            forms = [self._typed(schema, [name], depth) for name in types]
            if all(len(form) == 1 for form in forms):
                return {"type": types}
            return {"anyOf": forms}
        for form in (self._object(schema, depth), self._array(schema, depth), self._string(schema)):
            if (
                form.keys() & {"properties", "additionalProperties", "items", "prefixItems", "pattern", "format"}
                and form.get("additionalProperties") is not True
            ):
                return form
        return anything()

    def _object(self, schema: Schema, depth: int) -> Schema:
        properties = schema.get("properties")
        form: Schema = {}
        is_cut = False
        if isinstance(properties, dict):
            wanted = schema.get("required")
            required = [
                name
                for name in dict.fromkeys(wanted if isinstance(wanted, list) else ())
                if isinstance(name, str) and name in properties
            ]
            if "$ref" in properties or any(len(name) > MAX_NAME for name in properties):
                return {}
            is_cut = len(properties) - len(required) > MAX_OPTIONAL
            kept = {
                name: part
                for name, part in properties.items()
                if part is not False and not (is_cut and name not in required)
            }
            form["properties"] = {name: self._member(name, part, depth + 1) for name, part in kept.items()}
            required = [name for name in required if name in kept]
            if required:
                form["required"] = required
        others = True if is_cut else self._others(schema, depth)
        names = form.get("properties", {})
        if others is not None and (
            others is False or (all(map(_trie_safe, names)) and sum(map(len, names)) <= MAX_NAMES)
        ):
            form["additionalProperties"] = others
        return form

    def _member(self, name: str, schema: Any, depth: int) -> Schema:
        """A property's form."""
        if (
            self._path + len(name) > MAX_PATH
            and isinstance(schema, dict)
            and not schema.keys().isdisjoint(_COMPOUND)
            and "$ref" not in schema
        ):
            return self._referring(schema, "")
        self._path += len(name) + 1
        form = self._form(schema, depth)
        self._path -= len(name) + 1
        return form

    def _others(self, schema: Schema, depth: int) -> Schema | bool | None:
        """What properties without a schema of their own may be; those that a pattern describes are among them. None: nothing is said."""
        others, described = schema.get("additionalProperties"), schema.get("patternProperties")
        if isinstance(described, dict) and described:
            if others is None or others is True or len(described) > MAX_OPTIONAL:
                return True
            choices = [*described.values(), others]
            form = self._choice({}, [choice for choice in choices if choice is not False], depth)
            return True if form == anything() else form
        if isinstance(others, dict):
            form = self._form(others, depth + 1)
            return True if form == anything() else form
        return others if isinstance(others, bool) else None

    def _array(self, schema: Schema, depth: int) -> Schema:
        items, first = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):  # draft 7
            items, first = schema.get("additionalItems"), items
        least, most = _length(schema.get("minItems")) or 0, _length(schema.get("maxItems"))
        if isinstance(first, list) and first:
            if items is False:
                most = len(first) if most is None else min(most, len(first))
            closed = items is None or items is False
            if (
                closed
                and least <= len(first)
                and (most is None or most >= len(first))
                and all(part is not False for part in first)
            ):
                return {"prefixItems": [self._form(part, depth + 1) for part in first]} | self._bounds(
                    "Items", least, most
                )
            form = self._choice({}, [*first, True if items is None else items], depth)
        elif items is False:
            form, most = anything(), 0
        else:
            form = self._form(items, depth + 1) if isinstance(items, dict) else anything()
        bounds = self._bounds("Items", least, most)
        return {"items": form} | bounds if bounds or form != anything() else {}

    def _string(self, schema: Schema) -> Schema:
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            pattern = patterns.portable(pattern)
            if pattern is not None:
                return {"pattern": pattern}
        if isinstance(schema.get("format"), str) and schema["format"] in FORMATS:
            return {"format": schema["format"]}
        return self._bounds("Length", _length(schema.get("minLength")) or 0, _length(schema.get("maxLength")))

    def _bounds(self, what: str, least: int, most: int | None) -> Schema:
        """Bounds that are not too large, alone or together; none where they contradict each other, which hangs or kills llama.cpp."""
        bounds: Schema = {}
        if most is not None and most < least:
            return bounds
        for name, bound in ((f"min{what}", least or None), (f"max{what}", most)):
            if bound is not None and bound <= MAX_COUNT and self._counts + bound <= MAX_COUNTS:
                self._counts += bound
                bounds[name] = bound
        return bounds


def _both(one: Schema, other: Schema) -> Schema:
    """What holds for a value of which both hold: exactly, or looser where they speak of the same."""
    merged = one | other
    mine, theirs = one.get("properties"), other.get("properties")
    if isinstance(mine, dict) and isinstance(theirs, dict):
        merged["properties"] = {name: _of_both(mine, theirs, name) for name in mine | theirs}
    if isinstance(one.get("required"), list) and isinstance(other.get("required"), list):
        merged["required"] = [*one["required"], *other["required"]]
    if any(key in other for key in _ARRAY_GROUP):
        for key in _ARRAY_GROUP:
            if key in one and key not in other:
                del merged[key]
    if "patternProperties" in one and "patternProperties" in other:
        merged.pop("additionalProperties", None)
    one_types, other_types = _types(one), _types(other)
    if one_types and other_types:
        common = [name for name in one_types if name in other_types or (name == "integer" and "number" in other_types)]
        common += [name for name in other_types if name == "integer" and "number" in one_types and name not in common]
        merged["type"] = common or other_types
    if isinstance(one.get("enum"), list) and isinstance(other.get("enum"), list):
        merged["enum"] = [value for value in one["enum"] if value in other["enum"]] or other["enum"]
    return merged


def _of_both(mine: Schema, theirs: Schema, name: str) -> Any:
    """A property that one forbids is forbidden."""
    if mine.get(name) is False or theirs.get(name) is False:
        return False
    return theirs[name] if theirs.get(name, True) not in (True, {}) else mine.get(name, True)


def _types(schema: Schema) -> list[str]:
    """The types that it names; none: it names none."""
    named = schema.get("type")
    found = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return list(dict.fromkeys(name for name in found if isinstance(name, str) and name in _ALL_TYPES))


def _values(schema: Schema, values: list[Any], types: list[str]) -> Schema:
    """The converter follows a `$ref` in a value too."""
    typed: Schema = {"type": types[0] if len(types) == 1 else types} if types else anything()
    if not values or any(_holds_reference(value) for value in values):
        return typed
    kept: Schema = {"const": values[0]} if "const" in schema else {"enum": values}
    return kept | typed if len(types) == 1 else kept


def _holds_reference(value: Any) -> bool:
    if isinstance(value, dict):
        return "$ref" in value or any(map(_holds_reference, value.values()))
    return isinstance(value, list) and any(map(_holds_reference, value))


def _numbers(schema: Schema, type: str) -> Schema:
    """For integers, bounds that they can meet: the converter cuts off what follows the point, on the wrong side below zero."""
    low, above, high, below = (
        _finite(schema.get(name)) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    if type == "number":
        named = {"minimum": low, "exclusiveMinimum": above, "maximum": high, "exclusiveMaximum": below}
        bounds = {name: bound for name, bound in named.items() if bound is not None}
        least = max((bound for bound in (low, above) if bound is not None), default=-math.inf)
        most = min((bound for bound in (high, below) if bound is not None), default=math.inf)
        return {} if least > most or (least == most and (above == least or below == most)) else bounds
    lows = [math.ceil(low)] if low is not None else []
    lows += [math.floor(above) + 1] if above is not None else []
    highs = [math.floor(high)] if high is not None else []
    highs += [math.ceil(below) - 1] if below is not None else []
    if lows and highs and max(lows) > min(highs):
        return {}
    return ({"minimum": max(lows)} if lows else {}) | ({"maximum": min(highs)} if highs else {})


def _finite(value: object) -> float | int | None:
    return (
        value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_INTEGER else None
    )


def _length(value: object) -> int | None:
    """A bound on a length. `3.0` is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_INTEGER:
        return None
    return math.ceil(value)
