"""Resolution of the section `backends`: kinds, addresses and defaults.

Reads only the files that the section names.
"""

from pathlib import Path as FilePath
from typing import get_args

from pydantic import SecretStr

from gateway.config import default_limits, parsers
from gateway.config.document_backends import BackendDocument
from gateway.config.keys_file import read_key_file
from gateway.config.problems import Path, Problems, expected_one_of, shown
from gateway.config.settings import BackendSettings, Kind, ServerSettings

DEFAULT_URLS = {"ollama": "http://127.0.0.1:11434", "vllm": "http://127.0.0.1:8001"}
ONLY_OLLAMA = ("swap_after", "keep_alive", "num_ctx", "truncate")
NOT_OLLAMA = ("balance",)

# Headers that the gateway sets itself: a value from the settings would break the framing or the
# authentication.
OWN_HEADERS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "content-type", "accept-encoding", "te", "upgrade"}
)


class BackendResolver:
    """Converter of backends from the document to the settings."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def resolve(self, name: str, item: BackendDocument) -> BackendSettings | None:
        """Return the settings of a backend, None if its kind is unknown; report mistakes."""
        path: Path = ("backends", name)
        kind = item.kind or next((kind for kind in get_args(Kind) if kind == name.lower()), None)
        if kind is None:
            self._problems.add((*path, "kind"), f"missing; {expected_one_of(get_args(Kind), name)}")
            return None
        servers = self._servers(path, item, kind)
        for key in ONLY_OLLAMA:
            if kind != "ollama" and getattr(item, key) is not None:
                self._problems.add(
                    (*path, key),
                    f"got {shown((key,), getattr(item, key))} for kind {kind}; expected only for kind ollama",
                )
        for key in NOT_OLLAMA:
            if kind == "ollama" and getattr(item, key) is not None:
                self._problems.add(
                    (*path, key),
                    f"got {shown((key,), getattr(item, key))} for kind ollama; expected only for kinds vllm and openai",
                )
        if kind != "ollama" and item.model_concurrency == "auto":
            self._problems.add(
                (*path, "model_concurrency"), f"got 'auto' for kind {kind}; expected a whole number of at least 1"
            )
        for key, other in (("stop", "start"), ("start", "stop")):
            if getattr(item, key) is None and getattr(item, other) is not None:
                self._problems.add((*path, key), f"missing, but {other} is set; expected both or none of them")
        api_key = self._api_key(path, item)
        for header in item.headers or {}:
            if header in OWN_HEADERS or (header == "authorization" and (item.api_key or item.api_key_file)):
                self._problems.add(
                    (*path, "headers", header), "the gateway sets this header itself; expected another header"
                )
        if item.ca_file is not None:
            self._check_readable((*path, "ca_file"), item.ca_file)
        optional = {
            key: value
            for key in ("probe_interval", "discover", "balance", "swap_after", "truncate", "stop", "start")
            if (value := getattr(item, key)) is not None
        }
        return BackendSettings(
            name=name,
            kind=kind,
            servers=servers,
            limits=default_limits.resolved(kind, item),
            api_key=api_key,
            api_key_file=item.api_key_file,
            headers=item.headers or {},
            ca_file=item.ca_file,
            keep_alive=item.keep_alive,
            num_ctx=item.num_ctx,
            **optional,
        )

    def _api_key(self, path: Path, item: BackendDocument) -> SecretStr | None:
        if item.api_key_file is None:
            return item.api_key
        here = (*path, "api_key_file")
        if item.api_key is not None:
            self._problems.add(here, "both api_key and api_key_file are set; expected only one of them")
            return None
        try:
            return SecretStr(read_key_file(item.api_key_file))
        except ValueError as exc:
            self._problems.add(here, f"{str(item.api_key_file)!r}: {exc}")
            return None

    def _servers(self, path: Path, item: BackendDocument, kind: Kind) -> tuple[ServerSettings, ...]:
        if item.servers and item.base_url is not None:
            self._problems.add((*path, "servers"), "both servers and base_url are set; expected only one of them")
            return ()
        if item.servers:
            found: dict[str, ServerSettings] = {}
            for index, server in enumerate(item.servers):
                here = (*path, "servers", index, "base_url")
                url = self._url(here, server.base_url, kind)
                if url in found:
                    self._problems.add(here, f"{url!r} is listed twice; expected each server once")
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
            return parsers.server_url(text, parsers.BARE_PORTS.get(kind))
        except ValueError as exc:
            self._problems.add(path, f"got {shown(path, text)}; {exc}")
            return None

    def _check_readable(self, path: Path, file: FilePath) -> None:
        try:
            with file.open("rb"):
                pass
        except OSError as exc:
            self._problems.add(path, f"{str(file)!r}: {exc.strerror}; expected a readable file")
