"""The settings document: the shape of the YAML file and of the `GATEWAY__…` variables. Pure.

Every key is optional. `resolve.py` decides what a missing key means, and checks that names refer
to something.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from gateway.config.document_backends import BackendDocument
from gateway.config.document_tiers import AutoRuleDocument, EmbeddingDocument, RerankerDocument, TierDocument
from gateway.config.field_types import (
    Chance,
    CorsOrigin,
    Count,
    CountOrZero,
    DocumentSection,
    Duration,
    DurationOrZero,
    Flag,
    HeaderName,
    HostName,
    ImagePrefix,
    IpNetwork,
    Key,
    Keys,
    LogLevel,
    Name,
    Port,
    PublicName,
    Ratio,
    RedisUrl,
    Share,
    Size,
    empty_if_none,
)
from gateway.config.settings import GuardRule


class GuardDocument(DocumentSection):
    """Automatic rollback of a canary or a fresh switch that performs worse than the other side."""

    rules: tuple[GuardRule, ...] = Field(
        default=get_args(GuardRule),
        min_length=1,
        description="What is compared: errors, truncated (streams that broke off), empty (answers without content), "
        "time_to_first_token, inter_token_latency. Default: all of them.",
    )
    margin: Share = Field(
        default=0.005,
        description="How far the share of errors, truncated or empty answers may exceed that of the other side. "
        "Default: 0.005.",
    )
    ratio: Ratio = Field(
        default=1.5, description="Highest allowed ratio of a latency's p95 to that of the other side. Default: 1.5."
    )
    min_samples: Count = Field(
        default=20, description="Requests needed on each side before anything is decided. Default: 20."
    )
    window: Duration = Field(
        default=1800.0,
        description="How far back the previous backend is looked at, and the time after which a canary's test may "
        "start again. Default: 30m.",
    )
    grace: DurationOrZero = Field(
        default=30.0,
        description="Time after a change in which latencies are ignored, because caches are cold and a model may be "
        "loading. Default: 30s.",
    )
    false_alarms: Chance = Field(
        default=0.01, description="Probability that a change that is not worse is rolled back. Default: 0.01."
    )


class ImageUrlsDocument(DocumentSection):
    """Images by address, which the gateway fetches."""

    allow: tuple[ImagePrefix, ...] = Field(
        min_length=1,
        description="Beginnings of the https addresses that are fetched, such as https://cdn.example.com/. Required.",
    )


class SettingsDocument(DocumentSection):
    """Settings of the gateway.

    Durations are seconds, or text such as 500ms, 30s, 5m, 1h. Sizes are bytes, or text such as
    20MiB.
    """

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0: all addresses. "
        "Default: 127.0.0.1, so that the gateway is not exposed by accident.",
    )
    port: Port = Field(default=8080, description="Port to listen on; 0: the system chooses one. Default: 8080.")
    llm_backend: str | None = Field(
        default=None,
        description="Backend that serves every tier that is not pinned. Default: ollama, else the first backend.",
    )
    rollback_to: str | None = Field(
        default=None,
        description="Target of a rollback. Default: the first backend of kind ollama, else llm_backend.",
    )
    rollback_cutoff: DurationOrZero | None = Field(
        default=None,
        description="Time until a rollback ends requests that are still on the backend that it leaves, in seconds. "
        "Default: none, they may finish.",
    )
    backends: dict[Name, Annotated[BackendDocument, BeforeValidator(empty_if_none)]] = Field(
        default_factory=dict,
        description="Backends by name. `ollama` and `vllm` need no entry if something refers to them. "
        "Default: these two.",
    )
    tiers: dict[Name, TierDocument] = Field(
        default_factory=dict,
        description="Tiers by name, in the order in which they are listed. "
        "Default: `standard`, with the models OLLAMA_MODEL and VLLM_MODEL.",
    )
    default_tier: str | None = Field(
        default=None, description="Tier for the model name `auto` if no rule holds. Default: the first tier."
    )
    auto: tuple[AutoRuleDocument, ...] | None = Field(
        default=None,
        description="Rules for the model name `auto`: the first that holds selects the tier; if none does, "
        "default_tier serves. "
        "Default: a rule for each of the tasks simple, medium and complex that is the name or alias of a tier.",
    )
    embeddings: dict[PublicName, EmbeddingDocument] = Field(
        default_factory=dict, description="Embedding models, by the name that clients send. Default: {}."
    )
    rerankers: dict[PublicName, RerankerDocument] = Field(
        default_factory=dict,
        description="Models for /v1/rerank, by the name that clients send. Default: {}.",
    )
    exclusive: Flag = Field(
        default=False,
        description="Whether the backends share one GPU that holds only one engine: a switch frees the GPU of one "
        "engine and wakes the other, while requests wait. Default: false.",
    )
    wake_timeout: Duration = Field(
        default=300.0,
        description="With exclusive: longest time for an engine to come up, in seconds, before the roll-out returns "
        "to the engine that was left. Default: 300.",
    )
    guard: GuardDocument | None = Field(
        default=None,
        description="Automatic rollback of a canary or a fresh switch; `{}` turns it on with its defaults. "
        "Default: none, it is off.",
    )
    commit_after: DurationOrZero = Field(
        default=45.0,
        description="Silence after which a stream's answer begins, in seconds; below the 60 after which common "
        "proxies time out. Default: 45.",
    )
    heartbeat: Duration = Field(
        default=15.0,
        description="Time between two keep-alive signals on a silent answer, in seconds, for the same proxies. "
        "Default: 15.",
    )
    waiting_note: Flag = Field(
        default=False,
        description="Whether a queued stream is told its position and an estimate, as reasoning text. Default: false.",
    )
    drain_delay: DurationOrZero = Field(
        default=0.0,
        description="Time between reporting not ready and closing the listening socket, in seconds, for load "
        "balancers. Default: 0.",
    )
    drain_timeout: DurationOrZero = Field(
        default=30.0,
        description="Time for running requests to finish at the end, in seconds; orchestrators commonly grant 30. "
        "Default: 30.",
    )
    keep_alive_timeout: Duration = Field(
        default=75.0,
        description="Time for which an idle client connection stays open, in seconds; above the 60 of common proxies. "
        "Default: 75.",
    )
    max_connections_per_address: Count | None = Field(
        default=None,
        description="Maximum number of open connections of one client address. Default: null, no limit.",
    )
    unlimited_addresses: tuple[IpNetwork, ...] = Field(
        default=(),
        description="Addresses and networks that max_connections_per_address does not limit, such as reverse proxies. "
        "Default: [].",
    )
    max_body: Size = Field(
        default=20 * 1024 * 1024, description="Maximum bytes of a request body, for images. Default: 20MiB."
    )
    max_text_body: Size = Field(
        default=1024 * 1024,
        description="Maximum bytes of a chat's body without its images; parsing blocks all other requests. "
        "Default: 1MiB.",
    )
    max_waiting_bytes: Size = Field(
        default=1024 * 1024 * 1024,
        description="Maximum bytes of all request bodies in memory that are being read or whose requests wait. "
        "Default: 1GiB.",
    )
    cors_origins: tuple[CorsOrigin, ...] = Field(
        default=(),
        description="Origins of browser programs that may call the gateway, such as https://chat.example.com. "
        "One `*` may stand for the port or a part of the host, as in http://localhost:*; `*` alone: any. Default: [].",
    )
    image_urls: ImageUrlsDocument | None = Field(
        default=None,
        description="Images by address, which the gateway fetches. Default: none, they are refused.",
    )
    allowed_hosts: tuple[HostName, ...] = Field(
        default=(),
        description="Further values of the Host header that an open gateway on loopback accepts, without a port. "
        "Default: [], only local names and `host`.",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="json, text, or auto: text on a terminal, else json. Default: auto."
    )
    log_level: LogLevel = Field(
        default="info",
        description="Least serious lines that are logged: debug, info, warning or error. Requests with a status "
        "below 500 are logged at info, others at warning. Default: info.",
    )
    user_header: HeaderName | None = Field(
        default=None,
        description="Header in which a trusted program names the person, for fair queueing. Default: none.",
    )
    session_header: HeaderName | None = Field(
        default=None,
        description="Header in which a trusted program names the conversation, for canaries. Default: none.",
    )
    api_keys: Keys | None = Field(
        default=None,
        description="Client keys, as a list or comma-separated. Default: none, the gateway is open.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of client keys, one per line, # begins a comment; added to api_keys. Reread when it "
        "changes. Default: none.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="File of keys with names and limits, written by `gateway keys`. Reread when it changes. "
        "Default: none.",
    )
    admin_key: Key | None = Field(
        default=None,
        description="Bearer key for /ops and /metrics. Default: none; see docs/operations/settings.md.",
    )
    metrics_key: Key | None = Field(default=None, description="Bearer key for /metrics alone. Default: none.")
    metrics_port: Port | None = Field(
        default=None,
        description="Second port, without a key, for /metrics and the health checks alone. Default: none.",
    )
    ollama_port: Port | None = Field(
        default=None,
        description="Second port with the same API, for programs that expect Ollama, usually 11434. Default: none.",
    )
    ollama_as_key: str | None = Field(
        default=None,
        description="Name of the key in keys_file that requests without a key count as on ollama_port. Default: none, "
        "they are refused if the gateway has keys.",
    )
    state_file: str | None = Field(
        default="gateway-state.json",
        description="File that keeps the roll-out across restarts; empty: it is not kept. Default: gateway-state.json.",
    )
    usage_file: str | None = Field(
        default="gateway-usage.db",
        description="SQLite file of usage per key, person, tier, backend and day; empty: none is kept. "
        "Default: gateway-usage.db.",
    )
    redis_url: RedisUrl | None = Field(
        default=None,
        description="Redis or Valkey through which replicas share limits, as redis://host:6379/0. Default: none, this "
        "is the only replica.",
    )
    usage_days: Count = Field(default=400, description="Days of usage that are kept. Default: 400.")
    record: str | None = Field(
        default=None,
        description="File to which arrival times and sizes of requests are appended, never their contents, for "
        "`gateway bench load --replay`. Default: none, nothing is recorded.",
    )
    record_size: Size = Field(
        default=256 * 1024 * 1024,
        description="Maximum bytes of the recording: half for the file, half for the one before it, whose name ends "
        "in .1. Default: 256MiB.",
    )
    ollama_num_parallel: CountOrZero | None = Field(
        default=None,
        description="OLLAMA_NUM_PARALLEL of the Ollama server, if known: the first guess of model_concurrency auto; "
        "0: unknown. Default: learned.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_empty_files(cls, value: Any) -> Any:
        """Let an empty `state_file:` or `usage_file:` turn the file off; other empty values mean the default."""
        if isinstance(value, dict):
            return value | {key: "" for key in ("state_file", "usage_file") if value.get(key, "") is None}
        return value
