"""Loading models on Ollama, and listing the loaded ones (0.24 and 0.33)."""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from gateway.engines.engine import decode

MIN_KEEP_ALIVE = 30
"""Minimum `keep_alive` in seconds for a load.

With a `keep_alive` of zero, a request without content tells Ollama to unload the model. The
requests that follow carry the operator's own value.
"""


class _Loaded(Struct):
    name: str
    expires_at: str = ""


class _LoadedModels(Struct):
    models: list[_Loaded] | None


_decoder = msgspec.json.Decoder(_LoadedModels)


def canonical(name: str) -> str:
    """Return the canonical form of an Ollama model name.

    Ollama ignores case, and its own registry, the namespace `library` and the tag `latest` are
    optional (types/model/name.go).
    """
    return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":latest")


def loaded(body: bytes) -> dict[str, float] | None:
    """Parse the answer to `/api/ps`: canonical names to the Unix time at which each model expires.

    0 if Ollama does not report the time. Returns None if `body` is not such an answer. A model that
    is still loading is not listed (on 0.24 it appears a moment before loading finishes).
    """
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
    """Request that loads a model: one without messages loads it and generates nothing.

    It carries the operator's `keep_alive` and `num_ctx` like every other request. Otherwise the
    next request would reload the model.
    """

    path = "/api/ps"
    unload_path = "/api/generate"

    def __init__(self, keep_alive: str | float | None = None, num_ctx: int | None = None) -> None:
        self._options: dict[str, Any] = {} if num_ctx is None else {"options": {"num_ctx": num_ctx}}
        if keep_alive is not None:
            self._options["keep_alive"] = MIN_KEEP_ALIVE if _is_zero(keep_alive) else keep_alive

    def body(self, model: str, is_apart: bool) -> bytes:
        """Return the request body.

        It is for `/api/embed` if the model makes embeddings (`is_apart`), because such a model
        supports nothing else. Otherwise it is for `/api/chat`.
        """
        asked = {"input": []} if is_apart else {"messages": [], "stream": False}
        return msgspec.json.encode({"model": model, **asked, **self._options})

    def unload_body(self, model: str) -> bytes:
        """Return the body of the request to `unload_path` that unloads a model of any sort.

        Ollama answers at once, and unloads the model when its last request has ended
        (server/sched.go 0.24 and 0.33, `expireRunner`).
        """
        return msgspec.json.encode({"model": model, "keep_alive": 0, "stream": False})


def _is_zero(keep_alive: str | float) -> bool:
    """Return whether the duration is zero, for example `0`, `0s` or `0h0m`."""
    return not any(digit in "123456789" for digit in str(keep_alive))
