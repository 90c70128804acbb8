"""Results of a comparison: two sides with their runs, and what was seen of the engine beside them. Pure."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from gateway.bench.quality_scores import SideQuality
from gateway.bench.result_json import from_json, run_from_json, run_to_json
from gateway.bench.results import CellValue, RunResult

SideName = Literal["A", "B"]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class EngineUse:
    """Facts seen of the engine during one run; None: not seen.

    Attributes:
        gpu_memory_percent, gpu_percent: means over the run and over the machine's GPUs; all programs count.
        kv_cache_percent: the highest value of vLLM's `vllm:kv_cache_usage_perc`.
        model_gib: memory of the loaded model, as Ollama's `/api/ps` says.
    """

    gpu_memory_percent: float | None = None
    gpu_percent: float | None = None
    kv_cache_percent: float | None = None
    model_gib: float | None = None


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One load of the model and the first request after it; None: not seen.

    Attributes:
        load_seconds: from asking for the load, or from starting the server, until it is ready.
        reason: key of why there is no load time.
    """

    load_seconds: float | None = None
    response_seconds: float | None = None
    tokens_per_second: float | None = None
    use: EngineUse = field(default_factory=EngineUse)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        rounds: one run for each round; a single one from a scenario's result.
        uses, cold: what was seen in each round; may be empty.
        server: versions, by the name of the program.
    """

    name: str
    url: str
    model: str
    api: str
    endpoint: str
    workload: Mapping[str, CellValue]
    rounds: tuple[RunResult, ...]
    uses: tuple[EngineUse, ...] = ()
    cold: tuple[ColdStart, ...] = ()
    quality: SideQuality | None = None
    server: Mapping[str, CellValue] = field(default_factory=dict)
    figures: Mapping[str, CellValue] = field(default_factory=dict)
    date: str = ""
    scenario: str = "compare"

    @property
    def title(self) -> str:
        """The model, and the server if it is known."""
        servers = ", ".join(f"{name} {version}".strip() for name, version in self.server.items())
        return f"{self.model} ({servers})" if servers else self.model

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "url": self.url,
            "model": self.model,
            "api": self.api,
            "endpoint": self.endpoint,
            "scenario": self.scenario,
            "workload": dict(self.workload),
            "server": dict(self.server),
            "figures": dict(self.figures),
            "date": self.date,
            "uses": [asdict(use) for use in self.uses],
            "cold": [asdict(cold) for cold in self.cold],
            "quality": None if self.quality is None else self.quality.to_json(),
            "rounds": [run_to_json(run) for run in self.rounds],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            quality = value.get("quality")
            return cls(
                **{
                    **value,
                    "rounds": tuple(map(run_from_json, value["rounds"])),
                    "uses": tuple(EngineUse(**use) for use in value["uses"]),
                    "cold": tuple(_cold(cold) for cold in value["cold"]),
                    "quality": None if quality is None else SideQuality.from_json(quality),
                }
            )
        except (KeyError, TypeError) as problem:
            raise ValueError(f"not a side of a comparison: {problem}") from problem


def _cold(value: Mapping[str, Any]) -> ColdStart:
    return ColdStart(**{**value, "use": EngineUse(**value["use"])})


@dataclass(frozen=True, slots=True)
class Comparison:
    """One or two measured sides.

    Attributes:
        in_turn: the sides took turns, round by round, so that rounds are pairs.
        notes: keys of remarks.
    """

    date: str
    sides: tuple[Side, ...]
    in_turn: bool
    notes: tuple[str, ...] = ()

    @property
    def a(self) -> Side:
        return self.sides[0]

    @property
    def b(self) -> Side | None:
        return self.sides[1] if len(self.sides) > 1 else None

    @property
    def runs(self) -> tuple[RunResult, ...]:
        return tuple(run for side in self.sides for run in side.rounds)


def side_of_file(value: Mapping[str, Any]) -> Side:
    """Return the side that a result file holds: of `gateway bench`, `vllm bench serve`, or a one-sided comparison.

    Raises:
        ValueError: it is none of these, or holds two sides.
    """
    if "sides" in value:
        if len(value["sides"]) != 1:
            raise ValueError("it holds two sides already; compare files of one side each")
        return Side.from_json(value["sides"][0])
    result = from_json(value)
    return Side(
        name=result.target,
        url=result.url,
        model=result.model,
        api=result.api,
        endpoint=result.endpoint,
        workload=result.workload or _vllm_workload(value),
        rounds=(result.headline_run,),
        server=result.server,
        figures=result.figures,
        date=result.date,
        scenario=result.scenario,
    )


def _vllm_workload(value: Mapping[str, Any]) -> dict[str, CellValue]:
    """Return what a result of vLLM tells about its workload; it has no digest of the requests."""
    known = ("num_prompts", "max_concurrency", "request_rate", "burstiness", "total_input_tokens")
    return {"scenario": "load", **{key: value.get(key) for key in known}}
