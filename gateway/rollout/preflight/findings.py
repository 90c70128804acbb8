"""Lays two sides of a tier beside each other: what a move from one to the other would break, and what a client would notice. Pure: no I/O."""

from collections.abc import Iterator
from math import inf
from typing import Literal, NamedTuple

from msgspec import Struct

from gateway.rollout.preflight.gpu_memory import GpuMemory
from gateway.rollout.preflight.probes import IN_TEXT, NONE_SEEN, NOT_FOLLOWED, Trait, Traits

Severity = Literal["breaks", "notices", "note", "fine"]
"""`breaks`: requests would fail that succeed now. `notices`: a client can see the difference. `note`: the operator's matter, or not known."""

GB = 1e9


class Finding(Struct, frozen=True):
    """One matter on both sides. `tier` is None for what concerns the backends; `words` is empty where there is nothing to say."""

    tier: str | None
    what: str
    severity: Severity
    backend: str
    value: str
    other: str | None = None
    other_value: str | None = None
    words: str = ""


class TierSide(Struct, frozen=True):
    """A tier on one backend. `fault` says why it cannot serve, empty: it can; `remark` what is amiss otherwise."""

    backend: str
    kind: str
    model: str
    traits: Traits
    fault: str = ""
    remark: str = ""
    context: int | None = None
    is_context_sure: bool = True


class BackendFacts(Struct, frozen=True):
    """A backend as far as its memory goes. `hosts` are the names in its addresses; `keeps`: its settings have Ollama keep models loaded."""

    name: str
    kind: str
    hosts: frozenset[str]
    is_up: bool
    keeps: bool
    memory: GpuMemory


class Capability(NamedTuple):
    """What is lost where a side has not what the other has."""

    what: str
    lost: Severity
    words: str
    hint: str = ""
    """Where that side is a vLLM."""


CAPABILITIES = (
    Capability("streaming", "breaks", "streams break off"),
    Capability("usage", "notices", "streams tell no token counts"),
    Capability(
        "reasoning", "notices", "no thought comes apart from the answer", "vLLM splits it off with --reasoning-parser"
    ),
    Capability(
        "tools",
        "breaks",
        "requests with tools are refused",
        "vLLM takes them with --enable-auto-tool-choice and --tool-call-parser",
    ),
    Capability("forced_tools", "breaks", "requests that force a tool are refused"),
    Capability("structured_output", "notices", "JSON Schemas are not followed"),
    Capability("vision", "breaks", "requests with images are refused"),
    Capability("parameters", "notices", "sampling parameters or log probabilities are refused"),
)
UNLIKE = {
    ("forced_tools", NOT_FOLLOWED): "a forced choice of tool is not followed",
    (
        "reasoning",
        IN_TEXT,
    ): "the model's thought stands in its answer's text (the gateway takes apart only what begins with <think>)",
}
"""Other words, by what was seen."""
UNASKED = Trait(None, "not asked")


def compare(tier: str, side: TierSide, other: TierSide | None) -> Iterator[Finding]:
    """What `side` would change for the clients of `tier`, who are served by `other` now; None: nobody else could."""
    if side.fault:
        yield Finding(
            tier,
            "serves",
            "breaks",
            side.backend,
            side.fault,
            *_named(other),
            words=f"{side.backend} cannot serve {side.model!r}: {side.fault}",
        )
        return
    answers = side.traits.get("answers", UNASKED)
    severity: Severity = "fine" if answers.has else "note" if answers.has is None else "breaks"
    words = "" if answers.has else f"{side.backend} does not answer for {side.model!r}: {answers.value}"
    yield Finding(tier, "serves", severity, side.backend, answers.value, *_named(other), words=words)
    if side.remark:
        yield Finding(tier, "servers", "note", side.backend, side.remark, words=f"of {side.backend}: {side.remark}")
    yield _context(tier, side, other)
    if answers.has:
        for matter in CAPABILITIES:
            yield _matter(tier, matter, side, other)


def _named(other: TierSide | None, value: str | None = None) -> tuple[str | None, str | None]:
    if other is None:
        return None, None
    return other.backend, value if value is not None else other.fault or other.traits.get("answers", UNASKED).value


def _context(tier: str, side: TierSide, other: TierSide | None) -> Finding:
    here, there = side.context, other.context if other else None
    values = (side.backend, _tokens(side), *_named(other, _tokens(other) if other else ""))
    if here is None or there is None or here >= there or other is None:
        return Finding(
            tier,
            "context",
            "note" if here is None else "fine",
            *values,
            words="" if here else "its context length is not known",
        )
    if not (side.is_context_sure and other.is_context_sure):
        return Finding(
            tier,
            "context",
            "note",
            *values,
            words="the context may be smaller: a model that Ollama has not loaded tells only the longest",
        )
    return Finding(
        tier,
        "context",
        "notices",
        *values,
        words=f"prompts of more than {here} tokens are refused (context_length_exceeded)",
    )


def _tokens(side: TierSide) -> str:
    return (
        "not known"
        if side.context is None
        else f"{side.context} tokens"
        if side.is_context_sure
        else f"up to {side.context} tokens"
    )


def _matter(tier: str, matter: Capability, side: TierSide, other: TierSide | None) -> Finding:
    here, there = _trait(side, matter.what), UNASKED if other is None else _trait(other, matter.what)
    values = (side.backend, here.value, *_named(other, there.value))
    if here.has or _is_as_before(matter.what, here, there):
        return Finding(tier, matter.what, "fine", *values)
    if here.has is None and here.value != NONE_SEEN:
        return Finding(
            tier, matter.what, "note", *values, words=f"whether {matter.words} could not be found out: {here.value}"
        )
    severity = matter.lost
    if severity == "breaks" and matter.what != "streaming" and (there.has is None or here.value == NOT_FOLLOWED):
        severity = "notices"
    words = UNLIKE.get((matter.what, here.value), matter.words)
    return Finding(
        tier,
        matter.what,
        severity,
        *values,
        words=f"{words}; {matter.hint}" if matter.hint and side.kind == "vllm" else words,
    )


def _trait(side: TierSide, what: str) -> Trait:
    """What there was no time for is not known, for the reason that ended the look."""
    return side.traits.get(what) or Trait(None, side.traits.get("unfinished", UNASKED).value)


def _is_as_before(what: str, here: Trait, there: Trait) -> bool:
    """Nobody loses what the other side has not either. Thought in the text is another matter than no thought at all."""
    if what == "reasoning":
        return here.value == NONE_SEEN and not there.has
    return here.has is False and there.has is False


# The way back, and room on the GPU


def rollback_finding(tier: str, model: str | None, back: BackendFacts, loaded_seconds: float | None) -> Finding:
    """What a rollback to `back` would meet. `loaded_seconds`: until Ollama unloads the model; inf: never, 0: it is not loaded, None: not known."""
    if model is None:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "no model",
            words=f"a rollback leaves it where it is: it has no model on {back.name}",
        )
    if not back.is_up:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "down",
            words=f"{back.name} does not answer now: a rollback would lead to nothing",
        )
    if back.kind != "ollama":
        return Finding(tier, "rollback", "fine", back.name, "up")
    if loaded_seconds == 0:
        words = f"{back.name} has not loaded {model!r}: after a rollback the first request waits for that"
        return Finding(tier, "rollback", "note", back.name, "not loaded", words=words)
    if loaded_seconds == inf or back.keeps:
        return Finding(tier, "rollback", "fine", back.name, "stays loaded")
    if loaded_seconds is None:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "not known",
            words=f"{back.name} does not tell whether {model!r} is loaded",
        )
    words = f"{back.name} unloads {model!r} {_span(loaded_seconds)} from now, unless it is asked: after that a rollback begins with a load. "
    return Finding(
        tier,
        "rollback",
        "note",
        back.name,
        f"loaded for {_span(loaded_seconds)}",
        words=f"{words}`keep_alive: -1` of that backend keeps it loaded",
    )


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def shared_gpu(target: BackendFacts, other: BackendFacts) -> Finding | None:
    """Whether both fit the GPU at once, as far as they tell; None where that is no question."""
    if {target.kind, other.kind} != {"ollama", "vllm"}:
        return None
    ollama, vllm = (target, other) if target.kind == "ollama" else (other, target)
    names = (target.name, _holds(target), other.name, _holds(other))
    if not target.hosts & other.hosts:
        return Finding(None, "gpu", "fine", *names, words="")
    return Finding(
        None,
        "gpu",
        "note",
        *names,
        words=f"{ollama.name} and {vllm.name} are on one host, perhaps on one GPU: {_fit(ollama, vllm)}",
    )


def _fit(ollama: BackendFacts, vllm: BackendFacts) -> str:
    held, share = ollama.memory.in_gpu, vllm.memory.share
    if not vllm.is_up:
        return (
            f"{vllm.name} is down, and may be unable to start while {ollama.name} holds {held / GB:.1f} GB there"
            if held
            else f"{vllm.name} is down"
        )
    if not ollama.is_up:
        return (
            f"{ollama.name} is down; if both do not fit, the way back is to stop {vllm.name} and to start {ollama.name}"
        )
    if ollama.memory.loaded is None or not ollama.memory.loaded:
        given = "an unknown part" if share is None else f"up to {share:.0%}"
        return (
            f"{vllm.name} takes {given} of its GPU's memory, and {ollama.name} has nothing loaded. Whether a model fits beside it is not known; "
            "if not, a rollback is slow (in main memory) until vLLM is stopped"
        )
    partly = [item for item in ollama.memory.loaded if 0 < item.in_gpu < item.size]
    if partly:
        part = partly[0]
        return f"{ollama.name} has only {part.in_gpu / part.size:.0%} of {part.name!r} there: there was no room for all of it, and it is slow"
    if not held:
        return f"{ollama.name} has its models in main memory: it has no GPU, or no room there"
    if share is None or share == 1:
        return f"{ollama.name} holds {held / GB:.1f} GB there, and {vllm.name} runs beside it: both fit now"
    return (
        f"{ollama.name} holds {held / GB:.1f} GB there and {vllm.name} may take {share:.0%}: together that needs {held / (1 - share) / GB:.0f} GB "
        "or more. Both run now; whether they still fit after a reload is not known"
    )


def _holds(place: BackendFacts) -> str:
    if not place.is_up:
        return "down"
    if place.kind == "ollama":
        return "not known" if place.memory.loaded is None else f"{place.memory.in_gpu / GB:.1f} GB"
    return (
        "asleep"
        if place.memory.is_asleep
        else "not known"
        if place.memory.share is None
        else f"{place.memory.share:.0%}"
    )
