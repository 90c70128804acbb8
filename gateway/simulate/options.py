"""Options of a stand-in: its models, speed, limits and faults."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

Kind = Literal["ollama", "vllm"]
OllamaGeneration = Literal["0.33", "0.24"]
Template = Literal["any", "qwen3.5", "mistral", "gemma-2"]
FaultKind = Literal["die", "error", "garbage", "reset", "stall", "status", "truncate"]

# Families that Ollama serves one request at a time, whatever OLLAMA_NUM_PARALLEL says
# (Ollama 0.33, server/sched.go).
SERIAL_FAMILIES = frozenset(
    {"mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h"}
)

# The slowdown x with which five images at once take 397.2 s instead of 5 · 51 s, as measured on an
# older Ollama: 5 · 51 · (1 + 4 · x) = 397.2.
SEED_SLOWDOWN = (397.2 / (5 * 51.0) - 1) / 4


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a stand-in serves.

    Attributes:
        always_thinks: it reasons even under `think: false`.
        leaks: its engine returns the reasoning, from `<think>` to `</think>`, as content.
        bare_json_calls: it writes a tool call as plain JSON, not inside `<tool_call>`.
        context_length: tokens; the context of a vLLM, and the one that an Ollama loads by default.
        trained: the longest context that it can be loaded with, in tokens (0: `context_length`).
        size: bytes of memory.
        embedding: vector width of an embedding-only model (0: a generative model).
        matryoshka: a vLLM may shorten its vectors.
        reranks: a vLLM serves it as a reranker, and as nothing else.
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
    reranks: bool = False

    @property
    def longest(self) -> int:
        """Longest context that the model can be loaded with, in tokens."""
        return self.trained or self.context_length

    @property
    def tagged(self) -> str:
        """Name with its tag, as Ollama lists it."""
        return self.name if ":" in self.name else f"{self.name}:latest"

    @property
    def is_serial(self) -> bool:
        return self.family in SERIAL_FAMILIES

    @property
    def thinking_word(self) -> str:
        """Word by which the model's chat template on vLLM learns whether to think."""
        return "thinking" if self.family in ("deepseek", "granite") else "enable_thinking"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `NAME` followed by comma-separated options.

        Options: `vision`, `tools`, `thinking`, `leaks`, `context=TOKENS`, `trained=TOKENS`,
        `size=BYTES`, `family=NAME`, for embeddings `embedding=WIDTH` and `matryoshka`, and `reranks`.

        Raises:
            ValueError: an option is unknown.
        """
        name, *words = text.split(",")
        model = cls(name)
        for word in words:
            key, _, value = word.partition("=")
            match key:
                case "vision":
                    model = replace(model, vision=True, family="qwen3vl")
                case "tools" | "thinking" | "leaks" | "matryoshka":
                    flag: dict[str, Any] = {key: True}
                    model = replace(model, **flag)
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
                case "reranks":
                    model = replace(model, reranks=True, family="bert")
                case _:
                    expected = (
                        "vision, tools, thinking, leaks, context=, trained=, size=, family=, embedding=, matryoshka "
                        "or reranks"
                    )
                    raise ValueError(f"unknown model option {word!r}; expected {expected}")
        return model


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure of the next `times` generations (0: of all) after `after` tokens.

    With `every` above 1, only one in so many generations fails, and counts for `times`.

    Kinds: `die` closes the connection, and `reset` closes it with a TCP reset; `error` fails in
    mid-stream as that engine does; `garbage` answers 200 with a body that is not JSON; `stall` sends
    no further byte; `status` answers with `status` and nothing else; `truncate` ends the body
    cleanly, but without its final event.
    """

    kind: FaultKind
    after: int = 0
    times: int = 1
    status: int = 500
    every: int = 1

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Self:
        """Parse the body of `POST /simulate/fault`.

        Raises:
            ValueError: the body does not describe a fault.
        """
        kind = body.get("kind")
        if kind not in get_args(FaultKind):
            raise ValueError(f"unknown fault kind {kind!r}; expected one of {', '.join(get_args(FaultKind))}")
        numbers = {key: body[key] for key in ("after", "times", "status", "every") if key in body}
        if not all(isinstance(number, int) for number in numbers.values()) or set(body) - {"kind", *numbers}:
            raise ValueError("a fault takes kind, after, times, status and every; all but kind are integers")
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
    """Behaviour of a stand-in.

    Times are simulated seconds, each of which takes `time_scale` real seconds. A speed of 0 means
    as fast as possible. A vLLM serves one model, the first of `models`; the other names are aliases
    of it.
    """

    kind: Kind
    models: tuple[Model, ...] = ()
    time_scale: float = 1.0
    tokens_per_second: float = 0.0
    time_to_first_token: float = 0.0
    prefill_tokens_per_second: float = 0.0
    image_seconds: float = 0.0  # for each image, before the first token
    answer_tokens: int = 32
    repeat_word: str = "repeat"  # "repeat X" in the question makes the model repeat X without end
    faults: tuple[Fault, ...] = ()
    generation: OllamaGeneration = "0.33"
    parallel: int = 1  # OLLAMA_NUM_PARALLEL
    load_seconds: float = 0.0
    max_loaded: int = 3  # OLLAMA_MAX_LOADED_MODELS
    memory: int = 0  # bytes for all loaded models; 0: any number
    gpu: bool = False  # whether /api/ps shows the models in a GPU's memory
    max_queue: int = 512  # OLLAMA_MAX_QUEUE: requests that may wait for a load
    freeze_after: int = 0  # clients that leave a model at once and freeze it; 0: none do
    repeat_limit: int = 30  # equal tokens in a row after which Ollama aborts a reply; 0: never
    # Above 0, requests with images all run at once, each slowed down by this share for each other
    # one.
    image_slowdown: float = 0.0
    max_num_seqs: int = 256
    # Requests at once that fit into memory; with one more, all that run fail, as in a server that
    # batches whatever comes (Transformers). 0: any number fits.
    out_of_memory_above: int = 0
    gpu_share: float = 0.92  # --gpu-memory-utilization, reported in the metrics
    # A file that stands for a GPU with `gpu_memory` bytes, shared with other stand-ins. A vLLM holds its share of
    # it while it is awake, an Ollama the size of its loaded models. Empty: the stand-in has a GPU of its own.
    gpu_file: str = ""
    gpu_memory: int = 24 * 1024**3
    dev_mode: bool = False  # VLLM_SERVER_DEV_MODE: /sleep, /wake_up, /is_sleeping and /server_info exist
    sleep_mode: bool = False  # --enable-sleep-mode: /sleep frees memory
    sleep_seconds: float = 0.0
    wake_seconds: float = 0.0
    asleep: bool = False  # it sleeps at its start
    reasoning_parser: bool = False
    tool_parser: bool = True
    # As a vLLM allows: a forced call of a function without `strict` may have any JSON as arguments.
    loose_calls: bool = False
    template: Template = "any"  # family whose chat template refuses some conversations
    api_key: str = ""

    @property
    def served(self) -> tuple[Model, ...]:
        return self.models or (OLLAMA_MODELS if self.kind == "ollama" else VLLM_MODELS)

    def with_settings(self, settings: Iterable[str]) -> Self:
        """Return a copy with each `name=value` of `settings` applied.

        Fields may be numbers, strings or booleans (`yes` or `no`).

        Raises:
            ValueError: there is no such field, or the value does not have its type.
        """
        changes: dict[str, Any] = {}
        for setting in settings:
            name, given, value = setting.partition("=")
            now = getattr(self, name, None)
            if not given or name in ("kind", "generation") or not isinstance(now, (bool, int, float, str)):
                raise ValueError(f"unknown option {setting!r}; expected name=value")
            if isinstance(now, bool):
                if value not in ("yes", "no"):
                    raise ValueError(f"{setting!r}: {name} must be yes or no")
                changes[name] = value == "yes"
            elif name == "template" and value not in get_args(Template):
                raise ValueError(f"{setting!r}: template must be one of {', '.join(get_args(Template))}")
            else:
                changes[name] = type(now)(value)
        return replace(self, **changes)
