"""Timeout for clients that send the body of their request too slowly.

Pure: the protocol owns the clock and the transport.
"""

_BYTES_PER_SECOND = 65536
_TIGHT_BYTES_PER_SECOND = 16384


class BodyTimeout:
    """Check, every `tight_seconds`, that a body arrives in time, and fast enough while memory is tight.

    It has `seconds` in all, plus a second for every 64 KiB that have arrived. While much memory is in
    use, it must also have brought 16 KiB for each second since the last check. Counts are of the bytes
    of the whole request.
    """

    __slots__ = ("_first_check_seconds", "_received", "_seconds", "_started_at", "_tight_seconds")

    def __init__(self, seconds: float, tight_seconds: float) -> None:
        self._seconds = seconds
        self._tight_seconds = tight_seconds
        self._first_check_seconds = min(seconds, tight_seconds)
        self._started_at = 0.0
        self._received = 0  # at the last check

    def begin(self, received: int, now: float) -> float:
        """Begin with a body; return the seconds until its first check.

        `received` bytes of its request have arrived.
        """
        self._started_at = now
        self._received = received
        return self._first_check_seconds

    def extend(self, seconds: float) -> None:
        """Do not count `seconds` in which the server itself did not read."""
        self._started_at += seconds

    def next_check(self, received: int, is_tight: bool, now: float) -> float | None:
        """Return the time of the next check, or None if the body has not arrived in time.

        `is_tight` is true while much memory is in use. Both event loops read what has arrived before
        they run a timer, so a busy gateway is not taken for a slow client.
        """
        end = self._started_at + self._seconds + received / _BYTES_PER_SECOND
        grown, self._received = received - self._received, received
        if now >= end or (is_tight and grown < self._tight_seconds * _TIGHT_BYTES_PER_SECOND):
            return None
        return min(end, now + self._tight_seconds)
