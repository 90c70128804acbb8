"""YAML file: its values, the line of each key, and mistakes in its syntax."""

import re
from pathlib import Path as FilePath
from typing import Any

import yaml

from gateway.config.problems import Path, Problems, dotted

MAX_DEPTH = 30


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


def read_yaml(path: FilePath, problems: Problems) -> dict[str, Any]:
    """Return the mapping in a YAML file; `problems` gets the line of each key, and mistakes."""
    try:
        loader = yaml.SafeLoader(read_text(path))
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            if not isinstance(node, yaml.MappingNode):
                problems.add_line(f"{path}: expected a mapping of settings")
                return {}
            value = _Reader(path.name, loader, problems).value(node, ())
            return value if isinstance(value, dict) else {}
        finally:
            loader.dispose()
    except ValueError as exc:
        problems.add_line(f"{path}: {exc}")
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

    def __init__(self, file: str, loader: yaml.SafeLoader, problems: Problems) -> None:
        self._file = file
        self._loader = loader
        self._problems = problems

    def value(self, node: yaml.Node, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            raise ValueError(f"nested too deeply (line {node.start_mark.line + 1})")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.value(self._with_origin(item, (*path, index)), (*path, index)) for index, item in items]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = {id(key) for key, _ in node.value}
        self._loader.flatten_mapping(node)  # `<<: *anchor`
        mapping: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
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
            self._problems.record_origin(here, f"{self._file} line {line}")
            mapping[key.value] = self.value(item, here)
        return mapping

    def _with_origin(self, node: yaml.Node, path: Path) -> yaml.Node:
        self._problems.record_origin(path, f"{self._file} line {node.start_mark.line + 1}")
        return node
