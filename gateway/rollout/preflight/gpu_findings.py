"""Findings of the preflight check about a GPU that holds one engine at a time."""

import asyncio
import shutil
from collections.abc import Iterator, Mapping

from gateway.config import Settings
from gateway.rollout.gpu_state import GpuState
from gateway.rollout.gpu_times import Expected
from gateway.rollout.preflight.findings import GB, Finding
from gateway.rollout.preflight.gpu_memory import GpuMemory
from gateway.upstream.gpu_engine import GpuEngine


async def gpu_findings(
    settings: Settings, gpu: GpuState, target: str, memory: Mapping[str, GpuMemory]
) -> list[Finding]:
    """Return what a switch of the GPU to `target` would meet: obstacles, refused requests, memory and time."""
    found = [finding for name in gpu.engines for finding in _command_findings(settings, name)]
    found += await asyncio.gather(*(_engine_finding(engine, target) for engine in gpu.engines.values()))
    found += _refused(settings, target)
    found += [_memory_finding(gpu, target, memory), _time_finding(gpu, target)]
    return found


async def _engine_finding(engine: GpuEngine, target: str) -> Finding:
    """Return whether the engine can free the GPU: in the switch, or in the rollback after it."""
    backend = engine.backend
    how = "command" if backend.settings.stop else "unloads its models" if backend.kind == "ollama" else "sleeps"
    if why := await engine.obstacle():
        when = "a rollback after the switch would fail" if backend.name == target else "the switch would be taken back"
        words = f"{backend.name} cannot free the GPU, so that {when}: {why}"
        return Finding(None, "gpu_free", "breaks", backend.name, "not possible", words=words)
    if backend.name == target and not backend.settings.start and not await engine.answers():
        words = f"{target} does not answer, and has no start command: the switch would be taken back after wake_timeout"
        return Finding(None, "gpu_free", "breaks", target, "does not answer", words=words)
    return Finding(None, "gpu_free", "fine", backend.name, how)


def _command_findings(settings: Settings, name: str) -> Iterator[Finding]:
    backend = settings.backends[name]
    for key, words in (("stop", backend.stop), ("start", backend.start)):
        if words is not None and shutil.which(words[0]) is None:
            text = f"the {key} command of {name} cannot run: its program is not found on the gateway's machine"
            yield Finding(None, f"gpu_{key}", "breaks", name, "not found", words=text)


def _refused(settings: Settings, target: str) -> Iterator[Finding]:
    """Yield what is refused once `target` has the GPU: what the settings pin to another engine on it."""
    others = settings.on_gpu - {target}
    for tier in settings.tiers.values():
        if tier.backend in others:
            words = f"it is pinned to {tier.backend}, whose engine would sleep: its requests are refused"
            yield Finding(tier.name, "serves", "breaks", target, "refused", words=words)
    for section, items in (("embeddings", settings.embeddings), ("rerankers", settings.rerankers)):
        names = [name for name, item in items.items() if item.backend in others]
        if names:
            words = f"requests for {section} ({', '.join(names)}) are refused, because their engine would sleep"
            yield Finding(None, section, "breaks", target, "refused", words=words)


def _memory_finding(gpu: GpuState, target: str, memory: Mapping[str, GpuMemory]) -> Finding:
    """Return what the engines report of the GPU's memory."""
    parts = []
    for name in gpu.engines:
        found = memory.get(name, GpuMemory())
        if found.loaded and found.in_gpu:
            parts.append(f"{name} holds {found.in_gpu / GB:.1f} GB")
        elif found.is_asleep:
            parts.append(f"{name} sleeps")
        elif found.share is not None:
            parts.append(f"{name} takes up to {found.share:.0%}")
    value = "; ".join(parts) or "unknown"
    return Finding(None, "gpu_memory", "note", target, value, words=f"GPU memory: {value}" if parts else "")


def _time_finding(gpu: GpuState, target: str) -> Finding:
    expected, back = gpu.expected_to(target), gpu.settings.rollback_to
    words = f"a switch to {target} takes {shown(expected)}, in which requests wait"
    if back != target and back in gpu.engines:
        again = gpu.times.expected("free", target, {}) + gpu.wake_time(back)
        words += f"; a rollback to {back} takes {shown(again)}"
    return Finding(None, "gpu_time", "note", target, shown(expected), words=words)


def shown(expected: Expected) -> str:
    """Return an expected time in words."""
    if expected.seconds is None:
        return "an unknown time"
    return f"about {expected.seconds:.1f} s ({expected.basis})" if expected.basis != "none" else "no time"
