"""Output of `gateway config check`, `show` and `schema`, for people and editors.

Pure; secrets are hidden.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from gateway.config.document import SettingsDocument
from gateway.config.problems import MASK
from gateway.config.settings import BackendSettings, Settings, Tier
from gateway.config.yaml_file import IGNORED_PREFIX


def check(settings: Settings) -> list[str]:
    """Return lines for people: the sources, tables of backends, tiers and rules, and warnings."""
    lines = [*settings.sources, ""]
    lines += _table(
        ["backend", "kind", "servers", "concurrency", "queue"],
        [_backend_row(item) for item in settings.backends.values()],
    )
    lines += [""]
    rows = [_tier_row(tier, settings) for tier in settings.tiers.values()]
    lines += _table(["tier", "served by", "models", "aliases", "fallback"], rows)
    if discovering := [backend.name for backend in settings.backends.values() if backend.discover]:
        order = " (if several have a model, the first of them serves it)" if len(discovering) > 1 else ""
        lines += ["", f"models that no setting names are discovered on {', '.join(discovering)}{order}"]
    if settings.embeddings:
        lines += [""]
        lines += _table(
            ["embedding", "backend", "model"],
            [[name, item.backend, item.model] for name, item in settings.embeddings.items()],
        )
    if settings.rerankers:
        lines += [""]
        lines += _table(
            ["reranker", "backend", "model"],
            [[name, item.backend, item.model] for name, item in settings.rerankers.items()],
        )
    rules = [[f"rule {number}", str(rule), rule.tier] for number, rule in enumerate(settings.auto, 1)]
    rules.append(["else", "no rule holds" if rules else "always", settings.default_tier])
    lines += ["", *_table(["auto", "condition", "tier"], rules)]
    lines += ["", f"a rollback leads to {settings.rollback_to}"]
    if settings.guard is not None:
        lines.append(f"the guard compares {', '.join(settings.guard.rules)}")
    if settings.exclusive:
        names = ", ".join(name for name in settings.backends if name in settings.on_gpu)
        lines.append(f"one GPU holds one engine at a time: {names}")
    lines += [f"warning: {warning}" for warning in settings.warnings]
    return lines


def _backend_row(backend: BackendSettings) -> list[str]:
    limits = backend.limits
    servers = ", ".join(server.base_url for server in backend.servers)
    return [backend.name, backend.kind, servers, str(limits.max_concurrency), str(limits.max_queue)]


def _tier_row(tier: Tier, settings: Settings) -> list[str]:
    served = f"{tier.backend} (pinned)" if tier.backend else settings.llm_backend
    models = ", ".join(f"{backend}: {model}" for backend, model in tier.models.items())
    aliases = ", ".join(alias.name for alias in tier.aliases)
    fallback = "the next" if tier.fallback is True else tier.fallback or "-"
    return [tier.name, served, models, aliases or "-", fallback]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def show(settings: Settings) -> str:
    """Return the settings in force as YAML in the shape of the file, with all defaults filled in.

    Secrets are hidden. A literal `${` is written as `$${`, so that it stays one when it is read.
    """
    document: dict[str, Any] = {}
    for key in SettingsDocument.model_fields:
        value = getattr(settings, key)
        if key == "backends":
            document[key] = {name: _backend_document(backend) for name, backend in value.items()}
        elif key == "tiers":
            document[key] = {name: _tier_document(tier) for name, tier in value.items()}
        elif key == "auto":
            document[key] = [rule.model_dump(exclude_none=True) for rule in value]
        elif key in ("embeddings", "rerankers"):
            document[key] = {name: item.model_dump() for name, item in value.items()}
        elif key in ("guard", "image_urls") and value is not None:
            document[key] = _plain(value.model_dump())
        elif key in ("state_file", "usage_file"):
            document[key] = str(value) if value else ""
        elif value is not None and value != ():
            document[key] = _plain(value)
    return str(yaml.safe_dump(_escaped(document), sort_keys=False, allow_unicode=True, width=140))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return {key: _escaped(item) for key, item in value.items()} if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def _backend_document(backend: BackendSettings) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": backend.kind}
    first = backend.servers[0]
    if len(backend.servers) == 1 and first.models is None and not first.is_name:
        document["base_url"] = first.base_url
    else:
        document["servers"] = [_plain(server.model_dump()) for server in backend.servers]
    document |= backend.limits.model_dump(exclude={"concurrency"})
    own = ("keep_alive", "num_ctx", "truncate") if backend.kind == "ollama" else ("balance",)
    api_key = "api_key" if backend.api_key_file is None else "api_key_file"
    for key in ("probe_interval", "discover", api_key, "headers", "ca_file", "stop", "start", *own):
        if (value := getattr(backend, key)) is not None and value != {}:
            document[key] = _plain(value)
    return document


def _tier_document(tier: Tier) -> dict[str, Any]:
    document: dict[str, Any] = {"models": dict(tier.models)}
    if tier.aliases:
        document["aliases"] = [alias.model_dump() for alias in tier.aliases]
    if tier.backend:
        document["backend"] = tier.backend
    document["fallback"] = tier.fallback
    document["warm"] = tier.warm
    if tier.max_tokens:
        document["max_tokens"] = tier.max_tokens
    document["reasoning_field"] = tier.reasoning_field
    params = {"default": dict(tier.params.default), "force": dict(tier.params.force), "drop": list(tier.params.drop)}
    document["params"] = params
    if tier.images.max_pixels:
        document["images"] = tier.images.model_dump()
    if tier.limits:
        document["limits"] = {name: item.model_dump(exclude_none=True) for name, item in tier.limits.items()}
    return document


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the YAML file, for editors; it describes units and defaults."""
    found = SettingsDocument.model_json_schema(mode="validation")
    anchors = {f"^{IGNORED_PREFIX}": {"description": "Ignored; for YAML anchors."}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_with_placeholders(found),
        "patternProperties": anchors,
        "title": "Gateway settings",
    }


def _with_placeholders(schema: Any) -> Any:
    """Return the schema with `${NAME}` allowed wherever it asks for something but any text."""
    if isinstance(schema, list):
        return [_with_placeholders(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {name: _with_placeholders(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _with_placeholders(value)
        if key in ("items", "additionalProperties", "anyOf")
        else value
        for key, value in schema.items()
    }
    is_text = schema.get("type") == "string" and not {"pattern", "enum", "const"} & schema.keys()
    if is_text or schema.get("type") not in ("string", "integer", "number", "boolean"):
        return result
    about = {key: result.pop(key) for key in ("title", "description", "default") if key in result}
    return {**about, "anyOf": [result, {"type": "string", "pattern": r"\$\{"}]}
