"""Limits on the ambiguity of a grammar. Pure.

llama.cpp follows every possible parse of the text so far separately and in parallel. An ambiguous
grammar therefore grows while it is used.
"""

from collections.abc import Iterator

from gateway.chat.json_schema import TYPES, Schema

MAX_PARSES = 64
"""Maximum number of simultaneous parses that nested choices may cause.

A recursive choice has no such number: with two arrays, every level doubles it, and `[[[[` stops
Ollama 0.24.
"""
MAX_ALIKE = 256
"""Maximum number of objects, or of arrays, in one choice."""

Definitions = dict[str, Schema]


def limit_ambiguity(parts: list[Schema], definitions: Definitions) -> None:
    """Limit the number of simultaneous parses of portable schemas, in place.

    Choices in `parts` and `definitions` that begin alike become any object or any array.
    """
    limiter = _Limiter(definitions)
    for name, schema in definitions.items():
        limiter.count_parses(schema, name)
    for part in parts:
        limiter.count_parses(part, None)


def referenced(parts: list[Schema], definitions: Definitions) -> Definitions:
    """Return the `definitions` that `parts` reference, directly or indirectly."""
    rest = [name for part in parts for name in _referenced_names(part)]
    found: set[str] = set()
    while rest:
        name = rest.pop()
        if name not in found:
            found.add(name)
            rest.extend(_referenced_names(definitions[name]))
    return {name: schema for name, schema in definitions.items() if name in found}


class _Limiter:
    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self._reachable = _reachable({name: set(_referenced_names(schema)) for name, schema in definitions.items()})
        self._parses: dict[int, int] = {}
        """Numbers by the schema's identity."""

    def count_parses(self, schema: Schema, owner: str | None) -> int:
        """Return how many parses are open at once within `schema`.

        The schema belongs to the definition `owner`.
        """
        known = self._parses.get(id(schema))
        if known is None:
            self._parses[id(schema)] = 1  # recursion is handled at the choice
            if "$ref" in schema:
                owner = _definition_name(schema["$ref"])
                known = self.count_parses(self._definitions[owner], owner)
            elif "anyOf" in schema:
                known = self._choice(schema, owner)
            else:
                known = max((self.count_parses(child, owner) for child in _children(schema)), default=1)
            self._parses[id(schema)] = known
        return known

    def _choice(self, schema: Schema, owner: str | None) -> int:
        maximum = 1
        for kind in ("array", "object"):
            leaves = [(choice, self._leaves(choice)) for choice in schema["anyOf"]]
            alike = [leaf for _, found in leaves for leaf in found if _type(leaf) == kind]
            parses = self._count_alike(alike, owner)
            if parses > MAX_PARSES:
                parses = 1
                mixed = [found for _, found in leaves if any(_type(leaf) == kind for leaf in found)]
                is_pure = all(_type(leaf) == kind for found in mixed for leaf in found)
                loose = {"type": kind if is_pure else [*TYPES]}
                rest = [choice for choice, found in leaves if found not in mixed] if is_pure else []
                if not rest:
                    del schema["anyOf"]
                    schema.update(loose)
                    return 1
                schema["anyOf"] = [*rest, loose]
            maximum = max(maximum, parses)
        return max([maximum, *(self.count_parses(choice, owner) for choice in schema["anyOf"])])

    def _leaves(self, choice: Schema) -> list[Schema]:
        """Return the schemas that `choice` resolves to, through references and choices."""
        found: list[Schema] = []
        seen: set[int] = set()
        rest = [choice]
        while rest:
            schema = rest.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            if "$ref" in schema:
                rest.append(self._definitions[_definition_name(schema["$ref"])])
            elif "anyOf" in schema:
                rest.extend(schema["anyOf"])
            else:
                found.append(schema)
        return found

    def _count_alike(self, alike: list[Schema], owner: str | None) -> int:
        """Return the largest number of simultaneous parses of `alike`, which all have one type."""
        if len(alike) > MAX_ALIKE:
            return MAX_PARSES + 1
        groups: dict[str | None, list[Schema]] = {None: []}
        for leaf in alike:
            groups.setdefault(_first_property(leaf), []).append(leaf)
        any_first = groups.pop(None)
        maximum = 1
        for group in groups.values() or [[]]:
            for candidates in self._split_by_first_value(group):
                candidates = [*any_first, *candidates]
                if sum(self._is_recursive(leaf, owner) for leaf in candidates) > 1:
                    return MAX_PARSES + 1
                maximum = max(maximum, sum(self.count_parses(leaf, owner) for leaf in candidates))
        return maximum

    def _split_by_first_value(self, group: list[Schema]) -> Iterator[list[Schema]]:
        """Split objects that begin with the same property by its value, if each has a fixed one."""
        by_value: dict[str, list[Schema]] = {}
        for leaf in group:
            first = self._leaves(leaf["properties"][_first_property(leaf)])[:1]
            if not first or not first[0].keys() & {"const", "enum"}:
                by_value = {"": group}
                break
            by_value.setdefault(repr(first[0].get("const", first[0].get("enum"))), []).append(leaf)
        yield from by_value.values() or [[]]

    def _is_recursive(self, leaf: Schema, owner: str | None) -> bool:
        return owner is not None and any(
            name == owner or owner in self._reachable[name] for name in _referenced_names(leaf)
        )


def _first_property(leaf: Schema) -> str | None:
    """Return the first property of an object of this schema, or None if any can be first.

    Required properties come first, in their order.
    """
    required = leaf.get("required", ())
    return next((name for name in leaf.get("properties", ()) if name in required), None)


def _type(leaf: Schema) -> str | None:
    named = leaf.get("type")
    if named is None:
        return (
            "object"
            if leaf.keys() & {"properties", "additionalProperties"}
            else "array"
            if leaf.keys() & {"items", "prefixItems"}
            else None
        )
    return named if isinstance(named, str) else None


def _children(schema: Schema) -> Iterator[Schema]:
    """Yield the schemas of the values inside a value of `schema`."""
    yield from schema.get("properties", {}).values()
    yield from schema.get("prefixItems", ())
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield schema[name]


def _referenced_names(schema: Schema) -> Iterator[str]:
    """Yield the names of the definitions that `schema` references."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if "$ref" in node:
            yield _definition_name(node["$ref"])
        rest.extend(_children(node))
        rest.extend(node.get("anyOf", ()))


def _definition_name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _reachable(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    reachable = {}
    for name in direct:
        found: set[str] = set()
        rest = [name]
        while rest:
            new = direct[rest.pop()] - found
            found |= new
            rest.extend(new)
        reachable[name] = found
    return reachable
