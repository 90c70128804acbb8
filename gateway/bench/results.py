"""Results: the record of one request, of one run of requests, and of a scenario.

All are frozen. Times of records are seconds on the client's monotonic clock. Nothing here holds a prompt
or an answer; `RequestRecord.text` is kept only where it is asked for, and is never written.

A run's JSON is a superset of the result of `vllm bench serve --save-result --save-detailed` (vLLM 0.32,
`vllm/benchmarks/serve.py`): the same names for the same figures. `docs/benchmarks.md` lists what differs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from gateway.bench.arrivals import RampUp

CellKind = Literal["measured", "computed", "forecast"]
CellValue = float | int | str | None

CANCELLED = "cancelled"
"""The `error` of a request that was in flight when the run was interrupted. It counts nowhere."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Record of one request.

    Attributes:
        index: number in its run, from 0.
        arrival: when the request was due. `start - arrival` is the time that it waited in the client.
        start: when it was sent.
        ttft: seconds from `start` to the first token. None: there was none, or the answer was not streamed.
        itl: seconds between two pieces of the answer; a server may put several tokens into one piece.
        last_token: when the last piece of the answer arrived; the end of what `latency` measures.
        end: when the response was complete, or failed.
        prompt_tokens, completion_tokens: as the server counted them. None: it did not say.
        status: HTTP status; 0 without a response.
        error: kind of failure, from a closed set: empty, `timeout`, `connect`, `disconnected`, `cut`,
            `invalid_answer`, `http_503`, `http_503 queue_full`, `stream_error upstream_error`, `cancelled`.
        queue_ms: milliseconds in the gateway's queue, by its header `x-gateway-queue-ms`.
        backend: the backend that served it, by `x-gateway-backend`.
        load_seconds: time that an Ollama took to load the model, by its own account.
    """

    index: int
    arrival: float
    start: float
    last_token: float
    end: float
    ttft: float | None = None
    itl: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    images: int = 0
    status: int = 0
    error: str = ""
    finish: str = ""
    model: str = ""
    language: str = ""
    name: str = ""
    queue_ms: float | None = None
    backend: str = ""
    load_seconds: float | None = None
    text: str = field(default="", repr=False, compare=False)

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def latency(self) -> float:
        """Seconds from sending to the last piece: vLLM's E2EL."""
        return self.last_token - self.start

    @property
    def queue_time(self) -> float:
        """Seconds that the request waited in the client for a free place."""
        return self.start - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds for each output token after the first; None with fewer than two tokens."""
        if self.ttft is None or not self.completion_tokens or self.completion_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.completion_tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens per second of the whole latency: the speed that this one user saw."""
        return self.completion_tokens / self.latency if self.completion_tokens and self.latency > 0 else None

    def to_json(self, origin: float) -> dict[str, Any]:
        """Return the record with times relative to `origin`, without the text and the gaps."""
        names = [item.name for item in fields(self) if item.name not in ("text", "itl")]
        value: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("arrival", "start", "last_token", "end"):
            value[name] = round(value[name] - origin, 6)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; keys of newer versions are ignored."""
        known = {item.name for item in fields(cls)} - {"text", "itl"}
        taken: dict[str, Any] = {key: item for key, item in value.items() if key in known}
        return cls(**taken)


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """Load of the load client itself during a run.

    Attributes:
        cpu_share: processor time of this process divided by elapsed time; 1.0 is one whole core.
        lag_p99_ms, lag_max_ms: lateness of a periodic timer in the client's event loop: an arrival may
            have been timed that much too late.
        start_delay_p99_ms: lateness of sending at a given request rate, apart from `max_concurrency`.
        warnings: reasons to distrust the run, as keys of `gateway.bench.texts`.
    """

    cpu_share: float = 0.0
    lag_p99_ms: float = 0.0
    lag_max_ms: float = 0.0
    start_delay_p99_ms: float | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def worst(cls, loads: Iterable[Self]) -> Self:
        """Return the worst of each value over several runs, and every warning once."""
        found = list(loads)
        delays = [load.start_delay_p99_ms for load in found if load.start_delay_p99_ms is not None]
        return cls(
            cpu_share=max((load.cpu_share for load in found), default=0.0),
            lag_p99_ms=max((load.lag_p99_ms for load in found), default=0.0),
            lag_max_ms=max((load.lag_max_ms for load in found), default=0.0),
            start_delay_p99_ms=max(delays, default=None),
            warnings=tuple(dict.fromkeys(key for load in found for key in load.warnings)),
        )


@dataclass(frozen=True, slots=True)
class RateChange:
    """A moment of a ramp-up: local time in ISO 8601 and the whole number that the request rate reached."""

    rps: int
    timestamp: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run: a number of requests to one target under one load.

    Attributes:
        label: what distinguishes the run in its scenario, such as `parallel`, `5` or `window 3`.
        target: the target's name.
        duration: seconds from the start of the run to the end of its last request.
        request_rate: requests per second that were due; None: all at once (`inf` in the JSON).
        max_concurrency: limit of requests in flight; None: none.
        num_prompts: requests that were planned; fewer have records after an interruption.
        interrupted: the run was stopped early. Requests in flight then are not counted.
        goodput: limits in milliseconds by `ttft`, `tpot` or `e2el`.
        ramp_up: growth of the request rate, in place of `request_rate`.
        rate_changes: when the growing rate reached each whole number.
        probes: records of the small requests beside the load, which count nowhere else; None: none were asked for.
    """

    label: str
    target: str
    model: str
    records: tuple[RequestRecord, ...]
    start: float
    duration: float
    num_prompts: int
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    interrupted: bool = False
    goodput: Mapping[str, float] = field(default_factory=dict)
    client: ClientLoad = field(default_factory=ClientLoad)
    ramp_up: RampUp | None = None
    rate_changes: tuple[RateChange, ...] = ()
    probes: tuple[RequestRecord, ...] | None = None

    @property
    def ended(self) -> tuple[RequestRecord, ...]:
        """Records of requests that ended, well or not."""
        return tuple(record for record in self.records if record.error != CANCELLED)

    @property
    def good(self) -> tuple[RequestRecord, ...]:
        """Records of complete answers."""
        return tuple(record for record in self.records if record.is_ok)

    @property
    def errors(self) -> dict[str, int]:
        """Number of failed requests by kind, the most frequent first."""
        return dict(Counter(record.error for record in self.ended if record.error).most_common())

    def merged(self, others: Iterable["RunResult"], label: str) -> "RunResult":
        """Return one run with the records of this one and of `others`, which came later."""
        runs = (self, *others)
        return replace(
            self,
            label=label,
            records=tuple(record for run in runs for record in run.records),
            duration=sum(run.duration for run in runs),
            num_prompts=sum(run.num_prompts for run in runs),
            interrupted=any(run.interrupted for run in runs),
        )


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a table, and where it comes from.

    Attributes:
        kind: `measured` in this run; `computed` from measured values, such as 5 times the time of one;
            `forecast` by a source, without a measurement.
        note: key of `gateway.bench.texts` that explains the value or its absence, such as `n_too_small`.
    """

    value: CellValue
    kind: CellKind = "measured"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        key: key of its heading in `gateway.bench.texts`; also its name in JSON and CSV.
        unit: `s`, `ms`, `x` (ratio), `%`, `tok/s`, `req/s`, `n` (count), `key` (text cells are keys of
            `gateway.bench.texts`) or empty (text as it is).
        lower_is_better: None where neither direction is better.
    """

    key: str
    unit: str = ""
    lower_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a scenario; writers format it in the reader's language.

    `key` is the key of its title in `gateway.bench.texts`.
    """

    key: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A conclusion, with the rule that led to it.

    `key` and `rule` are keys of `gateway.bench.texts`, whose texts are filled in with `figures`.
    """

    key: str
    rule: str
    figures: Mapping[str, CellValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """Result of a scenario against one target.

    Attributes:
        date: local time, `YYYYMMDD-HHMMSS` as vLLM writes it.
        target, api, model, endpoint: what was measured. The address has no credentials.
        workload: everything that has to be equal for two results to be comparable, as scalars:
            lengths, limits, seed, and `requests_sha256`, a digest of all requests without the model.
        runs: the runs in the order in which they took place.
        headline: label of the run whose figures stand at the top of the JSON.
        figures: the scenario's own figures, for `--fail-if` and for comparisons.
        notes: what a reader has to know, as keys of `gateway.bench.texts`.
        metadata: the user's own facts about the measurement, by name.
    """

    scenario: str
    date: str
    target: str
    url: str
    api: str
    endpoint: str
    model: str
    workload: Mapping[str, CellValue]
    runs: tuple[RunResult, ...]
    headline: str
    tables: tuple[Table, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    figures: Mapping[str, CellValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    server: Mapping[str, CellValue] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def headline_run(self) -> RunResult:
        return next((run for run in self.runs if run.label == self.headline), self.runs[-1])

    @property
    def is_interrupted(self) -> bool:
        return any(run.interrupted for run in self.runs)
