"""State of one model on one server: loaded, held, loading or unloading, and what waits for it."""

from collections.abc import Callable
from math import inf
from typing import Literal, Protocol

from gateway.admission.model_activity import ModelActivity
from gateway.errors import GatewayError

Word = Literal["loaded", "loading", "unloading", "cold", "held"]
"""State of a model on a server in the status report."""


class Waiters(Protocol):
    """Queue of requests that wait for one model and need the same limits."""

    @property
    def waiting(self) -> int: ...

    def wants(self, state: "ModelState") -> bool:
        """Return whether a request would start sooner if the model were loaded on that server."""

    def may_try_elsewhere(self, state: "ModelState") -> bool:
        """Return whether another server has the model, or could load it and has not failed."""

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        """End the wait of all requests with an error."""


class ModelState:
    """State of one model on one server.

    `name` is the canonical name, `model` the name in the settings.
    """

    __slots__ = (
        "_load_seconds",
        "activity",
        "has_failed",
        "idle_since",
        "is_embedding",
        "is_held",
        "is_loaded",
        "is_ready",
        "is_unloading",
        "load_began",
        "model",
        "name",
        "ready_since",
        "running",
        "waiters",
        "wanted_since",
        "warm",
    )

    def __init__(self, name: str, model: str, is_embedding: bool, is_loaded: bool) -> None:
        self.name = name
        self.model = model
        self.is_embedding = is_embedding
        self.activity = ModelActivity()
        self.waiters: list[Waiters] = []
        self.is_ready = self.is_loaded = is_loaded
        self.is_held = False
        self.is_unloading = False
        self.has_failed = False
        """True if the load failed and another server has to try before this one does again."""
        self.running = 0
        self.idle_since = -inf
        """Time at which the last request in flight ended."""
        self.warm = False
        """True if the model is to be loaded even if no request waits for it."""
        self.wanted_since: float | None = None
        self.ready_since = -inf
        self.load_began: float | None = None
        self._load_seconds = 0.0

    def __repr__(self) -> str:
        return f"<ModelState {self.name} {self.word}, {self.running} running>"

    @property
    def word(self) -> Word:
        """State in one word, for the status report."""
        if self.is_loading:
            return "loading"
        if self.is_unloading:
            return "unloading"
        return "cold" if not self.is_loaded else "held" if self.is_held else "loaded"

    @property
    def is_loading(self) -> bool:
        return self.load_began is not None

    @property
    def has_work(self) -> bool:
        return self.running > 0 or any(queue.waiting for queue in self.waiters)

    def load_seconds(self, now: float) -> float:
        """Return how long the model has been loading in total."""
        return self._load_seconds + (0.0 if self.load_began is None else now - self.load_began)

    def set(
        self, *, is_loaded: bool | None = None, is_held: bool | None = None, is_unloading: bool | None = None
    ) -> bool:
        """Set the given flags. Return whether the model became ready."""
        was = self.is_ready
        self.is_loaded = self.is_loaded if is_loaded is None else is_loaded
        self.is_held = self.is_held if is_held is None else is_held
        self.is_unloading = self.is_unloading if is_unloading is None else is_unloading
        self.is_ready = self.is_loaded and not self.is_held and not self.is_unloading
        return self.is_ready and not was

    def end(self, now: float) -> None:
        """End the load."""
        self._load_seconds = self.load_seconds(now)
        self.load_began = None
