"""One exchange's clock: marks while it runs, a frozen `Exchange` when it is over. No I/O."""

from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from gateway.chat.answer import Usage
from gateway.errors import Outcome

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
    moved: bool = False
    """It had waited in the line of another backend, and moved along with the roll-out."""
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


class Meter:
    """Marks made by the relay as it goes. `clock` is monotonic, in seconds."""

    __slots__ = (
        "admitted", "arrived", "attempts", "clock", "first_piece", "has_said", "last_piece", "met_stale", "observe_gap", "phase", "sent",
        "upstream_ended", "usage",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float], observe_gap: Callable[[float, int], None] | None = None) -> None:
        self.clock = clock
        self.observe_gap = observe_gap
        """Told of each gap between pieces: seconds, and how many tokens came at its end."""
        self.arrived = clock()
        self.admitted: float | None = None
        self.sent: float | None = None
        self.first_piece: float | None = None
        self.last_piece = 0.0
        self.has_said = False
        """The model: something."""
        self.upstream_ended: float | None = None
        self.attempts = 0
        self.met_stale = False
        """In this attempt: a kept connection closed before a byte came, which counts as one of its own."""
        self.usage: Usage | None = None
        self.phase: Phase = "queued"

    def admit(self) -> None:
        self.admitted = self.clock()
        self.phase = "waiting"

    def start_attempt(self) -> None:
        self.attempts += 1
        self.met_stale = False
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

    def requeue(self) -> None:
        """Back in line, here or elsewhere: what was sent so far is over."""
        self.admitted = self.sent = self.upstream_ended = None
        self.phase = "queued"

    def end_upstream(self) -> None:
        if self.sent is not None:
            self.upstream_ended = self.clock()

    def times(self) -> tuple[float, float | None, float, float | None]:
        """In seconds, to six places: from the arrival up to now; in line, None for what was never admitted; at the backend; from the arrival to
        the first piece, the wait in line included: what the client sees.

        Without `round`, which goes by decimal text and costs ten times as much.
        """
        arrived, admitted, first_piece, sent, ended = (
            self.arrived,
            self.admitted,
            self.first_piece,
            self.sent,
            self.upstream_ended,
        )
        return (
            int((self.clock() - arrived) * 1e6 + 0.5) / 1e6,
            None if admitted is None else int((admitted - arrived) * 1e6 + 0.5) / 1e6,
            0.0 if sent is None or ended is None else int((ended - sent) * 1e6 + 0.5) / 1e6,
            None if first_piece is None else int((first_piece - arrived) * 1e6 + 0.5) / 1e6,
        )
