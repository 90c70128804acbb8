"""The section `backends` of the settings document, and the limits that tiers override. Pure."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from gateway.config.field_types import (
    Command,
    Count,
    CountOrAuto,
    CountOrZero,
    DocumentSection,
    Duration,
    DurationOrZero,
    Flag,
    HeaderName,
    HeaderValue,
    KeepAlive,
    Key,
    ModelName,
)
from gateway.config.settings import Balance, Kind


class LimitKeys(DocumentSection):
    """Limits and timeouts of a backend; the kind of the backend decides their defaults."""

    max_concurrency: Count | None = Field(
        default=None, description="Requests in flight at one server. Default: 4 on ollama, 128 on vllm and openai."
    )
    model_concurrency: CountOrAuto | None = Field(
        default=None,
        description="Requests in flight for one model at one server. auto (only on ollama) learns how many the "
        "server really runs at once, because Ollama does not report it. "
        "Default: auto on ollama, max_concurrency on vllm and openai.",
    )
    vision_concurrency: Count | None = Field(
        default=None,
        description="Requests with images in flight at one server. 1 makes them run one after the other, because "
        "two at once slow Ollama down. Default: 1 on ollama, max_concurrency on vllm and openai.",
    )
    max_queue: CountOrZero | None = Field(
        default=None,
        description="Queued requests; further ones are refused with 503. "
        "Default: 256 on ollama, 512 on vllm and openai.",
    )
    vision_max_queue: CountOrZero | None = Field(
        default=None, description="Queued requests with images; further ones are refused with 503. Default: 512."
    )
    queue_timeout: DurationOrZero | None = Field(
        default=None,
        description="Longest wait in the queue, in seconds, not counting the time in which the model loads. "
        "Default: 300 on ollama, 60 on vllm and openai.",
    )
    vision_queue_timeout: DurationOrZero | None = Field(
        default=None,
        description="Longest wait in the queue of a request with images, in seconds; one image can take a minute. "
        "Default: 3600 on ollama, 300 on vllm and openai.",
    )
    connect_timeout: Duration | None = Field(
        default=None,
        description="Longest time to connect, in seconds; short, so that a dead server costs little time. Default: 2.",
    )
    first_token_timeout: Duration | None = Field(
        default=None,
        description="Longest time from sending to the first token of the answer, in seconds; covers a model load. "
        "Default: 300 on ollama, 120 on vllm and openai.",
    )
    idle_timeout: Duration | None = Field(
        default=None,
        description="Longest time between two pieces of the answer, in seconds; Ollama sends a tool call only when "
        "it is complete. Default: 300 on ollama, 120 on vllm and openai.",
    )
    total_timeout: Duration | None = Field(
        default=None, description="Longest time from sending to the end of the answer, in seconds. Default: 3600."
    )


class LimitOverridesDocument(LimitKeys):
    """Limits and timeouts of one backend that a tier overrides."""

    concurrency: Count | None = Field(
        default=None,
        description="Requests of this tier in flight at one server, in place of model_concurrency. "
        "Default: model_concurrency.",
    )


class ServerDocument(DocumentSection):
    """One of several servers of a backend, or a host name whose addresses are servers."""

    base_url: str = Field(
        description="Address, with or without /v1 at the end; dns://host:port: each address of the host name is a "
        "server. Required."
    )
    models: tuple[ModelName, ...] | None = Field(
        default=None, min_length=1, description="Models that it serves. Default: those that the server lists."
    )


def _server(value: object) -> object:
    return {"base_url": value} if isinstance(value, str) else value


def _servers(value: object) -> object:
    return [value] if isinstance(value, str) else value


_ServerEntry = Annotated[ServerDocument, BeforeValidator(_server, json_schema_input_type=ServerDocument | str)]


class BackendDocument(LimitKeys):
    """A named group of one or more servers of one kind."""

    kind: Kind | None = Field(
        default=None,
        description="API of the servers: ollama, vllm or openai. "
        "Default: the backend's name if it is ollama or vllm; else required.",
    )
    base_url: str | None = Field(
        default=None,
        description="Address, with or without /v1 at the end; use either base_url or servers. "
        "Default: http://127.0.0.1:11434 on ollama, http://127.0.0.1:8001/v1 on vllm.",
    )
    servers: Annotated[
        tuple[_ServerEntry, ...] | None,
        BeforeValidator(_servers, json_schema_input_type=list[ServerDocument | str] | str | None),
    ] = Field(
        default=None,
        min_length=1,
        description="Several servers behind one name, because a vLLM serves one model: a list, or "
        "dns://host:port for all addresses of a host name, which is looked up again after each probe_interval. "
        "The key balance decides which of those that serve the model gets a request.",
    )
    api_key: Key | None = Field(default=None, description="Key sent to the backend as a bearer token. Default: none.")
    api_key_file: Path | None = Field(
        default=None,
        description="File with that key, such as a mounted secret; use either api_key or api_key_file. Default: none.",
    )
    headers: dict[HeaderName, HeaderValue] | None = Field(
        default=None, description="Additional headers sent with each request, for proxies. Default: none."
    )
    ca_file: Path | None = Field(
        default=None,
        description="PEM file of the certificate authorities to trust for https. Default: those of the system.",
    )
    probe_interval: Duration | None = Field(
        default=None,
        description="Time between two health probes, and between two lookups of a name in servers, in seconds. "
        "Default: 5.",
    )
    discover: Flag | None = Field(
        default=None,
        description="Whether the models that the servers list are served under their own names if no tier names them. "
        "Default: false.",
    )
    stop: Command | None = Field(
        default=None,
        description="With exclusive: command that makes the engine free the GPU, such as docker stop vllm, as text or "
        "as a list of words; no shell runs it. Set stop and start together. "
        "Default: Ollama unloads its models, vLLM sleeps.",
    )
    start: Command | None = Field(
        default=None,
        description="With exclusive: command that starts the engine again, such as docker start vllm. "
        "Default: vLLM wakes up; Ollama loads models when they are needed.",
    )
    balance: Balance | None = Field(
        default=None,
        description="Kinds vllm and openai, with several servers: affinity keeps a conversation, and requests with a "
        "common beginning, where the prefix cache holds them, as long as that server is not too busy; least_busy "
        "chooses the server with the fewest requests. Default: affinity.",
    )
    swap_after: DurationOrZero | None = Field(
        default=None,
        description="Kind ollama, for two models that do not fit into memory at once: time for which the loaded one "
        "has priority while requests for the other wait, in seconds; then the other one has it for as long. "
        "Default: 60.",
    )
    keep_alive: KeepAlive | None = Field(
        default=None,
        description="Kind ollama: how long a model stays loaded after a request, in seconds or as text such as 10m; "
        "negative: forever. Default: the server's own.",
    )
    num_ctx: Count | None = Field(
        default=None,
        description="Kind ollama: context length in tokens. If it differs from that of the loaded model, Ollama "
        "reloads the model. Default: the server's own.",
    )
    truncate: Flag | None = Field(
        default=None,
        description="Kind ollama: true lets it silently truncate long prompts, as Ollama does by default; "
        "false refuses them with 400. Default: false.",
    )
