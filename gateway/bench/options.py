"""Options of a benchmark, checked. Names and meanings are those of `vllm bench serve` where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.bench.arrivals import RampUp
from gateway.bench.metrics import DEFAULT_PERCENTILES
from gateway.bench.recording import Recording
from gateway.bench.target import BenchRequest, Target


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of a scenario.

    Attributes:
        num_prompts: requests to send; None: the scenario's default.
        levels: numbers of requests, files or users at once; empty: the scenario's default.
        request_rate: requests per second; None: as fast as `max_concurrency` allows.
        ramp_up: growth of the request rate, in place of `request_rate`.
        probe_rate: small requests per second beside the load; None: none.
        input_len: length of made-up prompts in tokens; None: the built-in questions.
        output_len: longest answer in tokens; None: the scenario's default, or what a dataset says.
        dataset: requests of a JSONL file, empty without one.
        languages: languages of the built-in questions.
        models: models of `multi-model`.
        parameters: further fields of every request's body.
        timeout: seconds for one answer; None: the scenario's default.
        realtime_ttft, realtime_speed: what `users` calls real time: seconds to the first token at most,
            and tokens per second after it at least.
        wait: seconds for a whole answer that `users` calls acceptable.
        max_users: most users that `users` tries.
        replay: recorded traffic that `load` sends again, `speed` times as fast as it came.
        names_model: the model was named, and not taken from the server's list.
        metadata: facts about the measurement for its result, by name.
        forecasts: by the key of a row, what a plan or a source expects; shown beside what is measured.
    """

    target: Target
    num_prompts: int | None = None
    levels: tuple[int, ...] = ()
    max_concurrency: int | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    ramp_up: RampUp | None = None
    probe_rate: float | None = None
    goodput: Mapping[str, float] = field(default_factory=dict)
    input_len: int | None = None
    output_len: int | None = None
    dataset: tuple[BenchRequest, ...] = field(default=(), repr=False)
    languages: tuple[str, ...] = ("ko",)
    models: tuple[str, ...] = ()
    image_folder: Path | None = None
    image_size: int = 512
    seed: int = 0
    num_warmups: int = 1
    stream: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    duration: float = 600.0
    window: float = 60.0
    rounds: int = 2
    realtime_ttft: float = 2.0
    realtime_speed: float = 5.0
    wait: float = 30.0
    max_users: int = 64
    metadata: Mapping[str, str] = field(default_factory=dict)
    forecasts: Mapping[str, str] = field(default_factory=dict)
    replay: Recording | None = field(default=None, repr=False)
    speed: float = 1.0
    names_model: bool = True
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES
