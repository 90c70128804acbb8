"""What a stand-in is told before it starts: its models, its speed, its limits, its faults."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

Kind = Literal["ollama", "vllm"]
OllamaGeneration = Literal["0.33", "0.24"]
FaultKind = Literal["die", "error", "stall", "status", "truncate"]

# Families that Ollama serves one request at a time whatever OLLAMA_NUM_PARALLEL says (Ollama 0.33, server/sched.go).
SERIAL_FAMILIES = frozenset(
    {"mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h"}
)

# What makes five pictures at once take 397.2 s instead of five times 51 s, as measured on an older Ollama: 5 · 51 · (1 + 4 · x) = 397.2.
SEED_SLOWDOWN = (397.2 / (5 * 51.0) - 1) / 4


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a stand-in serves.

    `always_thinks` is a model that reasons even under `think: false`; `leaks` one whose reasoning, from `<think>` to `</think>`, its engine
    takes for a part of the answer; `bare_json_calls` one that writes a tool call as plain JSON
    and not inside `<tool_call>`. `context_length` is what an Ollama loads it with unless asked otherwise and a vLLM's whole context, in tokens;
    `trained` is the longest that it could have (0: the same). `size` is bytes of memory. `embedding` is the width of the vectors of a model that
    makes embeddings and nothing else (0: one that answers), `matryoshka` says that a vLLM may cut them.
    """

    name: str
    family: str = "llama"
    vision: bool = False
    tools: bool = False
    thinking: bool = False
    always_thinks: bool = False
    leaks: bool = False
    bare_json_calls: bool = False
    context_length: int = 4096
    trained: int = 0
    size: int = 96364133
    embedding: int = 0
    matryoshka: bool = False

    @property
    def longest(self) -> int:
        """The longest context that it can be loaded with."""
        return self.trained or self.context_length

    @property
    def tagged(self) -> str:
        """The name as Ollama lists it, with its tag."""
        return self.name if ":" in self.name else f"{self.name}:latest"

    @property
    def is_serial(self) -> bool:
        return self.family in SERIAL_FAMILIES

    @classmethod
    def parse(cls, text: str) -> Self:
        """A model from `NAME[,vision][,tools][,thinking][,leaks][,context=TOKENS][,trained=TOKENS][,size=BYTES][,family=NAME]`
        or, for embeddings, with `[,embedding=WIDTH][,matryoshka]`.

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
                case "leaks":
                    model = replace(model, leaks=True)
                case "context":
                    model = replace(model, context_length=int(value))
                case "trained":
                    model = replace(model, trained=int(value))
                case "size":
                    model = replace(model, size=int(value))
                case "family":
                    model = replace(model, family=value)
                case "embedding":
                    model = replace(model, embedding=int(value), family="bert")
                case "matryoshka":
                    model = replace(model, matryoshka=True)
                case _:
                    expected = (
                        "vision, tools, thinking, leaks, context=, trained=, size=, family=, embedding= or matryoshka"
                    )
                    raise ValueError(f"{word!r} says nothing about a model; expected {expected}")
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
    """How a stand-in behaves. Times are seconds of its own time, of which each takes `time_scale` real ones; a speed of 0 is as fast as it goes.

    A vLLM serves one model: the first of `models`; further names there are its aliases.
    """

    kind: Kind
    models: tuple[Model, ...] = ()
    time_scale: float = 1.0
    tokens_per_second: float = 0.0
    time_to_first_token: float = 0.0
    prefill_tokens_per_second: float = 0.0
    image_seconds: float = 0.0  # for each picture, before the first token
    answer_tokens: int = 32
    repeat_word: str = "repeat"  # a question with this and another word is answered by that other word without an end
    faults: tuple[Fault, ...] = ()
    generation: OllamaGeneration = "0.33"
    parallel: int = 1  # OLLAMA_NUM_PARALLEL
    load_seconds: float = 0.0
    max_loaded: int = 3  # OLLAMA_MAX_LOADED_MODELS
    memory: int = 0  # bytes for all loaded models; 0: any number
    gpu: bool = False  # whether /api/ps shows the models in a GPU's memory
    max_queue: int = 512  # OLLAMA_MAX_QUEUE: counts only those who wait for a load
    repeat_limit: int = 30  # Ollama gives up a reply after more equal tokens than this; 0: never
    image_slowdown: float = 0.0  # above 0, requests with pictures run all at once, each slower by this part for each other: see SEED_SLOWDOWN
    max_num_seqs: int = 256
    gpu_share: float = 0.92  # --gpu-memory-utilization, as the metrics tell it
    asleep: bool = False  # as the metrics tell it
    reasoning_parser: bool = False
    tool_parser: bool = True
    loose_calls: bool = (
        False  # a forced call of a function that is not `strict` has any JSON for arguments, as a vLLM allows
    )
    api_key: str = ""

    @property
    def served(self) -> tuple[Model, ...]:
        return self.models or (OLLAMA_MODELS if self.kind == "ollama" else VLLM_MODELS)

    def with_settings(self, settings: Iterable[str]) -> Self:
        """These options with some changed, each given as `name=value` for a field that is a number, a word or yes/no.

        Raises:
            ValueError: no such field, or a value that is not of its kind.
        """
        changes: dict[str, Any] = {}
        for setting in settings:
            name, given, value = setting.partition("=")
            now = getattr(self, name, None)
            if not given or name in ("kind", "generation") or not isinstance(now, (bool, int, float, str)):
                raise ValueError(f"{setting!r} sets nothing; expected name=value")
            if isinstance(now, bool):
                if value not in ("yes", "no"):
                    raise ValueError(f"{setting!r}: {name} is yes or no")
                changes[name] = value == "yes"
            else:
                changes[name] = type(now)(value)
        return replace(self, **changes)
