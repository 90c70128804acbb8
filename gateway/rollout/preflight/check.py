"""The preflight check before a switch: what would break, and what clients would notice.

It probes the backend that is to serve and the one that serves now. It runs in the gateway, since
only the gateway may be able to reach the backends. It spends a few tokens, and moves no tier and no
circuit breaker. An Ollama that is not to serve is only asked for its lists, which tell what it can
do: no model is loaded there, and no request waits for it.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from gateway.chat.parameter_policy import ParameterPolicy
from gateway.config import Settings, Tier
from gateway.errors import ClientLeft, Conflict, InvalidRequest, ShuttingDown
from gateway.relay.context import RelayContext
from gateway.relay.route import Route
from gateway.rollout.assignment import TierRoute
from gateway.rollout.gpu_state import GpuState
from gateway.rollout.preflight import gpu_memory
from gateway.rollout.preflight.findings import BackendFacts, Finding, TierSide, compare, rollback_finding, shared_gpu
from gateway.rollout.preflight.gpu_findings import gpu_findings
from gateway.rollout.preflight.gpu_memory import GpuMemory, LoadedModel
from gateway.rollout.preflight.probes import YES, CapabilityProbe, Trait, Traits, reported_trait
from gateway.rollout.state import Rollout
from gateway.telemetry.exchange import CHAT
from gateway.upstream.backend import Backend

SECONDS, LEAST, LONGEST = 30.0, 1.0, 600.0
"""Time limit of a check, in seconds: the default, and the bounds of what a caller may set."""
MEMORY_SHARE, MIN_MEMORY_SECONDS = 0.25, 0.2
"""Share of the remaining time for reading the memory, so that a server that hangs in this is still
probed; and the least, in seconds."""
MAX_LISTED = 5
"""Models that a finding lists."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Pair(Struct, frozen=True):
    """A tier that would move, and the backend that serves it now or would after a rollback.

    `other` is None if no other backend has a model for the tier.
    """

    tier: Tier
    other: str | None


class PreflightCheck:
    """One check of a move to `target`. `deadline` is on the event loop's clock."""

    def __init__(
        self,
        settings: Settings,
        context: RelayContext,
        target: Backend,
        pairs: list[Pair],
        deadline: float,
        gpu: GpuState | None = None,
    ) -> None:
        self._gpu = gpu
        self._settings = settings
        self._context = context
        self._target = target
        self._pairs = pairs
        self._deadline = deadline
        self._memory: dict[str, GpuMemory] = {}
        self._traits: dict[tuple[str, str], Traits] = {}
        """Traits by tier and backend."""

    async def run(self) -> list[Finding]:
        names = dict.fromkeys(
            [self._target.name, *(pair.other for pair in self._pairs if pair.other), self._settings.rollback_to]
        )
        backends = [self._context.backends[name] for name in names]
        await self._read_memory(backends)
        unloaded = {pair.tier.name for pair in self._pairs if self._is_unloaded(pair.tier)}
        await asyncio.gather(*(self._probe_models(backend) for backend in backends))
        if unloaded:  # the model may be loaded now, and its context known
            await self._read_memory([self._target])
        findings = [
            finding for pair in self._pairs for finding in self._tier_findings(pair, pair.tier.name in unloaded)
        ]
        if self._target.name in self._settings.on_gpu and self._gpu is not None:
            return findings + await gpu_findings(self._settings, self._gpu, self._target.name, self._memory)
        target = self._backend_facts(self._target)
        for backend in backends[1:]:
            finding = shared_gpu(target, self._backend_facts(backend))
            if finding is not None:
                findings.append(finding)
        return findings

    async def _read_memory(self, backends: list[Backend]) -> None:
        left = self._deadline - self._context.loop.time()
        seconds = max(MIN_MEMORY_SECONDS, min(gpu_memory.SECONDS, MEMORY_SHARE * left))
        found = await asyncio.gather(
            *(gpu_memory.query(backend, self._context.gateway_id, seconds) for backend in backends)
        )
        self._memory |= {backend.name: memory for backend, memory in zip(backends, found, strict=True)}

    def _is_unloaded(self, tier: Tier) -> bool:
        model, memory = tier.models.get(self._target.name), self._memory[self._target.name]
        return model is not None and memory.loaded is not None and memory.of(self._target, model) is None

    # Capabilities of a side

    async def _probe_models(self, backend: Backend) -> None:
        """Probe the models of all tiers on `backend`.

        On Ollama one after the other, since loading one may unload another.
        """
        groups: list[tuple[Route, Tier, list[str]]] = []
        for pair in self._pairs:
            tier, model = pair.tier, pair.tier.models.get(backend.name)
            if (
                model is None
                or backend.name not in (self._target.name, pair.other)
                or backend.turn != "awake"
                or self._fault(backend, model)
            ):
                continue
            same = next(
                (names for route, other, names in groups if (route.model, _params(other)) == (model, _params(tier))),
                None,
            )
            if same is not None:
                same.append(tier.name)
            else:
                groups.append((Route(tier.name, backend.name, model), tier, [tier.name]))
        if backend.kind == "ollama":
            for group in groups:
                await self._probe_model(*group)
        else:
            await asyncio.gather(*(self._probe_model(*group) for group in groups))

    async def _probe_model(self, route: Route, tier: Tier, names: list[str]) -> None:
        backend = self._context.backends[route.backend]
        if backend.kind == "ollama" and backend is not self._target:
            traits = _reported_traits(backend, route.model)
        else:
            params = ParameterPolicy(*_params(tier))
            traits = await CapabilityProbe(
                self._context, self._context.destination(route, CHAT), params, self._deadline
            ).run()
        self._traits |= {(name, backend.name): traits for name in names}

    def _fault(self, backend: Backend, model: str) -> str:
        """Return why `backend` cannot serve `model`; empty if it may, or if its engine waits for the GPU."""
        if backend.turn != "awake":
            return ""
        if not backend.servers:
            return "has no servers, because its host name is not resolved"
        healthy = [server for server in backend.servers if server.is_well]
        if not healthy:
            if any(server.up is False and not server.circuit.is_open for server in backend.servers):
                return f"rejects the API key, or is not a server of kind {backend.kind}"
            return "does not answer"
        if not any(server.serves(model) for server in healthy):
            models = sorted({name.removesuffix(":latest") for server in healthy for name in server.discovered or {}})
            listed = ", ".join(name if name.isprintable() else ascii(name) for name in models[:MAX_LISTED])
            others = " and others" if len(models) > MAX_LISTED else ""
            return f"does not have the model; it has: {listed or 'none'}{others}"
        return "asleep" if self._memory[backend.name].is_asleep else ""

    def _side(self, tier: Tier, backend: Backend, was_unloaded: bool = False) -> TierSide:
        model = tier.models[backend.name]
        loaded = self._memory[backend.name].of(backend, model)
        down = [server.name for server in backend.servers if not server.is_well]
        lacking = [server.name for server in backend.servers if server.is_well and not server.serves(model)]
        remarks = [f"{', '.join(down)} down"] if down else []
        remarks += [f"{', '.join(lacking)} without {model!r}"] if lacking else []
        traits = self._traits.get((tier.name, backend.name), {})
        if backend.turn != "awake":
            traits = {"answers": Trait(None, "sleeps, not probed")}
        if was_unloaded and "streaming" in traits:
            unloaded = "" if loaded else ", but it is unloaded again: another model may have taken its place"
            remarks.append(f"{model!r} was not loaded, and this check loaded it{unloaded}")
        return TierSide(
            backend.name,
            backend.kind,
            model,
            traits,
            self._fault(backend, model),
            "; ".join(remarks),
            backend.context_length(model) if loaded is None or loaded.context_length is None else loaded.context_length,
            backend.kind != "ollama" or loaded is not None or backend.settings.num_ctx is not None,
        )

    # Findings

    def _tier_findings(self, pair: Pair, was_unloaded: bool) -> list[Finding]:
        tier, target = pair.tier, self._target
        if target.name not in tier.models:
            words = f"it has no model on {target.name} in the settings: a switch is refused"
            return [Finding(tier.name, "serves", "breaks", target.name, "no model", words=words)]
        other = None if pair.other is None else self._side(tier, self._context.backends[pair.other])
        findings = list(compare(tier.name, self._side(tier, target, was_unloaded), other))
        rollback_to = self._context.backends[self._settings.rollback_to]
        if rollback_to is not target and target.name not in self._settings.on_gpu:
            model = tier.models.get(rollback_to.name)
            facts, seconds = self._backend_facts(rollback_to), self._loaded_seconds(rollback_to, model)
            findings.append(rollback_finding(tier.name, model, facts, seconds))
        return findings

    def _loaded_seconds(self, backend: Backend, model: str | None) -> float | None:
        memory = self._memory[backend.name]
        if model is None or memory.loaded is None:
            return None
        found: LoadedModel | None = memory.of(backend, model)
        return 0.0 if found is None else found.seconds

    def _backend_facts(self, backend: Backend) -> BackendFacts:
        keep_alive = backend.settings.keep_alive
        keeps_loaded = (
            keep_alive.startswith("-") if isinstance(keep_alive, str) else keep_alive is not None and keep_alive < 0
        )
        names = {urlsplit(server.base_url).hostname or "" for server in backend.settings.servers}
        hosts = frozenset("loopback" if name in LOOPBACK else name for name in names)
        return BackendFacts(
            backend.name, backend.kind, hosts, backend.availability.is_up, keeps_loaded, self._memory[backend.name]
        )


def _params(tier: Tier) -> tuple[Mapping[str, object], Mapping[str, object], tuple[str, ...], int | None]:
    return tier.params.default, tier.params.force, tier.params.drop, tier.max_tokens


def _reported_traits(backend: Backend, model: str) -> Traits:
    """Return what an Ollama reports about a model; all its versions can do the rest."""
    traits = dict.fromkeys(("streaming", "usage", "structured_output", "parameters", "conversations"), YES)
    names = {"vision": "vision", "reasoning": "thinking", "tools": "tools", "forced_tools": "tools"}
    traits |= {what: reported_trait(backend, model, name) for what, name in names.items()}
    return traits | {"answers": Trait(None, "up, not probed")}


class Preflight:
    """Runs preflight checks, one at a time: a second caller waits for the first."""

    def __init__(self, context: RelayContext, rollout: Rollout, gpu: GpuState | None = None) -> None:
        self._context = context
        self._gpu = gpu
        self._tier_routes: Mapping[str, TierRoute] = rollout.tiers
        self._lock = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """End running checks with `ShuttingDown`."""
        self._stopping.set()

    def change(self) -> None:
        """End running checks with `Conflict`, since the settings have changed.

        Their findings would be about tiers and servers of earlier settings.
        """
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, backend: str | None, tier: str | None, seconds: float) -> dict[str, Any]:
        """Return the body of the answer: whether a tier would break, the findings, and both models.

        Raises:
            InvalidRequest: a name is unknown.
        """
        target = self._backend(backend)
        pairs = [Pair(item, self._other(item, target.name)) for item in self._tiers(tier)]
        pinned = [
            item
            for item in self._context.settings.tiers.values()
            if tier is not None and item.name.lower() == tier.lower() and item.backend
        ]
        async with self._lock:
            began = self._context.loop.time()
            check = PreflightCheck(self._context.settings, self._context, target, pairs, began + seconds, self._gpu)
            findings = await check.run()
            took = self._context.loop.time() - began
        findings += [
            Finding(
                item.name, "pinned", "note", target.name, "", words=f"it is pinned to {item.backend} in the settings"
            )
            for item in pinned
        ]
        return {
            "backend": target.name,
            "breaks": any(finding.severity == "breaks" for finding in findings),
            "seconds": round(took, 3),
            "tiers": {
                pair.tier.name: {
                    "model": pair.tier.models.get(target.name),
                    "other": pair.other,
                    "other_model": pair.tier.models.get(pair.other or ""),
                }
                for pair in pairs
            },
            "findings": msgspec.to_builtins(findings),
        }

    async def unless(
        self, gone: Coroutine[Any, Any, None], work: Coroutine[Any, Any, dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result of `work`.

        Raises:
            ClientLeft: `gone` ended first.
            ShuttingDown: `stop` was called.
            Conflict: the settings have changed.
        """
        changed = self._changed
        tasks = [asyncio.create_task(item) for item in (work, gone, _until(self._stopping), _until(changed))]
        working, leaving, stopping, _ = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not working.done():
                raise ShuttingDown
            if changed.is_set():  # even with a result: it may be about servers that are closed by now
                raise Conflict("The settings changed during the check, so its findings do not apply. Run it again.")
            if leaving.done() and not working.done():
                raise ClientLeft
            return working.result() or {}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Names

    def _backend(self, name: str | None) -> Backend:
        """Return the named backend; by default the first that tiers have, except `rollback_to`."""
        used = [
            backend
            for backend in self._context.settings.backends
            if any(backend in tier.models for tier in self._tiers(None))
        ]
        if name is None:
            found = next(
                (backend for backend in used if backend != self._context.settings.rollback_to),
                self._context.settings.rollback_to,
            )
        else:
            found = next(
                (backend for backend in self._context.settings.backends if backend.lower() == name.lower()), ""
            )
        if not found:
            raise InvalidRequest(
                f"'backend' must be one of: {', '.join(self._context.settings.backends)}.", param="backend"
            )
        return self._context.backends[found]

    def _tiers(self, name: str | None) -> list[Tier]:
        """Return the tiers that a switch would move."""
        tiers = list(self._context.settings.tiers.values())
        if name is not None:
            tiers = [tier for tier in tiers if tier.name.lower() == name.lower()]
            if not tiers:
                raise InvalidRequest(f"'tier' must be one of: {', '.join(self._context.settings.tiers)}.", param="tier")
        return [tier for tier in tiers if tier.backend is None]

    def _other(self, tier: Tier, target: str) -> str | None:
        """Return the backend that serves `tier` now or, if that is `target`, after a rollback."""
        assignment = self._tier_routes[tier.name].assignment
        candidates = (assignment.backend, self._context.settings.rollback_to, *tier.models)
        return next((name for name in candidates if name != target and name in tier.models), None)


async def _until(event: asyncio.Event) -> None:
    await event.wait()
