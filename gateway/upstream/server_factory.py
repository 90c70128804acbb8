"""Builds the servers of one backend, with what they share: TLS, and the heads of their requests."""

import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit
from zlib import crc32

from gateway.config import BackendSettings, ServerSettings
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.server import Server

IDLE_SECONDS = {"ollama": 30.0, "vllm": 2.5, "openai": 2.5}
"""Seconds that an idle connection is kept, by kind: half of what the servers keep it.

vLLM keeps it for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), other servers for uvicorn's default, Ollama
for ever.
"""

_TLS_SCHEMES = ("https", "dns+https")


class ServerFactory:
    """Factory of the servers of one backend.

    - `headers` are sent with each request.
    - `chat_path`, `embedding_path` and `other_paths` are the paths that requests go to.
    - `canonical` maps the names that a server accepts for a model to one of them.
    """

    def __init__(
        self,
        settings: BackendSettings,
        headers: Sequence[tuple[str, str]],
        chat_path: str,
        embedding_path: str,
        other_paths: Sequence[str],
        canonical: Callable[[str], str],
    ) -> None:
        self._kind = settings.kind
        self._name = settings.name
        self._servers = settings.servers
        self._is_single = len(settings.servers) == 1 and not settings.servers[0].is_name
        self._tls = _tls_context(settings)
        self._headers = [("Content-Type", "application/json"), *headers]
        self._chat_path = chat_path
        self._embedding_path = embedding_path
        self._other_paths = other_paths
        self._canonical = canonical

    def build_all(self, connect_timeout: float) -> list[Server]:
        """Return the servers whose addresses the settings give. Their names have their numbers there, from 1."""
        return [
            self._build(
                self._name if self._is_single else f"{self._name}#{number}",
                str(number),
                server,
                self.origin(server),
                connect_timeout,
            )
            for number, server in enumerate(self._servers, 1)
            if not server.is_name
        ]

    def build_at(self, settings: ServerSettings, address: str, connect_timeout: float) -> Server:
        """Return the server at one of the addresses of the name in `settings`."""
        origin = self.origin(settings, address)
        label = place(origin)
        return self._build(f"{self._name}#{label}", label, settings, origin, connect_timeout)

    def origin(self, settings: ServerSettings, address: str | None = None) -> Origin:
        """Return the place of a server; `address` is one of the addresses of its name."""
        url = urlsplit(settings.base_url)
        is_secure = url.scheme in _TLS_SCHEMES
        port = url.port or (443 if is_secure else 80)
        return Origin(url.hostname or "", port, self._tls if is_secure else None, url.path, address)

    def _build(self, name: str, label: str, settings: ServerSettings, origin: Origin, connect_timeout: float) -> Server:
        pool = Pool(origin, connect_timeout=connect_timeout, idle_seconds=IDLE_SECONDS[self._kind])
        head, embedding_head, *others = (
            pool.head("POST", path, self._headers)
            for path in (self._chat_path, self._embedding_path, *self._other_paths)
        )
        other_heads = dict(zip(self._other_paths, others, strict=True))
        server = Server(name, settings, pool, head, embedding_head, self._canonical, other_heads)
        server.label = label
        server.place = settings.base_url if origin.address is None else label
        server.prefixes.seed = crc32(server.place.encode())
        return server


def place(origin: Origin, address: str | None = None) -> str:
    """Return where a server is, as `address:port/prefix`: the same for two names of one server."""
    host = address or origin.address or origin.host
    return f"[{host}]:{origin.port}{origin.prefix}" if ":" in host else f"{host}:{origin.port}{origin.prefix}"


def _tls_context(settings: BackendSettings) -> ssl.SSLContext | None:
    if not any(urlsplit(server.base_url).scheme in _TLS_SCHEMES for server in settings.servers):
        return None
    return ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
