"""Kubernetes resources as `kustomize build` and `helm template` produce them from `deploy/`.

Both renderers know only what the files there use, and fail on everything else. The helm templates use
`if`, `with`, and pipelines of a few functions; the kustomizations use the keys in `KNOWN_KEYS`.
"""

import copy
import json
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUSTOMIZE = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "ollama-vllm-gateway"
NAMESPACE = "llm-gateway"
KNOWN_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "configMapGenerator"}

Resource = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses a key that occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate key in {keys}"
        return super().construct_mapping(node, deep)


def parse(text: str) -> list[Resource]:
    return copy.deepcopy(_parsed(text))


@cache
def _parsed(text: str) -> list[Resource]:
    documents = yaml.load_all(text, StrictLoader)
    return [document for document in documents if document is not None]


def kustomize(folder: Path, components: Iterable[str] = ()) -> list[Resource]:
    """Return the resources of an overlay, with further components as an operator adds them."""
    resources = _build(folder, [])
    for component in components:
        resources = _build(KUSTOMIZE / "components" / component, resources)
    for resource in resources:
        if resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = NAMESPACE
    return resources


def _build(folder: Path, resources: list[Resource]) -> list[Resource]:
    (described,) = parse((folder / "kustomization.yaml").read_text())
    assert set(described) <= KNOWN_KEYS, folder
    assert described.get("namespace", NAMESPACE) == NAMESPACE
    for name in described.get("resources", []):
        path = folder / name
        resources = _build(path, resources) if path.is_dir() else [*resources, *parse(path.read_text())]
    for generator in described.get("configMapGenerator", []):
        assert set(generator) == {"name", "files", "options"}
        assert generator["options"] == {"disableNameSuffixHash": True}
        data = {file: (folder / file).read_text() for file in generator["files"]}
        metadata = {"name": generator["name"]}
        resources = [*resources, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}]
    for name in described.get("components", []):
        resources = _build(folder / name, resources)
    for patch in described.get("patches", []):
        assert set(patch) == {"path"}
        resources = _patched(resources, *parse((folder / patch["path"]).read_text()))
    return resources


def _patched(resources: list[Resource], patch: Resource) -> list[Resource]:
    def identity(resource: Resource) -> tuple[str, str, str]:
        return resource["apiVersion"], resource["kind"], resource["metadata"]["name"]

    (target,) = [resource for resource in resources if identity(resource) == identity(patch)]
    return [merged(resource, patch) if resource is target else resource for resource in resources]


def merged(old: Any, new: Any) -> Any:
    """Merge `new` into `old`: mappings by key, lists of named items by name, new ones first; None deletes a key."""
    if isinstance(old, dict) and isinstance(new, dict):
        result = {key: value for key, value in old.items() if key not in new}
        return result | {
            key: merged(old.get(key), value) if key in old else copy.deepcopy(value)
            for key, value in new.items()
            if value is not None
        }
    if isinstance(old, list) and isinstance(new, list) and all("name" in item for item in new):
        changes = {item["name"]: item for item in new}
        kept = [merged(item, changes.pop(item["name"], {})) for item in old]
        return [*changes.values(), *kept]
    return copy.deepcopy(new)


@dataclass
class Chart:
    """The chart, and the paths of the values that its templates read."""

    used: set[str] = field(default_factory=set)

    def render(self, *values: dict[str, Any], namespace: str = NAMESPACE) -> list[Resource]:
        """Return the resources for `values`, each of which takes precedence over the one before it."""
        (given,) = parse((CHART / "values.yaml").read_text())
        for more in values:
            given = _coalesced(given, more)
        scope = {"Values": given, "Release": {"Namespace": namespace}}
        files = sorted((CHART / "templates").iterdir())
        return [resource for file in files for resource in parse(_Template(file.read_text(), scope, self.used).text())]


def values_file(name: str) -> dict[str, Any]:
    (values,) = parse((CHART / name).read_text())
    return values


def _coalesced(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge values as helm does: mappings by key, everything else is replaced; None deletes a key."""
    result = dict(old)
    for key, value in new.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            result[key] = _coalesced(old[key], value)
        else:
            result[key] = value
    return result


class _Template:
    _TOKEN = re.compile(r"(\s*\{\{-|\{\{)\s*(.*?)\s*(?:-\}\}\s*|\}\})", re.DOTALL)

    def __init__(self, source: str, scope: dict[str, Any], used: set[str]) -> None:
        self.source, self.scope, self.used = source, scope, used

    def text(self) -> str:
        output: list[str] = []
        # Of each open block: whether it is shown, and what `.` means in it.
        blocks: list[tuple[bool, Any]] = [(True, self.scope)]
        position = 0
        for token in self._TOKEN.finditer(self.source):
            shown, dot = blocks[-1]
            if shown:
                output.append(self.source[position : token.start()])
            position = token.end()
            word, _, rest = token[2].partition(" ")
            if word in ("if", "with"):
                value = self._value(rest, dot) if shown else None
                blocks.append((bool(value), value if word == "with" else dot))
            elif word == "end":
                blocks.pop()
            elif shown:
                output.append(str(self._value(token[2], dot)))
        assert len(blocks) == 1, "each block has an end"
        return "".join(output) + self.source[position:]

    def _value(self, expression: str, dot: Any) -> Any:
        first, *pipeline = expression.split(" | ")
        value = self._call(first.split(), dot)
        for step in pipeline:
            value = self._call([*step.split(), value], dot)
        return value

    def _call(self, words: list[Any], dot: Any) -> Any:
        name, *arguments = words
        values = [
            self._operand(word, dot) if isinstance(word, str) and word[:1] in '."' else word for word in arguments
        ]
        match name:
            case "quote":
                return json.dumps(str(values[0]))
            case "toYaml":
                return yaml.safe_dump(values[0]).rstrip("\n")
            case "toJson":
                return json.dumps(values[0], separators=(",", ":"))
            case "nindent":
                return "\n" + "\n".join(" " * int(values[0]) + line for line in values[1].split("\n"))
            case "len":
                return str(len(values[0]))
            case "eq":
                return values[0] == values[1]
            case _:
                assert not arguments, f"unknown function {name}"
                return self._operand(name, dot)

    def _operand(self, word: str, dot: Any) -> Any:
        if word.startswith('"'):
            return json.loads(word)
        if word == ".":
            return dot
        value = dot
        for part in word.removeprefix(".").split("."):
            value = value[part]
        self.used.add(word.removeprefix(".Values."))
        return value
