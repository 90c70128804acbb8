"""Settings loader: reads and merges all sources, and reports all mistakes at once."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway.config.advice import advice
from gateway.config.document import SettingsDocument
from gateway.config.dotenv_file import read_dotenv
from gateway.config.environment import MODEL_VARIABLES, PREFIX, VARIABLES, Names, VariablesReader
from gateway.config.interpolation import leftover_syntax
from gateway.config.problems import Path, Problems, expected_one_of, shown, suggest
from gateway.config.resolve import resolve
from gateway.config.schema_paths import model_at
from gateway.config.service_variables import without_service_variables
from gateway.config.settings import Settings
from gateway.config.sources import merge
from gateway.config.yaml_file import read_yaml

BUILT_IN = ("ollama", "vllm")
DEFAULT_TIER = "standard"
DEFAULT_MODELS = {"ollama": "qwen3:8b", "vllm": "Qwen/Qwen3-8B"}
ENVIRONMENT = "environment"
DOTENV = ".env"


def load(path: FilePath | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Load the settings from the YAML file, `.env` in the working directory, and `environ`.

    The YAML file is the one at `path`, else the one that GATEWAY_CONFIG names, else none.

    Raises:
        ConfigError: the settings are invalid; it has one line for each mistake.
    """
    problems = Problems()
    variables: dict[str, dict[str, str]] = {}
    ignored: dict[str, list[str]] = {}
    dotenv = read_dotenv(problems, environ)
    for place, values in ((DOTENV, dotenv), (ENVIRONMENT, environ)):
        variables[place], ignored[place] = without_service_variables(values)
    file = path or _config_file(variables)
    written = read_yaml(file, problems, _by_precedence(dotenv, environ)) if file else {}
    settings = _settings(written, variables, problems)
    return settings.model_copy(update={"file": file, "sources": _report_sources(file, variables, ignored)})


def build(document: Mapping[str, Any]) -> Settings:
    """Build settings from a mapping in the shape of the file, without files or variables.

    For tests and programs.

    Raises:
        ConfigError: the settings are invalid; it has one line for each mistake.
    """
    return _settings(copy.deepcopy(dict(document)), {}, Problems())


def _by_precedence(dotenv: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return all variables; an empty one in the environment does not hide that of `.env`."""
    return dict(dotenv) | {name: value for name, value in environ.items() if value or name not in dotenv}


def _config_file(variables: Mapping[str, Mapping[str, str]]) -> FilePath | None:
    names = [values.get("GATEWAY_CONFIG", "").strip() for values in variables.values()]
    return next((FilePath(name) for name in reversed(names) if name and not leftover_syntax(name)), None)


def _settings(written: dict[str, Any], variables: Mapping[str, Mapping[str, str]], problems: Problems) -> Settings:
    """Merge the content of the file with `variables`, which are ordered by rising precedence."""
    backends, tiers = _mapping(written, "backends"), _mapping(written, "tiers")
    names = Names(
        written,
        (*backends, *(name for name in BUILT_IN if name not in map(str.lower, backends))),
        tiers or (DEFAULT_TIER,),
    )
    every = {name: value for values in variables.values() for name, value in values.items() if value.strip()}
    referenced = _referenced(written) | {every.get("LLM_BACKEND", "").strip().lower()}
    homes = {kind: _home(kind, backends, referenced) for kind in BUILT_IN}
    # Read in the order of rising precedence, so that a message names the source that takes effect.
    layers = [
        written,
        *(VariablesReader(place, problems, names, homes).read(values) for place, values in variables.items()),
    ]
    merged = merge(reversed(layers))
    _warn_about_variables(written, every, homes, problems)
    _complete_backends(merged, bool(backends), bool(tiers))
    if not tiers:
        _complete_tiers(merged, variables, problems)
    document = _validated(merged, problems)
    settings = resolve(document, problems) if document else None
    problems.raise_any()
    assert settings is not None
    return settings.model_copy(update={"warnings": (*problems.warnings, *advice(settings))})


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _referenced(document: Mapping[str, Any]) -> set[str]:
    """Return all names, in lower case, that the document uses as names of backends."""
    found = [document.get("llm_backend"), document.get("rollback_to")]
    for tier in _mapping(document, "tiers").values():
        if isinstance(tier, dict):
            found += [*_mapping(tier, "models"), tier.get("backend"), tier.get("fallback")]
    for item in (*_mapping(document, "embeddings").values(), *_mapping(document, "rerankers").values()):
        if isinstance(item, dict):
            found.append(item.get("backend"))
    return {name.lower() for name in found if isinstance(name, str)}


def _home(kind: str, backends: Mapping[str, Any], referenced: set[str]) -> str | None:
    """Return the backend to which the variables of `kind` apply, None if that is ambiguous."""
    by_name = next((name for name in backends if name.lower() == kind), None)
    if by_name or not backends or kind in referenced:
        return by_name or kind
    same = [name for name, item in backends.items() if _kind(name, item) == kind]
    return kind if not same else same[0] if len(same) == 1 else None


def _kind(name: str, backend: object) -> str:
    """Return the kind of a backend that is not validated yet."""
    return str(_mapping({"backend": backend}, "backend").get("kind") or name.lower())


def _complete_backends(merged: dict[str, Any], file_names_backends: bool, file_names_tiers: bool) -> None:
    """Add the built-in backends: both if the file names none, else those that something refers to.

    If the file does not name tiers, the tier `standard` refers to one backend of each kind.
    """
    given = merged.get("backends") or {}
    if not isinstance(given, dict):
        return
    if not file_names_backends:
        merged["backends"] = {**{name: given.get(name, {}) for name in BUILT_IN}, **given}
        return
    present = {name.lower() for name in given}
    kinds = {_kind(name, item) for name, item in given.items()}
    referenced = _referenced(merged) | (set() if file_names_tiers else {kind for kind in BUILT_IN if kind not in kinds})
    merged["backends"] = {**given, **{name: {} for name in BUILT_IN if name in referenced and name not in present}}


def _complete_tiers(merged: dict[str, Any], variables: Mapping[str, Mapping[str, str]], problems: Problems) -> None:
    """Add the tier `standard` with OLLAMA_MODEL and VLLM_MODEL to what variables have set of it."""
    tiers = merged.get("tiers") or {}
    if not isinstance(tiers, dict) or not isinstance(merged["backends"], dict):
        return
    models: dict[str, str] = {}
    for name, backend in _mapping(merged, "backends").items():
        kind = _kind(name, backend)
        if kind not in DEFAULT_MODELS:
            continue
        models[name] = DEFAULT_MODELS[kind]
        variable = next(name for name, variable_kind in MODEL_VARIABLES.items() if variable_kind == kind)
        for place, values in variables.items():
            given = values.get(variable, "").strip()
            if given and not leftover_syntax(given):
                models[name] = given
                problems.record_origin(("tiers", DEFAULT_TIER, "models", name), place, variable)
    standard = _mapping(tiers, DEFAULT_TIER)
    completed = {**standard, "models": {**models, **_mapping(standard, "models")}}
    merged["tiers"] = {DEFAULT_TIER: completed, **{name: tier for name, tier in tiers.items() if name != DEFAULT_TIER}}


def _warn_about_variables(
    written: Mapping[str, Any], every: Mapping[str, str], homes: Mapping[str, str | None], problems: Problems
) -> None:
    for variable in MODEL_VARIABLES:
        if variable in every and _mapping(written, "tiers"):
            problems.warn(f"{variable}: ignored: the file defines tiers")
    for kind in BUILT_IN:
        backend = _mapping(_mapping(written, "backends"), homes[kind] or "")
        servers = backend.get("servers")
        replaced = "all" if isinstance(servers, str) else ""
        if isinstance(servers, list) and len(servers) > 1:
            replaced = f"all {len(servers)}"
        if replaced and f"{kind.upper()}_BASE_URL" in every:
            problems.warn(f"{kind.upper()}_BASE_URL: replaces {replaced} servers of backends.{homes[kind]} in the file")


def _validated(merged: dict[str, Any], problems: Problems) -> SettingsDocument | None:
    """Return the document, None if nothing of it is valid.

    Invalid entries are removed, and missing keys get a placeholder, so that the rest can be checked
    as well.
    """
    data = copy.deepcopy(merged)
    filled: set[Path] = set()
    while True:
        try:
            return SettingsDocument.model_validate(data)
        except ValidationError as exc:
            errors = exc.errors(include_url=False)
        invalid: list[Path] = []
        for error in errors:
            found, key = _located(error["loc"], data)
            path = (*found, *key)
            problems.add(path, _message(error, path))
            if error["type"] == "missing" and path not in filled and _fill(data, found, key):
                filled.add(path)  # only once, because the placeholder itself may be invalid
            else:
                invalid.append(found)
        if not _remove_all(data, invalid):
            return None


def _located(loc: Iterable[int | str], data: Any) -> tuple[Path, Path]:
    """Return the path of an error in the data, and the key that is missing there.

    Entries of `loc` that are not keys but pydantic's own are left out.
    """
    path: Path = ()
    node: Any = data
    for part in loc:
        inside = isinstance(node, dict) and part in node
        if not inside and not (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            return path, (part,) if isinstance(part, str) and isinstance(node, dict) and part != "[key]" else ()
        path, node = (*path, part), node[part]
    return path, ()


def _fill(data: Any, path: Path, key: Path) -> bool:
    """Put a placeholder at a required `key` of the section at `path`; return whether there is one.

    The missing key has been reported, so mistakes that follow from the placeholder are not.
    """
    node = data
    for part in path:
        node = node[part]
    models = dict.fromkeys(_mapping(data, "backends"), "any")
    placeholder = {"models": models, "base_url": "localhost"}.get(str(key[-1]), "any") if key else None
    if not placeholder:
        return False
    node[key[-1]] = placeholder
    return True


def _remove_all(data: Any, paths: list[Path]) -> bool:
    """Remove the entries at `paths`; return False if one of them is the whole document."""
    outermost = {path for path in paths if not any(path[:end] in paths for end in range(len(path)))}
    # Later items of a list first, so that the indexes of earlier ones stay valid.
    for path in sorted(
        outermost, key=lambda path: [part if isinstance(part, int) else 0 for part in path], reverse=True
    ):
        if not path:
            return False
        node: Any = data
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
    return True


def _message(error: ErrorDetails, path: Path) -> str:
    """Return the message for a pydantic error: the value, and what was expected."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        model = model_at(path[:-1])
        known = list(model.model_fields) if model else []
        return f"unknown key{suggest(str(path[-1]), known) or '; ' + expected_one_of(known)}"
    if kind == "missing":
        model = model_at(path[:-1])
        field = model.model_fields.get(str(path[-1])) if model else None
        return f"missing; expected: {(field.description or '').removesuffix(' Required.') if field else 'a value'}"
    expectation = {
        "value_error": str(context.get("error", error["msg"])),
        "string_type": "expected text; put text that looks like a number or a date in quotes",
        "path_type": "expected the path of a file",
        "string_too_short": "expected some text",
        "too_short": "expected at least one entry",
        "literal_error": f"expected {context.get('expected', '')}",
        "model_type": "expected a mapping of keys",
        "dict_type": "expected a mapping of keys",
        "tuple_type": "expected a list",
    }.get(kind, f"invalid value: {error['msg']}")
    return f"got {shown(path, error['input'])}; {expectation}"


def _report_sources(
    file: FilePath | None, variables: Mapping[str, Mapping[str, str]], ignored: Mapping[str, list[str]]
) -> tuple[str, ...]:
    lines = [f"file: {file}" if file else "no settings file"]
    for place, values in variables.items():
        used = sorted(
            name for name, value in values.items() if (name in VARIABLES or name.startswith(PREFIX)) and value.strip()
        )
        if used:
            lines.append(f"{place}: {', '.join(used)}")
    for place, names in ignored.items():
        if names:
            lines.append(
                f"{place}: ignored, since Kubernetes or Docker set them for services of such names: {', '.join(names)}"
            )
    return tuple(lines)
