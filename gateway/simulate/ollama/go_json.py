"""JSON decoding into Go structs, with Go's error messages. Pure."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[-+]?(\d+(\.\d*)?(ns|us|ms|s|m|h))+|[-+]?0")


class GoError(ValueError):
    """A Go decoding error; its text is the message of the response."""


def parse(body: bytes, empty: str) -> Any:
    """Return the first JSON value in `body` and ignore the rest.

    Raises:
        GoError: the value is not valid JSON. If the body is empty, the message is `empty`.
    """
    text = body.decode(errors="replace").lstrip()
    if not text:
        raise GoError(empty)
    try:
        return json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text)[0]
    except json.JSONDecodeError as exc:
        if exc.pos >= len(text.rstrip()) or "Unterminated" in exc.msg:
            raise GoError("unexpected EOF") from exc
        raise GoError(f"invalid character '{text[exc.pos]}' looking for beginning of value") from exc


def _refuse_constant(word: str) -> NoReturn:
    raise GoError(f"invalid character '{word[0]}' looking for beginning of value")


def fit(value: Any, struct: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the object `value` after checking the Go type of each of its `fields`.

    None counts as an empty object.

    Raises:
        GoError: `value` is not an object, or a field has another type.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise GoError(f"json: cannot unmarshal {kind_of(value)} into Go value of type {struct}")
    name = struct.rpartition(".")[2]
    for key, kind in fields.items():
        fit_field(value.get(key), f"{name}.{key}", kind)
    return value


def fit_field(value: Any, where: str, kind: str) -> None:
    """Check that `value` fits a field of the Go type `kind`.

    The items of a list must be objects. The error names the list's item type, or the type after
    "=" in `kind`.

    Raises:
        GoError: it does not fit.
    """
    if value is None:
        return
    if kind.startswith("[]"):
        listed, _, item = kind.partition("=")
        if not isinstance(value, list):
            raise GoError(f"json: cannot unmarshal {kind_of(value)} into Go struct field {where} of type {listed}")
        wrong = next((one for one in value if not isinstance(one, dict)), None)
        if wrong is not None:
            raise GoError(
                f"json: cannot unmarshal {kind_of(wrong)} into Go struct field {where} of type {item or listed[2:]}"
            )
    elif not _fits(value, kind):
        shown = (
            f"number {value}"
            if kind == "int" and isinstance(value, (int, float)) and not isinstance(value, bool)
            else kind_of(value)
        )
        raise GoError(f"json: cannot unmarshal {shown} into Go struct field {where} of type {kind}")


def kind_of(value: Any) -> str:
    """Return the name of the value's JSON kind in Go's decoder errors."""
    for types, name in ((bool, "bool"), ((int, float), "number"), (str, "string"), (list, "array")):
        if isinstance(value, types):
            return name
    return "object"


def type_of(value: Any) -> str:
    """Return the Go type that the value has when decoded into `any`."""
    for types, name in (
        (bool, "bool"),
        ((int, float), "float64"),
        (str, "string"),
        (list, "[]interface {}"),
        (dict, "map[string]interface {}"),
    ):
        if isinstance(value, types):
            return name
    return "<nil>"


def _fits(value: Any, kind: str) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        case "float32" | "float64":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, dict)


def seconds(value: Any) -> float | None:
    """Parse the duration of `keep_alive`: seconds, or Go's form ("5m", "1h30m").

    Negative values mean forever. Returns None for None.

    Raises:
        GoError: the value is neither.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        raise GoError(f"Unsupported type: '{type_of(value)}'")
    if not _DURATION.fullmatch(value):
        kind = "missing unit in" if re.fullmatch(r"[-+]?\d+(\.\d*)?", value) else "invalid"
        raise GoError(f'time: {kind} duration "{value}"')
    total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|ms|s|m|h)", value))
    return -total if value.startswith("-") else total
