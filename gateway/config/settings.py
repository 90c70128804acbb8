"""The settings as the rest of the gateway sees them: one frozen tree, resolved and checked. Pure: reads no file and no environment."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

Kind = Literal["ollama", "vllm", "openai"]
Priority = Literal["interactive", "batch"]
Task = Literal["simple", "medium", "complex"]
"""How hard a client says its request is."""
GuardRule = Literal["errors", "truncated", "empty", "time_to_first_token", "inter_token_latency"]

MIB = 1024 * 1024


class Frozen(BaseModel):
    """A value that nobody changes after start; a reload builds a new tree. Its dicts are to be read only."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())


class BackendLimits(Frozen):
    """How much a server is given at once and how long each step may take: counts of requests, times in seconds."""

    max_concurrency: int = Field(description="Requests in flight at one server.")
    model_concurrency: int | Literal["auto"] = Field(
        description="Requests in flight for one model at one server; auto: learned."
    )
    vision_concurrency: int = Field(description="Requests with images in flight at one server.")
    concurrency: int | None = Field(
        default=None, description="A tier's own bound, in place of model_concurrency; None: it has none."
    )
    max_queue: int = Field(description="Requests waiting; one more is refused.")
    vision_max_queue: int = Field(description="Requests with images waiting; one more is refused.")
    queue_timeout: float = Field(description="Longest wait, in seconds.")
    vision_queue_timeout: float = Field(description="Longest wait of a request with images, in seconds.")
    connect_timeout: float = Field(description="Longest time to connect, in seconds.")
    first_token_timeout: float = Field(description="From sending to the first piece, in seconds; covers a model load.")
    idle_timeout: float = Field(description="Between two pieces, in seconds.")
    total_timeout: float = Field(description="From sending to the end, in seconds.")


class LimitOverrides(Frozen):
    """What a tier changes in a backend's limits; None: as the backend has it."""

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
        """`limits` with these in their place. A lowered `max_concurrency` lowers what cannot be above it."""
        merged = limits.model_copy(update=self.model_dump(exclude_none=True))
        most = merged.max_concurrency
        lowered: dict[str, int] = {}
        if merged.model_concurrency != "auto" and merged.model_concurrency > most:
            lowered["model_concurrency"] = most
        if merged.vision_concurrency > most:
            lowered["vision_concurrency"] = most
        return merged.model_copy(update=lowered)


class ServerSettings(Frozen):
    """One address of a backend."""

    base_url: str = Field(description="scheme://host[:port][/prefix], without /v1 and without a slash at the end.")
    models: tuple[str, ...] | None = Field(default=None, description="Models served there; None: what the server says.")


class BackendSettings(Frozen):
    """One server, or several that stand behind one name, of one kind."""

    name: str
    kind: Kind
    servers: tuple[ServerSettings, ...]
    limits: BackendLimits
    api_key: SecretStr | None = Field(default=None, description="Sent as a bearer key.")
    headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Sent with each request; names in lower case."
    )
    ca_file: Path | None = Field(
        default=None, description="PEM file of the authorities trusted for https; None: the system's."
    )
    probe_interval: float = Field(default=5.0, description="Seconds between two health probes.")
    swap_after: float = Field(
        default=60.0,
        description="Ollama: of two models that do not fit at once, seconds in which the loaded one goes first.",
    )
    keep_alive: int | float | str | None = Field(
        default=None, description="Ollama: how long a model stays loaded; None: not sent."
    )
    num_ctx: int | None = Field(default=None, description="Ollama: context length in tokens; None: not sent.")
    truncate: bool = Field(default=False, description="Ollama: may cut long prompts without a word.")


class Alias(Frozen):
    """Another name for a tier."""

    name: str
    priority: Priority = "interactive"
    listed: bool = Field(default=True, description="Whether GET /v1/models names it.")


class ParamsSettings(Frozen):
    """What a tier does to a request's parameters."""

    default: dict[str, Any] = Field(default_factory=dict, description="Used where the client says nothing.")
    force: dict[str, Any] = Field(default_factory=dict, description="Used whatever the client says.")
    drop: tuple[str, ...] = Field(default=(), description="Never sent upstream.")


class Tier(Frozen):
    """A class of service: the model that stands for it on each backend, and its manners."""

    name: str
    models: dict[str, str] = Field(description="Backend name to the model's name there, in the file's order.")
    aliases: tuple[Alias, ...] = ()
    backend: str | None = Field(
        default=None, description="The backend that it is pinned to; None: it moves with the roll-out."
    )
    fallback: bool | str = Field(
        default=False, description="Who serves when the active backend cannot: a name, or True: the next."
    )
    warm: bool = Field(default=False, description="Whether its models of kind ollama are loaded at the start.")
    max_tokens: int | None = Field(default=None, description="Most tokens of an answer; None: the client's word.")
    params: ParamsSettings = ParamsSettings()
    limits: dict[str, LimitOverrides] = Field(default_factory=dict, description="By backend name.")


class EmbeddingSettings(Frozen):
    """An embedding model: pinned, never moved by a roll-out."""

    backend: str
    model: str
    warm: bool = Field(default=False, description="Whether it is loaded at the start, at kind ollama.")


class AutoRule(Frozen):
    """One step of the choice for the model name `auto`: `tier`, where all that is given holds; None: whatever it is."""

    tier: str
    task: Task | None = None
    images: bool | None = Field(default=None, description="Whether the request has images.")
    tools: bool | None = Field(default=None, description="Whether it offers tools.")
    longer_than: int | None = Field(default=None, description="Its messages' text has more characters than this.")

    def __str__(self) -> str:
        """What has to hold, in the words of the settings."""
        given = self.model_dump(exclude={"tier"}, exclude_none=True)
        return ", ".join(f"{name}={str(value).lower()}" for name, value in given.items())


class GuardSettings(Frozen):
    """When a canary or a fresh switch is taken back by itself. Times are in seconds."""

    rules: tuple[GuardRule, ...] = Field(description="What is looked at.")
    margin: float = Field(description="By how much a share may exceed the other side's.")
    ratio: float = Field(description="How many times the other side's a p95 may be.")
    min_samples: int = Field(description="Requests of each side before anything is decided.")
    window: float = Field(
        description="How far back the side that was left is looked at, and after how long a canary is judged anew."
    )
    grace: float = Field(description="From a change on, in which times are not looked at.")
    false_alarms: float = Field(description="The chance that a side that is no worse is taken back.")


class Settings(Frozen):
    """All settings. Whoever holds one can trust it: every reference in it leads somewhere."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, description="Port to listen on; 0: the system chooses one.")
    llm_backend: str = Field(description="Backend of every tier that is not pinned.")
    rollback_to: str = Field(description="Backend that one rollback leads to.")
    rollback_cutoff: float | None = Field(
        default=None, description="Seconds that a rollback leaves to who is on the backend left; None: all."
    )
    backends: dict[str, BackendSettings]
    tiers: dict[str, Tier] = Field(description="In the file's order.")
    default_tier: str = Field(description="What `auto` falls to.")
    auto: tuple[AutoRule, ...] = Field(
        default=(), description="What `auto` means: the first rule that holds counts, else default_tier."
    )
    embeddings: dict[str, EmbeddingSettings] = Field(default_factory=dict)
    guard: GuardSettings | None = Field(default=None, description="Takes a roll-out back by itself; None: nobody does.")
    commit_after: float = Field(default=45.0, description="Seconds of silence after which a stream's answer begins.")
    heartbeat: float = Field(default=15.0, description="Seconds between two signs of life on a silent answer.")
    waiting_note: bool = Field(
        default=False, description="Whether a waiting stream is told its place as reasoning text."
    )
    drain_delay: float = Field(default=0.0, description="Seconds between not ready and closing the door.")
    drain_timeout: float = Field(default=30.0, description="Seconds that running requests get at the end.")
    max_body: int = Field(default=20 * MIB, description="Most bytes of a request's body.")
    max_text_body: int = Field(default=MIB, description="Most bytes of a chat's body outside its images.")
    cors_origins: tuple[str, ...] = Field(default=(), description="Origins of browser programs; `*`: any.")
    log_format: Literal["auto", "json", "text"] = "auto"
    user_header: str | None = Field(default=None, description="Header that names the person, in lower case.")
    session_header: str | None = Field(default=None, description="Header that names the conversation, in lower case.")
    api_keys: tuple[SecretStr, ...] = Field(
        default=(), description="All client keys, those of the keys file with them; none: open."
    )
    api_keys_file: Path | None = None
    admin_key: SecretStr | None = Field(default=None, description="Bearer key of /ops and /metrics.")
    metrics_key: SecretStr | None = Field(default=None, description="Bearer key of /metrics alone.")
    metrics_port: int | None = Field(
        default=None, description="A second, unguarded port for /metrics, /healthz, /readyz."
    )
    state_file: Path | None = Field(
        default=Path("gateway-state.json"), description="Where the roll-out outlives a restart; None: not."
    )
    ollama_num_parallel: int | None = Field(
        default=None, description="OLLAMA_NUM_PARALLEL of the Ollama server, where known."
    )
    file: Path | None = Field(default=None, description="The YAML file that they were read from.")
    warnings: tuple[str, ...] = Field(
        default=(), description="One line each: settings that work but are likely not what was meant."
    )
    sources: tuple[str, ...] = Field(default=(), description="One line each: where the settings were read from.")

    _limits: dict[tuple[str, str], BackendLimits] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: object) -> None:
        """Merge the limits once: `limits_for` is asked for each request."""
        for tier in self.tiers.values():
            for backend in self.backends.values():
                override = tier.limits.get(backend.name)
                self._limits[tier.name, backend.name] = override.over(backend.limits) if override else backend.limits

    def limits_for(self, tier: Tier | str, backend: BackendSettings | str) -> BackendLimits:
        """The limits of a tier on a backend: the backend's, with what the tier overrides."""
        tier_name = tier if isinstance(tier, str) else tier.name
        return self._limits[tier_name, backend if isinstance(backend, str) else backend.name]
