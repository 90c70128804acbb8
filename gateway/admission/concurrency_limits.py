"""Concurrency limits: a fixed one, and one that learns how much an Ollama runs in parallel.

Pure: no clock of its own.

Ollama does not report how many requests for a model it runs in parallel (`OLLAMA_NUM_PARALLEL`, but
only 1 for some model families, whatever that variable says). The other requests wait inside the
server, where the gateway can neither see nor order them. Only one observation helps: k answers that
stream at the same time prove that k requests run in parallel. So an `AdaptiveLimit` counts the
answers that are between their first token and their end ("streaming").

Raising. While a request is queued, one more than `limit` is admitted on trial. If more than `limit`
answers stream at once, and still do `CONFIRM_SECONDS` later, their number becomes the limit. The
second look is needed because a busy gateway may process the end of one answer and the first token
of another in the wrong order, if both arrive together. If a request ends before the limit was
raised, the trial has failed, and the next one may start after `TRY_AGAIN_SECONDS`.

Lowering. A limit may be too high, because of a setting or because the server has restarted. When
`REQUESTS_BEFORE_LOWERING` requests have filled the limit and begun to stream, and never as many
streamed at once as the limit allows, the limit is lowered to the highest number that did.
"""

CONFIRM_SECONDS = 0.05
TRY_AGAIN_SECONDS = 60.0
REQUESTS_BEFORE_LOWERING = 8


class ConcurrencyLimit:
    """Limit on requests in flight, with their current `count`.

    The count may exceed the limit after the limit was lowered.
    """

    __slots__ = ("count", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.count}/{self.limit}>"

    @property
    def is_full(self) -> bool:
        return self.count >= self.limit

    @property
    def total(self) -> int:
        """The limit over all replicas of the gateway (`shared_limits.py`)."""
        return self.limit

    @property
    def entitlement(self) -> int:
        """The part that this replica can have, once others have given back what they do not need."""
        return self.limit

    def change(self, total: int) -> None:
        """Set another limit."""
        self.limit = total


class LoadSample:
    """State of one request in an `AdaptiveLimit`."""

    __slots__ = ("filled", "is_streaming")

    def __init__(self, filled: bool) -> None:
        self.filled = filled
        """True if the request reached the limit when it was admitted."""
        self.is_streaming = False


class AdaptiveLimit(ConcurrencyLimit):
    """Concurrency limit that follows what is observed."""

    __slots__ = ("_most_streaming", "_trial", "_unproven", "is_held", "next_try", "streaming")

    def __init__(self, limit: int, is_held: bool = False) -> None:
        super().__init__(limit)
        self.streaming = 0
        self.next_try = 0.0
        """Earliest time of the next trial, on the caller's clock."""
        self.is_held = is_held
        """True while the limit is set by the operator, so that nothing is learned."""
        self._trial: LoadSample | None = None
        self._unproven = 0
        self._most_streaming = 0

    def may_try(self, now: float) -> bool:
        return self.count == self.limit and self._trial is None and now >= self.next_try and not self.is_held

    def began(self) -> LoadSample:
        """Record that a request was admitted and counted."""
        sample = LoadSample(self.count >= self.limit)
        if self.count > self.limit:
            self._trial = sample
        return sample

    def first_token(self, sample: LoadSample) -> bool:
        """Record the first token of an answer.

        Return whether to call `confirm` in `CONFIRM_SECONDS`.
        """
        sample.is_streaming = True
        self.streaming += 1
        self._most_streaming = max(self._most_streaming, self.streaming)
        if self.streaming >= self.limit:
            self._reset_evidence()
        elif sample.filled:
            self._unproven += 1
        return self.streaming > self.limit

    def confirm(self) -> bool:
        """Raise the limit if more than `limit` answers still stream. Return whether it rose."""
        if self.streaming <= self.limit or self.is_held:
            return False
        self._trial = None
        self.next_try = 0.0
        self._learn(self.streaming)
        return True

    def ended(self, sample: LoadSample, now: float) -> bool:
        """Record the end of a request that is no longer counted. Return whether the limit fell."""
        if sample.is_streaming:
            self.streaming -= 1
        if self._trial is not None:
            self._trial = None
            self.next_try = now + TRY_AGAIN_SECONDS
        if self._unproven < REQUESTS_BEFORE_LOWERING or self.limit == 1 or self.is_held:
            return False
        self.next_try = now + TRY_AGAIN_SECONDS
        self._learn(max(1, self._most_streaming))
        return True

    def _learn(self, limit: int) -> None:
        self.limit = limit
        self._reset_evidence()

    def _reset_evidence(self) -> None:
        self._unproven = self._most_streaming = 0
