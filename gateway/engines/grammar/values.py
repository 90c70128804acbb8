"""Types, bounds, sizes and comparison of the values in a JSON Schema. Pure."""

import json
import math
from collections.abc import Hashable
from typing import Any

import orjson

from gateway.chat.json_schema import TYPES, Schema

MAX_INTEGER = 10**15
"""Maximum bound on a number.

Near 2^63 the converter never ends. `2^53 - 1`, which zod adds everywhere, is not a bound that any
model reaches.
"""
BYTES_PER_UNIT = 16
"""Bytes of the client's text that count as a unit of work where they are repeated in the result."""

_ALL_TYPES = frozenset(TYPES) | {"integer"}


def anything() -> Schema:
    """Return the schema of any value. To llama.cpp, `{}` means any object."""
    return {"type": list(TYPES)}


def types_of(schema: Schema) -> list[str]:
    """Return the types that the schema names, or an empty list."""
    named = schema.get("type")
    found = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return list(dict.fromkeys(name for name in found if isinstance(name, str) and name in _ALL_TYPES))


def holds_reference(value: Any) -> bool:
    if isinstance(value, dict):
        return "$ref" in value or any(map(holds_reference, value.values()))
    return isinstance(value, list) and any(map(holds_reference, value))


def units_of(values: Any) -> int:
    """Return the size of a value in units of work: one for each value in it, and its text."""
    if isinstance(values, str):
        return text_units(values)
    if isinstance(values, list):
        return 1 + sum(map(units_of, values))
    if isinstance(values, dict):
        return 1 + sum(map(text_units, values)) + sum(map(units_of, values.values()))
    return 1


def text_units(value: object) -> int:
    return 1 + len(value) // BYTES_PER_UNIT if isinstance(value, str) else 1


def comparison_key(value: Any) -> Hashable:
    """Return what a JSON value is compared by: 1 equals 1.0, but not true."""
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, list):
        return tuple(map(comparison_key, value))
    if isinstance(value, dict):
        return frozenset((name, comparison_key(part)) for name, part in value.items())
    return value  # type: ignore[no-any-return]  # str, int, float or None


def sorted_json(form: Schema) -> bytes:
    try:
        return orjson.dumps(form, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # numbers of more than 64 bits
        return json.dumps(form, sort_keys=True).encode()


def number_bounds(schema: Schema, type: str) -> Schema:
    """Return the bounds of a number, rounded to the next integers for type `integer`.

    The converter truncates fractions, which is wrong below zero.
    """
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


def length_bound(value: object) -> int | None:
    """Return a length bound as an integer. `3.0` counts as one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_INTEGER:
        return None
    return math.ceil(value)
