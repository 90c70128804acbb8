"""The conversion of JSON Schemas into portable ones. Pure; `portable.py` has its entry points."""

import re
from collections.abc import Iterable
from itertools import chain, count
from typing import Any

from gateway.chat.json_schema import Schema, SchemaDocument, WorkBudget
from gateway.engines.grammar import ambiguity, regex
from gateway.engines.grammar.merging import ANNOTATIONS, MAX_DEPTH, MAX_FORMS, SchemaMerger
from gateway.engines.grammar.values import (
    BYTES_PER_UNIT,
    anything,
    length_bound,
    number_bounds,
    sorted_json,
    text_units,
    types_of,
)

MAX_COUNT = 1000
"""Maximum length bound. llama.cpp makes a rule per unit, and rejects 2000 and more."""
MAX_COUNTS = 20_000
"""Maximum sum of all length bounds of a schema."""
MAX_OPTIONAL = 128
"""Maximum number of optional properties of an object.

The converter's work grows with the third power: 600 take 1 s, 2000 take 36 s.
"""
FORM_UNITS, PATTERN_UNITS = 6, 2
"""Units of work of a schema, and of a character of a pattern."""
MERGED_LEVELS = 8
"""Depth added by an `allOf`, because recursive references in it are expanded."""
MAX_NAMES = 800
"""Maximum length of all property names of an object with additional properties, in characters.

The converter makes a rule of each character, to exclude these names from the additional ones.
"""
MAX_PATH = 64
"""Maximum length of the property names on the path to a schema, in characters.

The converter names its rules after this path. Deeper schemas become definitions with their own
names.
"""
MAX_NAME = 256
FORMATS = frozenset({"date", "time", "date-time", "uuid"})
"""Formats that llama.cpp knows. It ignores others, and vLLM rejects those that it does not know."""

_COMPOUND = ("properties", "items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
_plain_name = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch
_trie_safe = re.compile(r"[A-Za-z0-9_ .,:;/@#$%&*+=!?~'<>(){}|`]*").fullmatch
"""Property names that the converter can put into character classes, one character at a time."""
_not_in_rule_name = re.compile("[^a-zA-Z0-9-]+")
_RULES = frozenset(
    {"", "root", "space", "boolean", "decimal-part", "integral-part", "number", "integer", "value", "object", "array",
     "uuid", "char", "string", "null", "date", "time", "date-time", "date-string", "time-string", "date-time-string",
     "dot"}
)  # fmt: skip
"""The converter's own rules.

A property of the root object with such a name would replace the rule.
"""


class Converter(SchemaMerger):
    """Conversion of one or more documents into one result.

    Referenced schemas become definitions, under names that all engines accept.
    """

    def __init__(self, budget: WorkBudget) -> None:
        super().__init__(budget)
        self._names: dict[int, tuple[str, Schema]] = {}
        """Name by the schema's identity. Holding the schema keeps its identity unique."""
        self._taken: set[str] = set()
        self._pending: list[tuple[SchemaDocument, str, Schema]] = []
        self._definitions: dict[str, Schema] = {}
        self._number = 0
        """The number in the last name of a definition that has no name of its own."""
        self._patterns: dict[str, str | None] = {}
        self._known_texts: dict[int, tuple[Schema, bytes]] = {}
        """By the identity of a form: the form, and its JSON."""
        self._path = 0
        self._bound_sum = 0

    def documents(self, roots: list[Schema]) -> list[Schema]:
        """Convert each root into a complete document."""
        parts = self.parts(roots)
        return [part | self.definitions() for part in parts]

    def parts(self, roots: list[Schema]) -> list[Schema]:
        """Convert the roots. They need `definitions` next to them at the root of the document."""
        found = []
        for root in roots:
            self._document, self._path = SchemaDocument(root), 0
            form = self._convert(root, 1)
            self._define_pending()
            if id(root) in self._names or any(
                _not_in_rule_name.sub("-", name) in _RULES for name in form.get("properties", ())
            ):
                self._document = SchemaDocument(root)
                form = self._reference_to(root, "root")
                self._define_pending()
            found.append(form)
        ambiguity.limit_ambiguity(found, self._definitions, self._budget)
        self._definitions = ambiguity.referenced(found, self._definitions)
        return found

    def definitions(self) -> Schema:
        return {"$defs": self._definitions} if self._definitions else {}

    def _define_pending(self) -> None:
        while self._pending:
            self._document, name, schema = self._pending.pop()
            self._path = 0
            self._definitions[name] = self._convert(schema, 1)

    def _reference_to(self, target: Schema, hint: str) -> Schema:
        name, _ = self._names.get(id(target), ("", None))
        if not name:
            name = next(name for name in chain([hint], self._numbered_names()) if self._is_free(name))
            self._spend(2 * FORM_UNITS)
            self._names[id(target)] = (name, target)
            self._taken.add(_not_in_rule_name.sub("-", name))
            self._pending.append((self._document, name, target))
        return {"$ref": f"#/$defs/{name}"}

    def _numbered_names(self) -> Iterable[str]:
        """Yield names for definitions; those that were taken before are not tried again."""
        for number in count(max(self._number, len(self._names))):
            self._number = number
            yield f"def-{number}"

    def _is_free(self, name: str) -> bool:
        return _plain_name(name) is not None and _not_in_rule_name.sub("-", name) not in self._taken

    def _convert(self, schema: object, depth: int) -> Schema:
        self._schema_count += 1
        if not isinstance(schema, dict) or depth > MAX_DEPTH or self._schema_count > MAX_FORMS:
            return anything()
        self._spend(FORM_UNITS + len(schema))
        if "allOf" in schema:
            schema = self._merge_all_of(schema, depth)
            depth += MERGED_LEVELS
        annotations = {key: schema[key] for key in ("title", "description") if isinstance(schema.get(key), str)}
        if "default" in schema and not isinstance(schema["default"], dict | list):
            annotations["default"] = schema["default"]
        for value in annotations.values():
            self._spend(text_units(value))
        reference = schema.get("$ref")
        form = (
            self._convert_reference(reference)
            if isinstance(reference, str)
            else self._convert_constraints(schema, depth)
        )
        return form | annotations

    def _convert_constraints(self, schema: Schema, depth: int) -> Schema:
        choices = schema.get("anyOf") if isinstance(schema.get("anyOf"), list) else schema.get("oneOf")
        if isinstance(choices, list):
            return self._convert_choice(schema, choices, depth)
        types = types_of(schema)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return self._convert_values(schema, values, types)
        return self._convert_type(schema, types, depth)

    # References and choices

    def _convert_reference(self, reference: str) -> Schema:
        target = self._resolve(reference)
        if not isinstance(target, dict):
            return anything()
        return self._reference_to(target, reference.rpartition("/")[2] if "/" in reference else "root")

    def _convert_choice(self, schema: Schema, choices: list[Any], depth: int) -> Schema:
        """Convert a choice between `choices`.

        `oneOf` becomes `anyOf`: `oneOf` of looser schemas would be stricter. Keywords next to the
        choice apply to every alternative.
        """
        siblings = {
            key: value for key, value in schema.items() if key not in ANNOTATIONS and key not in ("anyOf", "oneOf")
        }
        forms: dict[bytes, Schema] = {}
        for choice in choices:
            self._spend(1)
            if choice is False:
                continue
            if siblings and isinstance(choice, dict) and not (siblings.keys() == {"type"} and "$ref" in choice):
                choice = self._merge(
                    siblings, self._inline(choice, depth) if "$ref" in choice else self._merge_all_of(choice, depth)
                )
            form = self._convert(choice, depth + 1)
            if form == anything():
                return form
            for part in form["anyOf"] if form.keys() == {"anyOf"} else [form]:
                forms.setdefault(self._text(part), part)
        if not forms:
            return anything()
        return next(iter(forms.values())) if len(forms) == 1 else {"anyOf": [*forms.values()]}

    def _text(self, form: Schema) -> bytes:
        """Return the JSON of a form. Equal forms have the same, whatever their order."""
        known = self._known_texts.get(id(form))
        if known is None:
            known = self._known_texts[id(form)] = form, sorted_json(form)
            self._spend(len(known[1]) // BYTES_PER_UNIT)
        self._spend(1)
        return known[1]

    def _convert_values(self, schema: Schema, values: list[Any], types: list[str]) -> Schema:
        """Convert `const` and `enum`.

        Values with a `$ref` inside are dropped, because the converter would follow it.
        """
        typed: Schema = {"type": types[0] if len(types) == 1 else types} if types else anything()
        self._spend(self._values_units(values))
        if not values or self._known_values[id(values)][1]:
            return typed
        kept: Schema = {"const": values[0]} if "const" in schema else {"enum": values}
        return kept | typed if len(types) == 1 else kept

    # Single types

    def _convert_type(self, schema: Schema, types: list[str], depth: int) -> Schema:
        if len(types) > 1 or not types:
            return self._convert_types(schema, types, depth)
        form: Schema = {"type": types[0]}
        if types[0] == "object":
            form |= self._convert_object(schema, depth)
        elif types[0] == "array":
            form |= self._convert_array(schema, depth)
        elif types[0] == "string":
            form |= self._convert_string(schema)
        elif types[0] in ("integer", "number"):
            form |= number_bounds(schema, types[0])
        return form

    def _convert_types(self, schema: Schema, types: list[str], depth: int) -> Schema:
        """Convert a schema with several types or without a type.

        Without a type, the keywords decide between object, array and string, as in all engines.
        """
        if types:
            forms = [self._convert_type(schema, [name], depth) for name in types]
            if all(len(form) == 1 for form in forms):
                return {"type": types}
            return {"anyOf": forms}
        self._spend(FORM_UNITS)
        for form in (
            self._convert_object(schema, depth),
            self._convert_array(schema, depth),
            self._convert_string(schema),
        ):
            if (
                form.keys() & {"properties", "additionalProperties", "items", "prefixItems", "pattern", "format"}
                and form.get("additionalProperties") is not True
            ):
                return form
        return anything()

    def _convert_object(self, schema: Schema, depth: int) -> Schema:
        properties = schema.get("properties")
        form: Schema = {}
        is_truncated = False
        if isinstance(properties, dict):
            wanted = schema.get("required")
            self._spend(len(properties) + (len(wanted) if isinstance(wanted, list) else 0))
            required = [
                name
                for name in dict.fromkeys(wanted if isinstance(wanted, list) else ())
                if isinstance(name, str) and name in properties
            ]
            if "$ref" in properties or any(len(name) > MAX_NAME for name in properties):
                return {}
            is_truncated = len(properties) - len(required) > MAX_OPTIONAL
            is_required = frozenset(required)
            kept = {
                name: part
                for name, part in properties.items()
                if part is not False and not (is_truncated and name not in is_required)
            }
            self._spend(sum(map(len, kept)) // BYTES_PER_UNIT)
            form["properties"] = {name: self._convert_property(name, part, depth + 1) for name, part in kept.items()}
            required = [name for name in required if name in kept]
            if required:
                form["required"] = required
        additional = True if is_truncated else self._additional_properties(schema, depth)
        names = form.get("properties", {})
        if additional is not None and (
            additional is False or (all(map(_trie_safe, names)) and sum(map(len, names)) <= MAX_NAMES)
        ):
            form["additionalProperties"] = additional
        return form

    def _convert_property(self, name: str, schema: Any, depth: int) -> Schema:
        """Convert the schema of a property."""
        if (
            self._path + len(name) > MAX_PATH
            and isinstance(schema, dict)
            and not schema.keys().isdisjoint(_COMPOUND)
            and "$ref" not in schema
        ):
            return self._reference_to(schema, "")
        self._path += len(name) + 1
        form = self._convert(schema, depth)
        self._path -= len(name) + 1
        return form

    def _additional_properties(self, schema: Schema, depth: int) -> Schema | bool | None:
        """Convert the schema of properties without their own, including those matched by a pattern.

        Return None if the schema does not restrict them.
        """
        additional, by_pattern = schema.get("additionalProperties"), schema.get("patternProperties")
        if isinstance(by_pattern, dict) and by_pattern:
            if additional is None or additional is True or len(by_pattern) > MAX_OPTIONAL:
                return True
            self._spend(len(by_pattern))
            choices = [*by_pattern.values(), additional]
            form = self._convert_choice({}, [choice for choice in choices if choice is not False], depth)
            return True if form == anything() else form
        if isinstance(additional, dict):
            form = self._convert(additional, depth + 1)
            return True if form == anything() else form
        return additional if isinstance(additional, bool) else None

    def _convert_array(self, schema: Schema, depth: int) -> Schema:
        items, first = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):  # draft 7
            items, first = schema.get("additionalItems"), items
        least, most = length_bound(schema.get("minItems")) or 0, length_bound(schema.get("maxItems"))
        if isinstance(first, list) and first:
            if items is False:
                most = len(first) if most is None else min(most, len(first))
            self._spend(len(first))
            closed = items is None or items is False
            if (
                closed
                and least <= len(first)
                and (most is None or most >= len(first))
                and all(part is not False for part in first)
            ):
                return {"prefixItems": [self._convert(part, depth + 1) for part in first]} | self._bounds(
                    "Items", least, most
                )
            form = self._convert_choice({}, [*first, True if items is None else items], depth)
        elif items is False:
            form, most = anything(), 0
        else:
            form = self._convert(items, depth + 1) if isinstance(items, dict) else anything()
        bounds = self._bounds("Items", least, most)
        return {"items": form} | bounds if bounds or form != anything() else {}

    def _convert_string(self, schema: Schema) -> Schema:
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            pattern = self._portable_pattern(pattern)
            if pattern is not None:
                return {"pattern": pattern}
        if isinstance(schema.get("format"), str) and schema["format"] in FORMATS:
            return {"format": schema["format"]}
        return self._bounds("Length", length_bound(schema.get("minLength")) or 0, length_bound(schema.get("maxLength")))

    def _portable_pattern(self, pattern: str) -> str | None:
        if pattern not in self._patterns:
            if len(pattern) <= regex.MAX_LENGTH:
                self._spend(PATTERN_UNITS * len(pattern))
            self._patterns[pattern] = regex.portable(pattern)
        found = self._patterns[pattern]
        self._spend(len(found or "") // BYTES_PER_UNIT)
        return found

    def _bounds(self, what: str, least: int, most: int | None) -> Schema:
        """Return the bounds that are not too large, alone or in total.

        Return no bounds if they contradict each other, which hangs or crashes llama.cpp.
        """
        bounds: Schema = {}
        if most is not None and most < least:
            return bounds
        for name, bound in ((f"min{what}", least or None), (f"max{what}", most)):
            if bound is not None and bound <= MAX_COUNT and self._bound_sum + bound <= MAX_COUNTS:
                self._bound_sum += bound
                bounds[name] = bound
        return bounds
