"""Timing of one exchange: a `Meter` while it runs, a frozen `Exchange` at its end. No I/O."""

from collections.abc import Callable
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from gateway.chat.answer import Usage
from gateway.errors import Outcome

Phase = Literal["queued", "waiting", "streaming"]

Workload = Literal["chat", "embeddings", "rerank"]
"""Kind of work that a request asks a model for, whatever the client API. A chat goes to a tier."""

CHAT: Workload = "chat"
EMBEDDINGS: Workload = "embeddings"
RERANK: Workload = "rerank"

LANES: dict[Workload, tuple[str, ...]] = {
    CHAT: ("text", "vision"),
    EMBEDDINGS: ("embedding",),
    RERANK: ("embedding",),
}
"""The lanes of each workload."""

WORKLOADS: dict[str, Workload] = {
    "chat": CHAT,
    "completions": CHAT,
    "responses": CHAT,
    "messages": CHAT,
    "count_tokens": CHAT,
    "ollama_chat": CHAT,
    "ollama_generate": CHAT,
    "embeddings": EMBEDDINGS,
    "ollama_embed": EMBEDDINGS,
    "ollama_embeddings": EMBEDDINGS,
    "rerank": RERANK,
}
"""The workload of each endpoint, by the endpoint's label."""

NONE = "none"
"""Label value for a tier or backend that the request was never assigned."""


class Exchange(Struct, frozen=True, gc=False, kw_only=True):
    """Record of one request and its answer, for the log and the metrics.

    Times are in seconds. Label values come from the settings, never from a request.
    """

    request_id: str
    key_id: str
    key: str = ""
    """Name of the key; empty if it has none."""
    endpoint: str
    tier: str
    backend: str
    chosen: str = NONE
    """The backend that the roll-out chose; differs from `backend` after a fallback."""
    moved: bool = False
    """True if the request was queued for another backend and migrated with the roll-out."""
    model: str
    lane: str
    stream: bool
    status: int
    code: str | None
    reason: str | None
    outcome: Outcome
    empty: bool = False
    """True if the exchange succeeded although the model produced no output."""
    phase: Phase
    duration: float
    queue_wait: float | None
    upstream: float
    time_to_first_token: float | None
    usage: Usage | None
    sent_tokens: int = 0
    """Pieces with output that have arrived, if the answer broke off before the backend counted its tokens."""
    attempts: int
    trace_id: str | UnsetType = UNSET
    """The trace that the client's request or the gateway's tracing belongs to, in hexadecimal."""
    span_id: str | UnsetType = UNSET
    """The gateway's own span, if it makes one."""


class Attribution(Struct, frozen=True, gc=False):
    """Facts about an exchange that usage needs beside its record.

    It is not logged: a person's name may be an address.
    """

    person: str = ""
    """Person that a trusted program names; empty if it names none."""
    images: int = 0


class Meter:
    """Timestamps and counts that the relay sets while an exchange runs.

    `clock` is monotonic, in seconds.
    """

    __slots__ = (
        "admitted", "arrived", "attempts", "clock", "first_piece", "has_said", "last_piece", "met_stale",
        "observe_gap", "phase", "pieces", "sent", "upstream_ended", "usage",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float], observe_gap: Callable[[float, int], None] | None = None) -> None:
        self.clock = clock
        self.observe_gap = observe_gap
        """Called for each gap between pieces with its seconds and the number of tokens after it."""
        self.arrived = clock()
        self.admitted: float | None = None
        self.sent: float | None = None
        self.first_piece: float | None = None
        self.last_piece = 0.0
        self.has_said = False
        """True once the model has produced output."""
        self.pieces = 0
        """Pieces of the answer with output, which are about as many as its tokens."""
        self.upstream_ended: float | None = None
        self.attempts = 0
        self.met_stale = False
        """True if a reused connection closed in this attempt before a byte of the answer arrived.

        That failure counts as an attempt of its own.
        """
        self.usage: Usage | None = None
        self.phase: Phase = "queued"

    def admit(self) -> None:
        self.admitted = self.clock()
        self.phase = "waiting"

    def start_attempt(self) -> None:
        self.attempts += 1
        self.met_stale = False
        self.upstream_ended = None
        self.last_piece = self.clock()
        if self.sent is None:
            self.sent = self.last_piece

    def piece(self, tokens: int) -> None:
        """Record that a piece of the answer arrived with this number of tokens."""
        now = self.clock()
        self.pieces += tokens
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
        """Return to the phase `queued`, for any backend, and discard the times of attempts."""
        self.admitted = self.sent = self.upstream_ended = None
        self.phase = "queued"

    def end_upstream(self) -> None:
        if self.sent is not None:
            self.upstream_ended = self.clock()

    def counted(self, *, was_left: bool) -> tuple[int | None, int]:
        """Return the tokens that the exchange took: of the prompt, and those that were generated.

        An answer that broke off has no counts of its backend: what has arrived counts, and the
        prompt with None, since a backend worked on it. So does the prompt of a request that its
        client left (`was_left`) before the first piece. An attempt that failed takes none.
        """
        usage = self.usage
        if usage is not None:
            return usage.prompt_tokens, usage.completion_tokens
        if self.first_piece is None and (self.sent is None or not was_left):
            return 0, 0
        return None, self.pieces

    def times(self) -> tuple[float, float | None, float, float | None]:
        """Return the times of the exchange so far, in seconds to six decimal places.

        The tuple has: the time since the arrival; the time in the queue, None if the request was
        never admitted; the time at the backend; and the time from the arrival to the first token,
        which includes the queue, as the client sees it.

        Does not use `round`, which goes through decimal text and costs ten times as much.
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
