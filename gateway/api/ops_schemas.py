"""Schemas of the answers of `/ops`, and its part of the OpenAPI document. Pure.

The answers themselves are plain dicts; tests hold them to these structures.
"""

from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from gateway.api.operator_chat import PATH as CHAT_PATH
from gateway.rollout.assignment import Canary, Change
from gateway.rollout.gpu_state import Outcome, Phase
from gateway.rollout.gpu_times import Basis
from gateway.rollout.preflight.findings import Finding
from gateway.telemetry.live import Figures

JSON = "application/json"
ADMIN = "admin"
"""Name of the security scheme: the admin key or token."""


class Readiness(Struct):
    """Readiness of the gateway, and the tiers that no backend can serve now."""

    status: Literal["starting", "ready", "draining"]
    unserved_tiers: list[str]


class Percentiles(Struct):
    """Percentiles in seconds since the start, estimated from histograms; null without samples."""

    p50: float | None
    p99: float | None


class Latency(Struct):
    """Latencies of a tier on a backend since the start."""

    time_to_first_token: Percentiles
    inter_token_latency: Percentiles
    duration: Percentiles


class Share(Struct):
    """Requests of a tier with a canary since its assignment last changed."""

    requests: int
    canary_requests: int
    percent: float | None


class Tally(Struct):
    """Requests of one side, and the share of them that counts against it."""

    requests: int
    share: float | None


class GuardRule(Struct):
    """One rule of the guard: both sides, and the evidence against the side under test."""

    tested: Tally
    other: Tally
    evidence: float
    bound: float | None = None
    """Bound of a latency in seconds, where the rule has one."""


class GuardView(Struct):
    """Watch of the guard on a tier. A rule is broken when its evidence reaches `needed`."""

    tested: str
    other: str
    is_switch: bool
    seconds: float
    needed: float
    rules: dict[str, GuardRule]


class TierStatus(Struct):
    """A tier: the backends that serve it, and its latencies and live figures by backend."""

    active_backend: str
    canary: Canary | None
    share: Share | None
    pinned: bool
    guard: GuardView | None
    models: dict[str, str]
    latency: dict[str, Latency]
    live: dict[str, Figures]


class Ejection(Struct):
    """A server that gets no requests of one model and lane, because they failed."""

    model: str
    lane: str
    state: str
    reason: str
    until: str
    gets_requests: bool


class ModelSlots(Struct):
    """Requests of one model that run at a server, and how many may."""

    running: int
    limit: int
    learned: bool


class ServerStatus(Struct):
    """A server of a backend. `up` is null until it was probed."""

    name: str
    up: bool | None
    circuit: str
    paused: bool
    gets_requests: bool
    ejections: list[Ejection]
    running: int
    connections: int
    models: list[str] | None
    loads: dict[str, str] | None
    model_slots: dict[str, ModelSlots]


class NameStatus(Struct):
    """A host name whose addresses are servers, and how many of them there are.

    `failure` tells why the last lookup found no address. `ignored` are addresses beyond the limit.
    """

    name: str
    resolved: bool
    failure: str | None
    servers: int
    ignored: int


class LeavingServer(Struct):
    """A server whose address its host name no longer has, and the requests that still run there."""

    name: str
    running: int


class BackendStatus(Struct):
    """A backend: requests by lane, limits, live figures of all tiers, host names and servers."""

    kind: str
    up: bool
    state: Literal["awake", "leaving", "sleeping", "waking"]
    """Always `awake` unless engines share a GPU."""
    running: dict[str, int]
    waiting: dict[str, int]
    live: Figures
    limits: dict[str, float | str | None]
    names: list[NameStatus]
    servers: list[ServerStatus]
    leaving: list[LeavingServer]


class DiscoveredStatus(Struct):
    """A model that no tier names, and that a backend with `discover` serves under its own name."""

    backend: str
    capabilities: list[str] | None


class GpuRollback(Struct):
    """Expected time of a rollback that began now, in seconds; null if it is unknown."""

    to: str
    seconds: float | None
    basis: Basis


class GpuOutcome(Struct):
    """Outcome of the last switch of the GPU. `why` is the reason for a failure."""

    at: str
    from_: str | None = field(name="from")
    to: str
    outcome: Outcome
    seconds: float | None
    why: str


class GpuView(Struct):
    """A GPU that holds one engine at a time.

    `holder` is the backend that has it, null during a switch. `from` and `to` are null without one.
    `running` requests have still to end at the engine that is left, and `waiting` ones wait for the other.
    """

    holder: str | None
    phase: Phase
    since: str
    seconds: float
    from_: str | None = field(name="from")
    to: str | None
    expected_seconds: float | None
    """Expected seconds to the end of the switch."""
    running: int
    waiting: int
    rollback: GpuRollback
    last: GpuOutcome | None


class RolloutHistory(Struct):
    """Backend that a rollback leads to, the changes, the last one first, and a GPU that is shared.

    `shared` tells whether the other replicas know all of it; it is null without replicas.
    """

    rollback_to: str
    shared: bool | None
    history: list[Change]
    gpu: GpuView | None


class ReloadOutcome(Struct):
    """Outcome of the last time that the settings were reread."""

    at: str
    cause: str
    ok: bool
    changed: list[str]
    needs_restart: list[str]
    reasons: list[str]


class LiveTimes(Struct):
    """Timing of the live figures: seconds between samples, seconds that each looks back, samples kept."""

    step: float
    window: float
    kept: int


class FailedRequest(Struct):
    """A request that failed. `reason` is the backend's failure, as in the metrics; null without one."""

    at: str
    request_id: str
    endpoint: str
    tier: str
    backend: str
    status: int
    code: str | None
    reason: str | None
    outcome: str
    seconds: float


class BackendSeries(Struct):
    """Course of the live figures of a backend: one value for each sample."""

    requests: list[float]
    errors: list[float]
    tokens: list[float]
    time_to_first_token_p50: list[float | None]
    time_to_first_token_p95: list[float | None]
    inter_token_latency_p50: list[float | None]
    inter_token_latency_p95: list[float | None]
    running: list[int]
    waiting: list[int]


class Series(Struct):
    """Course of the live figures of a tier, of all tiers if `tier` is null. `at` is in Unix time."""

    tier: str | None
    at: list[float]
    backends: dict[str, BackendSeries]


class SharedLimitStatus(Struct):
    """A shared limit: its slots over all replicas, those that this one may fill, and those that it uses."""

    name: str
    limit: int
    share: int
    running: int


class ReplicasStatus(Struct):
    """The replicas that share the limits, and the link to Redis. `since` is when it came up or went down.

    `sharing` is 1 while this replica is alone; `replicas` is the number that it last saw, by which it then
    divides the limits.
    """

    replica: str
    redis: str
    up: bool
    since: float
    reason: str | None
    sharing: int
    replicas: int
    limits: list[SharedLimitStatus]


class ProcessStatus(Struct):
    """One of several replicas on this machine: its process, and its requests by backend."""

    replica: int
    pid: int
    status: str
    running: dict[str, int]
    waiting: dict[str, int]


class OpsStatus(Struct):
    """Status of the gateway: all that the console shows. `/ops/events` sends it and its changes."""

    version: str
    ready: Readiness
    backends: dict[str, BackendStatus]
    tiers: dict[str, TierStatus]
    discovered: dict[str, DiscoveredStatus]
    rollout: RolloutHistory
    reload: ReloadOutcome | None
    replicas: ReplicasStatus | None
    processes: list[ProcessStatus] | None
    """The replicas of `gateway serve --replicas`. The numbers of backends and tiers cover all of them."""
    default_tier: str
    live: LiveTimes
    errors: list[FailedRequest]
    series: Series | None = None


class TierAssignment(Struct):
    """The backends that a tier is assigned to. `share` is null without a canary."""

    backend: str
    canary: Canary | None
    pinned: bool
    share: Share | None


class RolloutView(Struct):
    """The roll-out: the assignment of each tier, and the changes, the last one first.

    `shared` tells whether the other replicas know all of it; it is null without replicas.
    """

    rollback_to: str
    shared: bool | None
    tiers: dict[str, TierAssignment]
    history: list[Change]
    gpu: GpuView | None


class RolloutAnswer(RolloutView):
    """The roll-out after an order, and what the order did."""

    changed: bool
    persisted: bool
    moved: int
    """Queued requests that migrated."""
    unmoved: dict[str, str]
    """Tiers that could not follow, each with the reason."""


class PreflightTier(Struct):
    """The models of a tier on the backend that was checked, and on the one that it was compared with."""

    model: str | None
    other: str | None
    other_model: str | None


class PreflightAnswer(Struct):
    """Result of a preflight check: what a switch to `backend` would break, and what clients would notice."""

    backend: str
    breaks: bool
    seconds: float
    tiers: dict[str, PreflightTier]
    findings: list[Finding]


OPERATIONS: dict[tuple[str, str], tuple[str, type[Struct]]] = {
    ("get", "/ops/status"): ("ops_status", OpsStatus),
    ("get", "/ops/rollout"): ("ops_rollout", RolloutView),
    ("put", "/ops/rollout"): ("ops_set_rollout", RolloutAnswer),
    ("post", "/ops/rollback"): ("ops_rollback", RolloutAnswer),
    ("post", "/ops/undo"): ("ops_undo", RolloutAnswer),
    ("post", "/ops/preflight"): ("ops_preflight", PreflightAnswer),
}
"""Id and answer of each operation, by method and path."""

_ERRORS = {
    "400": "A parameter or a field of the body is invalid.",
    "401": "The admin key or token is missing or incorrect.",
    "403": "The caller has no access: no admin key is set, and it is not a program on the gateway's machine.",
}
_EVENTS = (
    "Events: `status`, the body of GET /ops/status without its series; `patch`, a JSON Patch (RFC 6902) from the "
    "status before; `series`, as in GET /ops/status; `sample`, a series with its next sample alone. A client that "
    "reads slowly misses patches, and gets another `status`."
)


def add_ops(document: dict[str, Any], chat: dict[str, Any]) -> None:
    """Complete the description of `/ops`: ids, schemas, security and errors of all its operations.

    `chat` is the operation of a chat completion, of which `/ops/chat` is a variant.
    """
    answers = {kind for _, kind in OPERATIONS.values()}
    _, components = msgspec.json.schema_components(answers, ref_template="#/components/schemas/{name}")
    document["components"]["schemas"].update(components)
    document["components"]["securitySchemes"][ADMIN] = {
        "type": "http",
        "scheme": "bearer",
        "description": "The admin key, or the admin token of a gateway that has client keys and no admin key. "
        "A gateway without any key lets local programs in without one.",
    }
    paths = document["paths"]
    paths[CHAT_PATH] = {"post": _operator_chat(chat)}
    for (method, path), (name, kind) in OPERATIONS.items():
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        answer = {"description": (kind.__doc__ or "").partition("\n")[0], "content": {JSON: {"schema": schema}}}
        paths[path][method] |= {"operationId": name, "responses": {"200": answer}}
    events = {"description": _EVENTS, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    paths["/ops/events"]["get"] |= {"operationId": "ops_events", "responses": {"200": events}}
    error = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, operations in paths.items():
        if path.startswith("/ops/"):
            for operation in operations.values():
                operation |= {"security": [{ADMIN: []}, {}], "tags": ["ops"]}
                operation["responses"].pop("422", None)  # FastAPI's own; the gateway answers 400
                operation["responses"] |= {
                    status: {"description": text, "content": error} for status, text in _ERRORS.items()
                }


def _operator_chat(chat: dict[str, Any]) -> dict[str, Any]:
    header = {
        "name": "x-gateway-backend",
        "in": "header",
        "schema": {"type": "string"},
        "description": "The backend that is to serve. Without it, the roll-out chooses.",
    }
    return {
        **chat,
        "summary": "Chat with a tier on a backend of choice",
        "operationId": "ops_chat",
        "parameters": [header],
        "responses": dict(chat["responses"]),
    }
