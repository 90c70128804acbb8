"""Findings of the preflight check: compares two sides of a tier.

A finding says what a move would break, or what clients would notice. Pure: no I/O.
"""

from collections.abc import Iterator
from math import inf
from typing import Literal, NamedTuple

from msgspec import Struct

from gateway.rollout.preflight.gpu_memory import GpuMemory
from gateway.rollout.preflight.probes import IN_TEXT, NONE_SEEN, NOT_FOLLOWED, Trait, Traits

Severity = Literal["breaks", "notices", "note", "fine"]
"""`breaks`: requests that succeed now would fail. `notices`: clients can see a difference. `note`:
for the operator, or unknown. `fine`: as good as the other side, or better."""

GB = 1e9


class Finding(Struct, frozen=True):
    """One result of the check, with the values of both sides.

    `tier` is None if the finding is about the backends. `words` is empty if there is nothing to
    say.
    """

    tier: str | None
    what: str
    severity: Severity
    backend: str
    value: str
    other: str | None = None
    other_value: str | None = None
    words: str = ""


class TierSide(Struct, frozen=True):
    """A tier on one backend.

    `fault` says why the backend cannot serve it; empty if it can. `remark` names other problems.
    """

    backend: str
    kind: str
    model: str
    traits: Traits
    fault: str = ""
    remark: str = ""
    context: int | None = None
    is_context_sure: bool = True


class BackendFacts(Struct, frozen=True):
    """A backend and its memory.

    `hosts` are the host names in its addresses. `keeps_loaded` is true if its settings make Ollama
    keep models loaded.
    """

    name: str
    kind: str
    hosts: frozenset[str]
    is_up: bool
    keeps_loaded: bool
    memory: GpuMemory


class Capability(NamedTuple):
    """A capability, and what its loss means if the other side has it."""

    what: str
    lost: Severity
    words: str
    hint: str = ""
    """Advice if the side without it is a vLLM."""


CAPABILITIES = (
    Capability("streaming", "breaks", "streams break off"),
    Capability("usage", "notices", "streams report no token counts"),
    Capability(
        "reasoning", "notices", "answers have no separate reasoning", "vLLM separates it with --reasoning-parser"
    ),
    Capability(
        "tools",
        "breaks",
        "requests with tools are refused",
        "vLLM accepts them with --enable-auto-tool-choice and --tool-call-parser",
    ),
    Capability("forced_tools", "breaks", "requests that force a tool are refused"),
    Capability("structured_output", "notices", "JSON Schemas are not followed"),
    Capability("vision", "breaks", "requests with images are refused"),
    Capability("parameters", "notices", "sampling parameters or log probabilities are refused"),
    Capability("conversations", "breaks", "conversations whose roles do not take turns are refused"),
)
WORDS_BY_VALUE = {
    ("forced_tools", NOT_FOLLOWED): "a forced tool choice is not followed",
    (
        "reasoning",
        IN_TEXT,
    ): "reasoning is part of the answer's text (the gateway separates only text that begins with <think>)",
}
"""Words for a particular value of a capability."""
NOT_PROBED = Trait(None, "not probed")


def compare(tier: str, side: TierSide, other: TierSide | None) -> Iterator[Finding]:
    """Yield what changes for the clients of `tier` if `side` serves it in place of `other`.

    `other` is None if no other backend could serve the tier.
    """
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
    answers = side.traits.get("answers", NOT_PROBED)
    severity: Severity = "fine" if answers.has else "note" if answers.has is None else "breaks"
    does_not = "was not asked" if answers.has is None else "does not answer requests"
    words = "" if answers.has else f"{side.backend} {does_not} for {side.model!r}: {answers.value}"
    yield Finding(tier, "serves", severity, side.backend, answers.value, *_named(other), words=words)
    if side.remark:
        yield Finding(
            tier, "servers", "note", side.backend, side.remark, words=f"servers of {side.backend}: {side.remark}"
        )
    yield _context(tier, side, other)
    if answers.has:
        for capability in CAPABILITIES:
            yield _capability(tier, capability, side, other)


def _named(other: TierSide | None, value: str | None = None) -> tuple[str | None, str | None]:
    if other is None:
        return None, None
    return other.backend, value if value is not None else other.fault or other.traits.get("answers", NOT_PROBED).value


def _context(tier: str, side: TierSide, other: TierSide | None) -> Finding:
    here, there = side.context, other.context if other else None
    values = (side.backend, _tokens(side), *_named(other, _tokens(other) if other else ""))
    if here is None or there is None or here >= there or other is None:
        return Finding(
            tier,
            "context",
            "note" if here is None else "fine",
            *values,
            words="" if here else "its context length is unknown",
        )
    if not (side.is_context_sure and other.is_context_sure):
        return Finding(
            tier,
            "context",
            "note",
            *values,
            words="the context may be smaller: of a model that is not loaded, Ollama reports only the maximum",
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
        "unknown"
        if side.context is None
        else f"{side.context} tokens"
        if side.is_context_sure
        else f"up to {side.context} tokens"
    )


def _capability(tier: str, capability: Capability, side: TierSide, other: TierSide | None) -> Finding:
    here, there = _trait(side, capability.what), NOT_PROBED if other is None else _trait(other, capability.what)
    values = (side.backend, here.value, *_named(other, there.value))
    if here.has or _is_as_before(capability.what, here, there):
        return Finding(tier, capability.what, "fine", *values)
    if here.has is None and here.value != NONE_SEEN:
        return Finding(
            tier, capability.what, "note", *values, words=f"it is unknown whether {capability.words}: {here.value}"
        )
    severity = capability.lost
    if severity == "breaks" and capability.what != "streaming" and (there.has is None or here.value == NOT_FOLLOWED):
        severity = "notices"
    words = WORDS_BY_VALUE.get((capability.what, here.value), capability.words)
    return Finding(
        tier,
        capability.what,
        severity,
        *values,
        words=f"{words}; {capability.hint}" if capability.hint and side.kind == "vllm" else words,
    )


def _trait(side: TierSide, what: str) -> Trait:
    """Return a trait of `side`; unknown, and why, if the probes ended before it."""
    return side.traits.get(what) or Trait(None, side.traits.get("unfinished", NOT_PROBED).value)


def _is_as_before(what: str, here: Trait, there: Trait) -> bool:
    """Return whether nothing is lost, because the other side does not have the capability either.

    Reasoning in the answer's text is not the same as no reasoning at all.
    """
    if what == "reasoning":
        return here.value == NONE_SEEN and not there.has
    return here.has is False and there.has is False


# Rollback and GPU memory


def rollback_finding(tier: str, model: str | None, back: BackendFacts, loaded_seconds: float | None) -> Finding:
    """Return what a rollback to `back` would find.

    `loaded_seconds` is the time until Ollama unloads the model: inf for never, 0 if it is not
    loaded, None if that is unknown.
    """
    if model is None:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "no model",
            words=f"a rollback does not move it: it has no model on {back.name}",
        )
    if not back.is_up:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "down",
            words=f"{back.name} does not answer: requests would fail after a rollback",
        )
    if back.kind != "ollama":
        return Finding(tier, "rollback", "fine", back.name, "up")
    if loaded_seconds == 0:
        words = f"{back.name} has not loaded {model!r}: after a rollback, the first request waits for the load"
        return Finding(tier, "rollback", "note", back.name, "not loaded", words=words)
    if loaded_seconds == inf or back.keeps_loaded:
        return Finding(tier, "rollback", "fine", back.name, "stays loaded")
    if loaded_seconds is None:
        return Finding(
            tier,
            "rollback",
            "note",
            back.name,
            "unknown",
            words=f"{back.name} does not report whether {model!r} is loaded",
        )
    words = (
        f"{back.name} unloads {model!r} in {_duration(loaded_seconds)} if no request comes; after that, a rollback "
        "begins with a load. Set `keep_alive: -1` on that backend to keep it loaded"
    )
    return Finding(tier, "rollback", "note", back.name, f"loaded for {_duration(loaded_seconds)}", words=words)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def shared_gpu(target: BackendFacts, other: BackendFacts) -> Finding | None:
    """Return whether an Ollama and a vLLM fit into one GPU, as far as they report; else None."""
    if {target.kind, other.kind} != {"ollama", "vllm"}:
        return None
    ollama, vllm = (target, other) if target.kind == "ollama" else (other, target)
    names = (target.name, _memory_use(target), other.name, _memory_use(other))
    if not target.hosts & other.hosts:
        return Finding(None, "gpu", "fine", *names, words="")
    return Finding(
        None,
        "gpu",
        "note",
        *names,
        words=f"{ollama.name} and {vllm.name} are on one host and may share a GPU: {_fit(ollama, vllm)}",
    )


def _fit(ollama: BackendFacts, vllm: BackendFacts) -> str:
    held, share = ollama.memory.in_gpu, vllm.memory.share
    if not vllm.is_up:
        return (
            f"{vllm.name} is down, and may be unable to start while {ollama.name} holds {held / GB:.1f} GB of the GPU"
            if held
            else f"{vllm.name} is down"
        )
    if not ollama.is_up:
        return f"{ollama.name} is down; if both do not fit, stop {vllm.name} and start {ollama.name} to roll back"
    if ollama.memory.loaded is None or not ollama.memory.loaded:
        given = "an unknown part" if share is None else f"up to {share:.0%}"
        return (
            f"{vllm.name} takes {given} of its GPU's memory, and {ollama.name} has no model loaded. It is unknown "
            "whether a model fits beside it; if not, a rollback is slow (in main memory) until vLLM is stopped"
        )
    partly = [item for item in ollama.memory.loaded if 0 < item.in_gpu < item.size]
    if partly:
        part = partly[0]
        return (
            f"{ollama.name} has only {part.in_gpu / part.size:.0%} of {part.name!r} in GPU memory, because the rest "
            "does not fit: it is slow"
        )
    if not held:
        return f"{ollama.name} keeps its models in main memory, so it has no GPU or no room on it"
    if share is None or share == 1:
        return f"{ollama.name} holds {held / GB:.1f} GB of GPU memory, and {vllm.name} runs beside it: both fit now"
    return (
        f"{ollama.name} holds {held / GB:.1f} GB of GPU memory and {vllm.name} may take {share:.0%}: together they "
        f"need {held / (1 - share) / GB:.0f} GB or more. Both run now; it is unknown whether they fit after a reload"
    )


def _memory_use(backend: BackendFacts) -> str:
    if not backend.is_up:
        return "down"
    if backend.kind == "ollama":
        return "unknown" if backend.memory.loaded is None else f"{backend.memory.in_gpu / GB:.1f} GB"
    return (
        "asleep"
        if backend.memory.is_asleep
        else "unknown"
        if backend.memory.share is None
        else f"{backend.memory.share:.0%}"
    )
