"""Resolution of the document to the settings: defaults, references and contradictions.

Reads only the files that the settings name.
"""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import get_args

from pydantic import SecretStr

from gateway.config.document import SettingsDocument
from gateway.config.keys_file import read_keys_file
from gateway.config.problems import Problems
from gateway.config.references import References
from gateway.config.resolve_backends import BackendResolver
from gateway.config.resolve_tiers import TierResolver
from gateway.config.settings import (
    AutoRule,
    BackendSettings,
    EmbeddingSettings,
    GuardSettings,
    ImageUrlSettings,
    RerankerSettings,
    Settings,
    Task,
    Tier,
)

_RESOLVED = frozenset(
    {
        "backends",
        "tiers",
        "auto",
        "embeddings",
        "rerankers",
        "guard",
        "api_keys",
        "state_file",
        "usage_file",
        "record",
        "ollama_num_parallel",
        "host",
        "image_urls",
    }
)
"""Keys of the document whose values are not taken over unchanged."""


def resolve(document: SettingsDocument, problems: Problems) -> Settings | None:
    """Return the settings that a document describes, None if `problems` has a mistake."""
    return _Resolver(document, problems).settings()


class _Resolver:
    """Converter of one document; each section may use the ones resolved before it."""

    def __init__(self, document: SettingsDocument, problems: Problems) -> None:
        self._document = document
        self._problems = problems
        self._references = References(document, problems)

    def settings(self) -> Settings | None:
        """Return the settings. The order of the steps is the order of the problem lines."""
        backend_resolver = BackendResolver(self._problems)
        backends = {
            name: backend
            for name, item in self._document.backends.items()
            if (backend := backend_resolver.resolve(name, item))
        }
        active = self._active()
        tier_resolver = TierResolver(self._problems, self._references, backends, active)
        tiers = {name: tier_resolver.resolve(name, item) for name, item in self._document.tiers.items()}
        embeddings = self._embeddings()
        rerankers = self._rerankers(backends)
        self._references.check_public_names()
        default_tier = self._default_tier()
        auto = self._auto()
        rollback_to = self._rollback_to(backends, active)
        keys = self._keys()
        self._check_values()
        self._check_exclusive(backends, tiers)
        if self._problems.lines:
            return None
        unchanged = {key: getattr(self._document, key) for key in SettingsDocument.model_fields if key not in _RESOLVED}
        return Settings(
            **unchanged | {"llm_backend": active, "rollback_to": rollback_to, "default_tier": default_tier},
            host=self._document.host.strip().removeprefix("[").removesuffix("]"),
            backends=backends,
            tiers=tiers,
            auto=auto,
            embeddings=embeddings,
            rerankers=rerankers,
            guard=self._guard(),
            image_urls=ImageUrlSettings(allow=urls.allow) if (urls := self._document.image_urls) else None,
            api_keys=tuple(SecretStr(key) for key in keys),
            state_file=FilePath(self._document.state_file) if self._document.state_file else None,
            usage_file=FilePath(self._document.usage_file) if self._document.usage_file else None,
            record=FilePath(self._document.record) if self._document.record else None,
            ollama_num_parallel=self._document.ollama_num_parallel or None,
        )

    def _active(self) -> str:
        given = self._document.llm_backend
        if given is not None:
            return self._references.backend(("llm_backend",), given) or ""
        default = self._references.find_backend("ollama") or next(iter(self._document.backends), "")
        if not default and not self._problems.has_reported(("backends",)):
            self._problems.add(("backends",), "no backend is defined; expected at least one")
        return default

    def _embeddings(self) -> dict[str, EmbeddingSettings]:
        found: dict[str, EmbeddingSettings] = {}
        for name, item in self._document.embeddings.items():
            if backend := self._references.backend(("embeddings", name, "backend"), item.backend):
                found[name] = EmbeddingSettings(backend=backend, model=item.model, warm=item.warm)
        return found

    def _rerankers(self, backends: Mapping[str, BackendSettings]) -> dict[str, RerankerSettings]:
        found: dict[str, RerankerSettings] = {}
        for name, item in self._document.rerankers.items():
            path = ("rerankers", name, "backend")
            if backend := self._references.backend(path, item.backend):
                if backend in backends and (kind := backends[backend].kind) != "vllm":
                    self._problems.add(path, f"{backend!r} is of kind {kind}; expected a backend of kind vllm")
                found[name] = RerankerSettings(backend=backend, model=item.model)
        return found

    def _guard(self) -> GuardSettings | None:
        item = self._document.guard
        return (
            None if item is None else GuardSettings(**item.model_dump() | {"rules": tuple(dict.fromkeys(item.rules))})
        )

    def _default_tier(self) -> str:
        given = self._document.default_tier
        if given is None:
            tiers = self._document.tiers
            if (
                not tiers
                and not self._problems.has_reported(("tiers",))
                and not self._problems.has_reported_whole(("backends",))
            ):
                self._problems.add(("tiers",), "no tier is defined; expected at least one")
            return next(iter(tiers), "")
        return self._references.tier(("default_tier",), given)

    def _auto(self) -> tuple[AutoRule, ...]:
        if self._document.auto is None:
            named = {alias.name.lower(): tier for tier, item in self._document.tiers.items() for alias in item.aliases}
            named |= {tier.lower(): tier for tier in self._document.tiers}
            return tuple(AutoRule(tier=named[task], task=task) for task in get_args(Task) if task in named)
        rules = []
        for index, item in enumerate(self._document.auto):
            tier = self._references.tier(("auto", index, "tier"), item.tier)
            rule = AutoRule(**item.model_dump() | {"tier": tier})
            if not str(rule):
                self._problems.add(
                    ("auto", index), "the rule has no condition; expected task, images, tools or longer_than"
                )
            rules.append(rule)
        return tuple(rules)

    def _rollback_to(self, backends: Mapping[str, BackendSettings], active: str) -> str:
        if self._document.rollback_to is not None:
            return self._references.backend(("rollback_to",), self._document.rollback_to) or ""
        return next((name for name, backend in backends.items() if backend.kind == "ollama"), active)

    def _keys(self) -> tuple[str, ...]:
        found = [key.get_secret_value() for key in self._document.api_keys or ()]
        file = self._document.api_keys_file
        if file is not None:
            try:
                found += read_keys_file(file)
            except ValueError as exc:
                self._problems.add(("api_keys_file",), f"{str(file)!r}: {exc}")
        admin = self._document.admin_key
        if admin and admin.get_secret_value() in found:
            self._problems.add(("admin_key",), "the admin key is also a client key; expected a separate key")
        return tuple(dict.fromkeys(found))

    def _check_exclusive(self, backends: Mapping[str, BackendSettings], tiers: Mapping[str, Tier]) -> None:
        """Report what cannot work if the backends share one GPU."""
        if not self._document.exclusive:
            return
        if self._document.redis_url is not None:
            self._problems.add(("exclusive",), "got true with GATEWAY_REDIS_URL; expected a single gateway for one GPU")
        on_gpu = [name for name, item in backends.items() if item.kind != "openai" or item.stop]
        if len(on_gpu) < 2 and not self._problems.has_reported(("backends",)):
            self._problems.add(
                ("exclusive",),
                "fewer than two backends could share the GPU; expected at least two of kind ollama or vllm",
            )
        elif not any(tier.backend is None for tier in tiers.values()) and not self._problems.has_reported(("tiers",)):
            self._problems.add(
                ("exclusive",),
                "every tier is pinned, so a switch would move nothing; expected a tier that is not pinned",
            )
        for name in on_gpu:
            if any(server.is_name for server in backends[name].servers):
                self._problems.add(
                    ("backends", name, "servers"),
                    "the addresses of a host name may be on several machines, but with exclusive the engines share "
                    "one GPU; expected an address that starts with http:// or https://",
                )
        for name, tier in tiers.items():
            missing = [backend for backend in on_gpu if backend not in tier.models]
            if tier.backend is None and missing and len(missing) < len(on_gpu):
                self._problems.add(
                    ("tiers", name, "models"),
                    f"tier {name!r} has no model for {missing[0]!r}, but with exclusive all tiers move together; "
                    f"expected models.{missing[0]}, or a pin (backend: {next(iter(tier.models))})",
                )

    def _check_values(self) -> None:
        """Report values that contradict each other."""
        document = self._document
        if document.max_text_body > document.max_body:
            self._problems.add(
                ("max_text_body",),
                f"got {document.max_text_body}; expected at most max_body, which is {document.max_body} bytes",
            )
        if document.metrics_port and document.metrics_port == document.port:
            self._problems.add(
                ("metrics_port",), f"got {document.metrics_port}; expected a port other than the gateway's own"
            )
        if document.ollama_as_key is not None and (document.ollama_port is None or document.keys_file is None):
            self._problems.add(("ollama_as_key",), "expected ollama_port and keys_file as well")
        taken = {document.port: "the gateway's own", document.metrics_port: "metrics_port"}
        if document.ollama_port and document.ollama_port in taken:
            self._problems.add(
                ("ollama_port",),
                f"got {document.ollama_port}; expected a port other than {taken[document.ollama_port]}",
            )
        if document.user_header and document.user_header == document.session_header:
            self._problems.add(
                ("session_header",), f"got {document.session_header!r}; expected a header other than user_header"
            )
