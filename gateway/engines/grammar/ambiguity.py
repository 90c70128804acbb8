"""Keeps a grammar from growing while it is followed: llama.cpp walks all ways on at once that fit the text so far, each for itself. Pure."""

from collections.abc import Iterator

from gateway.chat.json_schema import TYPES, Schema

MAX_WAYS = 64
"""Ways that a text may be read at once, by choices of which one lies in the other. A choice that leads back to itself has no such number: with
two arrays each level doubles it, and `[[[[` stops Ollama 0.24."""
MAX_ALIKE = 256
"""Objects, or arrays, in one choice."""

Definitions = dict[str, Schema]


def limited(parts: list[Schema], definitions: Definitions) -> None:
    """Make the choices in the portable schemas `parts` and `definitions`, in place, such that few ways are open at once: those that begin alike
    become any object or any array."""
    limit = _Limit(definitions)
    for name, schema in definitions.items():
        limit.take(schema, name)
    for part in parts:
        limit.take(part, None)


def needed(parts: list[Schema], definitions: Definitions) -> Definitions:
    """Those of `definitions` that `parts` refer to, and what they refer to."""
    rest = [name for part in parts for name in _names(part)]
    found: set[str] = set()
    while rest:
        name = rest.pop()
        if name not in found:
            found.add(name)
            rest.extend(_names(definitions[name]))
    return {name: schema for name, schema in definitions.items() if name in found}


class _Limit:
    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self._reached = _reached({name: set(_names(schema)) for name, schema in definitions.items()})
        self._ways: dict[int, int] = {}
        """By the schema's identity."""

    def take(self, schema: Schema, owner: str | None) -> int:
        """How many ways are open at once within `schema`, which is in the definition `owner`."""
        known = self._ways.get(id(schema))
        if known is None:
            self._ways[id(schema)] = 1  # what leads back to itself is seen to where the choice is
            if "$ref" in schema:
                owner = _name(schema["$ref"])
                known = self.take(self._definitions[owner], owner)
            elif "anyOf" in schema:
                known = self._choice(schema, owner)
            else:
                known = max((self.take(child, owner) for child in _within(schema)), default=1)
            self._ways[id(schema)] = known
        return known

    def _choice(self, schema: Schema, owner: str | None) -> int:
        most = 1
        for kind in ("array", "object"):
            leaves = [(choice, self._leaves(choice)) for choice in schema["anyOf"]]
            alike = [leaf for _, found in leaves for leaf in found if _type(leaf) == kind]
            ways = self._open(alike, owner)
            if ways > MAX_WAYS:
                ways = 1
                mixed = [found for _, found in leaves if any(_type(leaf) == kind for leaf in found)]
                is_pure = all(_type(leaf) == kind for found in mixed for leaf in found)
                loose = {"type": kind if is_pure else [*TYPES]}
                rest = [choice for choice, found in leaves if found not in mixed] if is_pure else []
                if not rest:
                    del schema["anyOf"]
                    schema.update(loose)
                    return 1
                schema["anyOf"] = [*rest, loose]
            most = max(most, ways)
        return max([most, *(self.take(choice, owner) for choice in schema["anyOf"])])

    def _leaves(self, choice: Schema) -> list[Schema]:
        """What `choice` comes down to, through references and choices."""
        found: list[Schema] = []
        seen: set[int] = set()
        rest = [choice]
        while rest:
            schema = rest.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            if "$ref" in schema:
                rest.append(self._definitions[_name(schema["$ref"])])
            elif "anyOf" in schema:
                rest.extend(schema["anyOf"])
            else:
                found.append(schema)
        return found

    def _open(self, alike: list[Schema], owner: str | None) -> int:
        """Of schemas of one type: the most ways of those that a text may be of together."""
        if len(alike) > MAX_ALIKE:
            return MAX_WAYS + 1
        groups: dict[str | None, list[Schema]] = {None: []}
        for leaf in alike:
            groups.setdefault(_first(leaf), []).append(leaf)
        anywhere = groups.pop(None)
        most = 1
        for group in groups.values() or [[]]:
            for together in self._told_apart(group):
                together = [*anywhere, *together]
                if sum(self._leads_back(leaf, owner) for leaf in together) > 1:
                    return MAX_WAYS + 1
                most = max(most, sum(self.take(leaf, owner) for leaf in together))
        return most

    def _told_apart(self, group: list[Schema]) -> Iterator[list[Schema]]:
        """Objects that begin with the same property: apart by its value, where each has a fixed one."""
        by_value: dict[str, list[Schema]] = {}
        for leaf in group:
            first = self._leaves(leaf["properties"][_first(leaf)])[:1]
            if not first or not first[0].keys() & {"const", "enum"}:
                by_value = {"": group}
                break
            by_value.setdefault(repr(first[0].get("const", first[0].get("enum"))), []).append(leaf)
        yield from by_value.values() or [[]]

    def _leads_back(self, leaf: Schema, owner: str | None) -> bool:
        return owner is not None and any(name == owner or owner in self._reached[name] for name in _names(leaf))


def _first(leaf: Schema) -> str | None:
    """The property that an object of this schema begins with; None: any. Required ones come first, in their order."""
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


def _within(schema: Schema) -> Iterator[Schema]:
    """The schemas of what is in a value of `schema`."""
    yield from schema.get("properties", {}).values()
    yield from schema.get("prefixItems", ())
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield schema[name]


def _names(schema: Schema) -> Iterator[str]:
    """The definitions that it refers to."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if "$ref" in node:
            yield _name(node["$ref"])
        rest.extend(_within(node))
        rest.extend(node.get("anyOf", ()))


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _reached(direct: dict[str, set[str]]) -> dict[str, set[str]]:
    reached = {}
    for name in direct:
        found: set[str] = set()
        rest = [name]
        while rest:
            new = direct[rest.pop()] - found
            found |= new
            rest.extend(new)
        reached[name] = found
    return reached
