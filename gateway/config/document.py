"""The settings as people write them: the shape of the YAML file, which is also that of the `GATEWAY__…` variables. Pure.

Every key may be left out. What an absent key means, and what a name must lead to, is decided in `resolve.py`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, SecretStr, model_validator

from gateway.config import parsers as values
from gateway.config.settings import GuardRule, Kind, Priority, Task

_DurationInput = Annotated[float, Field(ge=0)] | Annotated[str, Field(pattern=values.DURATION_PATTERN)]
_CountInput = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\s*\d+\s*$")]
_CountOrZeroInput = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\s*\d+\s*$")]
_SizeInput = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=values.SIZE_PATTERN)]

Duration = Annotated[float, BeforeValidator(values.positive_duration, json_schema_input_type=_DurationInput)]
DurationOrZero = Annotated[float, BeforeValidator(values.duration, json_schema_input_type=_DurationInput)]
Size = Annotated[int, BeforeValidator(values.size, json_schema_input_type=_SizeInput)]
Count = Annotated[int, BeforeValidator(values.count(1), json_schema_input_type=_CountInput)]
CountOrZero = Annotated[int, BeforeValidator(values.count(0), json_schema_input_type=_CountOrZeroInput)]
CountOrAuto = Annotated[
    int | Literal["auto"], BeforeValidator(values.count_or_auto, json_schema_input_type=_CountInput | Literal["auto"])
]
Share = Annotated[
    float,
    BeforeValidator(
        values.number(0, 0.5, "a number from 0 to 0.5"), json_schema_input_type=Annotated[float, Field(ge=0, le=0.5)]
    ),
]
Ratio = Annotated[
    float,
    BeforeValidator(
        values.number(1, 100, "a number from 1 to 100"), json_schema_input_type=Annotated[float, Field(ge=1, le=100)]
    ),
]
Chance = Annotated[
    float,
    BeforeValidator(
        values.number(1e-6, 0.5, "a number from 0.000001 to 0.5"),
        json_schema_input_type=Annotated[float, Field(ge=1e-6, le=0.5)],
    ),
]
Port = Annotated[
    int, BeforeValidator(values.count(0, 65535), json_schema_input_type=Annotated[int, Field(ge=0, le=65535)])
]
Key = Annotated[SecretStr, BeforeValidator(values.key, json_schema_input_type=str)]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(values.keys, json_schema_input_type=str | list[str])]
HeaderName = Annotated[str, BeforeValidator(values.header_name, json_schema_input_type=str)]
HeaderValue = Annotated[SecretStr, BeforeValidator(values.header_value, json_schema_input_type=str)]
CorsOrigin = Annotated[str, BeforeValidator(values.origin, json_schema_input_type=str)]
Name = Annotated[str, BeforeValidator(values.name, json_schema_input_type=str)]
PublicName = Annotated[str, BeforeValidator(values.public_name, json_schema_input_type=str)]
ModelName = Annotated[str, BeforeValidator(values.model_name, json_schema_input_type=str)]
KeepAlive = Annotated[int | float | str, BeforeValidator(values.keep_alive, json_schema_input_type=float | str)]


def _fallback(value: object) -> bool | str:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool | str) and value != "":
        return value
    raise ValueError("expected true, false or the name of a backend")


def _flag(value: object) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


Flag = Annotated[bool, BeforeValidator(_flag, json_schema_input_type=bool)]
Fallback = Annotated[bool | str, BeforeValidator(_fallback, json_schema_input_type=bool | str)]


class DocumentSection(BaseModel):
    """A mapping of the file: unknown keys are refused, and a key without a value is as good as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None or key not in cls.model_fields}
        return {} if value is None else value


class LimitKeys(DocumentSection):
    """The limits and times of a backend; those without a value have the default of its kind."""

    max_concurrency: Count | None = Field(
        default=None, description="Requests in flight at one server. Default: ollama 4, vllm and openai 128."
    )
    model_concurrency: CountOrAuto | None = Field(
        default=None,
        description="Requests in flight for one model at one server. auto (kind ollama alone) learns what the server really does at once, "
        "since Ollama does not say. Default: ollama auto, vllm and openai as max_concurrency.",
    )
    vision_concurrency: Count | None = Field(
        default=None,
        description="Requests with images in flight at one server; 1 makes them a serial lane, since Ollama gets slower with two at once. "
        "Default: ollama 1, vllm and openai as max_concurrency.",
    )
    max_queue: CountOrZero | None = Field(
        default=None,
        description="Requests waiting; one more is refused with 503. Default: ollama 256, vllm and openai 512.",
    )
    vision_max_queue: CountOrZero | None = Field(
        default=None, description="Requests with images waiting; one more is refused with 503. Default: 512."
    )
    queue_timeout: DurationOrZero | None = Field(
        default=None,
        description="Longest wait, in seconds; time in which the model loads is not counted. Default: ollama 300, vllm and openai 60.",
    )
    vision_queue_timeout: DurationOrZero | None = Field(
        default=None,
        description="Longest wait of a request with images, in seconds; one image can take a minute. Default: ollama 3600, vllm and openai 300.",
    )
    connect_timeout: Duration | None = Field(
        default=None,
        description="Longest time to connect, in seconds; short, so that a dead server is soon passed by. Default: 2.",
    )
    first_token_timeout: Duration | None = Field(
        default=None,
        description="From sending to the first piece of the answer, in seconds; covers a model load. Default: ollama 300, vllm and openai 120.",
    )
    idle_timeout: Duration | None = Field(
        default=None,
        description="Between two pieces of the answer, in seconds; Ollama holds a tool call back until it is whole. "
        "Default: ollama 300, vllm and openai 120.",
    )
    total_timeout: Duration | None = Field(
        default=None, description="From sending to the end of the answer, in seconds. Default: 3600."
    )


class LimitOverridesDocument(LimitKeys):
    """What a tier changes in the limits and times of one backend."""

    concurrency: Count | None = Field(
        default=None,
        description="Requests of this tier in flight at one server, in place of model_concurrency. Default: as model_concurrency.",
    )


class ServerDocument(DocumentSection):
    """One of several servers behind a backend."""

    base_url: str = Field(description="Address, with or without /v1 at the end. Required.")
    models: tuple[ModelName, ...] | None = Field(
        default=None, min_length=1, description="Models that it serves. Default: what it says it serves."
    )


def _server(value: object) -> object:
    return {"base_url": value} if isinstance(value, str) else value


class BackendDocument(LimitKeys):
    """A server of one kind, or several that stand behind one name."""

    kind: Kind | None = Field(
        default=None,
        description="The API it speaks: ollama, vllm or openai. Default: its name, where that is ollama or vllm; else required.",
    )
    base_url: str | None = Field(
        default=None,
        description="Address, with or without /v1 at the end. Either this or servers. "
        "Default: ollama http://127.0.0.1:11434, vllm http://127.0.0.1:8001/v1.",
    )
    servers: (
        tuple[Annotated[ServerDocument, BeforeValidator(_server, json_schema_input_type=ServerDocument | str)], ...]
        | None
    ) = Field(
        default=None,
        min_length=1,
        description="Several servers behind one name (a vLLM serves one model): among those that serve a model the least busy is taken.",
    )
    api_key: Key | None = Field(default=None, description="Key sent to the backend as a bearer token. Default: none.")
    headers: dict[HeaderName, HeaderValue] | None = Field(
        default=None, description="Further headers sent with each request, for proxies that want them. Default: none."
    )
    ca_file: Path | None = Field(
        default=None, description="PEM file of the authorities to trust for https. Default: those of the system."
    )
    probe_interval: Duration | None = Field(
        default=None, description="Time between two health probes, in seconds. Default: 5."
    )
    swap_after: DurationOrZero | None = Field(
        default=None,
        description="Kind ollama: where two models do not fit into memory at once, how long requests for the loaded one go first while others "
        "wait for the other, in seconds; then it is their turn for as long. Default: 60.",
    )
    keep_alive: KeepAlive | None = Field(
        default=None,
        description="Kind ollama: how long a model stays loaded after a request, in seconds or such as 10m; negative: for ever. "
        "Default: the server's own.",
    )
    num_ctx: Count | None = Field(
        default=None,
        description="Kind ollama: context length in tokens. One that differs from the loaded model's makes Ollama load it again. "
        "Default: the server's own.",
    )
    truncate: Flag | None = Field(
        default=None,
        description="Kind ollama: true lets it cut long prompts without a word, as it does by itself; false answers 400. Default: false.",
    )


class AliasDocument(DocumentSection):
    """Another name for a tier, with its manners."""

    name: PublicName = Field(description="The name; `*` takes any name that nothing else takes.")
    priority: Priority = Field(
        default="interactive", description="interactive, or batch: those wait behind. Default: interactive."
    )
    listed: Flag = Field(default=True, description="Whether GET /v1/models names it. Default: true.")


class ParamsDocument(DocumentSection):
    """What a tier does to a request's parameters."""

    default: dict[str, JsonValue] = Field(
        default_factory=dict, description="Used where the client says nothing. Default: {}."
    )
    force: dict[str, JsonValue] = Field(default_factory=dict, description="Used whatever the client says. Default: {}.")
    drop: tuple[str, ...] = Field(
        default=(), description="Names of parameters that are never sent upstream. Default: []."
    )


def _alias(value: object) -> object:
    return value if isinstance(value, dict) else {"name": value}


def _overrides(value: object) -> object:
    return {} if value is None else value


class TierDocument(DocumentSection):
    """A class of service: the model that stands for it on each backend, and its manners."""

    models: dict[str, ModelName] = Field(
        description="Name of a backend: the model's name there. Required.", min_length=1
    )
    aliases: tuple[
        Annotated[AliasDocument, BeforeValidator(_alias, json_schema_input_type=AliasDocument | str)], ...
    ] = Field(default=(), description="Other names that clients may send as model. Default: [].")
    backend: str | None = Field(
        default=None,
        description="Pins the tier to this backend, so that no roll-out moves it. Default: llm_backend, and it moves.",
    )
    fallback: Fallback = Field(
        default=False,
        description="Who serves when the active backend cannot, before its first piece: the name of a backend, or true: the next under "
        "models. Default: false.",
    )
    warm: Flag = Field(
        default=False,
        description="Whether the tier's models on backends of kind ollama are loaded at the start, one after the other. Default: false.",
    )
    max_tokens: Count | None = Field(
        default=None, description="Most tokens of an answer, whatever the client asks. Default: no cap."
    )
    params: ParamsDocument = Field(
        default_factory=ParamsDocument, description="What is done to a request's parameters."
    )
    limits: dict[str, Annotated[LimitOverridesDocument, BeforeValidator(_overrides)]] = Field(
        default_factory=dict,
        description="Name of a backend: what this tier changes in its limits and times. Default: {}.",
    )


class AutoRuleDocument(DocumentSection):
    """One rule of what the model name `auto` means; it holds where all that it says does."""

    tier: str = Field(description="Name of the tier that is taken. Required.")
    task: Task | None = Field(
        default=None, description="What the header x-gateway-task says: simple, medium or complex. Default: anything."
    )
    images: Flag | None = Field(
        default=None, description="true: the request has images; false: it has none. Default: either."
    )
    tools: Flag | None = Field(
        default=None, description="true: the request offers tools; false: it does not. Default: either."
    )
    longer_than: CountOrZero | None = Field(
        default=None,
        description="The text of all messages together has more characters than this; images do not count. Default: any length.",
    )


class EmbeddingDocument(DocumentSection):
    """An embedding model: pinned, never moved by a roll-out."""

    backend: str = Field(description="Name of the backend that serves it. Required.")
    model: ModelName = Field(description="The model's name there. Required.")
    warm: Flag = Field(
        default=False,
        description="Whether it is loaded at the start, where the backend is of kind ollama. Default: false.",
    )


class GuardDocument(DocumentSection):
    """When a canary or a fresh switch is taken back by itself: it does worse than the other side."""

    rules: tuple[GuardRule, ...] = Field(
        default=get_args(GuardRule),
        min_length=1,
        description="What is looked at: errors, truncated (streams that broke off), empty (answers), time_to_first_token, inter_token_latency. "
        "Default: all of them.",
    )
    margin: Share = Field(
        default=0.005,
        description="By how much the share of errors, truncated or empty ones may exceed the other side's. Default: 0.005.",
    )
    ratio: Ratio = Field(default=1.5, description="How many times the other side's p95 of a time may be. Default: 1.5.")
    min_samples: Count = Field(default=20, description="Requests of each side before anything is decided. Default: 20.")
    window: Duration = Field(
        default=1800.0,
        description="How far back the side that was left is looked at, and after how long, at the earliest, a canary is judged anew. Default: 30m.",
    )
    grace: DurationOrZero = Field(
        default=30.0,
        description="Time from a change on in which times are not looked at: caches are cold, a model loads. Default: 30s.",
    )
    false_alarms: Chance = Field(
        default=0.01, description="The chance that a change that is no worse is taken back. Default: 0.01."
    )


class SettingsDocument(DocumentSection):
    """Settings of the gateway. Durations are seconds, or text such as 500ms, 30s, 5m, 1h; sizes are bytes, or text such as 20MiB."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on; 0.0.0.0: all. Default: 127.0.0.1, so that nothing is open by accident.",
    )
    port: Port = Field(default=8080, description="Port to listen on; 0: the system chooses one. Default: 8080.")
    llm_backend: str | None = Field(
        default=None,
        description="Backend that serves every tier that is not pinned. Default: ollama, or the only other one there is.",
    )
    rollback_to: str | None = Field(
        default=None,
        description="Backend that one rollback leads to. Default: the first of kind ollama, else llm_backend.",
    )
    rollback_cutoff: DurationOrZero | None = Field(
        default=None,
        description="Time that a rollback leaves to requests on the backend that it leads away from, in seconds; then they end with an error. "
        "Default: none, they may run to their end.",
    )
    backends: dict[Name, Annotated[BackendDocument, BeforeValidator(_overrides)]] = Field(
        default_factory=dict,
        description="The servers behind the gateway, by name. `ollama` and `vllm` are there without an entry where something names them. "
        "Default: these two.",
    )
    tiers: dict[Name, TierDocument] = Field(
        default_factory=dict,
        description="The classes of service, by name, in the order in which they are shown. "
        "Default: `standard`, made of OLLAMA_MODEL and VLLM_MODEL.",
    )
    default_tier: str | None = Field(
        default=None, description="What the model name `auto` falls to. Default: the first tier."
    )
    auto: tuple[AutoRuleDocument, ...] | None = Field(
        default=None,
        description="Rules for the model name `auto`: the first that holds names the tier; where none does, default_tier. "
        "Default: a rule for each of the tasks simple, medium and complex for which a tier, or an alias of one, has that name.",
    )
    embeddings: dict[PublicName, EmbeddingDocument] = Field(
        default_factory=dict, description="Embedding models, by the name that clients send. Default: {}."
    )
    guard: GuardDocument | None = Field(
        default=None,
        description="Takes a canary or a fresh switch back by itself; `{}` turns it on as it is. Default: none, and nobody does.",
    )
    commit_after: DurationOrZero = Field(
        default=45.0,
        description="Silence after which a stream's answer begins, in seconds: below the 60 of common proxies. Default: 45.",
    )
    heartbeat: Duration = Field(
        default=15.0,
        description="Time between two signs of life on a silent answer, in seconds: for the same proxies. Default: 15.",
    )
    waiting_note: Flag = Field(
        default=False,
        description="Whether a stream that waits is told its place and an estimate, as reasoning text. Default: false.",
    )
    drain_delay: DurationOrZero = Field(
        default=0.0,
        description="Time between saying not ready and closing the door, in seconds: for load balancers. Default: 0.",
    )
    drain_timeout: DurationOrZero = Field(
        default=30.0,
        description="Time that running requests get at the end, in seconds: what orchestrators grant. Default: 30.",
    )
    max_body: Size = Field(
        default=20 * 1024 * 1024, description="Most bytes of a request's body, for images. Default: 20MiB."
    )
    max_text_body: Size = Field(
        default=1024 * 1024,
        description="Most bytes of a chat's body outside its images: parsing holds up the rest. Default: 1MiB.",
    )
    cors_origins: tuple[CorsOrigin, ...] = Field(
        default=(),
        description="Origins of browser programs that may call, such as https://chat.example.com; `*`: any. Default: [].",
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="json, text, or auto: text on a terminal, else json. Default: auto."
    )
    user_header: HeaderName | None = Field(
        default=None, description="Header in which a trusted program tells the person, for taking turns. Default: none."
    )
    session_header: HeaderName | None = Field(
        default=None,
        description="Header in which a trusted program tells the conversation, for canaries. Default: none.",
    )
    api_keys: Keys | None = Field(
        default=None, description="Client keys, as a list or comma-separated. Default: none, which is open."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of client keys, one a line, # begins a comment; added to api_keys. Default: none.",
    )
    admin_key: Key | None = Field(
        default=None, description="Bearer key of /ops and /metrics. Default: none, which is loopback only."
    )
    metrics_key: Key | None = Field(default=None, description="Bearer key of /metrics alone. Default: none.")
    metrics_port: Port | None = Field(
        default=None, description="A second port, unguarded, for /metrics, /healthz and /readyz alone. Default: none."
    )
    state_file: str | None = Field(
        default="gateway-state.json",
        description="File in which the roll-out outlives a restart; empty: it does not. Default: gateway-state.json.",
    )
    ollama_num_parallel: CountOrZero | None = Field(
        default=None,
        description="OLLAMA_NUM_PARALLEL of the Ollama server, where known: the first guess of model_concurrency auto; 0: not known. "
        "Default: learned.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_empty_state_file(cls, value: Any) -> Any:
        """An empty `state_file:` turns the file off; elsewhere an empty value is the default."""
        if isinstance(value, dict) and value.get("state_file", "") is None:
            return value | {"state_file": ""}
        return value
