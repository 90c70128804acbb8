"""The check before a switch: asks the backend that is to serve, and the one that does now, and says what would break and what clients would notice.

It runs where the gateway runs, since nobody else may reach the backends. It spends a few tokens; nothing it does moves a tier or a circuit. An Ollama
that is not the one to serve is asked for its lists alone, which tell what it can do: nothing is loaded there, and nobody waits for it.
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
from gateway.rollout.preflight import gpu_memory as memory
from gateway.rollout.preflight.findings import BackendFacts, Finding, TierSide, compare, rollback_finding, shared_gpu
from gateway.rollout.preflight.gpu_memory import GpuMemory, LoadedModel
from gateway.rollout.preflight.probes import YES, CapabilityProbe, Trait, Traits, reported_trait
from gateway.rollout.state import Rollout, TierRoute
from gateway.telemetry.exchange import CHAT
from gateway.upstream.backend import Backend

SECONDS, LEAST, LONGEST = 30.0, 1.0, 600.0
"""What a check may take, both sides at the same time: by itself, and as the caller may set it."""
LOOK_SHARE, LEAST_LOOK = 0.25, 0.2
"""Of the time that is left for what is told besides, so that a server that hangs in that is still tried; the least of it in seconds."""
MAX_LISTED = 5
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Pair(Struct, frozen=True):
    """A tier that would move: who serves it now, or would after a rollback; None: nobody else has a model for it."""

    tier: Tier
    other: str | None


class PreflightCheck:
    """One check of a move to `target`. `deadline` is on the loop's clock."""

    def __init__(
        self, settings: Settings, context: RelayContext, target: Backend, pairs: list[Pair], deadline: float
    ) -> None:
        self._settings = settings
        self._context = context
        self._target = target
        self._pairs = pairs
        self._deadline = deadline
        self._memory: dict[str, GpuMemory] = {}
        self._traits: dict[tuple[str, str], Traits] = {}
        """By tier and backend."""

    async def run(self) -> list[Finding]:
        names = dict.fromkeys(
            [self._target.name, *(pair.other for pair in self._pairs if pair.other), self._settings.rollback_to]
        )
        backends = [self._context.backends[name] for name in names]
        await self._look_at_memory(backends)
        unloaded = {pair.tier.name for pair in self._pairs if self._is_unloaded(pair.tier)}
        await asyncio.gather(*(self._try_models(backend) for backend in backends))
        if unloaded:  # it may be loaded now, and tell its context
            await self._look_at_memory([self._target])
        findings = [
            finding for pair in self._pairs for finding in self._tier_findings(pair, pair.tier.name in unloaded)
        ]
        here = self._place(self._target)
        for backend in backends[1:]:
            finding = shared_gpu(here, self._place(backend))
            if finding is not None:
                findings.append(finding)
        return findings

    async def _look_at_memory(self, backends: list[Backend]) -> None:
        seconds = max(LEAST_LOOK, min(memory.SECONDS, LOOK_SHARE * (self._deadline - self._context.loop.time())))
        found = await asyncio.gather(*(memory.ask(backend, self._context.gateway_id, seconds) for backend in backends))
        self._memory |= {backend.name: told for backend, told in zip(backends, found, strict=True)}

    def _is_unloaded(self, tier: Tier) -> bool:
        model, told = tier.models.get(self._target.name), self._memory[self._target.name]
        return model is not None and told.loaded is not None and told.of(self._target, model) is None

    # What a side can do

    async def _try_models(self, backend: Backend) -> None:
        """All tiers' models there: on an Ollama one after the other, since each may take the place of another."""
        groups: list[tuple[Route, Tier, list[str]]] = []
        for pair in self._pairs:
            tier, model = pair.tier, pair.tier.models.get(backend.name)
            if model is None or backend.name not in (self._target.name, pair.other) or self._fault(backend, model):
                continue
            alike = next(
                (names for route, other, names in groups if (route.model, _params(other)) == (model, _params(tier))),
                None,
            )
            if alike is not None:
                alike.append(tier.name)
            else:
                groups.append((Route(tier.name, backend.name, model), tier, [tier.name]))
        if backend.kind == "ollama":
            for group in groups:
                await self._try_model(*group)
        else:
            await asyncio.gather(*(self._try_model(*group) for group in groups))

    async def _try_model(self, route: Route, tier: Tier, names: list[str]) -> None:
        backend = self._context.backends[route.backend]
        if backend.kind == "ollama" and backend is not self._target:
            traits = _by_its_word(backend, route.model)
        else:
            params = ParameterPolicy(*_params(tier))
            traits = await CapabilityProbe(
                self._context, self._context.destination(route, CHAT), params, self._deadline
            ).run()
        self._traits |= {(name, backend.name): traits for name in names}

    def _fault(self, backend: Backend, model: str) -> str:
        """Why `backend` cannot serve `model`; empty: it may."""
        well = [server for server in backend.servers if server.is_well]
        if not well:
            if any(server.up is False and not server.circuit.is_open for server in backend.servers):
                return f"refuses the key, or is no server of kind {backend.kind}"
            return "does not answer"
        if not any(server.serves(model) for server in well):
            there = sorted({name.removesuffix(":latest") for server in well for name in server.discovered or {}})
            listed = ", ".join(name if name.isprintable() else ascii(name) for name in there[:MAX_LISTED])
            return f"has no such model; there is: {listed or 'none'}{' and others' if len(there) > MAX_LISTED else ''}"
        return "asleep" if self._memory[backend.name].is_asleep else ""

    def _side(self, tier: Tier, backend: Backend, was_unloaded: bool = False) -> TierSide:
        model = tier.models[backend.name]
        loaded = self._memory[backend.name].of(backend, model)
        down = [server.name for server in backend.servers if not server.is_well]
        lacking = [server.name for server in backend.servers if server.is_well and not server.serves(model)]
        remarks = [f"{', '.join(down)} down"] if down else []
        remarks += [f"{', '.join(lacking)} without {model!r}"] if lacking else []
        traits = self._traits.get((tier.name, backend.name), {})
        if was_unloaded and "streaming" in traits:
            left = "" if loaded else "; it is not any more: another may have taken its place"
            remarks.append(f"{model!r} was not loaded, and has been for this check{left}")
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

    # What follows

    def _tier_findings(self, pair: Pair, was_unloaded: bool) -> list[Finding]:
        tier, target = pair.tier, self._target
        if target.name not in tier.models:
            words = f"the settings give it no model on {target.name}: a switch is refused"
            return [Finding(tier.name, "serves", "breaks", target.name, "no model", words=words)]
        other = None if pair.other is None else self._side(tier, self._context.backends[pair.other])
        findings = list(compare(tier.name, self._side(tier, target, was_unloaded), other))
        back = self._context.backends[self._settings.rollback_to]
        if back is not target:
            model = tier.models.get(back.name)
            findings.append(rollback_finding(tier.name, model, self._place(back), self._loaded_seconds(back, model)))
        return findings

    def _loaded_seconds(self, backend: Backend, model: str | None) -> float | None:
        told = self._memory[backend.name]
        if model is None or told.loaded is None:
            return None
        found: LoadedModel | None = told.of(backend, model)
        return 0.0 if found is None else found.seconds

    def _place(self, backend: Backend) -> BackendFacts:
        keep_alive = backend.settings.keep_alive
        keeps = keep_alive.startswith("-") if isinstance(keep_alive, str) else keep_alive is not None and keep_alive < 0
        names = {urlsplit(server.base_url).hostname or "" for server in backend.settings.servers}
        hosts = frozenset("loopback" if name in LOOPBACK else name for name in names)
        return BackendFacts(backend.name, backend.kind, hosts, backend.is_up, keeps, self._memory[backend.name])


def _params(tier: Tier) -> tuple[Mapping[str, object], Mapping[str, object], tuple[str, ...], int | None]:
    return tier.params.default, tier.params.force, tier.params.drop, tier.max_tokens


def _by_its_word(backend: Backend, model: str) -> Traits:
    """What an Ollama tells of a model that it serves. What it does not tell all of its versions can."""
    traits = dict.fromkeys(("streaming", "usage", "structured_output", "parameters"), YES)
    words = {"vision": "vision", "reasoning": "thinking", "tools": "tools", "forced_tools": "tools"}
    traits |= {what: reported_trait(backend, model, word) for what, word in words.items()}
    return traits | {"answers": Trait(None, "up, not asked")}


class Preflight:
    """Checks, one at a time: a second caller waits for the first."""

    def __init__(self, context: RelayContext, rollout: Rollout) -> None:
        self._context = context
        self._lines: Mapping[str, TierRoute] = rollout.tiers
        self._turn = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """What runs ends with `ShuttingDown`."""
        self._stopping.set()

    def change(self) -> None:
        """The settings are others: what runs ends with `Conflict`, since it would tell of tiers and servers that are not these."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, backend: str | None, tier: str | None, seconds: float) -> dict[str, Any]:
        """The answer's body: whether a tier would break, what was found, and the sides' models.

        Raises:
            InvalidRequest: a name means nothing.
        """
        target = self._backend(backend)
        pairs = [Pair(item, self._other(item, target.name)) for item in self._tiers(tier)]
        pinned = [
            item
            for item in self._context.settings.tiers.values()
            if tier is not None and item.name.lower() == tier.lower() and item.backend
        ]
        async with self._turn:
            began = self._context.loop.time()
            findings = await PreflightCheck(self._context.settings, self._context, target, pairs, began + seconds).run()
            took = self._context.loop.time() - began
        findings += [
            Finding(item.name, "pinned", "note", target.name, "", words=f"the settings pin it to {item.backend}")
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
        """What `work` gives.

        Raises:
            ClientLeft: `gone` ended before.
            ShuttingDown
            Conflict: the settings have changed.
        """
        changed = self._changed
        tasks = [asyncio.create_task(item) for item in (work, gone, _until(self._stopping), _until(changed))]
        working, leaving, stopping, _ = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not working.done():
                raise ShuttingDown
            if changed.is_set():  # even where there is an answer: it may be about what is closed by now
                raise Conflict("The settings have changed during the check, which tells nothing now. Ask again.")
            if leaving.done() and not working.done():
                raise ClientLeft
            return working.result() or {}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Names

    def _backend(self, name: str | None) -> Backend:
        """Without a name: the first that a tier could move to, besides the one that a rollback leads to."""
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
        """Those that a switch would move."""
        tiers = list(self._context.settings.tiers.values())
        if name is not None:
            tiers = [tier for tier in tiers if tier.name.lower() == name.lower()]
            if not tiers:
                raise InvalidRequest(f"'tier' must be one of: {', '.join(self._context.settings.tiers)}.", param="tier")
        return [tier for tier in tiers if tier.backend is None]

    def _other(self, tier: Tier, target: str) -> str | None:
        """Who serves it now; where `target` does already, who would after a rollback."""
        assignment = self._lines[tier.name].assignment
        candidates = (assignment.backend, self._context.settings.rollback_to, *tier.models)
        return next((name for name in candidates if name != target and name in tier.models), None)


async def _until(event: asyncio.Event) -> None:
    await event.wait()
