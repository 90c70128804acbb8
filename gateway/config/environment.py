"""Settings from `.env` and the environment, as a mapping in the shape of the file."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.config.document import SettingsDocument
from gateway.config.interpolation import leftover_syntax
from gateway.config.problems import Path, Problems, expected_one_of, suggest
from gateway.config.schema_paths import branch, is_list, unwrapped

PREFIX = "GATEWAY__"

# Variables for one top-level key each. Those of backends are in BACKEND_VARIABLES.
PLAIN_VARIABLES = {
    "LLM_BACKEND": "llm_backend",
    "OLLAMA_NUM_PARALLEL": "ollama_num_parallel",
    "GATEWAY_HOST": "host",
    "GATEWAY_PORT": "port",
    "GATEWAY_API_KEYS": "api_keys",
    "GATEWAY_API_KEYS_FILE": "api_keys_file",
    "GATEWAY_KEYS_FILE": "keys_file",
    "GATEWAY_ADMIN_KEY": "admin_key",
    "GATEWAY_METRICS_KEY": "metrics_key",
    "GATEWAY_METRICS_PORT": "metrics_port",
    "GATEWAY_OLLAMA_PORT": "ollama_port",
    "GATEWAY_OLLAMA_AS_KEY": "ollama_as_key",
    "GATEWAY_STATE_FILE": "state_file",
    "GATEWAY_USAGE_FILE": "usage_file",
    "GATEWAY_REDIS_URL": "redis_url",
    "GATEWAY_LOG_LEVEL": "log_level",
}
MAY_BE_EMPTY = ("GATEWAY_STATE_FILE", "GATEWAY_USAGE_FILE")
"""Variables for which empty means that there is no such file. For others it means unset."""
BACKEND_VARIABLES = {
    "OLLAMA_BASE_URL": ("ollama", "base_url"),
    "VLLM_BASE_URL": ("vllm", "base_url"),
    "VLLM_API_KEY": ("vllm", "api_key"),
}
MODEL_VARIABLES = {"OLLAMA_MODEL": "ollama", "VLLM_MODEL": "vllm"}
OTHER_VARIABLES = ("GATEWAY_CONFIG", "GATEWAY_URL")
VARIABLES = (*PLAIN_VARIABLES, *BACKEND_VARIABLES, *MODEL_VARIABLES, *OTHER_VARIABLES)

# Keys that exclude each other: a source that sets one of them clears the other in the sources of
# lower precedence.
EITHER_OR = (("base_url", "servers"), ("api_keys", "api_keys_file"), ("api_key", "api_key_file"))


class Names:
    """Names of tiers, backends and others, for variables that spell them in capitals."""

    def __init__(self, document: Mapping[str, Any], backends: Iterable[str], tiers: Iterable[str]) -> None:
        self._document = document
        self._backends = tuple(backends)
        self._tiers = tuple(tiers)

    def match(self, path: Path, word: str) -> str:
        """Return the name under `path` that `word` spells, else `word` in lower case.

        The case does not matter, and `_` may replace characters that variables cannot have.
        """
        known = self._known(path)
        for normalise in (str.lower, _as_in_variables):
            for name in known:
                if normalise(name) == normalise(word):
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


def _as_in_variables(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


class VariablesReader:
    """Reader that turns the variables of one place into a mapping in the shape of the file.

    Plain variables such as `LLM_BACKEND` are read first; `GATEWAY__SECTION__KEY` takes precedence
    over them. Empty variables count as unset, as `${X:-}` in a compose file means. `homes` has the
    backend to which `OLLAMA_BASE_URL` and `VLLM_BASE_URL` apply, by kind.
    """

    def __init__(self, place: str, problems: Problems, names: Names, homes: Mapping[str, str | None]) -> None:
        self._place = place
        self._problems = problems
        self._names = names
        self._homes = homes
        self._result: dict[str, Any] = {}

    def read(self, variables: Mapping[str, str]) -> dict[str, Any]:
        """Return the mapping. Call this once."""
        for variable, value in variables.items():
            self._plain(variable, value)
        for variable, value in variables.items():
            if variable.startswith(PREFIX):
                self._nested(variable, value)
            elif variable.startswith("GATEWAY_") and variable not in VARIABLES:
                known = (*(name for name in VARIABLES if name.startswith("GATEWAY_")), *_nested_variables())
                self._problems.warn(f"{variable}: ignored: unknown setting{suggest(variable, known)} ({self._place})")
        _clear_alternatives(self._result)
        for section in self._result.get("backends", {}).values():
            if isinstance(section, dict):
                _clear_alternatives(section)
        return self._result

    def _plain(self, variable: str, value: str) -> None:
        if variable in VARIABLES and (mistake := leftover_syntax(value)):
            self._problems.add_line(f"{variable}: {mistake} ({self._place})")
        elif variable in PLAIN_VARIABLES and (value.strip() or variable in MAY_BE_EMPTY):
            self._set((PLAIN_VARIABLES[variable],), value.strip(), variable)
        elif variable in BACKEND_VARIABLES and value.strip():
            kind, key = BACKEND_VARIABLES[variable]
            if home := self._homes[kind]:
                self._set(("backends", home, key), value.strip(), variable)
            else:
                self._problems.warn(
                    f"{variable}: ignored: several backends are of kind {kind}, and none is named {kind} "
                    f"({self._place})"
                )

    def _nested(self, variable: str, value: str) -> None:
        found = self._find(variable, variable.removeprefix(PREFIX).split("__"))
        if found is None or not (value.strip() or found[0] in (("state_file",), ("usage_file",))):
            return
        path, annotation = found
        try:
            if not _is_json(annotation) and (mistake := leftover_syntax(value)):
                raise ValueError(mistake)
            self._set(path, _parsed(value.strip(), annotation), variable)
        except ValueError as exc:
            self._problems.record_origin(path, self._place, variable)
            self._problems.add(path, str(exc))

    def _find(self, variable: str, words: list[str]) -> tuple[Path, Any] | None:
        """Return the key that the words of a variable name, and its type."""
        path: Path = ()
        annotation: Any = SettingsDocument
        for index, word in enumerate(words):
            model, item = branch(annotation)
            if model is not None:
                fields = model.model_fields
                if word.lower() not in fields:
                    prefix = PREFIX + "".join(f"{before}__" for before in words[:index])
                    suggestion = suggest(word, [name.upper() for name in fields], prefix)
                    self._problems.add_line(
                        f"{variable}: unknown setting{suggestion or '; ' + expected_one_of(fields)} ({self._place})"
                    )
                    return None
                path, annotation = (*path, word.lower()), fields[word.lower()].annotation
            elif item is not None and word:
                path, annotation = (*path, self._names.match(path, word)), item
            else:
                parent = PREFIX + "__".join(words[:index])
                self._problems.add_line(f"{variable}: unknown setting: {parent} has no keys below it ({self._place})")
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
        self._record_origin(path, value, variable)

    def _record_origin(self, path: Path, value: Any, variable: str) -> None:
        self._problems.record_origin(path, self._place, variable, whole=not isinstance(value, dict))
        if isinstance(value, dict):
            for key, item in value.items():
                self._record_origin((*path, key), item, f"{variable}.{key}")


def _merged(lower: dict[str, Any], higher: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings key by key; `higher` takes precedence."""
    result = dict(lower)
    for key, value in higher.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _clear_alternatives(section: dict[str, Any]) -> None:
    for pair in EITHER_OR:
        given = [key for key in pair if key in section]
        if len(given) == 1:
            section[pair[1 - pair.index(given[0])]] = None


def _parsed(text: str, annotation: Any) -> Any:
    """Return the value that the file would have in place of a variable's text.

    Lists, mappings and values of any type are JSON; for all others it is the text itself.
    """
    model, item = branch(annotation)
    if model is not None or item is not None:
        return _json(text, dict, 'expected a JSON object, such as {"key": "value"}')
    if is_list(annotation):
        if text.startswith("["):
            return _json(text, list, 'expected a JSON list, such as ["a", "b"], or comma-separated text')
        return [part.strip() for part in text.split(",")]
    if _is_any(annotation):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _is_json(annotation: Any) -> bool:
    """Return whether the value can be JSON, in which quotes and # are a part of it."""
    model, item = branch(annotation)
    return model is not None or item is not None or _is_any(annotation)


def _is_any(annotation: Any) -> bool:
    return "JsonValue" in str(unwrapped(annotation))


def _json(text: str, kind: type, message: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError(message) from None
    if not isinstance(value, kind):
        raise ValueError(message)
    return value


def _nested_variables() -> list[str]:
    return [PREFIX + name.upper() for name in SettingsDocument.model_fields]
