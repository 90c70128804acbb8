"""What a stand-in is told before it starts: its models, its speed, its limits, its faults."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

Kind = Literal["ollama", "vllm"]
Generation = Literal["0.33", "0.24"]
FaultKind = Literal["die", "error", "stall", "status", "truncate"]

# Families that Ollama serves one request at a time whatever OLLAMA_NUM_PARALLEL says (Ollama 0.33, server/sched.go).
SERIAL_FAMILIES = frozenset({"mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h"})


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a stand-in serves.

    `always_thinks` is a model that reasons even under `think: false`; `bare_json_calls` one that writes a tool call as plain JSON
    and not inside `<tool_call>`. `context_length` is in tokens.
    """

    name: str
    family: str = "llama"
    vision: bool = False
    tools: bool = False
    thinking: bool = False
    always_thinks: bool = False
    bare_json_calls: bool = False
    context_length: int = 4096

    @property
    def tagged(self) -> str:
        """The name as Ollama lists it, with its tag."""
        return self.name if ":" in self.name else f"{self.name}:latest"

    @property
    def is_serial(self) -> bool:
        return self.family in SERIAL_FAMILIES

    @classmethod
    def parse(cls, text: str) -> Self:
        """A model from `NAME[,vision][,tools][,thinking][,context=TOKENS][,family=NAME]`.

        Raises:
            ValueError: a word that is none of these.
        """
        name, *words = text.split(",")
        model = cls(name)
        for word in words:
            key, _, value = word.partition("=")
            match key:
                case "vision":
                    model = replace(model, vision=True, family="qwen3vl")
                case "tools":
                    model = replace(model, tools=True)
                case "thinking":
                    model = replace(model, thinking=True)
                case "context":
                    model = replace(model, context_length=int(value))
                case "family":
                    model = replace(model, family=value)
                case _:
                    raise ValueError(f"{word!r} says nothing about a model; expected vision, tools, thinking, context= or family=")
        return model


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong in a generation, once `after` tokens have left.

    `die` closes the connection, `error` fails in mid-stream as that engine does, `stall` sends no further byte, `status` answers `status`
    before anything else, `truncate` ends the body cleanly without its last word. It happens to the next `times` generations, for ever with 0.
    """

    kind: FaultKind
    after: int = 0
    times: int = 1
    status: int = 500

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Self:
        """A fault from the body of `POST /simulate/fault`. Raises ValueError where it is none."""
        kind = body.get("kind")
        if kind not in get_args(FaultKind):
            raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(FaultKind))}")
        numbers = {key: body[key] for key in ("after", "times", "status") if key in body}
        if not all(isinstance(number, int) for number in numbers.values()) or set(body) - {"kind", *numbers}:
            raise ValueError("a fault has kind, after, times and status, the last three whole numbers")
        return cls(kind, **numbers)  # type: ignore[arg-type]  # checked just above


OLLAMA_MODELS = (
    Model("qwen3-vl", family="qwen3vl", vision=True, tools=True),
    Model("qwen3-vl-thinking", family="qwen3vl", vision=True, tools=True, thinking=True, always_thinks=True),
    Model("llama"),
    Model("llama-tools", tools=True, bare_json_calls=True),
    Model("qwen3:8b", family="qwen3", tools=True, thinking=True, context_length=40960),
)
VLLM_MODELS = (Model("Qwen/Qwen3-VL-8B-Instruct", family="qwen3vl", vision=True, tools=True, context_length=32768),)


@dataclass(frozen=True, slots=True)
class Options:
    """How a stand-in behaves. Times are seconds; a speed of 0 is as fast as it goes.

    A vLLM serves one model: the first of `models`; further names there are its aliases.
    """

    kind: Kind
    models: tuple[Model, ...] = ()
    tokens_per_second: float = 0.0
    time_to_first_token: float = 0.0
    prefill_tokens_per_second: float = 0.0
    answer_tokens: int = 32
    faults: tuple[Fault, ...] = ()
    generation: Generation = "0.33"
    parallel: int = 1  # OLLAMA_NUM_PARALLEL
    load_seconds: float = 0.0
    max_queue: int = 512  # OLLAMA_MAX_QUEUE: counts only those who wait for a load
    max_num_seqs: int = 256
    reasoning_parser: bool = False
    tool_parser: bool = True
    api_key: str = ""

    @property
    def served(self) -> tuple[Model, ...]:
        return self.models or (OLLAMA_MODELS if self.kind == "ollama" else VLLM_MODELS)
