"""How an Ollama is told to load a model, and how it tells what it has loaded (0.24 and 0.33)."""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from gateway.engines.engine import decode

LEAST_KEEP_ALIVE = 30
"""Seconds. To be kept for no time is an order to unload, in a request that asks for nothing; the requests themselves bring the operator's own."""


class _Loaded(Struct):
    name: str
    expires_at: str = ""


class _LoadedModels(Struct):
    models: list[_Loaded] | None


_decoder = msgspec.json.Decoder(_LoadedModels)


def canonical(name: str) -> str:
    """Ollama takes any case, and leaves out its own registry, the namespace `library` and the tag `latest` (types/model/name.go)."""
    return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":latest")


def loaded(body: bytes) -> dict[str, float] | None:
    """What the answer to `/api/ps` shows: canonical names, and when each is due to go, in Unix time, 0: not told. None: it is no such answer. A model
    that is being loaded is not there yet (on 0.24 a moment before its end)."""
    parsed = decode(_decoder, body)
    return (
        None
        if parsed is None
        else {canonical(model.name): _unix_time(model.expires_at) for model in parsed.models or ()}
    )


def _unix_time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0


class OllamaLoading:
    """A request without messages loads the model and says nothing. With the operator's `keep_alive` and `num_ctx`, as all requests have them, or the
    next one would load it again."""

    path = "/api/ps"

    def __init__(self, keep_alive: str | float | None = None, num_ctx: int | None = None) -> None:
        self._more: dict[str, Any] = {} if num_ctx is None else {"options": {"num_ctx": num_ctx}}
        if keep_alive is not None:
            self._more["keep_alive"] = LEAST_KEEP_ALIVE if _is_nothing(keep_alive) else keep_alive

    def body(self, model: str, is_apart: bool) -> bytes:
        """For `/api/embed` if the model makes embeddings, which is all that such a model may be asked for; else for `/api/chat`."""
        asked = {"input": []} if is_apart else {"messages": [], "stream": False}
        return msgspec.json.encode({"model": model, **asked, **self._more})


def _is_nothing(keep_alive: str | float) -> bool:
    """`0`, `0s`, `0h0m`."""
    return not any(digit in "123456789" for digit in str(keep_alive))
