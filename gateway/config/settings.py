"""Settings as the rest of the gateway sees them: one frozen tree, resolved and checked.

Pure: reads neither files nor the environment.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from gateway.chat.answer import ReasoningField

Balance = Literal["affinity", "least_busy"]
Kind = Literal["ollama", "vllm", "openai"]
Priority = Literal["interactive", "batch"]
LogLevel = Literal["debug", "info", "warning", "error"]
Task = Literal["simple", "medium", "complex"]
"""Difficulty of a request according to its client."""
GuardRule = Literal["errors", "truncated", "empty", "time_to_first_token", "inter_token_latency"]

MIB = 1024 * 1024


class Frozen(BaseModel):
    """Immutable value; a reload builds a new tree. Its dicts must not be changed either."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class BackendLimits(Frozen):
    """Concurrency limits, queue limits and timeouts: counts of requests, and times in seconds."""

    max_concurrency: int = Field(description="Requests in flight at one server.")
    model_concurrency: int | Literal["auto"] = Field(
        description="Requests in flight for one model at one server; auto: the limit is learned."
    )
    vision_concurrency: int = Field(description="Requests with images in flight at one server.")
    concurrency: int | None = Field(
        default=None, description="Limit of one tier, in place of model_concurrency; None: not set."
    )
    max_queue: int = Field(description="Queued requests; further ones are refused.")
    vision_max_queue: int = Field(description="Queued requests with images; further ones are refused.")
    queue_timeout: float = Field(description="Longest wait in the queue, in seconds.")
    vision_queue_timeout: float = Field(description="Longest wait in the queue of a request with images, in seconds.")
    connect_timeout: float = Field(description="Longest time to connect, in seconds.")
    first_token_timeout: float = Field(
        description="Longest time from sending to the first token, in seconds; covers a model load."
    )
    idle_timeout: float = Field(description="Longest time between two pieces, in seconds.")
    total_timeout: float = Field(description="Longest time from sending to the end, in seconds.")


class LimitOverrides(Frozen):
    """Limits of a backend that a tier overrides; None keeps the backend's value."""

    max_concurrency: int | None = None
    model_concurrency: int | Literal["auto"] | None = None
    vision_concurrency: int | None = None
    concurrency: int | None = None
    max_queue: int | None = None
    vision_max_queue: int | None = None
    queue_timeout: float | None = None
    vision_queue_timeout: float | None = None
    connect_timeout: float | None = None
    first_token_timeout: float | None = None
    idle_timeout: float | None = None
    total_timeout: float | None = None

    def over(self, limits: BackendLimits) -> BackendLimits:
        """Return `limits` with these overrides.

        A lower `max_concurrency` also lowers `model_concurrency` and `vision_concurrency`.
        """
        merged = limits.model_copy(update=self.model_dump(exclude_none=True))
        maximum = merged.max_concurrency
        lowered: dict[str, int] = {}
        if merged.model_concurrency != "auto" and merged.model_concurrency > maximum:
            lowered["model_concurrency"] = maximum
        if merged.vision_concurrency > maximum:
            lowered["vision_concurrency"] = maximum
        return merged.model_copy(update=lowered)


class ServerSettings(Frozen):
    """One server of a backend."""

    base_url: str = Field(
        description="scheme://host[:port][/prefix], without /v1 and without a slash at the end. With the scheme dns "
        "(http) or dns+https, each address of the host name is a server."
    )
    models: tuple[str, ...] | None = Field(
        default=None, description="Models that it serves; None: those that the server lists."
    )

    @property
    def is_name(self) -> bool:
        """True if each address of the host name is a server."""
        return self.base_url.startswith("dns")


class BackendSettings(Frozen):
    """A named group of one or more servers of one kind."""

    name: str
    kind: Kind
    servers: tuple[ServerSettings, ...]
    limits: BackendLimits
    api_key: SecretStr | None = Field(default=None, description="Key sent as a bearer token.")
    api_key_file: Path | None = Field(default=None, description="File that the key was read from.")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers sent with each request; names in lower case."
    )
    ca_file: Path | None = Field(
        default=None, description="PEM file of the certificate authorities for https; None: those of the system."
    )
    probe_interval: float = Field(default=5.0, description="Seconds between two health probes.")
    discover: bool = Field(
        default=False, description="Whether models that no tier names are served under the servers' own names."
    )
    stop: tuple[str, ...] | None = Field(
        default=None, description="Command that makes the engine free the GPU; None: by its API."
    )
    start: tuple[str, ...] | None = Field(
        default=None, description="Command that starts the engine again; None: by its API."
    )
    balance: Balance = Field(
        default="affinity", description="How one of several servers is chosen: affinity or least_busy."
    )
    swap_after: float = Field(
        default=60.0,
        description="Ollama: seconds for which the loaded one of two models that do not fit at once has priority.",
    )
    keep_alive: int | float | str | None = Field(
        default=None, description="Ollama: how long a model stays loaded; None: not sent."
    )
    num_ctx: int | None = Field(default=None, description="Ollama: context length in tokens; None: not sent.")
    truncate: bool = Field(default=False, description="Ollama: whether it may silently truncate long prompts.")


class Alias(Frozen):
    """Another name for a tier."""

    name: str
    priority: Priority = "interactive"
    listed: bool = Field(default=True, description="Whether GET /v1/models names it.")


class ParamsSettings(Frozen):
    """Changes that a tier makes to a request's parameters."""

    default: dict[str, Any] = Field(default_factory=dict, description="Values used if the client does not set them.")
    force: dict[str, Any] = Field(default_factory=dict, description="Values used whatever the client sends.")
    drop: tuple[str, ...] = Field(default=(), description="Parameters that are never sent upstream.")


class ImageSettings(Frozen):
    """Changes that a tier makes to a request's images."""

    max_pixels: int | None = Field(
        default=None, description="Pixels to which larger images are scaled down; None: they are sent as they come."
    )


class Tier(Frozen):
    """A class of service: a model on each backend, and how requests for it are treated."""

    name: str
    models: dict[str, str] = Field(description="The model's name on each backend, in the file's order.")
    aliases: tuple[Alias, ...] = ()
    backend: str | None = Field(
        default=None, description="Backend to which the tier is pinned; None: the roll-out moves it."
    )
    fallback: bool | str = Field(
        default=False,
        description="Backend that serves if the active one cannot: its name, or True for the next in models.",
    )
    warm: bool = Field(default=False, description="Whether its models on Ollama are loaded at the start.")
    max_tokens: int | None = Field(
        default=None, description="Maximum tokens of an answer; None: as many as the client asks for."
    )
    reasoning_field: ReasoningField = Field(
        default="reasoning", description="Field of chat completions with the thoughts."
    )
    params: ParamsSettings = ParamsSettings()
    images: ImageSettings = ImageSettings()
    limits: dict[str, LimitOverrides] = Field(default_factory=dict, description="Overrides by backend name.")


class PinnedModel(Frozen):
    """A model that no roll-out moves."""

    backend: str
    model: str


class EmbeddingSettings(PinnedModel):
    """An embedding model."""

    warm: bool = Field(default=False, description="Whether it is loaded at the start, on a backend of kind ollama.")


class RerankerSettings(PinnedModel):
    """A reranker, on a backend of kind vllm."""


class AutoRule(Frozen):
    """One rule for the model name `auto`: selects `tier` if all given conditions hold."""

    tier: str
    task: Task | None = None
    images: bool | None = Field(default=None, description="Whether the request has images.")
    tools: bool | None = Field(default=None, description="Whether the request offers tools.")
    longer_than: int | None = Field(
        default=None, description="Number of characters that the text of all messages must exceed."
    )

    def __str__(self) -> str:
        """Return the conditions as they are written in the settings."""
        given = self.model_dump(exclude={"tier"}, exclude_none=True)
        return ", ".join(f"{name}={str(value).lower()}" for name, value in given.items())


class GuardSettings(Frozen):
    """Settings of the automatic rollback of a canary or a fresh switch. Times are in seconds."""

    rules: tuple[GuardRule, ...] = Field(description="What is compared.")
    margin: float = Field(description="How far a share may exceed that of the other side.")
    ratio: float = Field(description="Highest allowed ratio of a latency's p95 to that of the other side.")
    min_samples: int = Field(description="Requests needed on each side before anything is decided.")
    window: float = Field(
        description="How far back the previous backend is looked at, and after how long a canary's test may restart."
    )
    grace: float = Field(description="Time after a change in which latencies are ignored.")
    false_alarms: float = Field(description="Probability that a change that is not worse is rolled back.")


class ImageUrlSettings(Frozen):
    """Images by address, which the gateway fetches."""

    allow: tuple[str, ...] = Field(description="Beginnings of the https addresses that are fetched.")


class Settings(Frozen):
    """All settings, checked: every name in them refers to something that exists."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, description="Port to listen on; 0: the system chooses one.")
    llm_backend: str = Field(description="Backend of every tier that is not pinned.")
    rollback_to: str = Field(description="Target of a rollback.")
    rollback_cutoff: float | None = Field(
        default=None,
        description="Seconds until a rollback ends requests on the backend that it leaves; None: never.",
    )
    backends: dict[str, BackendSettings]
    tiers: dict[str, Tier] = Field(description="Tiers by name, in the file's order.")
    default_tier: str = Field(description="Tier for the model name `auto` if no rule holds.")
    auto: tuple[AutoRule, ...] = Field(
        default=(), description="Rules for the model name `auto`; the first that holds selects the tier."
    )
    embeddings: dict[str, EmbeddingSettings] = Field(default_factory=dict)
    rerankers: dict[str, RerankerSettings] = Field(default_factory=dict)
    exclusive: bool = Field(default=False, description="Whether the backends share one GPU.")
    wake_timeout: float = Field(
        default=300.0, description="Exclusive: seconds for an engine to come up before the roll-out returns."
    )
    guard: GuardSettings | None = Field(default=None, description="Automatic rollback; None: off.")
    commit_after: float = Field(default=45.0, description="Seconds of silence after which a stream's answer begins.")
    heartbeat: float = Field(default=15.0, description="Seconds between two keep-alive signals on a silent answer.")
    waiting_note: bool = Field(
        default=False, description="Whether a queued stream is told its position, as reasoning text."
    )
    drain_delay: float = Field(
        default=0.0, description="Seconds between reporting not ready and closing the listening socket."
    )
    drain_timeout: float = Field(default=30.0, description="Seconds for running requests to finish at the end.")
    keep_alive_timeout: float = Field(
        default=75.0, description="Seconds for which an idle client connection stays open."
    )
    max_connections_per_address: int | None = Field(
        default=None, description="Maximum number of open connections of one client address; None: no limit."
    )
    unlimited_addresses: tuple[str, ...] = Field(
        default=(), description="Addresses and networks without that limit, such as reverse proxies."
    )
    max_body: int = Field(default=20 * MIB, description="Maximum bytes of a request body.")
    max_text_body: int = Field(default=MIB, description="Maximum bytes of a chat's body without its images.")
    max_waiting_bytes: int = Field(
        default=1024 * MIB, description="Maximum bytes of all request bodies that are read or wait."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Origins of browser programs, each with at most one `*`; `*` alone: any."
    )
    image_urls: ImageUrlSettings | None = Field(
        default=None, description="Images by address, which the gateway fetches; None: they are refused."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="Further values of Host that an open gateway on loopback accepts, in lower case."
    )
    log_format: Literal["auto", "json", "text"] = "auto"
    log_level: LogLevel = Field(default="info", description="Least serious lines that are logged.")
    user_header: str | None = Field(default=None, description="Header that names the person, in lower case.")
    session_header: str | None = Field(default=None, description="Header that names the conversation, in lower case.")
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="All client keys, including those of the keys file; empty: the gateway is open."
    )
    api_keys_file: Path | None = None
    keys_file: Path | None = Field(
        default=None, description="File of keys with names and limits; None: there are no such keys."
    )
    admin_key: SecretStr | None = Field(default=None, description="Bearer key for /ops and /metrics.")
    metrics_key: SecretStr | None = Field(default=None, description="Bearer key for /metrics alone.")
    metrics_port: int | None = Field(
        default=None, description="Second port, without a key, for /metrics, /healthz, /health, /ping and /readyz."
    )
    ollama_port: int | None = Field(
        default=None, description="Second port with the same API, for programs that expect Ollama."
    )
    ollama_as_key: str | None = Field(
        default=None, description="Name of the key that requests without one count as on ollama_port."
    )
    state_file: Path | None = Field(
        default=Path("gateway-state.json"),
        description="File that keeps the roll-out across restarts; None: it is not kept.",
    )
    usage_file: Path | None = Field(
        default=Path("gateway-usage.db"), description="SQLite file of usage; None: none is kept."
    )
    redis_url: SecretStr | None = Field(
        default=None, description="Redis through which replicas share limits; None: this is the only replica."
    )
    usage_days: int = Field(default=400, description="Days of usage that are kept.")
    record: Path | None = Field(
        default=None, description="File to which sizes and times of requests are appended; None: nothing is recorded."
    )
    record_size: int = Field(default=256 * MIB, description="Maximum bytes of the recording, in two files.")
    ollama_num_parallel: int | None = Field(
        default=None, description="OLLAMA_NUM_PARALLEL of the Ollama server, if known."
    )
    file: Path | None = Field(default=None, description="YAML file that the settings were read from.")
    warnings: tuple[str, ...] = Field(
        default=(), description="Settings that work but are probably unintended, one line each."
    )
    sources: tuple[str, ...] = Field(default=(), description="Sources of the settings, one line each.")

    _limits: dict[tuple[str, str], BackendLimits] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: object) -> None:
        """Merge the limits once, because `limits_for` is called for each request."""
        for tier in self.tiers.values():
            for backend in self.backends.values():
                override = tier.limits.get(backend.name)
                self._limits[tier.name, backend.name] = override.over(backend.limits) if override else backend.limits

    @property
    def is_open(self) -> bool:
        """True if requests need no key."""
        return not self.api_keys and self.keys_file is None

    @property
    def on_gpu(self) -> frozenset[str]:
        """Names of the backends that share the GPU; empty unless `exclusive` is set.

        A backend of kind openai is elsewhere unless it has commands that stop and start it.
        """
        if not self.exclusive:
            return frozenset()
        return frozenset(name for name, item in self.backends.items() if item.kind != "openai" or item.stop)

    def limits_for(self, tier: Tier | str, backend: BackendSettings | str) -> BackendLimits:
        """Return the limits of a tier on a backend: the backend's, with the tier's overrides."""
        tier_name = tier if isinstance(tier, str) else tier.name
        return self._limits[tier_name, backend if isinstance(backend, str) else backend.name]
