"""One exchange's clock: marks while it runs, a frozen `Exchange` when it is over. No I/O."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, overload

from msgspec import Struct

from gateway.errors import Outcome
from gateway.views import Usage

Phase = Literal["queued", "waiting", "streaming"]

CHAT = "chat"
"""The endpoint label of chat completions."""

EMBEDDINGS = "embeddings"

LANES = {CHAT: ("text", "vision"), EMBEDDINGS: ("embedding",)}
"""Of each endpoint."""

NONE = "none"
"""The label of what a request did not get to have: a tier, a backend."""


class Exchange(Struct, frozen=True, gc=False, kw_only=True):
    """One request and its answer, for the log and the metrics. Times are in seconds; labels come from the settings, never from a request."""

    request_id: str
    key_id: str
    endpoint: str
    tier: str
    backend: str
    chosen: str = NONE
    """The backend that the roll-out chose: another one than `backend` after a fallback."""
    model: str
    lane: str
    stream: bool
    status: int
    code: str | None
    reason: str | None
    outcome: Outcome
    empty: bool = False
    """It ended well, but the model had said nothing."""
    phase: Phase
    duration: float
    queue_wait: float | None
    upstream: float
    time_to_first_token: float | None
    usage: Usage | None
    attempts: int


@overload
def microseconds(seconds: float) -> float: ...
@overload
def microseconds(seconds: None) -> None: ...
def microseconds(seconds: float | None) -> float | None:
    """`seconds`, not negative, to six places; a tenth of what `round` costs, which goes by decimal text."""
    return None if seconds is None else int(seconds * 1e6 + 0.5) / 1e6


@dataclass(slots=True)
class Meter:
    """Marks made by the relay as it goes. `clock` is monotonic, in seconds."""

    clock: Callable[[], float]
    observe_gap: Callable[[float, int], None] | None = None
    """Told of each gap between pieces: seconds, and how many tokens came at its end."""
    arrived: float = 0.0
    admitted: float | None = None
    sent: float | None = None
    first_piece: float | None = None
    last_piece: float = 0.0
    has_said: bool = False
    """The model: something."""
    upstream_ended: float | None = None
    attempts: int = 0
    usage: Usage | None = None
    phase: Phase = field(default="queued")

    def __post_init__(self) -> None:
        self.arrived = self.clock()

    def admit(self) -> None:
        self.admitted = self.clock()
        self.phase = "waiting"

    def send(self) -> None:
        self.attempts += 1
        self.last_piece = self.clock()
        if self.sent is None:
            self.sent = self.last_piece

    def piece(self, tokens: int) -> None:
        """A piece of the answer came, with so many tokens in it."""
        now = self.clock()
        if self.first_piece is None:
            self.first_piece = now
            self.phase = "streaming"
            self.has_said = tokens > 0
            if tokens > 1 and self.observe_gap is not None:
                self.observe_gap(0.0, tokens - 1)
        elif tokens:
            self.has_said = True
            if self.observe_gap is not None:
                self.observe_gap(now - self.last_piece, tokens)
        self.last_piece = now

    def wait_again(self) -> None:
        """Back in line, here or elsewhere: what was sent so far is over."""
        self.admitted = self.sent = self.upstream_ended = None
        self.phase = "queued"

    def end_upstream(self) -> None:
        if self.sent is not None:
            self.upstream_ended = self.clock()

    @property
    def queue_wait(self) -> float | None:
        """Seconds in line; None for what was never admitted."""
        return None if self.admitted is None else self.admitted - self.arrived

    @property
    def upstream_seconds(self) -> float:
        if self.sent is None or self.upstream_ended is None:
            return 0.0
        return self.upstream_ended - self.sent

    @property
    def time_to_first_token(self) -> float | None:
        """From the request's arrival to the first piece, the wait in line included: what the client sees."""
        return None if self.first_piece is None else self.first_piece - self.arrived
