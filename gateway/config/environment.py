"""Reads `.env` and the environment: variables turned into a mapping in the file's shape, with what is wrong told."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from dotenv import dotenv_values

from gateway.config.document import SettingsDocument
from gateway.config.problems import Path, Problems, expected_one_of, suggest
from gateway.config.schema_paths import branch, is_list, unwrapped
from gateway.config.yaml_file import read_text

PREFIX = "GATEWAY__"

# Variables that stand for one key each. Those of a backend are in BACKEND_VARIABLES.
PLAIN_VARIABLES = {
    "LLM_BACKEND": "llm_backend",
    "OLLAMA_NUM_PARALLEL": "ollama_num_parallel",
    "GATEWAY_HOST": "host",
    "GATEWAY_PORT": "port",
    "GATEWAY_API_KEYS": "api_keys",
    "GATEWAY_API_KEYS_FILE": "api_keys_file",
    "GATEWAY_ADMIN_KEY": "admin_key",
    "GATEWAY_METRICS_KEY": "metrics_key",
    "GATEWAY_METRICS_PORT": "metrics_port",
    "GATEWAY_STATE_FILE": "state_file",
}
BACKEND_VARIABLES = {
    "OLLAMA_BASE_URL": ("ollama", "base_url"),
    "VLLM_BASE_URL": ("vllm", "base_url"),
    "VLLM_API_KEY": ("vllm", "api_key"),
}
MODEL_VARIABLES = {"OLLAMA_MODEL": "ollama", "VLLM_MODEL": "vllm"}
OTHER_VARIABLES = ("GATEWAY_CONFIG", "GATEWAY_URL")
VARIABLES = (*PLAIN_VARIABLES, *BACKEND_VARIABLES, *MODEL_VARIABLES, *OTHER_VARIABLES)

# Kubernetes sets these in each container beside a Service named `gateway`; GATEWAY_PORT is then tcp://address:port.
SERVICE_LINK = re.compile(r"GATEWAY_(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_\w+)")

# Two ways to say one thing: a source that says one of them takes the other back from the sources below.
EITHER_OR = (("base_url", "servers"), ("api_keys", "api_keys_file"))


def read_dotenv(problems: Problems, path: FilePath = FilePath(".env")) -> dict[str, str]:
    """The variables of a `.env` file, none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return {
            name: value
            for name, value in dotenv_values(stream=io.StringIO(read_text(path))).items()
            if value is not None
        }
    except ValueError as exc:
        problems.add_line(f"{path}: {exc}")
        return {}


class Names:
    """The names that the file gives to tiers, backends and the like, for variables that spell them in capitals."""

    def __init__(self, document: Mapping[str, Any], backends: Iterable[str], tiers: Iterable[str]) -> None:
        self._document = document
        self._backends = tuple(backends)
        self._tiers = tuple(tiers)

    def match(self, path: Path, word: str) -> str:
        """The name under `path` that `word` stands for, in any case and with `_` for what variables cannot spell; else `word`."""
        known = self._known(path)
        for fold in (str.lower, _folded):
            for name in known:
                if fold(name) == fold(word):
                    return name
        return word.lower()

    def _known(self, path: Path) -> tuple[str, ...]:
        if path == ("tiers",):
            return self._tiers
        if path == ("backends",) or (path[:1] == ("tiers",) and path[2:] in (("models",), ("limits",))):
            return self._backends
        node: Any = self._document
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        return tuple(node) if isinstance(node, dict) else ()


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


class VariablesReader:
    """Turns the variables of one place into a mapping: `LLM_BACKEND` and its like, and above them `GATEWAY__SECTION__KEY`.

    Empty variables do not count: `${X:-}` of a compose file is no value. `homes` says which backend `OLLAMA_BASE_URL` and
    its like are about.
    """

    def __init__(self, place: str, problems: Problems, names: Names, homes: Mapping[str, str | None]) -> None:
        self._place = place
        self._problems = problems
        self._names = names
        self._homes = homes
        self._result: dict[str, Any] = {}

    def read(self, variables: Mapping[str, str]) -> dict[str, Any]:
        """The mapping; to be called once."""
        for variable, value in variables.items():
            self._plain(variable, value)
        for variable, value in variables.items():
            if variable.startswith(PREFIX):
                self._nested(variable, value)
            elif variable.startswith("GATEWAY_") and variable not in VARIABLES and not SERVICE_LINK.fullmatch(variable):
                near = suggest(
                    variable, (*(name for name in VARIABLES if name.startswith("GATEWAY_")), *_nested_forms())
                )
                self._problems.warn(f"{variable}: no such setting, not used{near} ({self._place})")
        _take_back(self._result)
        for section in self._result.get("backends", {}).values():
            if isinstance(section, dict):
                _take_back(section)
        return self._result

    def _plain(self, variable: str, value: str) -> None:
        if variable == "GATEWAY_PORT" and value.startswith("tcp://"):
            self._problems.warn(
                f"GATEWAY_PORT: not used: Kubernetes set it for a Service named gateway ({self._place})"
            )
        elif variable in PLAIN_VARIABLES and (value.strip() or variable == "GATEWAY_STATE_FILE"):
            self._set((PLAIN_VARIABLES[variable],), value.strip(), variable)
        elif variable in BACKEND_VARIABLES and value.strip():
            kind, key = BACKEND_VARIABLES[variable]
            if home := self._homes[kind]:
                self._set(("backends", home, key), value.strip(), variable)
            else:
                self._problems.warn(
                    f"{variable}: not used: several backends are of kind {kind}, and none has that name ({self._place})"
                )

    def _nested(self, variable: str, value: str) -> None:
        found = self._find(variable, variable.removeprefix(PREFIX).split("__"))
        if found is None or not (value.strip() or found[0] == ("state_file",)):
            return
        path, annotation = found
        try:
            self._set(path, _parsed(value.strip(), annotation), variable)
        except ValueError as exc:
            self._problems.written(path, self._place, variable)
            self._problems.add(path, str(exc))

    def _find(self, variable: str, words: list[str]) -> tuple[Path, Any] | None:
        """Follow the words down the document's types."""
        path: Path = ()
        annotation: Any = SettingsDocument
        for index, word in enumerate(words):
            model, item = branch(annotation)
            if model is not None:
                fields = model.model_fields
                if word.lower() not in fields:
                    prefix = PREFIX + "".join(f"{before}__" for before in words[:index])
                    near = suggest(word, [name.upper() for name in fields], prefix)
                    self._problems.add_line(
                        f"{variable}: no such setting{near or '; ' + expected_one_of(fields)} ({self._place})"
                    )
                    return None
                path, annotation = (*path, word.lower()), fields[word.lower()].annotation
            elif item is not None and word:
                path, annotation = (*path, self._names.match(path, word)), item
            else:
                self._problems.add_line(
                    f"{variable}: no such setting: nothing stands below {PREFIX}{'__'.join(words[:index])} ({self._place})"
                )
                return None
        return path, annotation

    def _set(self, path: Path, value: Any, variable: str) -> None:
        node = self._result
        for part in path[:-1]:
            if not isinstance(node.get(str(part)), dict):
                node[str(part)] = {}
            node = node[str(part)]
        last = str(path[-1])
        node[last] = (
            _merged(node[last], value) if isinstance(node.get(last), dict) and isinstance(value, dict) else value
        )
        self._note(path, value, variable)

    def _note(self, path: Path, value: Any, label: str) -> None:
        self._problems.written(path, self._place, label, whole=not isinstance(value, dict))
        if isinstance(value, dict):
            for key, item in value.items():
                self._note((*path, key), item, f"{label}.{key}")


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _take_back(section: dict[str, Any]) -> None:
    for pair in EITHER_OR:
        given = [key for key in pair if key in section]
        if len(given) == 1:
            section[pair[1 - pair.index(given[0])]] = None


def _parsed(text: str, annotation: Any) -> Any:
    """A variable's text as the value that the file would hold: JSON for lists, mappings and free values, else the text itself."""
    model, item = branch(annotation)
    if model is not None or item is not None:
        return _json(text, dict, 'expected a JSON object, such as {"key": "value"}')
    if is_list(annotation):
        if text.startswith("["):
            return _json(text, list, 'expected a JSON list, such as ["a", "b"], or text with commas')
        return [part.strip() for part in text.split(",")]
    if "JsonValue" in str(unwrapped(annotation)):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _json(text: str, kind: type, message: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(message) from None
    if not isinstance(value, kind):
        raise ValueError(message)
    return value


def _nested_forms() -> list[str]:
    return [PREFIX + name.upper() for name in SettingsDocument.model_fields]
