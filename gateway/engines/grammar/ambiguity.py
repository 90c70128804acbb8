"""Limits on the ambiguity of a grammar. Pure.

llama.cpp follows every possible parse of the text so far separately and in parallel. An ambiguous
grammar therefore grows while it is used.
"""

from collections.abc import Callable, Generator, Iterator

from gateway.chat.json_schema import TYPES, Schema, WorkBudget

MAX_PARSES = 64
"""Maximum number of simultaneous parses that nested choices may cause.

A recursive choice has no such number: with two arrays, every level doubles it, and `[[[[` stops
Ollama 0.24.
"""
MAX_ALIKE = 256
"""Maximum number of objects, or of arrays, in one choice."""

Definitions = dict[str, Schema]
Spend = Callable[[int], None]
"""Counts units of work: see `WorkBudget`."""
_Count = Generator[tuple[Schema, str | None], int, int]
"""A step of counting: yields a schema and its owner, is sent their number, and returns its own."""


def limit_ambiguity(parts: list[Schema], definitions: Definitions, budget: WorkBudget | None = None) -> None:
    """Limit the number of simultaneous parses of portable schemas, in place.

    Choices in `parts` and `definitions` that begin alike become any object or any array.

    Raises:
        SchemaTooComplex: the budget is used up.
    """
    limiter = _Limiter(definitions, _count_nothing if budget is None else budget.spend)
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


def _count_nothing(units: int) -> None:
    """Stand in for a budget that is not limited."""


class _Limiter:
    def __init__(self, definitions: Definitions, spend: Spend) -> None:
        self._definitions = definitions
        self._spend = spend
        spend(4 * len(definitions))
        self._cycles = _cycles({name: set(_referenced_names(schema, spend)) for name, schema in definitions.items()})
        """Number of each definition's cycle. Definitions that reach each other share one."""
        self._parses: dict[int, int] = {}
        """Numbers by the schema's identity."""
        self._removed: list[Schema] = []
        """Schemas that are no longer in the result, kept so that their identities stay unique."""
        self._known_leaves: dict[int, list[Schema]] = {}
        self._known_cycles: dict[int, frozenset[int]] = {}
        """By the schema's identity, until a choice changes."""

    def count_parses(self, schema: Schema, owner: str | None) -> int:
        """Return how many parses are open at once within `schema`.

        The schema belongs to the definition `owner`. The recursion is kept in a list, because
        references may form a path through hundreds of definitions.
        """
        running = [self._count(schema, owner)]
        answer: int | None = None
        while running:
            try:
                inner, inner_owner = running[-1].send(answer)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                running.pop()
                answer = end.value
            else:
                answer = self._parses.get(id(inner))
                if answer is None:
                    running.append(self._count(inner, inner_owner))
        assert answer is not None
        return answer

    def _count(self, schema: Schema, owner: str | None) -> _Count:
        self._spend(3)
        known = self._parses.get(id(schema))
        if known is None:
            self._parses[id(schema)] = 1  # recursion is handled at the choice
            if "$ref" in schema:
                owner = _definition_name(schema["$ref"])
                known = yield self._definitions[owner], owner
            elif "anyOf" in schema:
                known = yield from self._choice(schema, owner)
            else:
                known = yield from self._maximum(list(_children(schema)), owner)
            self._parses[id(schema)] = known
        return known

    def _maximum(self, schemas: list[Schema], owner: str | None) -> _Count:
        self._spend(len(schemas))
        maximum = 1
        for schema in schemas:
            maximum = max(maximum, self._parses.get(id(schema)) or (yield schema, owner))
        return maximum

    def _choice(self, schema: Schema, owner: str | None) -> _Count:
        maximum = 1
        for kind in ("array", "object"):
            leaves = [(choice, self._leaves(choice)) for choice in schema["anyOf"]]
            alike = [leaf for _, found in leaves for leaf in found if _type(leaf) == kind]
            parses = yield from self._count_alike(alike, owner)
            if parses > MAX_PARSES:
                parses = 1
                is_mixed = [any(_type(leaf) == kind for leaf in found) for _, found in leaves]
                is_pure = all(
                    _type(leaf) == kind
                    for (_, found), mixed in zip(leaves, is_mixed, strict=True)
                    if mixed
                    for leaf in found
                )
                loose = {"type": kind if is_pure else [*TYPES]}
                rest = [choice for (choice, _), mixed in zip(leaves, is_mixed, strict=True) if not mixed]
                self._removed += schema["anyOf"]
                self._known_leaves.clear()
                self._known_cycles.clear()
                if not (is_pure and rest):
                    del schema["anyOf"]
                    schema.update(loose)
                    return 1
                schema["anyOf"] = [*rest, loose]
            maximum = max(maximum, parses)
        return max(maximum, (yield from self._maximum(schema["anyOf"], owner)))

    def _leaves(self, choice: Schema) -> list[Schema]:
        """Return the schemas that `choice` resolves to, through references and choices."""
        known = self._known_leaves.get(id(choice))
        if known is None:
            known = self._known_leaves[id(choice)] = self._find_leaves(choice)
        self._spend(1 + len(known))
        return known

    def _find_leaves(self, choice: Schema) -> list[Schema]:
        found: list[Schema] = []
        seen: set[int] = set()
        rest = [choice]
        while rest:
            schema = rest.pop()
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            self._spend(1)
            if "$ref" in schema:
                rest.append(self._definitions[_definition_name(schema["$ref"])])
            elif "anyOf" in schema:
                self._spend(len(schema["anyOf"]))
                rest.extend(schema["anyOf"])
            else:
                found.append(schema)
        return found

    def _count_alike(self, alike: list[Schema], owner: str | None) -> _Count:
        """Return the largest number of simultaneous parses of `alike`, which all have one type."""
        if len(alike) > MAX_ALIKE:
            return MAX_PARSES + 1
        groups: dict[str | None, list[Schema]] = {None: []}
        for leaf in alike:
            groups.setdefault(self._first_property(leaf), []).append(leaf)
        any_first = groups.pop(None)
        maximum = 1
        for group in groups.values() or [[]]:
            for candidates in self._split_by_first_value(group):
                candidates = [*any_first, *candidates]
                self._spend(2 * len(candidates))
                if owner is not None and sum(self._is_recursive(leaf, owner) for leaf in candidates) > 1:
                    return MAX_PARSES + 1
                parses = 0
                for leaf in candidates:
                    parses += self._parses.get(id(leaf)) or (yield leaf, owner)
                maximum = max(maximum, parses)
        return maximum

    def _first_property(self, leaf: Schema) -> str | None:
        """Return the first property of an object of this schema, or None if any can be first.

        Required properties come first, in their order.
        """
        required = leaf.get("required", ())
        for name in leaf.get("properties", ()):
            self._spend(1 + len(required) // 32)
            if name in required:
                return str(name)
        return None

    def _split_by_first_value(self, group: list[Schema]) -> Iterator[list[Schema]]:
        """Split objects that begin with the same property by its value, if each has a fixed one."""
        by_value: dict[str, list[Schema]] = {}
        for leaf in group:
            first = self._leaves(leaf["properties"][self._first_property(leaf)])[:1]
            if not first or not first[0].keys() & {"const", "enum"}:
                by_value = {"": group}
                break
            text = repr(first[0].get("const", first[0].get("enum")))
            self._spend(len(text) // 16)
            by_value.setdefault(text, []).append(leaf)
        yield from by_value.values() or [[]]

    def _is_recursive(self, leaf: Schema, owner: str) -> bool:
        """Return whether `leaf`, which is reached from the definition `owner`, leads back to it."""
        known = self._known_cycles.get(id(leaf))
        if known is None:
            names = list(_referenced_names(leaf, self._spend))
            known = self._known_cycles[id(leaf)] = frozenset(self._cycles[name] for name in names)
        return self._cycles[owner] in known


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


def _referenced_names(schema: Schema, spend: Spend = _count_nothing) -> Iterator[str]:
    """Yield the names of the definitions that `schema` references.

    `spend` is told of the work.
    """
    rest = [schema]
    while rest:
        node = rest.pop()
        spend(3)
        if "$ref" in node:
            yield _definition_name(node["$ref"])
        rest.extend(_children(node))
        rest.extend(node.get("anyOf", ()))


def _definition_name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _cycles(direct: dict[str, set[str]]) -> dict[str, int]:
    """Return a number for each name: the same for names that reach each other (Tarjan 1972)."""
    found: dict[str, int] = {}
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_names: list[str] = []
    for start, begun in direct.items():
        path = [] if start in order else [(start, iter(begun))]
        while path:
            name, after = path[-1]
            if name not in order:
                order[name] = lowest[name] = len(order)
                open_names.append(name)
            for other in after:
                if other not in order:
                    path.append((other, iter(direct[other])))
                    break
                if other not in found:
                    lowest[name] = min(lowest[name], order[other])
            else:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[name])
                while lowest[name] == order[name] and name not in found:
                    found[open_names.pop()] = order[name]
    return found
