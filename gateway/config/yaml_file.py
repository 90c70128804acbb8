"""YAML file: its values, the line of each key, and mistakes in its syntax."""

import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import yaml

from gateway.config.interpolation import Interpolator
from gateway.config.problems import Path, Problems, dotted

MAX_DEPTH = 30
MAX_VALUES = 100_000
"""Maximum number of values, counting each use of an alias: a few lines of aliases can mean billions."""

IGNORED_PREFIX = "x-"
"""Prefix of the top-level keys that hold anchors."""

_MERGE = "tag:yaml.org,2002:merge"
_FREE_TEXT = "params"  # below it, values are the client's or the engine's text, and no settings


def read_text(path: FilePath) -> str:
    """Return a file's text; it is UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the file cannot be read; the message says why.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ValueError(exc.strerror or "it cannot be read") from exc
    except UnicodeDecodeError as exc:
        raise ValueError("it is not UTF-8 text") from exc


def read_yaml(path: FilePath, problems: Problems, variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the mapping in a YAML file, with `variables` for `${NAME}` in its text values.

    `problems` gets the line of each key, and mistakes.
    """
    try:
        loader = yaml.SafeLoader(read_text(path))
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            if not isinstance(node, yaml.MappingNode):
                problems.add_line(f"{path}: expected a mapping of settings")
                return {}
            value = _Reader(path.name, loader, problems, Interpolator(variables)).value(node, ())
            return value if isinstance(value, dict) else {}
        finally:
            loader.dispose()
    except ValueError as exc:
        problems.add_line(f"{path}: {exc}")
    except RecursionError:
        problems.add_line(f"{path}: nested too deeply")
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        # PyYAML quotes the text that it could not parse, which may be an API key.
        message = re.sub(
            r"'([^']*)'",
            lambda quoted: quoted[0] if len(quoted[1]) < 2 else "…",
            getattr(exc, "problem", None) or "not valid YAML",
        )
        problems.add_line(f"{path}: {message}{f' (line {mark.line + 1})' if mark else ''}")
    return {}


class _Reader:
    """Converter of YAML nodes to values.

    Keys stay text, so that `on:` is a tier's name and not true. Duplicate keys are reported.
    """

    def __init__(self, file: str, loader: yaml.SafeLoader, problems: Problems, interpolator: Interpolator) -> None:
        self._file = file
        self._loader = loader
        self._problems = problems
        self._interpolator = interpolator
        self._values_left = MAX_VALUES

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._count(node, len(path))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.value(self._with_origin(item, (*path, index)), (*path, index)) for index, item in items]
        value = self._loader.construct_object(node)
        return self._expanded(value, path) if isinstance(value, str) else value

    def _count(self, node: yaml.Node, depth: int) -> None:
        """Bound the work on a node and on what it merges.

        Raises:
            ValueError: the file is nested too deeply, or has too many values.
        """
        line = _line_of(node)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested too deeply (line {line})")
        self._values_left -= 1
        if self._values_left < 0:
            raise ValueError(f"more than {MAX_VALUES} values, counting each use of an alias (line {line})")

    def _expanded(self, text: str, path: Path) -> str:
        if "${" not in text:
            return text
        try:
            return self._interpolator.expand(text, is_free_text=_FREE_TEXT in path)
        except ValueError as exc:
            self._problems.add(path, str(exc))
            return text

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = {id(key) for key, _ in node.value}
        mapping: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key, item in self._with_merged(node, len(path)):
            line = _line_of(key)
            if not isinstance(key, yaml.ScalarNode):
                self._problems.add_line(f"{self._file}: expected a key that is text (line {line})")
                continue
            here = (*path, key.value)
            if id(key) in own and key.value in seen:
                self._problems.add_line(
                    f"{dotted(here)}: duplicate key ({self._file} lines {seen[key.value]} and {line})"
                )
            if id(key) in own:
                seen[key.value] = line
            if not path and key.value.startswith(IGNORED_PREFIX):
                continue
            self._problems.record_origin(here, f"{self._file} line {line}")
            mapping[key.value] = self.value(item, here)
        return mapping

    def _with_merged(self, node: yaml.MappingNode, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the keys and values of a mapping; before its own ones, those of `<<: *anchor`.

        Unlike PyYAML, which repeats a key each time that it is merged, this keeps merged keys
        unique. An own key takes the place of a merged one.
        """
        self._count(node, depth)
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for item in [item for key, item in node.value if key.tag == _MERGE]:
            sources = item.value if isinstance(item, yaml.SequenceNode) else [item]
            for source in reversed(sources):  # the first one takes precedence
                if not isinstance(source, yaml.MappingNode):
                    raise ValueError(f"expected a mapping, or a list of mappings, to merge (line {_line_of(item)})")
                for pair in self._with_merged(source, depth + 1):
                    self._count(pair[0], depth)
                    if isinstance(pair[0], yaml.ScalarNode):
                        merged[pair[0].value] = pair
        replaced, own = set(), []
        for pair in [pair for pair in node.value if pair[0].tag != _MERGE]:
            name = pair[0].value if isinstance(pair[0], yaml.ScalarNode) else None
            if name in merged and name not in replaced:
                merged[name] = pair
                replaced.add(name)
            else:
                own.append(pair)
        return [*merged.values(), *own]

    def _with_origin(self, node: yaml.Node, path: Path) -> yaml.Node:
        self._problems.record_origin(path, f"{self._file} line {_line_of(node)}")
        return node


def _line_of(node: yaml.Node) -> int:
    """Return the line of a node in the file, counted from 1."""
    return int(node.start_mark.line) + 1
