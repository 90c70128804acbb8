"""The file `.env`: its variables, and its lines that have no effect."""

import io
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

from gateway.config.environment import PREFIX, VARIABLES
from gateway.config.problems import Problems
from gateway.config.yaml_file import read_text


def read_dotenv(problems: Problems, environ: Mapping[str, str], path: Path = Path(".env")) -> dict[str, str]:
    """Return the variables of a `.env` file, none if the file does not exist.

    `environ` is the environment, which a value can refer to by `${NAME}`.
    """
    if not path.is_file():
        return {}
    try:
        text = read_text(path)
    except ValueError as exc:
        problems.add_line(f"{path}: {exc}")
        return {}
    known = set(environ)
    for binding in parse_stream(io.StringIO(text)):
        _check(binding, path, known, problems)
        if binding.key and binding.value is not None:
            known.add(binding.key)
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def _check(binding: Binding, path: Path, known: set[str], problems: Problems) -> None:
    """Report a line that has no effect. It is not quoted, because it may be a key."""
    original = binding.original.string
    blank_lines = original[: len(original) - len(original.lstrip())].count("\n")
    place = f"{path} line {binding.original.line + blank_lines}"
    if binding.error:
        problems.add_line(f"{place}: expected NAME=value; a value with a quote at its beginning needs one at its end")
    elif binding.key and binding.value is None:
        name = f"{binding.key}: " if _is_ours(binding.key) else ""
        problems.warn(f"{name}{place} has no effect, because it has no '='; expected NAME=value")
    elif binding.key and binding.value and _is_ours(binding.key):
        for atom in parse_variables(binding.value):
            if isinstance(atom, Variable) and atom.default is None and atom.name not in known:
                problems.add_line(
                    f"{binding.key}: the variable {atom.name} is not set; "
                    f"expected a value in the environment or further up in {path} ({place})"
                )


def _is_ours(name: str) -> bool:
    return name in VARIABLES or name.startswith(PREFIX)
