"""Ollama's models: which there are, what its lists say of them, and which are loaded until when."""

import asyncio
import hashlib
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gateway.simulate.engine import Lane
from gateway.simulate.options import Model, Options

DEFAULT_KEEP_ALIVE = 300.0
FOR_EVER = "2319-03-03T09:29:37.047750274Z"  # what Ollama shows for keep_alive -1
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Busy(Exception):
    """Too many requests wait for a load."""


def stamp(when: float | None = None) -> str:
    """A time as Go writes it, with nanoseconds."""
    when = time.time() if when is None else when
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%M:%S}.{int(when % 1 * 1e9):09d}Z"


def keep_alive_seconds(value: object) -> float | None:
    """Seconds that `keep_alive` asks for: a number, or Go's form ("5m", "1h30m"); below 0 for ever; None when it asks for nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return float(value)
    parts = re.findall(r"(-?[\d.]+)(ns|us|ms|s|m|h)", value)
    return sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else None


@dataclass(slots=True)
class Loaded:
    context_length: int
    keep_alive: float = DEFAULT_KEEP_ALIVE
    expires: float = 0.0

    def touch(self, keep_alive: float | None) -> None:
        """A use now. A keep_alive once asked for sticks for later uses that ask for none."""
        self.keep_alive = self.keep_alive if keep_alive is None else keep_alive
        self.expires = time.time() + self.keep_alive


class Catalog:
    """The models of one server and their runners. Loads happen one at a time, each within the request that asked for it."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._began = time.time()
        self._loaded: dict[str, Loaded] = {}
        self._loading = asyncio.Lock()
        self._pending = 0
        self._lanes = {model.tagged: Lane(1 if model.is_serial else options.parallel) for model in options.served}

    def find(self, name: str) -> Model | None:
        tagged = name if ":" in name else f"{name}:latest"
        return next((model for model in self._options.served if model.tagged.lower() == tagged.lower()), None)

    def lane(self, model: Model) -> Lane:
        return self._lanes[model.tagged]

    def loaded(self) -> dict[str, Loaded]:
        """The runners that there are now; those past their time are gone."""
        now = time.time()
        for name in [name for name, entry in self._loaded.items() if entry.keep_alive >= 0 and entry.expires < now]:
            if self._lanes[name].idle.is_set():
                del self._loaded[name]
        return self._loaded

    def unload(self, model: Model) -> None:
        self._loaded.pop(model.tagged, None)

    async def load(self, model: Model, context_length: int | None, keep_alive: float | None) -> float:
        """Have `model` ready with that context; the seconds that it took. Cancelling aborts the load.

        Raises:
            Busy: `max_queue` requests wait for a load already.
        """
        began = time.monotonic()
        wanted = context_length or model.context_length
        if self._ready(model, wanted) is None:
            if self._pending > self._options.max_queue:
                raise Busy
            self._pending += 1
            try:
                await self._load_now(model, wanted)
            finally:
                self._pending -= 1
        self._loaded[model.tagged].touch(keep_alive)
        return time.monotonic() - began

    def _ready(self, model: Model, context_length: int) -> Loaded | None:
        entry = self.loaded().get(model.tagged)
        return entry if entry is not None and entry.context_length == context_length else None

    async def _load_now(self, model: Model, context_length: int) -> None:
        async with self._loading:
            if self._ready(model, context_length) is None:
                before = self._loaded.get(model.tagged)
                await self.lane(model).idle.wait()
                self.unload(model)
                await asyncio.sleep(self._options.load_seconds)
                self._loaded[model.tagged] = Loaded(context_length, before.keep_alive if before else DEFAULT_KEEP_ALIVE)
                self._loaded[model.tagged].touch(None)

    def tags(self) -> dict[str, Any]:
        """The body of `GET /api/tags`, newest first."""
        newer = self._options.generation == "0.33"
        models = []
        for i, model in enumerate(self._options.served):
            details = _details(model)
            if newer and not model.vision:
                details |= {"context_length": model.context_length, "embedding_length": 64}
            entry = {
                "name": model.tagged,
                "model": model.tagged,
                "modified_at": stamp(self._began - i),
                "size": 444054,
                "digest": _digest(model),
                "details": details,
            }
            models.append(entry | {"capabilities": [word for word in capabilities(model) if word != "vision"]} if newer else entry)
        return {"models": models}

    def ps(self) -> dict[str, Any]:
        """The body of `GET /api/ps`."""
        return {"models": [self._runner(name, entry) for name, entry in self.loaded().items()]}

    def _runner(self, name: str, entry: Loaded) -> dict[str, Any]:
        model = self.find(name)
        assert model is not None
        return {
            "name": name,
            "model": name,
            "size": 96364133,
            "digest": _digest(model),
            "details": _details(model),
            "expires_at": FOR_EVER if entry.keep_alive < 0 else stamp(entry.expires),
            "size_vram": 0,
            "context_length": entry.context_length,
        }

    def show(self, model: Model) -> dict[str, Any]:
        """The body of `POST /api/show`; of `model_info` and `tensors` only what says something here."""
        kind = model.family
        info: dict[str, Any] = {"general.architecture": kind, "general.file_type": 1, "general.parameter_count": 20304960}
        info |= {f"{kind}.block_count": 4, f"{kind}.context_length": model.context_length, f"{kind}.embedding_length": 64}
        if model.vision:
            info |= {f"{kind}.vision.block_count": 2, f"{kind}.vision.patch_size": 16}
        return {
            "modelfile": f'# Modelfile generated by "ollama show"\nFROM {model.tagged}\nTEMPLATE {{{{ .Prompt }}}}\n' + "#\n" * 1024,
            "template": "{{ .Prompt }}",
            "details": _details(model),
            "model_info": info,
            "tensors": [{"name": "token_embd.weight", "type": "F16", "shape": [64, 1024]}],
            "capabilities": capabilities(model),
            "modified_at": stamp(self._began),
        }

    def v1_models(self) -> dict[str, Any]:
        """The body of `GET /v1/models`; `data` is null when there are none."""
        return {"object": "list", "data": [self.v1_model(model, model.tagged) for model in self._options.served] or None}

    def v1_model(self, model: Model, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(self._began), "owned_by": "library"}


def capabilities(model: Model) -> list[str]:
    """What Ollama says that a model can do, in its order."""
    words = {"completion": True, "vision": model.vision, "tools": model.tools, "thinking": model.thinking}
    return [word for word, there in words.items() if there]


def full_name(model: Model) -> str:
    """The name with its registry, as some of Ollama's errors have it."""
    return f"registry.ollama.ai/{model.tagged}" if "/" in model.name else f"registry.ollama.ai/library/{model.tagged}"


def _details(model: Model) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": model.family,
        "families": [model.family],
        "parameter_size": "20.30M",
        "quantization_level": "F16",
    }


def _digest(model: Model) -> str:
    return hashlib.sha256(model.tagged.encode()).hexdigest()
