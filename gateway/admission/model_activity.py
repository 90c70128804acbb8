"""Signs of life of a model on a server: when it last sent something, and how long it usually takes.

Pure: times are arguments, in seconds on one monotonic clock.
"""

from collections import deque
from math import inf

LEAST_PATIENCE = 60.0
"""Seconds of silence for which no model counts as frozen while other requests can still wait."""
SLOWNESS = 10
"""Multiple of the longest recent time to the first token after which silence is unusual."""
SAMPLES = 64


class ModelActivity:
    """Signs of life of one model on one server."""

    __slots__ = ("_first_tokens", "last_heard", "missing_at", "was_unloaded")

    def __init__(self) -> None:
        self.last_heard = -inf
        """Time of the last piece of any answer, as far as it is known."""
        self.missing_at = -inf
        """Time of the last report, made because the model was silent, in which it was not loaded."""
        self.was_unloaded = False
        """True if the model was unloaded because it had frozen, and has sent nothing since."""
        self._first_tokens: dict[str, deque[tuple[float, float]]] = {}

    def hear(self, now: float) -> None:
        """Record that a piece of an answer came."""
        self.last_heard = max(self.last_heard, now)
        self.was_unloaded = False

    def first_token(self, lane: str, seconds: float, size: int, now: float) -> None:
        """Record the first token for a request of `size` bytes, `seconds` after it was sent."""
        self.hear(now)
        samples = self._first_tokens.get(lane)
        if samples is None:
            samples = self._first_tokens[lane] = deque(maxlen=SAMPLES)
        samples.append((seconds, seconds / max(1, size)))

    def patience(self, lane: str, size: int) -> float:
        """Return the seconds in which a first token is to be expected for a request of `size` bytes.

        An engine is silent while it evaluates the prompt, so the time grows with the prompt: the
        slowest recent request counts, both by its time and by its time per byte. Without a recent
        request of that lane, nothing is known, and the result is infinite.
        """
        samples = self._first_tokens.get(lane)
        if not samples:
            return inf
        slowest = max(max(seconds, per_byte * size) for seconds, per_byte in samples)
        return max(LEAST_PATIENCE, SLOWNESS * slowest)
