"""Merging of JSON Schemas that apply to the same value: references and `allOf`. Pure."""

from collections.abc import Hashable
from typing import Any

from gateway.chat.json_schema import Schema, SchemaDocument, WorkBudget
from gateway.engines.grammar.values import BYTES_PER_UNIT, comparison_key, holds_reference, types_of, units_of

MERGE_UNITS = 5
"""Units of work of merging two schemas."""
MAX_FORMS = 5000
"""Maximum number of schemas in the result. Nested choices are multiplied out."""
MAX_DEPTH = 48

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
     "$id", "id", "$anchor", "$dynamicAnchor", "$defs", "definitions", "$vocabulary"}
)  # fmt: skip
_ARRAY_GROUP = ("items", "prefixItems", "additionalItems")


class SchemaMerger:
    """Merges the schemas of one document after another, within one budget of work.

    Each merge is done once, however often a schema is referred to.
    """

    def __init__(self, budget: WorkBudget) -> None:
        self._budget = budget
        self._spend = budget.spend
        self._document = SchemaDocument({})
        self._schema_count = 0
        self._known_values: dict[int, tuple[list[Any], bool, int]] = {}
        """By the identity of a list: the list, whether it holds a `$ref`, and its size in units."""
        self._known_merges: dict[int, tuple[Schema, Schema]] = {}
        """By the identity of a schema with `allOf`: the schema, and the result of merging it."""
        self._known_keys: dict[int, tuple[list[Any], list[Hashable]]] = {}
        """By the identity of a list: the list, and what its values are compared by."""

    def _resolve(self, reference: str) -> Any:
        """Follow the reference and all references that it leads to."""
        for _ in range(MAX_DEPTH):
            self._spend(2 + len(reference) // BYTES_PER_UNIT)
            target = self._document.resolve(reference)
            if not isinstance(target, dict) or not isinstance(target.get("$ref"), str):
                return target
            reference = target["$ref"]
        return None

    def _merge_all_of(self, schema: Schema, depth: int) -> Schema:
        """Merge `allOf` into the rest of the schema, because only one of the engines supports it."""
        parts = schema.get("allOf")
        if not isinstance(parts, list):
            return schema
        known = self._known_merges.get(id(schema))
        if known is None:
            known = self._known_merges[id(schema)] = schema, self._merge_parts(schema, parts, depth)
        return known[1]

    def _merge_parts(self, schema: Schema, parts: list[Any], depth: int) -> Schema:
        if depth > MAX_DEPTH or self._schema_count > MAX_FORMS:
            return {}
        own = {key: value for key, value in schema.items() if key != "allOf"}
        if len(parts) == 1 and isinstance(parts[0], dict) and "$ref" in parts[0] and ANNOTATIONS.issuperset(own):
            return parts[0] | own
        result = self._inline(own, depth)
        last: Schema = {}
        for part in parts:
            self._schema_count += 1
            if isinstance(part, dict):
                inlined = self._inline(part, depth + 1)
                if inlined is not last:
                    result = self._merge(result, inlined)
                last = inlined
        return result

    def _inline(self, schema: Schema, depth: int) -> Schema:
        """Replace a reference by its target."""
        self._spend(1 + len(schema))
        if isinstance(schema.get("$ref"), str):
            target = self._resolve(schema["$ref"])
            schema = target if isinstance(target, dict) else {}
        return self._merge_all_of(schema, depth + 1)

    def _merge(self, one: Schema, other: Schema) -> Schema:
        """Merge two schemas that apply to the same value.

        The result is exact, or looser where both restrict the same thing.
        """
        self._spend(MERGE_UNITS + len(one) + len(other))
        merged = one | other
        one_properties, other_properties = one.get("properties"), other.get("properties")
        if isinstance(one_properties, dict) and isinstance(other_properties, dict):
            self._spend(len(one_properties) + len(other_properties))
            merged["properties"] = {
                name: _merge_property(one_properties, other_properties, name)
                for name in one_properties | other_properties
            }
        if isinstance(one.get("required"), list) and isinstance(other.get("required"), list):
            self._spend((len(one["required"]) + len(other["required"])) // 8)
            names = [*one["required"], *other["required"]]
            merged["required"] = [*dict.fromkeys(name for name in names if isinstance(name, str))]
        if any(key in other for key in _ARRAY_GROUP):
            for key in _ARRAY_GROUP:
                if key in one and key not in other:
                    del merged[key]
        if "patternProperties" in one and "patternProperties" in other:
            merged.pop("additionalProperties", None)
        one_types, other_types = types_of(one), types_of(other)
        if one_types and other_types:
            common = [
                name for name in one_types if name in other_types or (name == "integer" and "number" in other_types)
            ]
            common += [
                name for name in other_types if name == "integer" and "number" in one_types and name not in common
            ]
            merged["type"] = common or other_types
        if isinstance(one.get("enum"), list) and isinstance(other.get("enum"), list):
            merged["enum"] = self._common_values(one["enum"], other["enum"])
        return merged

    def _common_values(self, one: list[Any], other: list[Any]) -> list[Any]:
        """Return the values in both lists, or the other list if there are none."""
        if one is other:
            return one
        allowed = set(self._keys(other))
        common = [value for value, key in zip(one, self._keys(one), strict=True) if key in allowed]
        return one if len(common) == len(one) else common or other

    def _keys(self, values: list[Any]) -> list[Hashable]:
        self._spend(1 + len(values) // 4)
        known = self._known_keys.get(id(values))
        if known is None:
            self._spend(self._values_units(values))
            known = self._known_keys[id(values)] = values, [comparison_key(value) for value in values]
        return known[1]

    def _values_units(self, values: list[Any]) -> int:
        """Return the size of a list of values in units of work."""
        known = self._known_values.get(id(values))
        if known is None:
            has_reference = any(map(holds_reference, values))
            known = self._known_values[id(values)] = values, has_reference, units_of(values)
            self._spend(known[2])
        return known[2]


def _merge_property(one_properties: Schema, other_properties: Schema, name: str) -> Any:
    """Merge the two schemas of a property. Forbidden by one means forbidden."""
    if one_properties.get(name) is False or other_properties.get(name) is False:
        return False
    return (
        other_properties[name] if other_properties.get(name, True) not in (True, {}) else one_properties.get(name, True)
    )
