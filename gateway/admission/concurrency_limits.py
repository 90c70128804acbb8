"""How many may be at it at once: a `Bound` that is set, and one that learns what an Ollama really does. Pure: no clock of its own.

Ollama does not say how many requests of a model it runs at once (`OLLAMA_NUM_PARALLEL`, and 1 for some families whatever that says); the others
wait inside, where nobody sees them or can put them in order. It shows in one thing only: k answers that come at the same time, piece by piece,
prove that k run at once. So a `AdaptiveLimit` counts the answers between their first piece and their end ("speaking").

Up: while someone waits, one more than `limit` is let in on trial. When more than `limit` speak at once, and still do `CONFIRM_SECONDS` later, the
limit is that number. (An end and a first piece that reach a busy gateway together may be seen in the wrong order; hence the second look.) When one
ends before that, the trial has failed, and the next is made after `TRY_AGAIN_SECONDS`.

Down: a limit may be too high, from a setting or from before a restart of the server. When `ENOUGH` requests have filled the limit and
begun to speak, and never did as many speak at once as the limit allows, it is lowered to the most that did.
"""

CONFIRM_SECONDS = 0.05
TRY_AGAIN_SECONDS = 60.0
ENOUGH = 8


class ConcurrencyLimit:
    """At most `limit` at once; `count` are there now. It may be over the limit after the limit was lowered."""

    __slots__ = ("count", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.count}/{self.limit}>"

    @property
    def is_full(self) -> bool:
        return self.count >= self.limit


class LoadSample:
    """What one request has to do with a `AdaptiveLimit`."""

    __slots__ = ("filled", "is_streaming")

    def __init__(self, filled: bool) -> None:
        self.filled = filled
        """The limit was reached with it."""
        self.is_streaming = False


class AdaptiveLimit(ConcurrencyLimit):
    """A limit that follows what is seen."""

    __slots__ = ("_most", "_trial", "_unproven", "is_held", "next_try", "streaming")

    def __init__(self, limit: int, is_held: bool = False) -> None:
        super().__init__(limit)
        self.streaming = 0
        self.next_try = 0.0
        """When the next trial may begin, on the clock of who asks."""
        self.is_held = is_held
        """The limit is set for now, and nothing is learned."""
        self._trial: LoadSample | None = None
        self._unproven = 0
        self._most = 0

    def may_try(self, now: float) -> bool:
        return self.count == self.limit and self._trial is None and now >= self.next_try and not self.is_held

    def began(self) -> LoadSample:
        """A request was let in and counted."""
        part = LoadSample(self.count >= self.limit)
        if self.count > self.limit:
            self._trial = part
        return part

    def first_token(self, part: LoadSample) -> bool:
        """Its first piece came. True: look again in `CONFIRM_SECONDS`, with `confirm`."""
        part.is_streaming = True
        self.streaming += 1
        self._most = max(self._most, self.streaming)
        if self.streaming >= self.limit:
            self._forget()
        elif part.filled:
            self._unproven += 1
        return self.streaming > self.limit

    def confirm(self) -> bool:
        """True: more than `limit` speak still, and the limit was raised."""
        if self.streaming <= self.limit or self.is_held:
            return False
        self.limit = self.streaming
        self._trial = None
        self.next_try = 0.0
        self._forget()
        return True

    def ended(self, part: LoadSample, now: float) -> bool:
        """A request is over, and counted off. True: the limit was lowered."""
        if part.is_streaming:
            self.streaming -= 1
        if self._trial is not None:
            self._trial = None
            self.next_try = now + TRY_AGAIN_SECONDS
        if self._unproven < ENOUGH or self.limit == 1 or self.is_held:
            return False
        self.limit = max(1, self._most)
        self.next_try = now + TRY_AGAIN_SECONDS
        self._forget()
        return True

    def _forget(self) -> None:
        self._unproven = self._most = 0
