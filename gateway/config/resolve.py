"""From the document to the settings: defaults put in, names followed, contradictions found. Reads only the files that settings name."""

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import get_args

from pydantic import SecretStr

from gateway.chat.parameter_policy import problem as params_problem
from gateway.config import default_limits as limits
from gateway.config import parsers as values
from gateway.config.document import BackendDocument, SettingsDocument, TierDocument
from gateway.config.problems import Path, Problems, expected_one_of, shown
from gateway.config.settings import (
    Alias,
    AutoRule,
    BackendSettings,
    EmbeddingSettings,
    GuardSettings,
    Kind,
    LimitOverrides,
    ParamsSettings,
    ServerSettings,
    Settings,
    Task,
    Tier,
)
from gateway.config.yaml_file import read_text

DEFAULT_URLS = {"ollama": "http://127.0.0.1:11434", "vllm": "http://127.0.0.1:8001"}
ONLY_OLLAMA = ("swap_after", "keep_alive", "num_ctx", "truncate")

# What the gateway writes itself: a value from the settings would break the framing or the authentication.
OWN_HEADERS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "content-type", "accept-encoding", "te", "upgrade"}
)
# What routing and the answer's form depend on: a tier cannot change these.
OWN_PARAMS = frozenset({"model", "messages", "stream", "stream_options"})
_NOT_A_TIERS = "'{}' is not for a tier to change; expected another parameter"
RESERVED = {"auto": "it means that the gateway chooses", "none": "it means in metrics that there is none"}


def resolve(document: SettingsDocument, problems: Problems) -> Settings | None:
    """The settings that a document stands for; None, with the reasons in `problems`, where it contradicts itself."""
    return _Resolver(document, problems).settings()


def read_keys_file(path: FilePath) -> tuple[str, ...]:
    """The keys of a file, one a line, each once; `#` begins a comment.

    Raises:
        ValueError: it cannot be read, has no key, or a line is no key; the message names the line, never the key.
    """
    found: dict[str, None] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                found[values.key(text)] = None
            except ValueError as exc:
                raise ValueError(f"line {number}: {exc}") from None
    if not found:
        raise ValueError("expected at least one key, one a line")
    return tuple(found)


class _Resolver:
    """Goes through the document once, part by part; later parts may rely on earlier ones."""

    def __init__(self, document: SettingsDocument, problems: Problems) -> None:
        self._document = document
        self._problems = problems
        self._backend_names = self._unique("backends", document.backends)
        self._kinds: dict[str, Kind] = {}

    def settings(self) -> Settings | None:
        """Everything; the order matters only for the order of the lines."""
        backends = {
            name: built for name, item in self._document.backends.items() if (built := self._backend(name, item))
        }
        active = self._active(backends)
        tiers = {name: self._tier(name, item, active) for name, item in self._document.tiers.items()}
        embeddings = self._embeddings()
        self._public_names()
        default_tier = self._default_tier()
        auto = self._auto()
        rollback_to = self._rollback_to(backends, active)
        keys = self._keys()
        self._single_values()
        if self._problems.lines:
            return None
        plain = {
            key: getattr(self._document, key)
            for key in SettingsDocument.model_fields
            if key
            not in (
                "backends",
                "tiers",
                "auto",
                "embeddings",
                "guard",
                "api_keys",
                "state_file",
                "ollama_num_parallel",
                "host",
            )
        }
        return Settings(
            **plain | {"llm_backend": active, "rollback_to": rollback_to, "default_tier": default_tier},
            host=self._document.host.strip().removeprefix("[").removesuffix("]"),
            backends=backends,
            tiers=tiers,
            auto=auto,
            embeddings=embeddings,
            guard=self._guard(),
            api_keys=tuple(SecretStr(key) for key in keys),
            state_file=FilePath(self._document.state_file) if self._document.state_file else None,
            ollama_num_parallel=self._document.ollama_num_parallel or None,
        )

    # Names

    def _unique(self, section: str, names: Iterable[str]) -> dict[str, str]:
        """Names by their lower-case form; two that differ only in case are a problem."""
        found: dict[str, str] = {}
        for name in names:
            if name.lower() in found:
                self._problems.add(
                    (section, name), f"{name!r} and {found[name.lower()]!r} are one name; expected different names"
                )
            elif name.lower() in RESERVED:
                self._problems.add(
                    (section, name), f"{name!r} is reserved: {RESERVED[name.lower()]}; expected another name"
                )
            found.setdefault(name.lower(), name)
        return found

    def _backend_named(self, path: Path, name: str) -> str | None:
        """The backend that a reference means; a problem where there is none."""
        if found := self._backend_names.get(name.lower()):
            return found
        if name.lower() not in self._broken("backends") and not self._problems.has_reported_whole(("backends",)):
            self._problems.add(path, f"{name!r} is not a backend; {expected_one_of(self._document.backends, name)}")
        return None

    def _broken(self, section: str) -> set[str]:
        """Names, in lower case, of entries that were taken out since something is wrong in them."""
        return {str(path[1]).lower() for path in self._problems.reported_below((section,))}

    def _public_names(self) -> None:
        """Tiers, aliases and embedding models share the space of names that clients send."""
        taken: dict[str, str] = {}
        for path, name in self._claims():
            lower = name.lower()
            if lower in RESERVED and (lower == "auto" or (path[0] == "tiers" and len(path) == 2)):
                self._problems.add(path, f"{name!r} is reserved: {RESERVED[lower]}; expected another name")
            elif lower in taken:
                self._problems.add(
                    path, f"{name!r} is taken by {taken[lower]}; expected names that differ in more than case"
                )
            taken.setdefault(lower, ".".join(str(part) for part in path[:2]))

    def _claims(self) -> Iterable[tuple[Path, str]]:
        for name in self._document.tiers:
            yield ("tiers", name), name
        for name, tier in self._document.tiers.items():
            for index, alias in enumerate(tier.aliases):
                yield ("tiers", name, "aliases", index), alias.name
        for name in self._document.embeddings:
            yield ("embeddings", name), name

    # Backends

    def _backend(self, name: str, item: BackendDocument) -> BackendSettings | None:
        path: Path = ("backends", name)
        kind = item.kind or next((kind for kind in get_args(Kind) if kind == name.lower()), None)
        if kind is None:
            self._problems.add((*path, "kind"), f"missing; {expected_one_of(get_args(Kind), name)}")
            return None
        self._kinds[name] = kind
        servers = self._servers(path, item, kind)
        for key in ONLY_OLLAMA:
            if kind != "ollama" and getattr(item, key) is not None:
                self._problems.add(
                    (*path, key), f"{shown((key,), getattr(item, key))} at kind {kind}; expected only at kind ollama"
                )
        if kind != "ollama" and item.model_concurrency == "auto":
            self._problems.add(
                (*path, "model_concurrency"), f"'auto' at kind {kind}; expected a whole number, at least 1"
            )
        for header in item.headers or {}:
            if header in OWN_HEADERS or (header == "authorization" and item.api_key):
                self._problems.add(
                    (*path, "headers", header), "the gateway writes this header itself; expected another"
                )
        if item.ca_file is not None:
            self._readable((*path, "ca_file"), item.ca_file)
        optional = {
            key: value
            for key in ("probe_interval", "swap_after", "truncate")
            if (value := getattr(item, key)) is not None
        }
        return BackendSettings(
            name=name, kind=kind, servers=servers, limits=limits.resolved(kind, item), api_key=item.api_key, headers=item.headers or {},
            ca_file=item.ca_file, keep_alive=item.keep_alive, num_ctx=item.num_ctx, **optional,
        )  # fmt: skip

    def _servers(self, path: Path, item: BackendDocument, kind: Kind) -> tuple[ServerSettings, ...]:
        if item.servers and item.base_url is not None:
            self._problems.add((*path, "servers"), "stands beside base_url; expected one of the two")
            return ()
        if item.servers:
            found: dict[str, ServerSettings] = {}
            for index, server in enumerate(item.servers):
                here = (*path, "servers", index, "base_url")
                url = self._url(here, server.base_url, kind)
                if url in found:
                    self._problems.add(here, f"{url!r} stands twice; expected each server once")
                elif url:
                    found[url] = ServerSettings(base_url=url, models=server.models)
            return tuple(found.values())
        if item.base_url is None and kind not in DEFAULT_URLS:
            self._problems.add((*path, "base_url"), "missing; expected an address such as https://api.example.com/v1")
            return ()
        url = self._url((*path, "base_url"), item.base_url, kind) if item.base_url is not None else DEFAULT_URLS[kind]
        return (ServerSettings(base_url=url),) if url else ()

    def _url(self, path: Path, text: str, kind: Kind) -> str | None:
        try:
            return values.base_url(text, values.BARE_PORTS.get(kind))
        except ValueError as exc:
            self._problems.add(path, f"got {shown(path, text)}; {exc}")
            return None

    def _readable(self, path: Path, file: FilePath) -> None:
        try:
            with file.open("rb"):
                pass
        except OSError as exc:
            self._problems.add(path, f"{str(file)!r}: {exc.strerror}; expected a file that can be read")

    # Tiers

    def _active(self, backends: Mapping[str, BackendSettings]) -> str:
        given = self._document.llm_backend
        if given is not None:
            return self._backend_named(("llm_backend",), given) or ""
        default = self._backend_names.get("ollama") or next(iter(self._document.backends), "")
        if not default and not self._problems.has_reported(("backends",)):
            self._problems.add(("backends",), "there is none; expected at least one")
        return default

    def _tier(self, name: str, item: TierDocument, active: str) -> Tier:
        path: Path = ("tiers", name)
        models: dict[str, str] = {}
        for written, model in item.models.items():
            if backend := self._backend_named((*path, "models", written), written):
                models[backend] = model
        pin = self._backend_named((*path, "backend"), item.backend) if item.backend is not None else None
        if pin and pin not in models:
            self._problems.add(
                (*path, "models"), f"tier {name!r} is pinned to {pin!r}, which has no model here; expected models.{pin}"
            )
        elif not item.backend and active and active not in models:
            self._problems.add(
                (*path, "models"),
                f"tier {name!r} has no model for {active!r}, the backend of all tiers that are not pinned; expected models.{active}",
            )
        overrides: dict[str, LimitOverrides] = {}
        for written, given in item.limits.items():
            if backend := self._backend_named((*path, "limits", written), written):
                overrides[backend] = LimitOverrides(**given.model_dump())
                if given.model_concurrency == "auto" and self._kinds.get(backend, "ollama") != "ollama":
                    self._problems.add(
                        (*path, "limits", written, "model_concurrency"),
                        "'auto' is for kind ollama; expected a whole number, at least 1",
                    )
        self._params(path, item)
        return Tier(
            name=name,
            models=models,
            aliases=tuple(Alias(**alias.model_dump()) for alias in item.aliases),
            backend=pin,
            fallback=self._fallback(path, item, models, pin),
            warm=item.warm,
            max_tokens=item.max_tokens,
            params=ParamsSettings(**item.params.model_dump()),
            limits=overrides,
        )

    def _fallback(self, path: Path, item: TierDocument, models: Mapping[str, str], pin: str | None) -> bool | str:
        if isinstance(item.fallback, bool):
            return item.fallback
        here = (*path, "fallback")
        backend = self._backend_named(here, item.fallback)
        if backend is None:
            return False
        if backend not in models:
            self._problems.add(here, f"{backend!r} has no model in tier {path[1]!r}; {expected_one_of(models)}")
        elif backend == pin:
            self._problems.add(here, f"{backend!r} is the backend that the tier is pinned to; expected another")
        return backend

    def _params(self, path: Path, item: TierDocument) -> None:
        params = item.params
        for place, name in enumerate(params.drop):
            here = (*path, "params", "drop", place)
            if name in OWN_PARAMS:
                self._problems.add(here, _NOT_A_TIERS.format(name))
            elif name in params.force:
                self._problems.add(here, f"{name!r} stands under force too; expected one of the two")
        for part, given in (("default", params.default), ("force", params.force)):
            for name, value in given.items():
                wrong = _NOT_A_TIERS.format(name) if name in OWN_PARAMS else params_problem(name, value)
                if wrong:
                    self._problems.add((*path, "params", part, name), wrong)

    def _embeddings(self) -> dict[str, EmbeddingSettings]:
        found: dict[str, EmbeddingSettings] = {}
        for name, item in self._document.embeddings.items():
            if backend := self._backend_named(("embeddings", name, "backend"), item.backend):
                found[name] = EmbeddingSettings(backend=backend, model=item.model, warm=item.warm)
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
                self._problems.add(("tiers",), "there is none; expected at least one")
            return next(iter(tiers), "")
        return self._tier_named(("default_tier",), given)

    def _tier_named(self, path: Path, name: str) -> str:
        """The tier that a reference means; a problem, and no name, where there is none."""
        tiers = {known.lower(): known for known in self._document.tiers}
        if (
            name.lower() not in tiers
            and name.lower() not in self._broken("tiers")
            and not self._problems.has_reported_whole(("tiers",))
        ):
            self._problems.add(path, f"{name!r} is not a tier; {expected_one_of(self._document.tiers, name)}")
        return tiers.get(name.lower(), "")

    def _auto(self) -> tuple[AutoRule, ...]:
        if self._document.auto is None:
            named = {alias.name.lower(): tier for tier, item in self._document.tiers.items() for alias in item.aliases}
            named |= {tier.lower(): tier for tier in self._document.tiers}
            return tuple(AutoRule(tier=named[task], task=task) for task in get_args(Task) if task in named)
        rules = []
        for index, item in enumerate(self._document.auto):
            rule = AutoRule(**item.model_dump() | {"tier": self._tier_named(("auto", index, "tier"), item.tier)})
            if not str(rule):
                self._problems.add(
                    ("auto", index), "says of no request that it holds; expected task, images, tools or longer_than"
                )
            rules.append(rule)
        return tuple(rules)

    def _rollback_to(self, backends: Mapping[str, BackendSettings], active: str) -> str:
        if self._document.rollback_to is not None:
            return self._backend_named(("rollback_to",), self._document.rollback_to) or ""
        return next((name for name, backend in backends.items() if backend.kind == "ollama"), active)

    # Single values

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
            self._problems.add(("admin_key",), "it is one of the client keys; expected a key of its own")
        return tuple(dict.fromkeys(found))

    def _single_values(self) -> None:
        document = self._document
        if document.max_text_body > document.max_body:
            self._problems.add(
                ("max_text_body",),
                f"got {document.max_text_body}; expected at most max_body, which is {document.max_body} bytes",
            )
        if document.metrics_port and document.metrics_port == document.port:
            self._problems.add(
                ("metrics_port",), f"got {document.metrics_port}; expected another port than the gateway's own"
            )
        if document.user_header and document.user_header == document.session_header:
            self._problems.add(
                ("session_header",), f"got {document.session_header!r}; expected another header than user_header"
            )
